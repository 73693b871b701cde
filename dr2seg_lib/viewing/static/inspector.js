// The drawing side of dr2seg_lib.viewing: one module, four views (inspect, live, compare, ask). Data comes in traits, once per sample.

// ---- small parts --------------------------------------------------------------------------------------------------------
const SVG = new Set(["svg", "path", "line", "rect", "text", "g", "circle"]);

function h(tag, props = {}, ...children) { // an element with its properties, listeners and children
  const e = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [k, v] of Object.entries(props)) {
    if (v === undefined || v === null || v === false) continue;
    if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else if (k === "html") e.innerHTML = v;
    else if (k === "style") e.style.cssText = v;
    else e.setAttribute(k, v === true ? "" : v);
  }
  e.append(...children.flat().filter(c => c !== null && c !== undefined && c !== false && c !== ""));
  return e;
}
const fill = (e, ...children) => (e.replaceChildren(...children.flat().filter(c => c !== null && c !== undefined && c !== "")), e);
const words = name => name.replaceAll("_", " ");
const num = (v, digits = 3) => v === null || v === undefined || !isFinite(v) ? "–" : String(+Number(v).toPrecision(digits)).replace("-", "−");
const signed = v => (v < 0 ? "−" : "+") + Math.abs(v).toFixed(2);
const fixed = v => Number(v).toFixed(2).replace("-", "−");
const clamp = (v, lo, hi) => Math.min(Math.max(v, lo), hi);
const mean = v => v.length ? v.reduce((a, b) => a + b, 0) / v.length : NaN;

// ---- masks: run lengths, row by row, background first ---------------------------------------------------------------------
function raster(runs, w, h) { // -> Uint8Array [h*w]
  const m = new Uint8Array(w * h);
  let at = 0, on = 0;
  for (const n of runs) { if (on) m.fill(1, at, at + n); at += n; on ^= 1; }
  return m;
}

const CASES = [[], ["LT"], ["TR"], ["LR"], ["RB"], ["LT", "RB"], ["TB"], ["LB"], ["LB"], ["TB"], ["TR", "LB"], ["RB"], ["LR"], ["TR"], ["LT"], []];

function outline(m, w, h) { // the 0.5 level line of the softened mask, by marching squares -> Path2D in image pixels
  const W = w + 4, H = h + 4, soft = new Float32Array(W * H), f = new Float32Array(W * H), path = new Path2D();
  for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) if (m[y * w + x]) {
    const i = (y + 2) * W + x + 2;
    soft[i] += .5; soft[i - 1] += .25; soft[i + 1] += .25;
  }
  for (let i = W; i < W * (H - 1); i++) f[i] = .5 * soft[i] + .25 * (soft[i - W] + soft[i + W]);
  for (let y = 0; y < H - 1; y++) for (let x = 0; x < W - 1; x++) {
    const i = y * W + x, a = f[i], b = f[i + 1], c = f[i + W + 1], d = f[i + W];
    const code = (a > .5) | (b > .5) << 1 | (c > .5) << 2 | (d > .5) << 3;
    if (code === 0 || code === 15) continue;
    const t = (u, v) => (.5 - u) / (v - u), X = x - 1.5, Y = y - 1.5;
    const ends = {T: [X + t(a, b), Y], R: [X + 1, Y + t(b, c)], B: [X + t(d, c), Y + 1], L: [X, Y + t(a, d)]};
    for (const [p, q] of CASES[code]) { path.moveTo(...ends[p]); path.lineTo(...ends[q]); }
  }
  return path;
}

function tint(m, w, h, [r, g, b]) { // the mask in one colour -> canvas of the image's size
  const canvas = h_canvas(w, h), ctx = canvas.getContext("2d"), image = ctx.createImageData(w, h), px = new Uint32Array(image.data.buffer);
  const colour = (255 << 24 | b << 16 | g << 8 | r) >>> 0;
  for (let i = 0; i < m.length; i++) if (m[i]) px[i] = colour;
  ctx.putImageData(image, 0, 0);
  return canvas;
}
const INFERNO = [[87, 16, 110], [127, 30, 108], [168, 46, 95], [204, 66, 72], [234, 99, 42], [249, 142, 9], [251, 190, 35], [241, 239, 117]];

