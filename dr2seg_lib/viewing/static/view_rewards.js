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
  const line = r => h("button", {class: "d2-row", "data-rollout": r.number, onclick: () => pick(r.number)}, h("span", {class: "d2-n"}, r.name, h("i", {class: "d2-mark"})), h("span", {class: "d2-tokens"}, num(r.tokens, 4), r.second ? h("em", {}, ` → ${num(r.tokens_second, 4)}`) : null),
    stack(r, about, [lo, hi]), h("b", {}, fixed(r.reward)), lean(r.advantage, top));
  const key = h("p", {class: "d2-key"}, Object.entries(about.terms).filter(([k]) => k !== about.factor).map(([k, c]) => h("span", {}, h("i", {class: "d2-dot", style: `background:${c}`}), words(k))),
    about.factor ? h("span", {}, h("i", {class: "d2-dot d2-lost"}), `not paid: × ${words(about.factor)}`) : null);
  return h("div", {class: "d2-table"}, head, rows.map(line), about.factor === null ? h("p", {class: "d2-key"}, "The terms of this method make the reward in a way of its own: the bars show them one after the other, and need not end at the reward.") : null, key);
}

function predictionTable(shown, pick) { // a row an evaluation
  const line = r => h("button", {class: "d2-row d2-eval", "data-rollout": r.number, onclick: () => pick(r.number)}, h("span", {class: "d2-n"}, r.name, h("i", {class: "d2-mark"})), h("span", {class: "d2-tokens"}, num(r.tokens, 4)),
    h("div", {class: "d2-stack"}, h("i", {style: `left:0;width:${100 * r.iou}%;background:var(--accent)`})), h("b", {}, fixed(r.iou)));
  const [before, after] = shown.entries, change = after ? after.iou - before.iou : null;
  const key = change === null ? null : h("p", {class: "d2-key"}, h("span", {}, "change of IoU ", h("b", {class: change < 0 ? "d2-worse" : ""}, signed(change))));
  return h("div", {class: "d2-table"}, h("div", {class: "d2-row d2-eval d2-head"}, ["", "tokens", "IoU", ""].map(t => h("span", {}, t))), shown.entries.map(line), key);
}

// ---- cards --------------------------------------------------------------------------------------------------------------------
const said = (title, count, html, cls = "", pass = null) => h("div", {class: cls, "data-pass": pass}, h("h6", {}, title, count === undefined || count === null ? "" : h("span", {}, `${count} tokens`)), h("div", {class: "d2-said", html}));

function card(entry, about, pick, mark) {
  const facts = entry.reward === undefined ? `IoU ${fixed(entry.iou)}` : formula(entry, about);
  return h("article", {class: "d2-card", "data-rollout": entry.number, onclick: () => pick(entry.number)},
    h("header", {}, h("b", {}, entry.title), h("span", {class: "d2-sum"}, facts), verdictButtons(verdict => mark(entry.number, verdict))), h("p", {class: "d2-own", hidden: true}),
    h("div", {class: entry.reward === undefined ? "d2-passes d2-two" : "d2-passes"}, said("first pass", entry.tokens, entry.first, "", "first"), said("description", null, entry.description, "d2-desc"), entry.reward === undefined ? null : said("second pass", entry.second ? entry.tokens_second : null, entry.second || "<p class=raw>no second pass</p>", "", "second")));
}
