// ---- charts -------------------------------------------------------------------------------------------------------------------------
// What plotly draws: its widgets come from the kernel once they are asked for, and go to the element with data-chart="name".
function charts(model, root) {
  const manager = model.widget_manager, shown = {};
  if (!manager) return; // a page without a kernel keeps the stills
  async function place() {
    for (const [name, reference] of Object.entries(model.get("figures") || {})) {
      const box = root.querySelector(`[data-chart="${name}"]`);
      if (!box || shown[name] === reference) continue;
      shown[name] = reference;
      const view = await manager.create_view(await manager.get_model(reference.replace("IPY_MODEL_", "")));
      fill(box, view.el);
    }
  }
  model.on("change:figures", place); place();
  model.send({ask: "figures"});
}

// ---- live -----------------------------------------------------------------------------------------------------------------------------
function live(model, root) {
  const pill = h("span", {class: "d2-pill"}), name = h("b", {class: "d2-name"}), lead = h("span", {class: "d2-lead"}), doing = h("span", {class: "d2-doing"}), bar = h("i"), error = h("p", {class: "d2-notice", hidden: true}), wait = h("p", {class: "d2-meta"}, "The curves come with the first step."), plots = h("div", {}, h("div", {"data-chart": "curves"}), h("div", {"data-chart": "seconds"}));
  const stop = h("button", {class: "d2-button", onclick: () => { stop.disabled = true; stop.textContent = "stopping…"; model.send({ask: "stop"}); }}, "Stop after this step");
  root.append(h("div", {class: "d2-top"}, name, lead, pill, stop), error, h("div", {class: "d2-progress"}, h("div", {}, bar), doing), wait, plots);
  function said() {
    const s = model.get("state"), about = model.get("about"), here = s.n ? clamp(s.i / s.n, 0, 1) : 0;
    name.textContent = about.name; lead.textContent = about.lead;
    pill.textContent = s.status; pill.className = `d2-pill d2-is-${s.status}`;
    stop.hidden = s.status !== "running"; stop.disabled = s.stopping; stop.textContent = s.stopping ? "stopping after this step" : "Stop after this step";
    bar.style.width = `${100 * here}%`;
    doing.textContent = s.status === "waiting" ? "no run in this folder yet" : s.status === "unreadable" ? "" : s.stage ? `${s.stage} ${s.i} of ${s.n}${s.note ? " · " + s.note : ""}` : "starting";
    error.hidden = !s.error; error.textContent = s.error || "";
  }
  const drawn = () => { wait.hidden = Object.keys(model.get("figures") || {}).length > 0; };
  model.on("change:state", said); model.on("change:about", said); model.on("change:figures", drawn);
  said(); drawn(); charts(model, root);
}

// ---- compare ----------------------------------------------------------------------------------------------------------------------------
function compare(model, root) { root.innerHTML = model.get("html"); charts(model, root); }