function glow(grid, w, h, strength) { // attention, one cell an image token -> a smooth canvas, bright where the model looks
  const k = Math.max(2, Math.ceil(196 / Math.max(w, h))), W = w * k, H = h * k, spline = d => d < .5 ? .75 - d * d : d < 1.5 ? .5 * (1.5 - d) ** 2 : 0;
  const along = n => Array.from({length: n * k}, (_, x) => { const u = (x + .5) / k - .5, j = Math.round(u); return [j - 1, j, j + 1].map(i => [clamp(i, 0, n - 1), spline(Math.abs(u - i))]); });
  const across = new Float32Array(W * h), heat = new Float32Array(W * H), canvas = h_canvas(W, H), ctx = canvas.getContext("2d"), image = ctx.createImageData(W, H);
  along(w).forEach((near, x) => { for (let y = 0; y < h; y++) for (const [i, f] of near) across[y * W + x] += f * grid[y * w + i]; });
  along(h).forEach((near, y) => { for (let x = 0; x < W; x++) for (const [i, f] of near) heat[y * W + x] += f * across[i * W + x]; });
  let lo = Infinity, hi = 0;
  for (const v of heat) { if (v < lo) lo = v; if (v > hi) hi = v; }
  for (let i = 0; i < heat.length; i++) {
    const v = hi - lo > 1e-6 ? (heat[i] - lo) / (hi - lo) : 0, at = 7 * v, j = Math.min(Math.floor(at), 6);
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = INFERNO[j][c] + (at - j) * (INFERNO[j + 1][c] - INFERNO[j][c]);
    image.data[4 * i + 3] = 225 * strength * v ** .7;
  }
  ctx.putImageData(image, 0, 0);
  return canvas;
}
function h_canvas(w, h) { const c = document.createElement("canvas"); c.width = w; c.height = h; return c; }

// ---- the picture with its layers --------------------------------------------------------------------------------------------
const COLOURS = {truth: [0, 214, 255], prediction: [255, 32, 206], missed: [255, 176, 0], extra: [255, 64, 56]};
const css = ([r, g, b], a = 1) => `rgb(${r} ${g} ${b}/${a})`;

