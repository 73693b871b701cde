// ---- filter and sort ------------------------------------------------------------------------------------------------------------
const OPS = {"=": (a, b) => a === b, "!=": (a, b) => a !== b, "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b};

const opened = new WeakMap();

function unpacked(columns) { // as `pack_columns` sends them -> a value a row; opened once
  if (!opened.has(columns)) opened.set(columns, Object.fromEntries(Object.entries(columns).map(([name, c]) => [name, Array.isArray(c) ? c : c.at.map(i => c.names[i])])));
  return opened.get(columns);
}

// The language of core/conditions: what is typed is cut into words, and a word is a condition or a text to look for.
const unquoted = text => text.replaceAll('"', ""), filterWords = text => text.match(/(?:"[^"]*"|\S)+/g) || [];
function conditionOf(word) { // [field, sign, value], or null
  const m = word.match(/^([\w.]+)(>=|<=|!=|=|>|<)(.+)$/);
  return m && [m[1], m[2], unquoted(m[3])];
}

function matcher(text, columns) { // "accuracy>1 tokens<40 ring" -> row number -> bool; throws a sentence
  const tests = filterWords(text).map(word => {
    const condition = conditionOf(word);
    if (!condition) { const w = unquoted(word).toLowerCase(); return i => `${columns.query[i]} ${columns.sample[i]} ${columns.note ? columns.note[i] : ""}`.toLowerCase().includes(w); }
    const [field, op, value] = condition, column = columns[field];
    if (!column) throw new Error(`there is no field "${field}"; known are ${Object.keys(columns).filter(k => k !== "group").join(", ")}`);
    const number = column.some(v => typeof v === "number"), b = number ? Number(value) : value.toLowerCase();
    if (number && isNaN(b)) throw new Error(`${field} is a number; write ${field}${op}1, not ${value}`);
    return i => {
      const a = column[i], fits = v => OPS[op](number ? v : String(v).toLowerCase(), b);
      if (Array.isArray(a)) return op === "!=" ? a.every(fits) : a.some(fits); // tags
      return a !== null && a !== undefined && fits(a);
    };
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
