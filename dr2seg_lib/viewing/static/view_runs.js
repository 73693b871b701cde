
// ==== runs in a table, curves over time, one question over time ============================================================

// ---- another view below ---------------------------------------------------------------------------------------------------
function holding(model, box) { // what the kernel holds for this view: its widget, or nothing
  const manager = model.widget_manager;
  async function place() {
    const reference = model.get("held");
    if (!manager || !reference) { fill(box); return; }
    const view = await manager.create_view(await manager.get_model(reference.replace("IPY_MODEL_", "")));
    if (model.get("held") === reference) fill(box, h("button", {class: "d2-close", title: "close what is open below", "aria-label": "close", onclick: () => model.send({ask: "close"})}, "×"), view.el);
  }
  model.on("change:held", () => place().then(() => model.get("held") && box.scrollIntoView({block: "nearest", behavior: "smooth"})));
  place();
}

// ---- small things -----------------------------------------------------------------------------------------------------------
function spark(values, title) { // a small curve
  if (!values || !values.length) return h("span", {class: "d2-none"}, "–");
  const W = 84, H = 20, low = Math.min(...values), high = Math.max(...values), x = i => values.length > 1 ? 2 + (W - 6) * i / (values.length - 1) : W - 4;
  const y = v => high > low ? H - 3 - (H - 6) * (v - low) / (high - low) : H / 2, last = values.length - 1;
  return h("svg", {class: "d2-spark", width: W, height: H, viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title} from ${num(values[0])} to ${num(values[last])}`},
    h("path", {d: "M" + values.map((v, i) => `${x(i).toFixed(1)},${y(v).toFixed(1)}`).join("L")}), h("circle", {cx: x(last), cy: y(values[last]), r: 2}));
}
function span(seconds) { // a time in two units at most
  if (seconds === null) return "–";
  const d = Math.floor(seconds / 86400), hh = Math.floor(seconds / 3600), m = Math.floor(seconds / 60);
  return d ? `${d} d ${hh % 24} h` : hh ? `${hh} h ${String(m % 60).padStart(2, "0")} min` : m ? `${m} min` : `${Math.round(seconds)} s`;
}
const day = text => text ? text.slice(0, 16).replace("T", " ") : "–";

// ---- which runs: the words of `dr2seg runs --where` ----------------------------------------------------------------------------
const FIELDS = ["name", "tags", "status", "method", "data", "seed", "step", "steps", "tokens", "gIoU", "accuracy", "seconds", "started", "error"];
const field = (row, name) => FIELDS.includes(name) ? row[name] : row.parameters[name];
function fitting(rows, text) { // the rows that fit; throws a sentence
  const known = new Set(FIELDS.concat(rows.flatMap(r => Object.keys(r.parameters))));
  const tests = filterWords(text).map(word => {
    const condition = conditionOf(word);
    if (!condition) { const w = unquoted(word).toLowerCase(); return r => `${r.name} ${r.tags.join(" ")}`.toLowerCase().includes(w); }
    const [name, op, value] = condition;
    if (name === "tag" || name === "tags") return r => r.tags.includes(value) === (op !== "!=");
    if (!known.has(name)) throw new Error(`runs have no field "${name}"; known are ${[...known].slice(0, 24).join(", ")}`);
    return r => {
      const a = field(r, name);
      if (a === null || a === undefined) return false;
      if (typeof a !== "number") return OPS[op](String(a).toLowerCase(), value.toLowerCase());
      if (isNaN(Number(value))) throw new Error(`${name} is a number; write ${name}${op}1, not ${value}`);
      return OPS[op](a, Number(value));
    };
  });
  return rows.filter(r => tests.every(t => t(r)));
}
function differing(rows, names) { // the parameters that are not alike in all of these that have them
  return names.filter(n => new Set(rows.filter(r => n in r.parameters).map(r => r.parameters[n])).size > 1);
}

// ---- runs -------------------------------------------------------------------------------------------------------------------------
function runs(model, root) {
  const about = model.get("about"), chosen = new Set(model.get("chosen"));
  let by = "started", down = true, curve = about.curves[0], shown = [], anchor = null;
  const search = h("input", {type: "search", class: "d2-filter", "aria-label": "filter", spellcheck: "false", placeholder: "filter: method=dr2seg gIoU>0.7 tag=good", oninput: draw});
  const curves = h("select", {"aria-label": "what the small curves show", onchange: e => { curve = e.target.value; draw(); }}, about.curves.map(c => h("option", {value: c}, c)));
  const count = h("span", {class: "d2-count"}), wrong = h("p", {class: "d2-wrong", hidden: true}), note = h("p", {class: "d2-notice", hidden: true}), said = h("p", {class: "d2-meta d2-done", hidden: true});
  const all = h("input", {type: "checkbox", "aria-label": "choose all runs shown", onchange: () => { for (const r of shown) all.checked ? chosen.add(r.id) : chosen.delete(r.id); pick(); }});
  const head = h("tr"), body = h("tbody"), table = h("table", {class: "d2-runtable"}, h("thead", {}, head), body), scroll = h("div", {class: "d2-runscroll", tabindex: 0, role: "region", "aria-label": "runs"}, table);
  const bar = h("div", {class: "d2-acts"}), form = h("div", {class: "d2-form", hidden: true}), below = h("div", {class: "d2-held"});
  root.append(h("div", {class: "d2-top"}, h("b", {class: "d2-name"}, about.root), h("span", {class: "d2-lead"}, about.lead), h("button", {class: "d2-button", title: "read the folder again", onclick: () => ask("refresh")}, "Refresh")),
    h("div", {class: "d2-bar d2-find"}, search, h("label", {class: "d2-sort"}, h("span", {}, "curve"), curves), count), wrong, note, said, scroll, bar, form, below);

  const status = r => h("span", {class: `d2-pill d2-is-${r.status}`, title: r.error || undefined}, r.status);
  const places = (v, n) => v === null ? "–" : v.toFixed(n), right = {gIoU: r => places(r.gIoU, 3), tokens: r => places(r.tokens, 1), accuracy: r => places(r.accuracy, 3), seed: r => r.seed ?? "–"};
  const columns = {
    run: {key: "name", cell: r => [h("span", {class: "d2-run", title: r.name}, r.name), r.tags.map(t => h("span", {class: "d2-tag"}, t)), r.error ? h("span", {class: "d2-why", title: r.error}, r.error) : null]},
    status: {key: "status", cell: status}, step: {key: "step", cell: r => r.place || "–"},
    gIoU: {key: "gIoU", cell: right.gIoU, num: true}, tokens: {key: "tokens", cell: right.tokens, num: true}, accuracy: {key: "accuracy", cell: right.accuracy, num: true},
    curve: {key: null, title: () => curve, cell: r => spark(r.curves[curve], curve)},
    duration: {key: "seconds", cell: r => span(r.seconds), num: true}, started: {key: "started", cell: r => day(r.started)},
    method: {key: "method", cell: r => r.method ?? "–"}, data: {key: "data", cell: r => r.data ?? "–"}, seed: {key: "seed", cell: right.seed, num: true},
  };
  const value = (r, key) => key in r ? r[key] : r.parameters[key];
  function sorted(rows) {
    const sign = down ? -1 : 1, known = v => v !== null && v !== undefined && v !== "";
    return [...rows].sort((a, b) => {
      const [x, y] = [value(a, by), value(b, by)];
      if (!known(x) || !known(y)) return known(y) - known(x);
      return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), undefined, {numeric: true}));
    });
  }
  function draw() {
    const rows = model.get("rows");
    try { shown = sorted(fitting(rows, search.value)); wrong.hidden = true; }
    catch (e) { wrong.textContent = e.message; wrong.hidden = false; return; }
    const own = differing(shown, model.get("differing"));
    const list = [...Object.entries(columns), ...own.map(n => [n, {key: n, cell: r => n in r.parameters ? String(r.parameters[n]) : "–", num: shown.every(r => !(n in r.parameters) || typeof r.parameters[n] === "number")}])];
    fill(head, h("th", {class: "d2-tick"}, all), list.map(([title, c]) => {
      const name = c.title ? c.title() : title, on = c.key === by;
      const press = c.key === null ? name : h("button", {title: `sort by ${name}`, onclick: () => { down = on ? !down : ["gIoU", "accuracy", "started"].includes(c.key); by = c.key; draw(); }}, name, h("i", {}, on ? (down ? "↓" : "↑") : ""));
      return h("th", {class: c.num ? "num" : null, "aria-sort": on ? (down ? "descending" : "ascending") : null}, press);
    }));
    fill(body, shown.map(r => h("tr", {"data-id": r.id, class: chosen.has(r.id) ? "d2-on" : null, onclick: e => toggle(r, e), ondblclick: () => { chosen.clear(); chosen.add(r.id); pick(); ask("inspect"); }},
      h("td", {class: "d2-tick"}, h("input", {type: "checkbox", checked: chosen.has(r.id), "aria-label": `choose ${r.name}`})), list.map(([, c]) => h("td", {class: c.num ? "num" : null}, [c.cell(r)].flat(2))))));
    count.textContent = !rows.length ? "no runs" : shown.length === rows.length ? `${rows.length} runs` : shown.length ? `${shown.length} of ${rows.length} runs` : "nothing fits";
    pick();
  }
  function toggle(r, e) {
    if (e.shiftKey && anchor !== null) {
      const at = [anchor, r.id].map(id => shown.findIndex(s => s.id === id)).sort((a, b) => a - b);
      if (at[0] >= 0) for (const s of shown.slice(at[0], at[1] + 1)) chosen.add(s.id);
      window.getSelection().removeAllRanges();
    } else chosen.has(r.id) ? chosen.delete(r.id) : chosen.add(r.id);
    anchor = r.id; pick();
  }
  const picked = () => model.get("rows").filter(r => chosen.has(r.id));
  function pick() { // what is chosen, and what one may do with it
    for (const id of chosen) if (!model.get("rows").some(r => r.id === id)) chosen.delete(id);
    for (const tr of body.children) { const on = chosen.has(+tr.dataset.id); tr.classList.toggle("d2-on", on); tr.querySelector("input").checked = on; }
    const n = chosen.size, inside = shown.filter(r => chosen.has(r.id)).length;
    all.checked = inside > 0 && inside === shown.length; all.indeterminate = inside > 0 && inside < shown.length;
    const act = (label, what, fits, title, cls = "") => h("button", {class: `d2-button ${cls}`, disabled: !fits, title, onclick: what}, label);
    fill(bar, h("span", {class: "d2-chosen"}, n ? `${n} ${n === 1 ? "run" : "runs"} chosen` : "choose runs by a click; shift chooses a range"),
      act("Curves", () => ask("curves"), n, "training curves of the runs chosen"), act("Compare", () => ask("compare"), n > 1, "two runs or more, side by side"), act("Diff", () => ask("diff"), n === 2, "what sets two runs apart"), act("Inspect", () => ask("inspect"), n === 1, "look into one run"), act("Questions", () => ask("question"), n === 1, "one question over the steps"),
      act("Tag…", tagging, n, "tag the runs chosen"), act("Rename…", renaming, n === 1, "give one run another name"), act("Delete…", deleting, n, "move the runs chosen to the trash", "d2-danger"));
    if (!n) form.hidden = true;
    const ids = [...chosen];
    if (String(ids) !== String(model.get("chosen"))) { model.set("chosen", ids); model.save_changes(); }
  }
  function ask(what, more = {}) {
    form.hidden = true; note.hidden = true; said.hidden = false; said.textContent = {refresh: "reading…", compare: "opening…", curves: "opening…", diff: "opening…", inspect: "opening…", question: "opening…"}[what] || "…";
    try { model.send({ask: what, ids: [...chosen], ...more}); } catch { note.hidden = false; said.hidden = true; note.textContent = "The kernel is gone; run the cell again."; }
  }
  function dialog(...parts) { form.hidden = false; fill(form, parts, h("button", {class: "d2-button", onclick: () => { form.hidden = true; }}, "Cancel")); const first = form.querySelector("input"); if (first) { first.focus(); first.select(); } }
  const entry = (label, text, done) => h("input", {type: "text", "aria-label": label, value: text, spellcheck: "false", onkeydown: e => { if (e.key === "Enter") done(); if (e.key === "Escape") form.hidden = true; e.stopPropagation(); }});
  function renaming() {
    const [r] = picked(), go = () => ask("rename", {name: input.value}), input = entry("new name", r.name.split("/").at(-1), go);
    dialog(h("span", {}, "New name of ", h("b", {}, r.name)), input, h("button", {class: "d2-button d2-main", onclick: go}, "Rename"));
  }
  function tagging() {
    const runs = picked(), tags = [...new Set(runs.flatMap(r => r.tags))], go = () => ask("tag", {tags: input.value.split(/[\s,]+/).filter(Boolean)}), input = entry("tags", "", go);
    input.placeholder = "one or more tags";
    dialog(h("span", {}, "Tag"), input, h("button", {class: "d2-button d2-main", onclick: go}, "Add"), tags.map(t => h("button", {class: "d2-tag d2-off", title: `take the tag ${t} away`, onclick: () => ask("untag", {tags: [t]})}, t, " ×")));
  }
  function deleting() {
    const runs = picked(), names = runs.slice(0, 3).map(r => r.name).join(", ") + (runs.length > 3 ? `, and ${runs.length - 3} more` : "");
    dialog(h("span", {}, "Move ", h("b", {}, names), ` to ${about.trash}?`), h("button", {class: "d2-button d2-danger", onclick: () => ask("delete")}, runs.length === 1 ? "Move it" : `Move ${runs.length} runs`));
  }
  model.on("change:rows", draw);
  model.on("msg:custom", m => { if (m.done === undefined) return; said.hidden = !m.done; said.textContent = m.done; note.hidden = !m.error; note.textContent = m.error; });
  draw(); holding(model, below);
}

// ---- curves -----------------------------------------------------------------------------------------------------------------------
function curves(model, root) {
  const about = model.get("about"), plots = h("div", {class: "d2-curveplot", "data-chart": "curves"}), below = h("div", {class: "d2-held"}), note = h("p", {class: "d2-notice", hidden: true});
  const save = () => model.save_changes(), out = h("output", {});
  let timer = null, all = false; // all: every measure that the run has is offered
  const seen = new Set();
  const place = keep => keep <= 0 ? 0 : Math.round(-100 / 3 * Math.log10(1 - keep)); // 0 to 100: the higher, the finer
  const smooth = h("input", {type: "range", min: 0, max: 100, "aria-label": "smoothing", oninput: e => {
    const keep = +e.target.value ? 1 - 10 ** (-3 * e.target.value / 100) : 0;
    out.textContent = keep.toFixed(keep > .99 ? 3 : 2); smooth.style.setProperty("--at", `${e.target.value}%`);
    clearTimeout(timer); timer = setTimeout(() => { model.set("keep", keep); save(); }, 60);
  }});
  const chip = (label, on, press, title) => h("button", {class: "d2-chip", "aria-pressed": String(on), title, onclick: press}, label);
  const axes = h("div", {class: "d2-layers"}), measures = h("div", {class: "d2-layers d2-measures"});
  root.append(h("div", {class: "d2-top"}, h("b", {class: "d2-name"}, about.name), h("span", {class: "d2-lead"}, about.lead)), about.missing ? h("p", {class: "d2-notice"}, about.missing) : "",
    h("div", {class: "d2-curvebar"}, h("label", {class: "d2-slider"}, h("span", {}, "smoothing"), smooth, out), axes), measures,
    h("p", {class: "d2-keyline"}, about.runs.map(r => h("span", {}, h("i", {style: `background:${r.colour}`}), r.name)), h("span", {class: "d2-tip"}, "click a point to look into its step")), note, plots, below);
  function draw() {
    const keep = model.get("keep"), chosen = model.get("measures");
    smooth.value = place(keep); out.textContent = keep.toFixed(keep > .99 ? 3 : 2); smooth.style.setProperty("--at", `${smooth.value}%`);
    fill(axes, [["log_x", "log steps"], ["log_y", "log values"]].map(([trait, label]) => chip(label, model.get(trait), () => { model.set(trait, !model.get(trait)); save(); }, "a logarithmic axis")));
    for (const m of chosen) seen.add(m); // once drawn, a measure stays at hand
    const more = about.measures.filter(m => !seen.has(m)).length, open = h("button", {class: "d2-chip d2-more", "aria-expanded": String(all), onclick: () => { all = !all; draw(); }}, all ? "fewer" : `${more} more`);
    fill(measures, about.measures.filter(m => all || seen.has(m)).map(m => chip(about.titles[m], chosen.includes(m), () => { model.set("measures", about.measures.filter(n => chosen.includes(n) !== (n === m))); save(); }, m)), more ? open : null);
    plots.hidden = !chosen.length; note.hidden = !model.get("note"); note.textContent = model.get("note");
  }
  const rest = fitColumns(model, root, w => w < 480 ? 1 : w < 900 ? 2 : 3);
  for (const t of ["keep", "measures", "log_x", "log_y", "note"]) model.on(`change:${t}`, draw);
  draw(); plotted(model, root); holding(model, below);
  return rest;
}

// ---- one question over the steps --------------------------------------------------------------------------------------------------
function question(model, root) {
  const about = model.get("about"), sources = Object.keys(about.questions), save = () => model.save_changes();
  root.append(h("div", {class: "d2-top"}, h("b", {class: "d2-name"}, about.name), h("span", {class: "d2-lead"}, about.lead),
    sources.length > 1 ? h("div", {class: "d2-tabs"}, sources.map(s => h("button", {"data-source": s, onclick: () => { model.set("source", s); save(); }}, s))) : null), about.missing ? h("p", {class: "d2-notice"}, about.missing) : "");
  if (!sources.length) { root.append(h("p", {class: "d2-meta"}, "No question was asked at two steps of this run. Held-out questions are asked every evaluation.every steps.")); return; }
  const list = () => about.questions[model.get("source")], at = () => list().findIndex(q => q.sample === model.get("sample"));
  const go = i => { const q = list()[i]; if (q && q.sample !== model.get("sample")) { model.set("sample", q.sample); save(); } };
  const choice = h("select", {"aria-label": "question", onchange: () => go(choice.selectedIndex)}), page = h("div", {class: "d2-questionpage"}), count = h("span", {class: "d2-count"});
  const step = (by, sign, label) => h("button", {class: "d2-flip", title: label, "aria-label": label, onclick: () => go(at() + by)}, sign);
  const numbers = h("span", {class: "d2-tabs", hidden: true});
  root.append(h("div", {class: "d2-choice"}, step(-1, "‹", "the question before"), choice, step(1, "›", "the next question"), numbers, count),
    h("div", {class: "d2-questionplot", "data-chart": "question"}), h("p", {class: "d2-key d2-questionkey"}, h("span", {}, h("i", {class: "d2-stroke"}), "this question"), h("span", {}, h("i", {class: "d2-stroke d2-palestroke"}), "all others; a click chooses one"), h("span", {}, h("i", {class: "d2-dot", style: `background:${css(COLOURS.truth)}`}), "ground truth"), h("span", {}, h("i", {class: "d2-dot", style: `background:${css(COLOURS.prediction)}`}), "its mask")), page);
  function fields() {
    const change = q => Math.abs(q.change) >= .005 ? ` · ${signed(q.change)}` : "";
    fill(choice, list().map(q => h("option", {value: q.sample}, `${q.query} · ${q.sample}${change(q)}`)));
    for (const b of root.querySelectorAll(".d2-tabs [data-source]")) b.setAttribute("aria-pressed", b.dataset.source === model.get("source"));
  }
  function draw() {
    choice.selectedIndex = at(); count.textContent = `${at() + 1} of ${list().length}`;
    const left = page.querySelector(".d2-film")?.scrollLeft || 0, n = model.get("rollouts");
    page.innerHTML = model.get("html");
    const film = page.querySelector(".d2-film"); if (film) film.scrollLeft = left;
    numbers.hidden = n < 2;
    fill(numbers, Array.from({length: n}, (_, k) => h("button", {"aria-pressed": String(k === model.get("rollout")), title: `rollout ${k + 1} of each step`, onclick: () => { model.set("rollout", k); save(); }}, k + 1)));
  }
  const rest = fitColumns(model, root, w => w < 560 ? 1 : 3);
  root.addEventListener("keydown", e => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[e.key];
    if (!by || e.target.matches("select,input,.d2-film")) return;
    go(at() + by); e.preventDefault(); e.stopPropagation();
  });
  model.on("change:source", () => { fields(); draw(); });
  for (const t of ["sample", "html", "rollout", "rollouts"]) model.on(`change:${t}`, draw);
  fields(); draw(); plotted(model, root);
  return rest;
}