class Picture { // zoom with + − 0, the wheel (once focused, or with Ctrl) and by dragging; `draw` gets boxes and points instead
  constructor({draw = null} = {}) {
    this.draw = draw;
    this.layers = {truth: true, prediction: true, contours: true, fill: false, difference: false, prompts: true}; // a fill would change the colours it covers
    this.opacity = .35; this.masks = {}; this.prompts = []; this.given = []; this.size = [1, 1];
    this.canvas = h("canvas", {class: "d2-canvas" + (draw ? " d2-draws" : ""), tabindex: 0, role: "img", "aria-label": "the picture with its layers"});
    this.note = h("div", {class: "d2-nopicture", hidden: true});
    this.frame = h("div", {class: "d2-frame"}, this.canvas, this.note, h("div", {class: "d2-zoom"},
      h("button", {title: "zoom in (+)", "aria-label": "zoom in", onclick: () => this.zoom(1.5)}, "+"), h("button", {title: "zoom out (−)", "aria-label": "zoom out", onclick: () => this.zoom(1 / 1.5)}, "−"),
      h("button", {title: "whole picture (0)", "aria-label": "whole picture", onclick: () => this.fit()}, "⤢")));
    this.observer = new ResizeObserver(() => this.paint());
    this.observer.observe(this.canvas);
    this.pointers();
    this.fit();
  }
  fit() { this.k = 1; this.centre = [this.size[0] / 2, this.size[1] / 2]; this.paint(); }
  zoom(by, at = this.centre) {
    const k = clamp(this.k * by, 1, 16), s = 1 - this.k / k;
    this.centre = this.centre.map((c, i) => k === 1 ? this.size[i] / 2 : c + (at[i] - c) * s);
    this.k = k; this.paint();
  }
  get scale() { return this.k * Math.min(this.canvas.clientWidth / this.size[0], this.canvas.clientHeight / this.size[1]); }
  image(event) { // where an event is, in image pixels
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left - box.width / 2) / this.scale + this.centre[0], (event.clientY - box.top - box.height / 2) / this.scale + this.centre[1]];
  }
  show(uri, size, note = "") { // another picture; its masks are given apart
    this.masks = {}; this.prompts = []; this.given = []; this.drawn = this.heat = null;
    const same = size && this.size[0] === size[0] && this.size[1] === size[1];
    this.size = size || [1, 1]; this.canvas.style.aspectRatio = `${clamp(this.size[0] / this.size[1], .75, 2)}`;
    this.note.hidden = !!uri; this.note.textContent = note;
    const bitmap = this.bitmap = uri ? new Image() : null;
    if (uri) { bitmap.onload = () => this.paint(); bitmap.src = uri; }
    same && this.k > 1 ? this.paint() : this.fit();
  }
  mask(name, runs) { // null: none
    if (!runs) delete this.masks[name];
    else { const [w, h] = this.size, m = raster(runs, w, h); this.masks[name] = {m, paint: tint(m, w, h, COLOURS[name]), path: outline(m, w, h)}; }
    const {truth, prediction} = this.masks;
    this.diff = null;
    if (truth && prediction) {
      const [w, h] = this.size, pick = f => truth.m.map((v, i) => f(v, prediction.m[i]));
      this.diff = () => this.kept = {missed: tint(pick((a, b) => a & ~b & 1), w, h, COLOURS.missed), extra: tint(pick((a, b) => b & ~a & 1), w, h, COLOURS.extra)};
    }
    this.kept = null; this.paint();
  }
  paint() {
    const c = this.canvas, ratio = window.devicePixelRatio || 1, w = c.clientWidth, hh = c.clientHeight;
    if (!w || !hh) return;
    if (c.width !== Math.round(w * ratio) || c.height !== Math.round(hh * ratio)) { c.width = Math.round(w * ratio); c.height = Math.round(hh * ratio); }
    const ctx = c.getContext("2d"), s = this.scale, L = this.layers;
    ctx.setTransform(1, 0, 0, 1, 0, 0); ctx.clearRect(0, 0, c.width, c.height);
    ctx.setTransform(s * ratio, 0, 0, s * ratio, (w / 2 - this.centre[0] * s) * ratio, (hh / 2 - this.centre[1] * s) * ratio);
    ctx.imageSmoothingEnabled = s * ratio < 8; ctx.imageSmoothingQuality = "high";
    if (this.bitmap && this.bitmap.complete && this.bitmap.naturalWidth) ctx.drawImage(this.bitmap, 0, 0, ...this.size);
    if (this.heat) { // the picture goes dark and grey under it
      for (const [how, colour] of [["saturation", "rgb(0 0 0/.75)"], ["source-over", "rgb(0 0 0/.42)"]]) { ctx.globalCompositeOperation = how; ctx.fillStyle = colour; ctx.fillRect(0, 0, ...this.size); }
      ctx.imageSmoothingEnabled = true; ctx.drawImage(this.heat, 0, 0, ...this.size);
    }
    const both = this.heat ? null : L.difference && this.diff ? this.kept || this.diff() : null;
    for (const [name, on] of [["truth", L.truth && !both], ["prediction", L.prediction && !both]])
      if (on && L.fill && this.masks[name] && !this.heat) { ctx.globalAlpha = this.opacity; ctx.drawImage(this.masks[name].paint, 0, 0); }
    if (both) { ctx.globalAlpha = clamp(this.opacity * 2, .1, 1); ctx.drawImage(both.missed, 0, 0); ctx.drawImage(both.extra, 0, 0); }
    ctx.globalAlpha = 1; ctx.lineCap = ctx.lineJoin = "round";
    const stroke = (path, colour, width) => { for (const [v, n] of [["rgb(0 0 0/.5)", width + 1.6], [colour, width]]) { ctx.strokeStyle = v; ctx.lineWidth = n / s; ctx.stroke(path); } };
    if (L.contours) for (const name of ["truth", "prediction"]) if (L[name] && this.masks[name]) stroke(this.masks[name].path, css(COLOURS[name]), name === "truth" ? 4.6 : 1.8); // both are seen where they agree
    const cross = ([x, y]) => { const p = new Path2D(), r = 6 / s; p.moveTo(x - r, y); p.lineTo(x + r, y); p.moveTo(x, y - r); p.lineTo(x, y + r); return p; };
    const frame = ([x1, y1, x2, y2]) => { const p = new Path2D(); p.rect(x1, y1, x2 - x1 + 1, y2 - y1 + 1); return p; };
    const marks = (list, colour) => { for (const {box, point} of list) {
      if (box) stroke(frame(box), colour, 1.6);
      if (point) stroke(cross([point[0] + .5, point[1] + .5]), colour, 1.8);
    } };
    if (L.truth && !this.heat) marks(this.given, css(COLOURS.truth)); // a truth without masks
    if (L.prompts && !this.heat) marks(this.prompts, "#fff");
    if (this.drawn) { ctx.setLineDash([5 / s, 4 / s]); stroke(frame(this.drawn), "#fff", 1.6); ctx.setLineDash([]); }
  }
  pointers() {
    const c = this.canvas;
    let from = null, centre = null;
    c.addEventListener("wheel", e => {
      if (!e.ctrlKey && !e.metaKey && document.activeElement !== c) return;
      e.preventDefault(); this.zoom(Math.exp(-e.deltaY / 300), this.image(e));
    }, {passive: false});
    c.addEventListener("pointerdown", e => { c.focus(); c.setPointerCapture(e.pointerId); from = this.image(e); centre = [e.clientX, e.clientY, ...this.centre]; });
    c.addEventListener("pointermove", e => {
      if (!from) return;
      const to = this.image(e), [w, h] = this.size;
      if (this.draw && !e.shiftKey) {
        const x = [from[0], to[0]].map(v => clamp(Math.floor(v), 0, w - 1)).sort((a, b) => a - b), y = [from[1], to[1]].map(v => clamp(Math.floor(v), 0, h - 1)).sort((a, b) => a - b);
        this.drawn = (x[1] - x[0]) * this.scale > 4 || (y[1] - y[0]) * this.scale > 4 ? [x[0], y[0], x[1], y[1]] : null;
      } else if (this.k > 1) this.centre = [centre[2] - (e.clientX - centre[0]) / this.scale, centre[3] - (e.clientY - centre[1]) / this.scale].map((v, i) => clamp(v, 0, this.size[i]));
      this.paint();
    });
    c.addEventListener("pointerup", e => {
      if (from && this.draw && !e.shiftKey && this.bitmap) {
        const at = from.map((v, i) => clamp(Math.floor(v), 0, this.size[i] - 1));
        this.draw(this.drawn ? {box: this.drawn} : {point: at});
      }
      from = null; this.drawn = null; this.paint();
    });
    c.addEventListener("pointercancel", () => { from = null; this.drawn = null; this.paint(); });
  }
  key(key) { // the keys that belong to the picture
    if (key === "+" || key === "=") this.zoom(1.5);
    else if (key === "-") this.zoom(1 / 1.5);
    else if (key === "0") this.fit();
    else return false;
    return true;
  }
  controls(names) { // toggles of the layers, and their opacity
    this.toggles = {};
    const chip = ([name, label]) => this.toggles[name] = h("button", {class: `d2-chip d2-${name}`, "aria-pressed": String(this.layers[name]), title: `show or hide (${label[0]})`, onclick: () => this.toggle(name)},
      COLOURS[name] ? h("i", {class: "d2-dot", style: `background:${css(COLOURS[name])}`}) : null, label);
    const slider = h("input", {type: "range", min: 0, max: 100, value: this.opacity * 100, "aria-label": "opacity of the masks", oninput: e => { this.opacity = e.target.value / 100; this.paint(); }});
    this.strength = h("label", {class: "d2-opacity"}, h("span", {}, "opacity"), slider);
    this.weigh();
    return h("div", {class: "d2-layers"}, Object.entries(names).map(chip), this.strength);
  }
  weigh() { this.strength.hidden = !(this.layers.fill || this.layers.difference); } // only a fill has an opacity
  toggle(name) {
    this.layers[name] = !this.layers[name];
    this.toggles[name].setAttribute("aria-pressed", this.layers[name]);
    this.ontoggle && this.ontoggle(name);
    this.weigh(); this.paint();
  }
}

