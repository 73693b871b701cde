// ---- browse: all answers side by side ---------------------------------------------------------------------------------------------
// The kernel filters, orders and counts; here stand the histograms, and the thumbnails that are in sight.
const GAP = 12, CAPTION = 40, KEPT = 3000; // pixels; thumbnails that are kept
const svgBars = (counts, top, cls) => counts.map((n, i) => n ? h("rect", {class: cls, x: i + .06, width: .88, y: 100 - Math.max(100 * n / top, 2), height: Math.max(100 * n / top, 2)}) : null);
const short = v => String(+Number(v).toPrecision(4)).replace("-", "−");

function numberCounts(counts, say) { // bars; a dragged range filters, a click takes it back or asks for one bar
  const {field, edges, every, fit, asked} = counts, n = every.length, top = Math.max(...every, 1);
  const brush = h("rect", {class: "d2-brush", y: 0, height: 100}), low = asked[">="], high = asked["<"];
  const svg = h("svg", {viewBox: `0 0 ${n} 100`, preserveAspectRatio: "none", role: "img", "aria-label": `${words(field)}: ${fit.reduce((a, b) => a + b, 0)} fit; drag a range to filter`}, svgBars(every, top, "d2-every"), svgBars(fit, top, "d2-fit"), brush);
  const place = v => clamp((v - edges[0]) / (edges[n] - edges[0]) * n, 0, n);
  const show = (a, b) => { brush.setAttribute("x", a); brush.setAttribute("width", Math.max(b - a, 0)); };
  const at = e => { const box = svg.getBoundingClientRect(); return clamp(Math.floor((e.clientX - box.left) / box.width * n), 0, n - 1); };
  const range = low !== undefined || high !== undefined, rest = () => range ? show(low === undefined ? 0 : place(+low), high === undefined ? n : place(+high)) : show(0, 0);
  let from = null, start = 0;
  svg.addEventListener("pointerdown", e => { svg.setPointerCapture(e.pointerId); from = at(e); start = e.clientX; show(from, from + 1); e.preventDefault(); });
  svg.addEventListener("pointermove", e => { if (from !== null) show(Math.min(from, at(e)), Math.max(from, at(e)) + 1); });
  svg.addEventListener("pointercancel", () => { from = null; rest(); });
  svg.addEventListener("pointerup", e => {
    if (from === null) return;
    const to = at(e), a = Math.min(from, to), b = Math.max(from, to) + 1, click = Math.abs(e.clientX - start) < 4;
    from = null;
    if (click && range) say({ask: "clear", field}); else say({ask: "brush", field, low: edges[a], high: edges[b]});
  });
  rest();
  return [svg, h("p", {class: "d2-ends"}, h("span", {}, short(edges[0])), h("span", {}, short(edges[n])))];
}

function textCounts(counts, say) { // a line a value
  const {field, names, every, fit, more, asked} = counts, top = Math.max(...every, 1), chosen = (asked["="] || "").toLowerCase();
  const line = (name, i) => { const on = chosen === name.toLowerCase();
    return h("button", {class: "d2-kind", "aria-pressed": String(on), title: on ? "show all again" : `only ${words(field)} ${name}`, onclick: () => say(on ? {ask: "clear", field} : {ask: "value", field, value: name})},
      h("span", {}, name || "(empty)"), h("i", {}, h("i", {class: "d2-every", style: `width:${100 * every[i] / top}%`}), h("i", {class: "d2-fit", style: `width:${100 * fit[i] / top}%`})), h("b", {}, fit[i])); };
  return [...names.map(line), more > 0 ? h("p", {class: "d2-ends"}, `and ${more} other values`) : null];
}

