// ---- the inspector ----------------------------------------------------------------------------------------------------------------
function inspect(model, root) {
  const about = model.get("about"), index = model.get("index"), picture = new Picture(), masks = new Map();
  Object.assign(picture.layers, model.get("layers"));
  let list = [], hit = new Set(), steps = [], measuring = "", measured = false, stale = false;
  const choosing = (...pairs) => { for (const [k, v] of pairs) model.set(k, v); model.save_changes(); };
  const slider = (label, input) => { const out = h("output", {}), range = h("input", {type: "range", min: 0, value: 0, "aria-label": label, oninput: e => input(+e.target.value)}); return {range, out, box: h("label", {class: "d2-slider"}, h("span", {}, label), range, out)}; };
  const byStep = slider("step", i => go(steps[i].groups[0])), bySample = slider("sample", i => go(current().groups[i]));
  const search = h("input", {type: "search", class: "d2-filter", "aria-label": "filter", spellcheck: "false", oninput: () => choosing(["filter", search.value])});
  const sort = h("select", {"aria-label": "sort by", onchange: () => { choosing(["sort", sort.value]); sorted(); }}), flip = h("button", {class: "d2-flip", onclick: () => { choosing(["descending", !model.get("descending")]); sorted(); }});
  const count = h("span", {class: "d2-count"}), any = h("p", {class: "d2-any", hidden: true}), wrong = h("p", {class: "d2-wrong", hidden: true}), question = h("h4"), meta = h("p", {class: "d2-meta"}), table = h("div"), cards = h("div", {class: "d2-cards"}), status = h("p", {class: "d2-status"});
  const sources = Object.keys(index), tabs = sources.length > 1 ? h("div", {class: "d2-tabs"}, sources.map(s => h("button", {"data-source": s, onclick: () => { if (s === model.get("source")) return; choosing(["source", s], ["at", 0], ["rollout", 0], ["filter", ""], ["sort", "order"]); }}, s))) : null;
  const layers = picture.controls({truth: "ground truth", prediction: "prediction", contours: "contours", fill: "fill", difference: "difference", prompts: "box and point"});
  const heat = h("p", {class: "d2-entropy"}, "entropy of a token: 0", h("i", {class: "d2-scale"}), "2 nats or more", h("span", {class: "d2-hint"}, "point at a word to see where the model looks; a click holds it"));
  const why = h("p", {class: "d2-notice d2-why", hidden: true}), keys = h("p", {class: "d2-keys"});
  const reviews = reviewing(model, {tell: text => { why.textContent = text; why.hidden = false; }, around: root});
  const agree = agreeing(model, judge => { search.value = `disagrees=${judge}`; choosing(["filter", search.value]); });
  const right = h("div", {class: "d2-right"}, question, meta, reviews.box, table, heat, cards);
  root.append(h("div", {class: "d2-top"}, h("b", {class: "d2-name"}, about.name), h("span", {class: "d2-lead"}, about.lead), tabs), about.missing ? h("p", {class: "d2-notice"}, about.missing) : "");
  if (!sources.length) { root.append(h("p", {class: "d2-meta"}, about.empty)); return; } // nothing to choose from
  root.append(
    h("div", {class: "d2-bar"}, byStep.box, bySample.box), h("div", {class: "d2-bar d2-find"}, search, h("label", {class: "d2-sort"}, h("span", {}, "sort by"), sort, flip), count), wrong, any,
    h("div", {class: "d2-body"}, h("div", {class: "d2-left"}, picture.frame, layers, status, why, keys, agree), right));

  let known = null; // the columns with what was said, of one state of both
  function columns() {
    const source = model.get("source"), plain = unpacked(model.get("index")[source]), said = model.get("reviews");
    if (!known || known.plain !== plain || known.said !== said) known = {plain, said, columns: reviews.columns(plain, source)};
    return known.columns;
  }
  const current = () => steps.find(s => s.groups.includes(model.get("at"))) || steps[0] || {groups: []};
  function fitting(at) { const {group, rollout} = columns(), i = group.findIndex((g, k) => g === at && hit.has(k)); return i < 0 ? 0 : rollout[i]; } // the first rollout that fits
  function go(at) { if (at === undefined || at === model.get("at")) return; choosing(["at", at], ["rollout", fitting(at)]); place(); if (stale) arrange(); }
  function pick(rollout) { if (rollout === model.get("rollout")) return; choosing(["rollout", rollout]); }
  function turned() { // the arrow points where the numbers go
    const descending = model.get("descending");
    fill(flip, descending ? "↓" : "↑");
    const order = descending ? "descending: the largest first" : "ascending: the smallest first";
    flip.title = order; flip.setAttribute("aria-label", `${order}; turn the order`);
  }
  function sorted() { arrange(); if (list.length) go(list[0]); } // another order begins at its first
  function example() { // a filter that these columns know
    const c = columns(), number = ["accuracy>1", "iou>0.5", "reward>2", "tokens<40", "change<0"].filter(e => c[e.match(/^\w+/)[0]]).slice(0, 2);
    const word = ["difficulty", "kind", "query_type"].find(n => (c[n] || []).some(v => typeof v === "string"));
    return "filter: " + [...number, ...(word ? [`${word}=${c[word].find(v => typeof v === "string")}`] : [])].join(" ");
  }
  function measure() { // the IoU of all rollouts, once it is asked for; a large segmenter draws one at a time instead
    const wanted = sort.value === "iou" || /(^|\s)iou[<>=!]/.test(search.value);
    if (!wanted || !about.quick || measured || model.get("source") !== "rollouts" || columns().iou.some(v => v !== null)) return;
    measured = true; count.textContent = measuring = "measuring IoU…"; model.send({ask: "measure"});
  }
  function hint() { // the keys that do something here
    const key = (...names) => h("span", {class: "d2-keep"}, names.map(n => h("kbd", {}, n))), rollouts = model.get("source") === "rollouts";
    const turn = bySample.box.hidden ? [" sample "] : [" step ", key("↑", "↓"), " sample "], choice = rollouts ? [key("1"), "…", key("9"), " rollout "] : [key("1", "2"), " before, after "];
    fill(keys, key("←", "→"), turn, choice, key("+", "−", "0"), " zoom ", key("r"), key("w"), key("i"), " right, wrong, interesting ", key("?"), " all keys");
  }
  function fields() {
    search.placeholder = example();
    const names = Object.keys(columns()).filter(k => !["group", "query", "step", "sample", "rollout", "note"].includes(k));
    fill(sort, h("option", {value: "order"}, model.get("source") === "evaluation" ? "order" : "step"), names.map(n => h("option", {value: n}, words(n))));
    ordered();
    for (const t of tabs ? tabs.children : []) t.setAttribute("aria-pressed", t.dataset.source === model.get("source"));
  }
  function ordered() { const wanted = model.get("sort"); sort.value = [...sort.options].some(o => o.value === wanted) ? wanted : "order"; } // a field that these columns have
  const judging = () => /(^|\s)(verdict|tag|disagrees|note)[<>=!]/.test(search.value) || ["verdict", "tag", "disagrees"].includes(sort.value); // what is marked stays in sight till one goes on
  function arrange() { // the groups that fit, in order; those of one step share a place on the first slider
    try { const found = arranged(columns(), search.value, sort.value, model.get("descending")); stale = false; list = found.groups; hit = found.hit; wrong.hidden = true; }
    catch (e) { wrong.textContent = e.message; wrong.hidden = false; return; }
    const {group, step} = columns(), of = new Map(group.map((g, i) => [g, step ? step[i] : null])), ranked = sort.value !== "order" || !step;
    steps = [];
    for (const g of list) { const last = steps.at(-1); if (!ranked && last && last.step === of.get(g)) last.groups.push(g); else steps.push({step: of.get(g), groups: [g]}); }
    byStep.box.firstChild.textContent = ranked ? "sample" : "step"; bySample.box.hidden = ranked;
    byStep.range.setAttribute("aria-label", ranked ? "place" : "step");
    const all = new Set(group).size, each = model.get("source") === "evaluation" ? "answers" : "rollouts", filtered = search.value.trim();
    const fits = `${list.length} of ${all} samples · ${hit.size} of ${group.length} ${each}`;
    count.textContent = measuring || (!list.length ? "nothing fits" : filtered ? fits : `${all} samples`);
    any.hidden = !filtered || !list.length; any.textContent = `A sample stays if one of its ${each} fits; those that do not are pale.`;
    measure(); hint();
    right.classList.toggle("d2-empty", !list.length);
    if (list.length && !list.includes(model.get("at"))) go(list[0]);
    else if (filtered && list.length && !columns().group.some((g, i) => g === model.get("at") && columns().rollout[i] === model.get("rollout") && hit.has(i))) pick(fitting(model.get("at")));
    place(); marks();
  }
  function place() { // the sliders where the sample is
    const now = current(), i = steps.indexOf(now), j = now.groups.indexOf(model.get("at"));
    Object.assign(byStep.range, {max: Math.max(steps.length - 1, 0)}); byStep.range.value = i; byStep.range.disabled = steps.length < 2;
    byStep.out.textContent = i < 0 ? "–" : bySample.box.hidden ? `${i + 1} of ${steps.length}` : `${now.step} of ${Math.max(...steps.map(s => s.step))}`;
    Object.assign(bySample.range, {max: Math.max(now.groups.length - 1, 0)}); bySample.range.value = j; bySample.range.disabled = now.groups.length < 2;
    bySample.out.textContent = j < 0 ? "–" : `${j + 1} of ${now.groups.length}`;
    for (const r of [byStep.range, bySample.range]) r.style.setProperty("--at", `${100 * r.value / Math.max(r.max, 1)}%`);
  }
  function marks() { // which rollout is chosen, which ones fit the filter
    const at = model.get("at"), {group, rollout} = columns(), fits = new Set();
    group.forEach((g, i) => { if (g === at && hit.has(i)) fits.add(rollout[i]); });
    for (const e of right.querySelectorAll("[data-rollout]")) { e.classList.toggle("d2-on", +e.dataset.rollout === model.get("rollout")); e.classList.toggle("d2-dim", !fits.has(+e.dataset.rollout)); }
  }
  function draw() { // a sample has come
    const s = model.get("shown");
    if (!s.entries) { fill(question, s.note || about.empty || "Nothing to show."); return; }
    picture.show(s.image, s.size, s.note);
    picture.given = s.given || [];
    picture.mask("truth", s.truth);
    fill(question, s.query); fill(meta, s.meta);
    fill(table, s.source === "evaluation" ? predictionTable(s, pick) : rewardTable(s, about, pick));
    fill(cards, s.entries.map(e => card(e, about, pick, reviews.mark)));
    reviews.draw(right);
    heat.hidden = !cards.querySelector(".heat"); // predictions keep no entropies
    right.scrollTop = 0;
    place(); marks(); choose(); sight.renew();
  }
  function choose() { // the chosen rollout's box, point and mask
    const s = model.get("shown"), e = s.entries && s.entries[model.get("rollout")];
    if (!e || s.at !== model.get("at") || s.source !== model.get("source")) return; // the one it belongs to is on its way
    picture.prompts = e.prompts || [];
    const key = `${s.source}/${s.at}/${e.number}`, found = masks.get(key);
    picture.mask("prediction", found ? found.runs : null);
    if (!found && s.image && picture.layers.prediction) model.send({ask: "mask", source: s.source, at: s.at, rollout: e.number});
    fill(status, h("b", {}, e.title), found ? (found.iou === null ? found.note || "  IoU –" : `  IoU ${fixed(found.iou)}`) : s.image && picture.layers.prediction ? "  segmenting…" : "");
    marks(); sight.again();
  }
  const percent = v => v > 0 && v < .01 ? "under 1 %" : `${Math.round(100 * v)} %`;
  const sight = gaze(model, cards, {
    show: look => { picture.heat = look.canvas; picture.paint(); fill(status, h("b", {}, "“", look.word, "”"), `${percent(look.share)} of its attention is on the picture${look.by ? ` · ${look.by}` : ""}`); },
    clear: () => { if (!picture.heat) return; picture.heat = null; picture.paint(); choose(); },
    tell: text => { why.textContent = text; why.hidden = false; },
  });
  picture.ontoggle = name => { choosing(["layers", {...picture.layers}]); if (name === "prediction") choose(); };
  model.on("change:layers", () => { const {prediction} = picture.layers; picture.show_layers(model.get("layers")); if (picture.layers.prediction !== prediction) choose(); });
  model.on("msg:custom", m => { if (m.mask === undefined) return; masks.set(m.mask, m); const s = model.get("shown"); if (m.mask === `${s.source}/${s.at}/${model.get("rollout")}`) choose(); });
  model.on("change:shown", draw);
  model.on("change:rollout", () => { choose(); const e = cards.querySelector(`[data-rollout="${model.get("rollout")}"]`); if (e && right.scrollHeight > right.clientHeight) right.scrollTo({top: Math.max(0, e.offsetTop - 12), behavior: "smooth"}); });
  model.on("change:at", place);
  model.on("change:source", () => { search.value = model.get("filter"); fields(); arrange(); });
  model.on("change:filter", () => { if (search.value !== model.get("filter")) search.value = model.get("filter"); arrange(); });
  model.on("change:sort", () => { ordered(); arrange(); });
  model.on("change:descending", () => { turned(); arrange(); });
  model.on("change:reviews", () => { stale = true; if (why.textContent.startsWith("Not kept")) why.hidden = true; reviews.draw(right); if (!search.value.trim() || !judging()) arrange(); });
  model.on("change:index", () => { measuring = ""; sorted(); });
  model.on("msg:custom", m => { if (m.measured !== undefined) count.textContent = measuring = m.measured; });
  root.addEventListener("keydown", e => {
    if (e.target.matches("input[type=search],input[type=text],textarea,select,dialog *") || e.ctrlKey || e.metaKey || e.altKey) return;
    const now = current(), i = steps.indexOf(now), j = now.groups.indexOf(model.get("at")), next = steps[i + {ArrowRight: 1, ArrowLeft: -1}[e.key]];
    const verdict = {r: "right", w: "wrong", i: "interesting"}[e.key];
    if (e.target.matches(".d2-opacity input") && e.key.startsWith("Arrow")) return;
    if (e.key === "ArrowRight" || e.key === "ArrowLeft") next && go(next.groups[clamp(j, 0, next.groups.length - 1)]);
    else if (e.key === "ArrowUp" || e.key === "ArrowDown") go(now.groups[j + (e.key === "ArrowDown" ? 1 : -1)]);
    else if (/^[1-9]$/.test(e.key)) { if (+e.key <= (model.get("shown").entries || []).length) pick(+e.key - 1); }
    else if (verdict) reviews.mark(model.get("rollout"), verdict);
    else if (e.key === "t") reviews.tag();
    else if (e.key === "n") reviews.note();
    else if (!picture.key(e.key)) return;
    e.preventDefault(); e.stopPropagation();
  });
  search.value = model.get("filter");
  turned(); fields(); arrange();
  if (Object.values(model.get("reviews") || {}).some(r => Object.keys(r).length)) model.send({ask: "agreement"});
  draw();
  return () => picture.observer.disconnect();
}