// ---- rewards: bars that add up ----------------------------------------------------------------------------------------------
function parts(entry, about) { // the terms of a rollout, those that are summed; its factor
  const summed = Object.entries(entry.terms || {}).filter(([k]) => k !== about.factor);
  return {summed, sum: summed.reduce((a, [, v]) => a + v, 0), factor: about.factor ? entry.terms[about.factor] : 1};
}

function formula(entry, about) { // how the terms make the reward, in numbers
  const {summed, factor} = parts(entry, about);
  if (about.factor === null) return [summed.map(([k, v]) => `${words(k)} ${num(v)}`).join(" · "), ` · reward ${fixed(entry.reward)}`];
  const sum = summed.map(([k, v]) => h("span", {class: "d2-term"}, `${words(k)} `, h("b", {}, num(v))));
  const plus = sum.flatMap((s, i) => i ? [" + ", s] : [s]);
  return about.factor ? ["(", ...plus, ") × ", h("span", {class: "d2-term"}, `${words(about.factor)} `, h("b", {}, num(factor))), " = ", h("b", {}, fixed(entry.reward))] : [...plus, " = ", h("b", {}, fixed(entry.reward))];
}

function stack(entry, about, [lo, hi]) { // the terms as one bar; solid is what was paid, hatched what the factor took
  const {summed, sum, factor} = parts(entry, about), span = hi - lo || 1, at = v => 100 * (v - lo) / span, bar = h("div", {class: "d2-stack"});
  let up = 0, down = 0;
  for (const [name, value] of summed) {
    const v = value * (about.factor === null ? 1 : factor), from = v < 0 ? down += v : up, width = Math.abs(v);
    if (v > 0) up += v;
    if (width) bar.append(h("i", {"data-term": name, style: `left:${at(from)}%;width:${100 * width / span}%;background:${about.terms[name]}`, title: `${words(name)}: ${num(value)}${about.factor && factor !== 1 ? ` × ${num(factor)} = ${num(v)}` : ""}`}));
  }
  if (about.factor && factor < 1 && sum > 0) bar.append(h("i", {class: "d2-lost", style: `left:${at(sum * factor)}%;width:${100 * sum * (1 - factor) / span}%`, title: `${words(about.factor)} ${num(factor)}: ${num(sum * (1 - factor))} of ${num(sum)} not paid`}));
  if (lo < 0) bar.append(h("i", {class: "d2-zero", style: `left:${at(0)}%`}), h("i", {class: "d2-net", style: `left:${at(entry.reward)}%`, title: `reward ${fixed(entry.reward)}`}));
  return bar;
}