function spread(model, say, quick) { // the histograms, and which fields have one
  const list = h("div", {class: "d2-hists"}), add = h("select", {"aria-label": "add a histogram", onchange: () => { keep([...model.get("fields"), add.value]); }});
  const measure = h("button", {class: "d2-button", hidden: true, onclick: () => { measure.disabled = true; say({ask: "measure"}); }}, "Measure IoU of all");
  const keep = fields => { model.set("fields", fields); model.save_changes(); };
  const one = counts => h("figure", {class: "d2-hist", "data-field": counts.field}, h("figcaption", {}, h("b", {}, words(counts.field)), Object.keys(counts.asked).length ? h("button", {class: "d2-link", onclick: () => say({ask: "clear", field: counts.field})}, "clear") : null,
    h("button", {class: "d2-off", title: "take this histogram away", "aria-label": `take the histogram of ${words(counts.field)} away`, onclick: () => keep(model.get("fields").filter(f => f !== counts.field))}, "×")), counts.edges ? numberCounts(counts, say) : textCounts(counts, say));
  function draw() {
    const known = model.get("known"), shown = model.get("fields");
    fill(list, model.get("histograms").map(one));
    fill(add, h("option", {value: ""}, "add a histogram…"), known.filter(f => !shown.includes(f)).map(f => h("option", {value: f}, words(f))));
    measure.hidden = !quick || model.get("source") !== "rollouts" || known.includes("iou");
  }
  model.on("change:histograms", draw); model.on("change:known", draw);
  draw();
  return h("aside", {class: "d2-spread"}, list, add, measure);
}

