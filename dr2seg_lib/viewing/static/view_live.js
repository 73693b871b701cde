// ---- charts -------------------------------------------------------------------------------------------------------------------------
// What plotly draws: its widgets come from the kernel once they are asked for, and go to the element with data-chart="name".
function settle(box, tries = 50) { // plotly measures its place once it has drawn: before, it would draw nothing
  if (box.querySelector(".main-svg")) window.dispatchEvent(new Event("resize"));
  else if (tries) setTimeout(settle, 100, box, tries - 1);
}
function plotted(model, root) { // a chart that is replaced is taken down first
  const manager = model.widget_manager, views = {};
  if (!manager) return; // a page without a kernel keeps the stills
  let turn = Promise.resolve();
  async function place() {
    const figures = model.get("figures") || {};
    for (const box of root.querySelectorAll("[data-chart]")) {
      const name = box.dataset.chart, reference = figures[name], [known, view] = views[name] || [];
      if (known === reference) continue;
      if (view) view.remove();
      views[name] = undefined;
      if (!reference) continue;
      let next;
      try { next = await manager.create_view(await manager.get_model(reference.replace("IPY_MODEL_", ""))); }
      catch { continue; } // it was replaced meanwhile: the other comes with the next change
      views[name] = [reference, next]; fill(box, next.el);
      settle(box);
    }
  }
  const queue = () => { turn = turn.then(place).catch(() => {}); };
  model.on("change:figures", queue); queue();
  model.send({ask: "figures"});
}
function fitColumns(model, root, count = w => Math.floor(w / 230), most = 4) { // so many panels in a row as the view is wide
  const place = () => { const w = root.clientWidth, n = clamp(count(w), 1, most); if (w && n !== model.get("cols")) { model.set("cols", n); model.save_changes(); } };
  const observer = new ResizeObserver(place);
  observer.observe(root); place();
  return () => observer.disconnect();
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
  said(); drawn(); plotted(model, root);
  return fitColumns(model, root);
}

// ---- compare ----------------------------------------------------------------------------------------------------------------------------
function compare(model, root) { root.innerHTML = model.get("html"); plotted(model, root); return fitColumns(model, root); }