const lean = (v, top) => h("div", {class: "d2-lean"}, h("div", {}, h("i", {class: v < 0 ? "d2-down" : "d2-up", style: `width:${50 * Math.min(Math.abs(v) / (top || 1), 1)}%;${v < 0 ? "right" : "left"}:50%`})), h("span", {}, signed(v)));

function rewardTable(shown, about, pick) { // a row a rollout
  const rows = shown.entries, sums = rows.map(r => parts(r, about)), paid = rows.map((r, i) => about.factor === null ? 1 : sums[i].factor);
  const net = (i, sign) => sums[i].summed.reduce((a, [, v]) => a + Math.max(0, sign * v), 0);
  const hi = Math.max(...rows.map((r, i) => net(i, 1) * Math.max(paid[i], 1)), 1e-9), lo = -Math.max(...rows.map((r, i) => net(i, -1) * paid[i]), 0), top = Math.max(...rows.map(r => Math.abs(r.advantage)));
  const head = h("div", {class: "d2-row d2-head"}, ["", "tokens", "reward", "", "advantage"].map(t => h("span", {}, t)));
  const line = r => h("button", {class: "d2-row", "data-rollout": r.number, onclick: () => pick(r.number)}, h("span", {class: "d2-n"}, r.name), h("span", {class: "d2-tokens"}, num(r.tokens, 4), r.second ? h("em", {}, ` → ${num(r.tokens_second, 4)}`) : null),
    stack(r, about, [lo, hi]), h("b", {}, fixed(r.reward)), lean(r.advantage, top));
  const key = h("p", {class: "d2-key"}, Object.entries(about.terms).filter(([k]) => k !== about.factor).map(([k, c]) => h("span", {}, h("i", {class: "d2-dot", style: `background:${c}`}), words(k))),
    about.factor ? h("span", {}, h("i", {class: "d2-dot d2-lost"}), `not paid: × ${words(about.factor)}`) : null);
  return h("div", {class: "d2-table"}, head, rows.map(line), about.factor === null ? h("p", {class: "d2-key"}, "The terms of this method make the reward in a way of its own: the bars show them one after the other, and need not end at the reward.") : null, key);
}

