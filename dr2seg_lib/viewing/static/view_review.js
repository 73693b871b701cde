// ---- reviews ------------------------------------------------------------------------------------------------------------------------
// What a person says of an answer (right, wrong, interesting) and of a sample (tags, a note). The kernel keeps it in the run's folder.
const VERDICTS = {right: "✓", wrong: "✗", interesting: "★"};

function verdictButtons(say) { // one group a card
  const button = ([name, sign]) => h("button", {class: `d2-verdict d2-v-${name}`, "data-verdict": name, "aria-pressed": "false", "aria-label": name, title: `${name} (${name[0]}); again takes it back`, onclick: e => { e.stopPropagation(); say(name); }}, sign);
  return h("span", {class: "d2-verdicts", role: "group", "aria-label": "your verdict"}, Object.entries(VERDICTS).map(button));
}

function reviewing(model, {tell, around}) { // -> the sample's tags and note, and what the inspector needs of the reviews
  const of = (source, at, rollout) => ((model.get("reviews") || {})[source] || {})[`${at}/${rollout ?? ""}`] || {tags: [], note: "", verdict: null, disagrees: []};
  const here = rollout => of(model.get("source"), model.get("at"), rollout);
  const place = () => ({source: model.get("source"), at: model.get("at")});
  function say(rollout, said, where = place()) { // the kernel answers with the reviews, or with a sentence
    try { model.send({ask: "review", ...where, rollout: rollout ?? null, said}); }
    catch { tell("The kernel is gone; run the cell again to review."); }
  }
  const mark = (rollout, verdict) => say(rollout, {verdict: here(rollout).verdict === verdict ? "" : verdict});

  const chips = h("span", {class: "d2-tags"});
  const tag = h("input", {type: "text", class: "d2-tag", "aria-label": "add a tag to this sample", placeholder: "tag", maxlength: 60, spellcheck: "false"});
  const note = h("textarea", {rows: 1, class: "d2-note", "aria-label": "note on this sample", placeholder: "note on this sample", maxlength: 10000});
  const box = h("div", {class: "d2-review"}, chips, tag, note);
  function add() { // the words that were typed
    const typed = tag.value.split(/[\s,]+/).filter(Boolean);
    tag.value = "";
    if (typed.length) say(null, {add: typed});
  }
  let noted = place(); // the sample that the note is about
  const keep = () => { if (note.value !== of(noted.source, noted.at, null).note) say(null, {note: note.value}, noted); };
  const leave = e => { e.preventDefault(); e.target.blur(); around.focus({preventScroll: true}); };
  tag.addEventListener("keydown", e => { if (e.key === "Enter" || e.key === ",") { e.preventDefault(); add(); } else if (e.key === "Escape") { tag.value = ""; leave(e); } e.stopPropagation(); });
  tag.addEventListener("blur", add);
  note.addEventListener("keydown", e => { if (e.key === "Escape") { note.value = here(null).note; leave(e); } else if (e.key === "Enter" && !e.shiftKey) leave(e); e.stopPropagation(); });
  note.addEventListener("focus", () => { noted = place(); });
  note.addEventListener("blur", keep);
  const chip = word => h("span", {class: "d2-word"}, word, h("button", {"aria-label": `remove the tag ${word}`, title: "remove", onclick: () => say(null, {remove: [word]})}, "×"));

  function draw(right) { // verdicts on rows and cards, tags and note of the sample
    const whole = here(null);
    fill(chips, whole.tags.map(chip));
    if (document.activeElement !== note) note.value = whole.note;
    for (const e of right.querySelectorAll("[data-rollout]")) {
      const said = here(e.dataset.rollout), n = e.querySelector(".d2-mark");
      for (const b of e.querySelectorAll(".d2-verdict")) b.setAttribute("aria-pressed", String(b.dataset.verdict === said.verdict));
      if (n) { n.textContent = VERDICTS[said.verdict] || ""; n.className = `d2-mark d2-v-${said.verdict || "none"}`; n.title = said.verdict || ""; }
      const own = e.querySelector(".d2-own");
      if (own) { own.hidden = !(said.tags.length || said.note || said.disagrees.length); fill(own, said.tags.map(w => h("span", {class: "d2-word"}, w)), said.note, said.disagrees.length ? h("span", {class: "d2-contrary"}, `contrary: ${said.disagrees.map(words).join(", ")}`) : ""); }
    }
  }
  function columns(plain, source) { // fields of the filter, a value a row
    const rows = plain.group.map((g, i) => [of(source, g, plain.rollout[i]), of(source, g, null)]);
    return {...plain, verdict: rows.map(([own]) => own.verdict || "none"), tag: rows.map(([own, whole]) => [...own.tags, ...whole.tags]),
      disagrees: rows.map(([own]) => own.disagrees || []), note: rows.map(([own, whole]) => [own.note, whole.note].filter(Boolean).join(" "))};
  }
  model.on("msg:custom", m => { if (m.unsaid !== undefined) tell(`Not kept: ${m.unsaid}`); });
  return {box, mark, draw, columns, tag: () => tag.focus(), note: () => note.focus()};
}

function agreeing(model, find) { // a small table: how far the reward agrees with the reviewer; `find` shows where it does not
  const body = h("div"), summary = h("summary"), box = h("details", {class: "d2-agree", hidden: true}, summary, body);
  function draw() {
    const rows = model.get("agreement") || [], first = rows.find(r => r.judge === "reward") || rows[0];
    box.hidden = !first;
    if (!first) return;
    fill(summary, "The reward agrees with the reviewer on ", h("b", {}, `${first.agree} of ${first.n}`));
    const away = r => r.n - r.agree, line = r => h("tr", {}, h("th", {scope: "row"}, r.title), h("td", {class: "num"}, `${r.agree} of ${r.n}`), h("td", {class: "num"}, r.share), h("td", {class: "num"}, r.kappa === null ? "–" : fixed(r.kappa)),
      h("td", {}, away(r) ? h("button", {class: "d2-link", "aria-label": `show the ${away(r)} answers on which ${r.title} disagrees`, onclick: () => find(r.judge)}, `show ${away(r)}`) : "–"));
    fill(body, h("div", {class: "d2-scroll"}, h("table", {}, h("thead", {}, h("tr", {}, ["judge", "agree", "share (95 %)", "κ", "contrary"].map((t, i) => h("th", {scope: "col", class: i && i < 4 ? "num" : null}, t)))), h("tbody", {}, rows.map(line)))));
  }
  model.on("change:agreement", draw); draw();
  return box;
}