function sheet(model, say, {pick, range}) { // thumbnails, as many as are in sight
  const inner = h("div", {class: "d2-inner"}), box = h("div", {class: "d2-sheet", tabindex: 0, role: "listbox", "aria-multiselectable": "true", "aria-label": "answers"}, inner), none = h("p", {class: "d2-meta d2-nothing", hidden: true}, "No answer fits the filter.");
  const pictures = new Map(), drawn = new Map();
  let side = 128, cells = new Map(), turn = -1, timer = null, cursor = -1, asked = "";
  const total = () => model.get("found").fits || 0, key = row => `${model.get("source")}/${row}`;
  const shape = () => { const width = box.clientWidth - 14, cols = Math.max(1, Math.floor((width + GAP) / (side + GAP))); return {cols, wide: (width + GAP) / cols, high: side + CAPTION + GAP}; };
  const shown = () => { const s = model.get("sort"); return s !== "order" ? s : model.get("fields")[0] || ""; };

  function picture(e, row) { // its picture, its note, or that it is on its way
    const known = pictures.get(key(row));
    fill(e, !known ? "" : known.url ? h("img", {src: known.url, alt: "", draggable: "false"}) : h("span", {class: "d2-nothumb"}, known.note));
  }
  function facts(e, place) {
    const cell = cells.get(place);
    if (!cell) return;
    const value = typeof cell.value === "number" ? num(cell.value) : Array.isArray(cell.value) ? cell.value.join(" ") : cell.value ?? "–", frame = h("span", {class: "d2-thumb"});
    e.dataset.row = cell.row; e.title = `${cell.query}\n${cell.title}`;
    e.setAttribute("aria-label", `${cell.title}, ${words(shown())} ${value}`);
    fill(e, frame, h("span", {class: "d2-cap"}, h("b", {}, value), h("span", {}, words(shown())), VERDICTS[cell.verdict] ? h("em", {class: `d2-v-${cell.verdict}`, title: cell.verdict}, VERDICTS[cell.verdict]) : null, cell.tags.length ? h("i", {}, cell.tags.join(" ")) : null), h("span", {class: "d2-cap d2-who"}, cell.place));
    picture(frame, cell.row); mark(e);
  }
  const mark = e => { const on = model.get("selected").includes(+e.dataset.row) && e.dataset.row !== undefined; e.setAttribute("aria-selected", String(on)); e.classList.toggle("d2-cursor", +e.dataset.place === cursor); };
  function ask() { // what is in sight and not known yet
    const {first, last} = sight(), rows = [];
    let missing = false;
    for (let i = first; i < last; i++) { const cell = cells.get(i); if (!cell) missing = true; else if (!pictures.has(key(cell.row))) rows.push(cell.row); }
    if (missing) say({ask: "cells", first, last});
    const wanted = rows.join();
    if (rows.length && wanted !== asked) { asked = wanted; say({ask: "thumbs", rows}); }
  }
  const sight = () => { const {cols, high} = shape(), top = Math.floor(box.scrollTop / high); return {first: top * cols, last: Math.min((top + Math.ceil(box.clientHeight / high) + 1) * cols, total())}; };
  function layout() {
    const {cols, wide, high} = shape(), {first, last} = sight();
    inner.style.height = `${Math.ceil(total() / cols) * high}px`; none.hidden = total() > 0;
    for (const [place, e] of drawn) if (place < first || place >= last) { e.remove(); drawn.delete(place); }
    for (let place = first; place < last; place++) {
      let e = drawn.get(place);
      if (!e) { e = h("div", {class: "d2-cell", role: "option", "data-place": place}); drawn.set(place, e); inner.append(e); facts(e, place); }
      e.style.cssText = `left:${(place % cols) * wide}px;top:${Math.floor(place / cols) * high}px;width:${side}px;--side:${side}px`;
    }
    clearTimeout(timer); timer = setTimeout(ask, 60);
  }
  function renew() { // another order
    const now = model.get("found").turn;
    if (now === turn) return;
    turn = now; cells = new Map(); asked = ""; cursor = -1;
    for (const e of drawn.values()) e.remove();
    drawn.clear(); box.scrollTop = 0; layout();
  }
  model.on("msg:custom", (m, buffers) => {
    if (m.cells !== undefined && m.turn === turn) { m.cells.forEach((cell, i) => cells.set(m.first + i, cell)); for (const [place, e] of drawn) if (e.dataset.row === undefined) facts(e, place); ask(); }
    if (m.thumb !== undefined) {
      const b = buffers && buffers[0], of = `${m.source}/${m.thumb}`;
      pictures.set(of, b ? {url: URL.createObjectURL(new Blob([b], {type: "image/webp"}))} : {note: m.note});
      if (pictures.size > KEPT) { const [old, gone] = pictures.entries().next().value; if (gone.url) URL.revokeObjectURL(gone.url); pictures.delete(old); }
      for (const e of drawn.values()) if (e.dataset.row !== undefined && key(e.dataset.row) === of) picture(e.firstChild, m.thumb);
    }
  });
  const at = e => { const cell = e.target.closest(".d2-cell"); return cell && cell.dataset.row !== undefined ? +cell.dataset.place : -1; };
  function go(place, extend) { // the cursor
    const from = cursor < 0 ? place : cursor;
    if (extend && place >= 0) range(from, place);
    cursor = place;
    for (const e of drawn.values()) mark(e);
    const cell = cells.get(place);
    if (cell) pick.over(cell);
  }
  box.addEventListener("click", e => { const place = at(e); if (place < 0) return; if (!e.shiftKey) pick(cells.get(place).row); go(place, e.shiftKey); });
  box.addEventListener("mousedown", e => { if (e.shiftKey) e.preventDefault(); }); // no text is marked
  box.addEventListener("keydown", e => {
    const {cols, high} = shape(), by = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: cols, ArrowUp: -cols}[e.key];
    if (by && total()) { const place = clamp(cursor + (cursor < 0 ? 1 : by), 0, total() - 1); const top = Math.floor(place / cols) * high; if (top < box.scrollTop) box.scrollTop = top; else if (top + high > box.scrollTop + box.clientHeight) box.scrollTop = top + high - box.clientHeight; layout(); go(place, e.shiftKey); }
    else if ((e.key === " " || e.key === "Enter") && cells.get(cursor)) pick(cells.get(cursor).row);
    else if (e.key === "Escape") pick.none();
    else if (e.key === "a" && (e.ctrlKey || e.metaKey)) range(0, total() - 1);
    else return;
    e.preventDefault(); e.stopPropagation();
  });
  box.addEventListener("scroll", layout);
  model.on("change:found", renew);
  model.on("change:selected", () => { for (const e of drawn.values()) mark(e); });
  const observer = new ResizeObserver(layout); observer.observe(box);
  setTimeout(renew);
  return {box: h("div", {class: "d2-sheets"}, box, none), size(v) { side = v; layout(); }, close() { observer.disconnect(); for (const p of pictures.values()) if (p.url) URL.revokeObjectURL(p.url); }};
}