function predictionTable(shown, pick) { // a row an evaluation
  const line = r => h("button", {class: "d2-row d2-eval", "data-rollout": r.number, onclick: () => pick(r.number)}, h("span", {class: "d2-n"}, r.name), h("span", {class: "d2-tokens"}, num(r.tokens, 4)),
    h("div", {class: "d2-stack"}, h("i", {style: `left:0;width:${100 * r.iou}%;background:var(--accent)`})), h("b", {}, fixed(r.iou)));
  const [before, after] = shown.entries, change = after ? after.iou - before.iou : null;
  const key = change === null ? null : h("p", {class: "d2-key"}, h("span", {}, "change of IoU ", h("b", {class: change < 0 ? "d2-worse" : ""}, signed(change))));
  return h("div", {class: "d2-table"}, h("div", {class: "d2-row d2-eval d2-head"}, ["", "tokens", "IoU", ""].map(t => h("span", {}, t))), shown.entries.map(line), key);
}

// ---- cards --------------------------------------------------------------------------------------------------------------------
const said = (title, count, html, cls = "", pass = null) => h("div", {class: cls, "data-pass": pass}, h("h6", {}, title, count === undefined || count === null ? "" : h("span", {}, `${count} tokens`)), h("div", {class: "d2-said", html}));

function card(entry, about, pick) {
  const facts = entry.reward === undefined ? `IoU ${fixed(entry.iou)}` : formula(entry, about);
  return h("article", {class: "d2-card", "data-rollout": entry.number, onclick: () => pick(entry.number)},
    h("header", {}, h("b", {}, entry.title), h("span", {class: "d2-sum"}, facts)),
    h("div", {class: entry.reward === undefined ? "d2-passes d2-two" : "d2-passes"}, said("first pass", entry.tokens, entry.first, "", "first"), said("description", null, entry.description, "d2-desc"), entry.reward === undefined ? null : said("second pass", entry.second ? entry.tokens_second : null, entry.second || "<p class=raw>no second pass</p>", "", "second")));
}

