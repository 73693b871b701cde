// ---- help -----------------------------------------------------------------------------------------------------------------------------
// ? opens what a view's keys do. The browser's own dialog holds the focus and gives it back; Escape closes it.
const ZOOM = [["+", "−", "0"], "zoom in, zoom out, the whole picture; the wheel with Ctrl, too"];
const LAYERS = [["g", "p", "c", "f", "d", "b"], "ground truth, prediction, contours, fill, difference, box and point: show or hide"];
const CHARTS = [["drag"], "in a chart: look closer; a double click shows all again"], LEGEND = [["click"], "on a name of a legend: hide its line, or show it"], TAB = [["Tab"], "to the next control"];
const KEYS = {
  inspect: [[["←", "→"], "the step before, the next one; in an order of your own, the sample"], [["↑", "↓"], "another sample of the step"], [["1", "…", "9"], "choose an answer"],
    [["r", "w", "i"], "the chosen answer is right, wrong, interesting; the same key takes it back"], [["t", "n"], "a tag, a note on this sample; Enter keeps it"], LAYERS, ZOOM,
    [["Tab", "← →"], "to a line of reasoning, then from word to word: where the model looks"]],
  live: [TAB, CHARTS, LEGEND], compare: [TAB, CHARTS, LEGEND],
  ask: [[["Enter"], "ask; with Shift, a new line"], [["drag", "click"], "on the picture: segment a box, a point; with Shift, move a picture that is zoomed"], LAYERS, ZOOM],
  browse: [[["click"], "choose an answer, or let it go; with Shift, all up to it"], [["←", "→", "↑", "↓"], "go from answer to answer; with Shift, choose on the way"], [["Space"], "choose the answer at hand, or let it go"],
    [["Ctrl A", "Esc"], "choose all that fit, none"], [["drag"], "in a histogram: filter by a range; a click takes it back"], TAB],
  runs: [[["click"], "choose a run, or let it go; with Shift, all up to it"], [["click"], "on a head: sort, and the other way round"], [["double click"], "look into a run"], TAB],
  curves: [[["click"], "on a point: look into its step"], CHARTS, TAB],
  embedding: [[["drag"], "around dots: their answers come below; with Shift, add more"], [["double click"], "let them go"], TAB],
  question: [[["←", "→"], "the question before, the next one"], [["click"], "on a pale curve: that question"], TAB],
};
const TITLES = {inspect: "inspector", live: "a run as it goes", compare: "comparison of runs", ask: "a question to a picture", browse: "grid of answers", runs: "table of runs", curves: "curves of runs", question: "a question over the steps", embedding: "questions by likeness"};

function help(root, kind) { // its button, which ? presses as well
  const row = ([keys, what]) => h("div", {}, h("dt", {}, keys.map(k => h("kbd", {}, k))), h("dd", {}, what));
  const close = h("button", {class: "d2-button", onclick: () => box.close()}, "Close"), title = h("h5", {}, `Keys: ${TITLES[kind]}`);
  const box = h("dialog", {class: "d2-help", "aria-label": `keys of the ${TITLES[kind]}`}, title, h("dl", {}, [...KEYS[kind], [["?"], "this list"]].map(row)), close);
  const open = () => { if (!box.open) { box.showModal(); close.focus(); } };
  box.addEventListener("click", e => { if (e.target === box) box.close(); }); // beside it
  box.addEventListener("keydown", e => { e.stopPropagation(); if (e.key === "Escape") { e.preventDefault(); box.close(); } else if (e.key === "Tab") { e.preventDefault(); close.focus(); } });
  root.addEventListener("keydown", e => {
    if (e.key !== "?" || e.target.matches("input:not([type=range]),textarea,select")) return;
    e.preventDefault(); e.stopPropagation(); open();
  }, true);
  root.append(box);
  return h("button", {class: "d2-ask-keys", "aria-label": "keys of this view", title: "keys (?)", onclick: open}, "?");
}