function savedViews(model, say) { // a menu of names, and a new one
  const menu = h("select", {"aria-label": "saved views", onchange: () => { if (menu.value) say({ask: "load", name: menu.value}); off.hidden = !menu.value; }});
  const off = h("button", {class: "d2-off", hidden: true, title: "forget this saved view", "aria-label": "forget this saved view", onclick: () => say({ask: "remove", name: menu.value})}, "×");
  const name = h("input", {type: "text", class: "d2-viewname", "aria-label": "name of the view", placeholder: "name of this view", maxlength: 60, onkeydown: e => { if (e.key === "Enter") keep(); e.stopPropagation(); }});
  const keep = () => { if (name.value.trim()) say({ask: "save", name: name.value.trim()}); name.value = ""; };
  function draw() { const now = menu.value, names = Object.keys(model.get("views")); fill(menu, h("option", {value: ""}, names.length ? "saved views…" : "no saved views"), names.map(n => h("option", {value: n}, n))); menu.value = names.includes(now) ? now : ""; menu.disabled = !names.length; off.hidden = !menu.value; }
  model.on("change:views", draw); draw();
  return h("div", {class: "d2-saved"}, menu, off, name, h("button", {class: "d2-button", onclick: keep}, "Save view"));
}

function chosen(model, say) { // what can be done with what is chosen
  const count = h("b", {}), tag = h("input", {type: "text", class: "d2-tagall", "aria-label": "tag for the chosen answers", placeholder: "tag", maxlength: 60, spellcheck: "false", onkeydown: e => { if (e.key === "Enter") give(); e.stopPropagation(); }});
  const give = () => { const names = tag.value.split(/[\s,]+/).filter(Boolean); tag.value = ""; if (names.length) say({ask: "tag", words: names}); };
  const set = rows => { model.set("selected", rows); model.save_changes(); };
  const all = h("button", {class: "d2-button", onclick: () => say({ask: "select", first: 0, last: (model.get("found").fits || 1) - 1})}, "Choose all that fit"), off = h("button", {class: "d2-button", onclick: () => set([])}, "Let go");
  const give_ = h("button", {class: "d2-button", onclick: give}, "Add tag"), out = [".csv", ".jsonl"].map(suffix => h("button", {class: "d2-button", "data-suffix": suffix, onclick: () => say({ask: "export", suffix})}, suffix === ".csv" ? "Export CSV" : "Export JSONL"));
  function draw() { const n = model.get("selected").length, fits = model.get("found").fits || 0; count.textContent = n ? `${n} chosen` : "none chosen"; off.disabled = give_.disabled = tag.disabled = !n; all.disabled = !fits; for (const b of out) { b.disabled = !n && !fits; b.title = n ? "the chosen answers, into the run's folder" : "all answers that fit, into the run's folder"; } }
  model.on("change:selected", draw); model.on("change:found", draw); draw();
  return h("div", {class: "d2-chosen"}, count, all, off, h("span", {class: "d2-give"}, tag, give_), out);
}