// ---- filter and sort ------------------------------------------------------------------------------------------------------------
const OPS = {"=": (a, b) => a === b, "!=": (a, b) => a !== b, "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b};

function matcher(text, columns) { // "accuracy>1 tokens<40 ring" -> row number -> bool; throws a sentence
  const tests = (text.match(/\S+/g) || []).map(word => {
    const m = word.match(/^([\w.]+)(>=|<=|!=|=|>|<)(.+)$/);
    if (!m) { const w = word.toLowerCase(); return i => `${columns.query[i]} ${columns.sample[i]}`.toLowerCase().includes(w); }
    const [, field, op, value] = m, column = columns[field];
    if (!column) throw new Error(`there is no field "${field}"; known are ${Object.keys(columns).filter(k => k !== "group").join(", ")}`);
    const number = column.some(v => typeof v === "number"), b = number ? Number(value) : value.toLowerCase();
    if (number && isNaN(b)) throw new Error(`"${field}" is a number; write ${field}${op}1`);
    return i => { const a = column[i]; return a !== null && a !== undefined && OPS[op](number ? a : String(a).toLowerCase(), b); };
  });
  return i => tests.every(t => t(i));
}

function arranged(columns, text, field, down) { // -> {groups: numbers in order, hit: set of rows}
  const fits = matcher(text, columns), rows = new Map(), hit = new Set();
  columns.group.forEach((g, i) => { if (!rows.has(g)) rows.set(g, []); if (fits(i)) { rows.get(g).push(i); hit.add(i); } });
  const value = g => { const v = rows.get(g).map(i => columns[field][i]).filter(x => x !== null && x !== undefined); return typeof v[0] === "number" ? mean(v) : v.length ? String(v[0]) : NaN; };
  const groups = [...rows.keys()].filter(g => rows.get(g).length), keys = new Map(groups.map(g => [g, field === "order" ? g : value(g)])), sign = down ? -1 : 1;
  const compare = (a, b) => a === b ? 0 : a !== a ? 1 : b !== b ? -1 : (a < b ? -1 : 1) * sign;
  return {groups: groups.sort((a, b) => compare(keys.get(a), keys.get(b)) || a - b), hit};
}

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

// ---- the inspector ----------------------------------------------------------------------------------------------------------------
function inspect(model, root) {
  const about = model.get("about"), index = model.get("index"), picture = new Picture(), masks = new Map();
  picture.layers.prediction = about.quick; // a large segmenter draws when asked: by this layer's button
  let list = [], hit = new Set(), steps = [], descending = false, measuring = "", measured = false;
  const slider = (label, input) => { const out = h("output", {}), range = h("input", {type: "range", min: 0, value: 0, "aria-label": label, oninput: e => input(+e.target.value)}); return {range, out, box: h("label", {class: "d2-slider"}, h("span", {}, label), range, out)}; };
  const byStep = slider("step", i => go(steps[i].groups[0])), bySample = slider("sample", i => go(current().groups[i]));
  const search = h("input", {type: "search", class: "d2-filter", "aria-label": "filter", spellcheck: "false", oninput: arrange});
  const sort = h("select", {"aria-label": "sort by", onchange: sorted}), flip = h("button", {class: "d2-flip", onclick: () => { descending = !descending; turned(); sorted(); }});
  const count = h("span", {class: "d2-count"}), any = h("p", {class: "d2-any", hidden: true}), wrong = h("p", {class: "d2-wrong", hidden: true}), question = h("h4"), meta = h("p", {class: "d2-meta"}), table = h("div"), cards = h("div", {class: "d2-cards"}), status = h("p", {class: "d2-status"});
  const sources = Object.keys(index), tabs = sources.length > 1 ? h("div", {class: "d2-tabs"}, sources.map(s => h("button", {"data-source": s, onclick: () => { if (s === model.get("source")) return; model.set("source", s); model.set("at", 0); model.set("rollout", 0); model.save_changes(); }}, s))) : null;
  const layers = picture.controls({truth: "ground truth", prediction: "prediction", contours: "contours", fill: "fill", difference: "difference", prompts: "box and point"});
  const heat = h("p", {class: "d2-entropy"}, "entropy of a token: 0", h("i", {class: "d2-scale"}), "2 nats or more", h("span", {class: "d2-hint"}, "point at a word to see where the model looks; a click holds it"));
  const why = h("p", {class: "d2-notice d2-why", hidden: true}), keys = h("p", {class: "d2-keys"});
  const right = h("div", {class: "d2-right"}, question, meta, table, heat, cards);
  root.append(h("div", {class: "d2-top"}, h("b", {class: "d2-name"}, about.name), h("span", {class: "d2-lead"}, about.lead), tabs), about.missing ? h("p", {class: "d2-notice"}, about.missing) : "");
  if (!sources.length) { root.append(h("p", {class: "d2-meta"}, about.empty)); return; } // nothing to choose from
  root.append(
    h("div", {class: "d2-bar"}, byStep.box, bySample.box), h("div", {class: "d2-bar d2-find"}, search, h("label", {class: "d2-sort"}, h("span", {}, "sort by"), sort, flip), count), wrong, any,
    h("div", {class: "d2-body"}, h("div", {class: "d2-left"}, picture.frame, layers, status, why, keys), right));

  const columns = () => model.get("index")[model.get("source")];
  const current = () => steps.find(s => s.groups.includes(model.get("at"))) || steps[0] || {groups: []};
  function fitting(at) { const {group, rollout} = columns(), i = group.findIndex((g, k) => g === at && hit.has(k)); return i < 0 ? 0 : rollout[i]; } // the first rollout that fits
  function go(at) { if (at === undefined || at === model.get("at")) return; model.set("at", at); model.set("rollout", fitting(at)); model.save_changes(); place(); }
  function pick(rollout) { if (rollout === model.get("rollout")) return; model.set("rollout", rollout); model.save_changes(); }
  function turned() { // the arrow points where the numbers go
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
    fill(keys, key("←", "→"), turn, choice, key("+", "−", "0"), " zoom");
  }
  function fields() {
    search.placeholder = example();
    const names = Object.keys(columns()).filter(k => !["group", "query", "step", "sample", "rollout"].includes(k));
    fill(sort, h("option", {value: "order"}, model.get("source") === "evaluation" ? "order" : "step"), names.map(n => h("option", {value: n}, words(n))));
    for (const t of tabs ? tabs.children : []) t.setAttribute("aria-pressed", t.dataset.source === model.get("source"));
  }
  function arrange() { // the groups that fit, in order; those of one step share a place on the first slider
    try { const found = arranged(columns(), search.value, sort.value, descending); list = found.groups; hit = found.hit; wrong.hidden = true; }
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
    if (!s.entries) { fill(question, about.empty || "Nothing to show."); return; }
    picture.show(s.image, s.size, s.note);
    picture.given = s.given || [];
    picture.mask("truth", s.truth);
    fill(question, s.query); fill(meta, s.meta);
    fill(table, s.source === "evaluation" ? predictionTable(s, pick) : rewardTable(s, about, pick));
    fill(cards, s.entries.map(e => card(e, about, pick)));
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
  picture.ontoggle = name => { if (name === "prediction") choose(); };
  model.on("msg:custom", m => { if (m.mask === undefined) return; masks.set(m.mask, m); const s = model.get("shown"); if (m.mask === `${s.source}/${s.at}/${model.get("rollout")}`) choose(); });
  model.on("change:shown", draw);
  model.on("change:rollout", () => { choose(); const e = cards.querySelector(`[data-rollout="${model.get("rollout")}"]`); if (e && right.scrollHeight > right.clientHeight) right.scrollTo({top: Math.max(0, e.offsetTop - 12), behavior: "smooth"}); });
  model.on("change:at", place);
  model.on("change:source", () => { search.value = ""; fields(); arrange(); });
  model.on("change:index", () => { measuring = ""; sorted(); });
  model.on("msg:custom", m => { if (m.measured !== undefined) count.textContent = measuring = m.measured; });
  root.addEventListener("keydown", e => {
    if (e.target.matches("input[type=search],select") || e.ctrlKey || e.metaKey || e.altKey) return;
    const now = current(), i = steps.indexOf(now), j = now.groups.indexOf(model.get("at")), next = steps[i + {ArrowRight: 1, ArrowLeft: -1}[e.key]];
    const layer = {g: "truth", p: "prediction", d: "difference", c: "contours", f: "fill", b: "prompts"}[e.key];
    if (e.target.matches(".d2-opacity input") && e.key.startsWith("Arrow")) return;
    if (e.key === "ArrowRight" || e.key === "ArrowLeft") next && go(next.groups[clamp(j, 0, next.groups.length - 1)]);
    else if (e.key === "ArrowUp" || e.key === "ArrowDown") go(now.groups[j + (e.key === "ArrowDown" ? 1 : -1)]);
    else if (/^[1-9]$/.test(e.key)) { if (+e.key <= (model.get("shown").entries || []).length) pick(+e.key - 1); }
    else if (layer) picture.toggle(layer);
    else if (!picture.key(e.key)) return;
    e.preventDefault(); e.stopPropagation();
  });
  turned();
  if (sources.length) { fields(); arrange(); }
  draw();
  return () => picture.observer.disconnect();
}

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

// ---- the door -----------------------------------------------------------------------------------------------------------------------
const VIEWS = {inspect, live, compare, ask};

export default {
  render({model, el}) {
    const root = h("div", {class: `dr2seg d2-${model.get("kind")}`, tabindex: 0, "data-lm-suppress-shortcuts": "true"});
    el.append(root);
    return VIEWS[model.get("kind")](model, root);
  }
};
