// ---- ask ----------------------------------------------------------------------------------------------------------------------------------
function ask(model, root) {
  const picture = new Picture({draw: touch => model.send({ask: "segment", ...touch})}), enter = f => e => { if (e.key === "Enter" && !e.shiftKey) { e.preventDefault(); f(); } e.stopPropagation(); };
  const send = what => () => { const m = what === "first" ? {query: query.value} : {description: description.value}; busy("thinking"); model.send({ask: what, ...m}); };
  const query = h("textarea", {rows: 1, "aria-label": "question", spellcheck: "false", placeholder: "what would you ask about this picture?", onkeydown: enter(send("first"))}), description = h("textarea", {rows: 2, "aria-label": "description", spellcheck: "false", placeholder: "describe the target, then ask again", onkeydown: enter(send("second"))});
  const first = h("div"), second = h("div"), status = h("p", {class: "d2-status"}), go = h("button", {class: "d2-button d2-main", onclick: send("first")}, "Ask"), again = h("button", {class: "d2-button", onclick: send("second")}, "Ask again"), wrong = h("p", {class: "d2-notice", hidden: true});
  const use = which => h("button", {class: "d2-link", hidden: true, "data-pass": which, onclick: () => model.send({ask: "again", pass: which})}, "show its mask");
  const shows = {first: use("first"), second: use("second")};
  const p = model.get("picture"), known = p.truth || p.given.length; // whether there is a ground truth
  const layers = picture.controls({...(known ? {truth: "ground truth"} : {}), prediction: "mask", contours: "contours", fill: "fill", ...(p.truth ? {difference: "difference"} : {}), prompts: "box and point"});
  root.append(h("div", {class: "d2-asked"}, query, go), wrong, h("div", {class: "d2-body"}, h("div", {class: "d2-left"}, picture.frame, layers, status, h("p", {class: "d2-keys"}, "Drag a box or click a point to segment; ", h("kbd", {}, "+"), h("kbd", {}, "−"), " zoom")),
    h("div", {class: "d2-right d2-steps"}, h("section", {}, h("h6", {}, "first pass"), first), h("section", {}, h("h6", {}, "description"), h("div", {class: "d2-asked"}, description, again)), h("section", {}, h("h6", {}, "second pass, asked about the description alone"), second),
      h("p", {class: "d2-entropy"}, "entropy of a token: 0", h("i", {class: "d2-scale"}), "2 nats or more"))));
  const busy = text => { root.classList.toggle("d2-busy", !!text); go.disabled = again.disabled = !!text; };
  const told = (box, which) => () => {
    const p = model.get(which);
    fill(box, p.html ? [h("div", {class: "d2-said", html: p.html}), h("p", {class: "d2-count d2-after"}, `${p.tokens} tokens, ${num(p.seconds, 2)} s`, shows[which])] : h("p", {class: "d2-said d2-wait"}, model.get("busy") ? model.get("busy") + "…" : "–"));
    shows[which].hidden = !p.html;
  };
  const drawn = () => {
    const d = model.get("drawn");
    picture.prompts = d.prompts || []; picture.mask("prediction", d.runs || null);
    fill(status, d.by ? [h("b", {}, `Mask of ${d.by === "your box" || d.by === "your point" ? d.by : "the " + d.by}`), d.iou === null ? (known ? "IoU – · " : "") : `IoU ${fixed(d.iou)} · `, `${num(d.seconds, 2)} s`] : "");
  };
  const tell = {first: told(first, "first"), second: told(second, "second")};
  model.on("change:first", tell.first); model.on("change:second", tell.second); model.on("change:drawn", drawn);
  model.on("msg:custom", m => { if (m.done === undefined) return; busy(""); wrong.hidden = !m.error; wrong.textContent = m.error; });
  model.on("change:busy", () => { if (model.get("busy")) busy(model.get("busy")); tell.first(); tell.second(); });
  model.on("change:query", () => { query.value = model.get("query"); }); model.on("change:description", () => { description.value = model.get("description"); });
  root.addEventListener("keydown", e => { if (!e.target.matches("textarea,input") && picture.key(e.key)) e.preventDefault(); });
  picture.show(p.image, p.size); picture.given = p.given; picture.mask("truth", p.truth);
  if (picture.toggles.truth) picture.toggle("truth"); // one asks before one knows
  query.value = model.get("query"); description.value = model.get("description");
  tell.first(); tell.second(); drawn();
  return () => picture.observer.disconnect();
}
