// ---- questions by likeness ------------------------------------------------------------------------------------------------------------
function embedding(model, root) {
  const about = model.get("about"), plot = h("div", {class: "d2-curveplot", "data-chart": "embedding"}), below = h("div", {class: "d2-held"}), note = h("p", {class: "d2-count", role: "status"}), legend = h("p", {class: "d2-keyline d2-dots"});
  const selects = {};
  const choice = (label, trait, names) => h("label", {class: "d2-sort"}, h("span", {}, label), selects[trait] = h("select", {"aria-label": label, onchange: e => { model.set(trait, e.target.value); model.save_changes(); }}, names.map(n => h("option", {value: n}, words(n)))));
  root.append(h("div", {class: "d2-top"}, h("b", {class: "d2-name"}, about.name), h("span", {class: "d2-lead"}, about.lead)), about.missing ? h("p", {class: "d2-notice"}, about.missing) : "");
  if (!about.features.length) { root.append(h("p", {class: "d2-meta"}, "Nothing has been recorded in this folder.")); return; }
  root.append(h("div", {class: "d2-bar d2-find"}, choice("likeness of", "feature", about.features), about.fields.length ? choice("colour", "colour", about.fields) : "", note), legend, plot, below);
  const draw = () => { for (const [trait, select] of Object.entries(selects)) select.value = model.get(trait); note.textContent = model.get("note") || "draw around dots to see their answers; a double click lets them go"; };
  const named = () => fill(legend, model.get("legend").map(d => h("span", {}, h("i", {style: `background:${d.colour}`}), words(d.name))));
  model.on("change:legend", named); named();
  for (const t of ["feature", "colour", "note"]) model.on(`change:${t}`, draw);
  draw(); plotted(model, root); holding(model, below);
}
