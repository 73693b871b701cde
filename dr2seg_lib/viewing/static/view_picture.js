// ---- the picture with its layers --------------------------------------------------------------------------------------------
const COLOURS = {truth: [0, 214, 255], prediction: [255, 32, 206], missed: [255, 176, 0], extra: [222, 12, 8]};
const css = ([r, g, b], a = 1) => `rgb(${r} ${g} ${b}/${a})`;

const LAYER_KEYS = {g: "truth", p: "prediction", c: "contours", f: "fill", d: "difference", b: "prompts"};

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
    else if (this.toggles && this.toggles[LAYER_KEYS[key]]) this.toggle(LAYER_KEYS[key]);
    else return false;
    return true;
  }
  controls(names) { // toggles of the layers, and their opacity
    this.toggles = {};
    const chip = ([name, label]) => this.toggles[name] = h("button", {class: `d2-chip d2-${name}`, "aria-pressed": String(this.layers[name]), title: `show or hide (${Object.keys(LAYER_KEYS).find(k => LAYER_KEYS[k] === name)})`, onclick: () => this.toggle(name)},
      COLOURS[name] ? h("i", {class: "d2-dot", style: `background:${css(COLOURS[name])}`}) : null, label);
    const slider = h("input", {type: "range", min: 0, max: 100, value: this.opacity * 100, "aria-label": "opacity of the masks", oninput: e => { this.opacity = e.target.value / 100; this.paint(); }});
    this.strength = h("label", {class: "d2-opacity"}, h("span", {}, "opacity"), slider);
    this.weigh();
    return h("div", {class: "d2-layers"}, Object.entries(names).map(chip), this.strength);
  }
  show_layers(wanted) { // as someone else has set them
    for (const name of Object.keys(this.toggles)) if (name in wanted && wanted[name] !== this.layers[name]) { this.layers[name] = wanted[name]; this.toggles[name].setAttribute("aria-pressed", this.layers[name]); }
    this.weigh(); this.paint();
  }
  weigh() { this.strength.hidden = !(this.layers.fill || this.layers.difference); } // only a fill has an opacity
  toggle(name) {
    this.layers[name] = !this.layers[name];
    this.toggles[name].setAttribute("aria-pressed", this.layers[name]);
    this.ontoggle && this.ontoggle(name);
    this.weigh(); this.paint();
  }
}
