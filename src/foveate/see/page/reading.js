"use strict";
// What the file holds, and every question that the page asks of it.

const $ = (id) => document.getElementById(id);
const about = JSON.parse($("report").textContent);
const { tokens, shape: [L, H, N, K] } = about;
let index, weight, rest, average; // average: the mean weight that each key received

/** Arrays lie there plane by plane (all low bytes, then all higher ones), deflated, in base64. */
async function load() {
  const text = atob($("data").textContent);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  let at = 0;
  const integers = (count, width) => {
    const out = new Uint32Array(count);
    for (let p = 0; p < width; p++) for (let i = 0; i < count; i++) out[i] += bytes[at++] << (8 * p);
    return out;
  };
  const squares = (count, width) => Float32Array.from(integers(count, width), (v) => (v / (256 ** width - 1)) ** 2);
  const rows = L * H * N;
  index = integers(rows * K, about.indexBytes);
  weight = squares(rows * K, about.weightBytes);
  rest = squares(rows, 2);
  average = squares(rows, 2);
}

const row = (layer, head, token) => (layer * H + head) * N + token;

/** A word of several tokens stands behind the last token: it looks where they look on average, and receives their sum. */
const rowsOf = (token) => (token === N ? about.word : [token]);
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const mean = (numbers) => sum(numbers) / numbers.length;
const received = (layer, head, token) => sum(rowsOf(token).map((t) => average[row(layer, head, t)]));
const unlisted = (layer, head, token) => mean(rowsOf(token).map((t) => rest[row(layer, head, t)]));

/** The keys that one row shows, largest first. */
function looksAt(layer, head, token) {
  const rows = rowsOf(token), found = new Map();
  for (const t of rows) {
    const from = row(layer, head, t) * K;
    for (let i = from; i < from + K; i++) {
      if (weight[i] > 0) found.set(index[i], (found.get(index[i]) ?? 0) + weight[i] / rows.length);
    }
  }
  return [...found].map(([token, weight]) => ({ token, weight })).sort((a, b) => b.weight - a.weight);
}

/** The most that a key which this row does not list can weigh. */
const unseen = (r) => (K < N ? Math.min(weight[r * K + K - 1], rest[r]) : 0);

/** The weight of one edge, or null where the key is not listed (then `bound` is the most it can be). */
function edge(layer, head, token, key) {
  const keys = rowsOf(key), found = looksAt(layer, head, token).filter((k) => keys.includes(k.token));
  const bound = mean(rowsOf(token).map((t) => unseen(row(layer, head, t)))) * (keys.length - found.length);
  return { weight: found.length ? sum(found.map((k) => k.weight)) : bound > 0 ? null : 0, bound };
}

/** The rows that list this key, largest first, and the most that any other row can give it. */
function lookedAtBy(layer, head, key) {
  const rows = [];
  let bound = 0;
  for (let t = 0; t < N; t++) {
    const e = edge(layer, head, t, key);
    if (e.weight === null) bound = Math.max(bound, e.bound);
    else if (e.weight > 0) rows.push({ token: t, weight: e.weight });
  }
  return { rows: rows.sort((a, b) => b.weight - a.weight), bound };
}

/** Percent with the digits that the file holds: tenths (finer for tiny shares), or whole ones for one-byte weights. */
function percent(w, fine = about.weightBytes > 1) {
  if (w > 0.9995) return "100%";
  if (w < 2e-6) return "0%"; // what float32 cannot tell from nothing
  if (!fine) return w > 0 && w < 0.01 ? "<1%" : `${(100 * w).toFixed()}%`;
  if (w > 0 && w < 1e-5) return "<0.001%";
  return `${w > 0 && w < 0.001 ? (100 * w).toPrecision(1) : (100 * w).toFixed(1)}%`;
}

const CONTROL = { "\n": "⏎", "\t": "⇥", " ": "␣", "": "∅" };
const visible = (token) => CONTROL[token] ?? token.replace(/[\u0000-\u001f\u007f]/g, (c) => CONTROL[c] ?? "�");
const shown = (t) => rowsOf(t).map((one) => visible(tokens[one])).join(" ");
const special = (t) => /^(\[[A-Z]+\]|<[^<>]*>)$/.test(tokens[t]);
