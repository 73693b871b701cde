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
