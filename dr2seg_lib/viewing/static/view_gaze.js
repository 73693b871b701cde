// ---- where the model looks ------------------------------------------------------------------------------------------------------
const PAUSE = 90, PATIENCE = 8000; // ms: a pointer that only passes by asks nothing; a kernel that says nothing is told of

function gaze(model, cards, {show, clear, tell}) { // hover, focus or click a word of the reasoning; `show` gets its heat, `tell` a sentence, once
  const found = new Map(), asked = new Set();
  let over = null, pinned = null, timer = null, told = false, blind = false;
  const once = text => { if (!told) { told = true; tell(text); } };
  const place = word => { const s = model.get("shown"), of = word.closest("[data-pass]"), line = word.parentElement;
    return {key: [s.source, s.at, word.closest("[data-rollout]").dataset.rollout, of.dataset.pass].join("/"), pass: of.dataset.pass, rollout: +word.closest("[data-rollout]").dataset.rollout, t: +line.dataset.from + [...line.children].indexOf(word)}; };
  const now = () => over || pinned;
  function ask({key, pass, rollout}) {
    const s = model.get("shown");
    if (asked.has(key) || blind || !s.image) return;
    asked.add(key);
    try { model.send({ask: "look", source: s.source, at: s.at, rollout, pass}); } catch { once("The kernel is gone; run the cell again to see where the model looks."); return; }
    setTimeout(() => { if (!found.has(key)) once("The kernel does not answer yet; if it is gone, run the cell again to see where the model looks."); }, PATIENCE);
  }
  function draw() {
    clearTimeout(timer);
    for (const e of cards.querySelectorAll(".d2-seen")) e.classList.remove("d2-seen");
    const word = now();
    if (!word || !cards.contains(word)) { over = pinned = null; clear(); return; }
    word.classList.add("d2-seen");
    const at = place(word), look = found.get(at.key);
    if (look) { const [w, hh] = look.size; show({...at, word: word.textContent.trim(), share: look.share[at.t], by: look.by, canvas: glow(look.grids.subarray(at.t * w * hh, (at.t + 1) * w * hh), w, hh, Math.sqrt(look.peak[at.t]))}); }
    else timer = setTimeout(() => ask(at), PAUSE);
  }
  model.on("msg:custom", (m, buffers) => {
    if (m.look === undefined) return;
    if (m.note) { blind = true; once(`Where the model looks cannot be shown: ${m.note}.`); return; }
    const b = buffers[0];
    found.set(m.look, {...m, grids: new Uint8Array(b.buffer || b, b.byteOffset || 0, b.byteLength)});
    const word = now();
    if (word && cards.contains(word) && place(word).key === m.look) draw();
  });
  const word = e => e.target.closest && e.target.closest(".heat i");
  cards.addEventListener("mouseover", e => { const w = word(e); if (w !== over) { over = w; draw(); } });
  cards.addEventListener("mouseleave", () => { if (over) { over = null; draw(); } });
  cards.addEventListener("click", e => { const w = word(e); pinned = w === pinned ? null : w; draw(); });
  cards.addEventListener("focusin", e => { if (e.target.matches(".heat:focus-visible")) { pinned = e.target.querySelector("i"); over = null; draw(); } });
  cards.addEventListener("keydown", e => { // ← and → go from word to word, Esc ends
    const line = e.target.matches(".heat") ? e.target : null, by = {ArrowRight: 1, ArrowLeft: -1}[e.key];
    if (!line || !(by || e.key === "Escape")) return;
    const words = [...line.children], i = words.indexOf(pinned);
    pinned = by ? words[clamp(i + by, 0, words.length - 1)] : null;
    over = null; draw(); e.preventDefault(); e.stopPropagation();
  });
  return {
    renew() { over = pinned = null; draw(); for (const line of cards.querySelectorAll(".heat")) { line.tabIndex = 0; line.setAttribute("role", "group"); line.setAttribute("aria-label", "reasoning; the arrow keys go from word to word and show where the model looks"); } },
    again: () => now() && draw(),
  };
}
