// ---- the door -----------------------------------------------------------------------------------------------------------------------
const VIEWS = {inspect, live, compare, ask, browse, runs, curves, question, embedding};

export default {
  render({model, el}) {
    const kind = model.get("kind"), root = h("div", {class: `dr2seg d2-${kind}`, tabindex: 0, role: "region", "aria-label": TITLES[kind], "data-lm-suppress-shortcuts": "true"});
    el.append(root);
    const over = VIEWS[kind](model, root);
    (root.querySelector(".d2-top, .d2-asked") || root).append(help(root, kind));
    return over;
  }
};