function browse(model, root) {
  const about = model.get("about"), told = h("p", {class: "d2-told", role: "status", hidden: true}), wrong = h("p", {class: "d2-wrong", hidden: true}), count = h("span", {class: "d2-count"});
  const tell = (text, failed) => { told.hidden = !text; told.textContent = text; told.classList.toggle("d2-failed", !!failed); };
  const say = message => { try { model.send(message); } catch { tell("The kernel is gone; run the cell again.", true); } };
  const put = (name, value) => { model.set(name, value); model.save_changes(); };
  const sources = about.sources, tabs = sources.length > 1 ? h("div", {class: "d2-tabs"}, sources.map(s => h("button", {"data-source": s, onclick: () => put("source", s)}, s))) : null;
  root.append(h("div", {class: "d2-top"}, h("b", {class: "d2-name"}, about.name), h("span", {class: "d2-lead"}, about.lead), tabs), about.missing ? h("p", {class: "d2-notice"}, about.missing) : "");
  if (!sources.length) { root.append(h("p", {class: "d2-meta"}, "Nothing has been recorded in this folder.")); return; }
  let timer = null;
  const search = h("input", {type: "search", class: "d2-filter", "aria-label": "filter", spellcheck: "false", placeholder: "filter: iou<0.5 tokens>=40 kind=shape, or words of the question", oninput: () => { clearTimeout(timer); timer = setTimeout(() => put("filter", search.value), 250); }, onkeydown: e => { if (e.key === "Enter") { clearTimeout(timer); put("filter", search.value); } e.stopPropagation(); }});
  const sort = h("select", {"aria-label": "sort by", onchange: () => put("sort", sort.value)}), flip = h("button", {class: "d2-flip", onclick: () => put("down", !model.get("down"))});
  const link = h("code", {}), copy = h("button", {class: "d2-button", onclick: () => { const done = navigator.clipboard ? navigator.clipboard.writeText(link.textContent) : Promise.reject(); done.then(() => { copy.textContent = "Copied"; }, () => { getSelection().selectAllChildren(link); copy.textContent = "Marked"; }); }}, "Copy"), query = h("p", {class: "d2-query"}), detail = h("div", {class: "d2-detail", hidden: true}, query, h("div", {class: "d2-open"}, link, copy));
  const pick = row => say({ask: "pick", row});
  pick.over = cell => { query.textContent = `${cell.query} · ${cell.title}`; link.textContent = ""; copy.textContent = "Copy"; detail.hidden = false; say({ask: "link", row: cell.row}); };
  pick.none = () => put("selected", []);
  const answers = sheet(model, say, {pick, range: (first, last) => say({ask: "select", first, last})});
  const size = h("input", {type: "range", min: 72, max: 256, value: 128, "aria-label": "size of the thumbnails", oninput: () => { size.style.setProperty("--at", `${(size.value - 72) / 1.84}%`); answers.size(+size.value); }});
  size.style.setProperty("--at", `${(128 - 72) / 1.84}%`);
  root.append(h("div", {class: "d2-bar d2-find"}, search, h("label", {class: "d2-sort"}, h("span", {}, "sort by"), sort, flip), count), wrong,
    h("div", {class: "d2-shelf"}, savedViews(model, say), h("label", {class: "d2-size"}, h("span", {}, "size"), size)),
    h("div", {class: "d2-many"}, spread(model, say, about.quick), h("div", {class: "d2-side"}, chosen(model, say), told, answers.box, detail)));
  function draw() {
    const {fits, every} = model.get("found"), known = model.get("known"), down = model.get("down"), order = down ? "descending: the largest first" : "ascending: the smallest first", wish = model.get("wrong");
    if (document.activeElement !== search) search.value = model.get("filter");
    fill(sort, h("option", {value: "order"}, "the run's order"), known.map(f => h("option", {value: f}, words(f)))); sort.value = model.get("sort");
    fill(flip, down ? "↓" : "↑"); flip.title = order; flip.setAttribute("aria-label", `${order}; turn the order`);
    count.textContent = `${fits} of ${every} fit`; wrong.hidden = !wish; wrong.textContent = wish;
    for (const t of tabs ? tabs.children : []) t.setAttribute("aria-pressed", t.dataset.source === model.get("source"));
  }
  for (const name of ["found", "known", "filter", "sort", "down", "wrong", "source"]) model.on(`change:${name}`, draw);
  model.on("msg:custom", m => { if (m.told !== undefined) tell(m.told, m.failed); if (m.link !== undefined) link.textContent = m.link; });
  draw();
  return () => answers.close();
}
