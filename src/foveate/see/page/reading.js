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

/** The keys that one row shows, largest first. */
function looksAt(layer, head, token) {
  const from = row(layer, head, token) * K, out = [];
  for (let i = from; i < from + K; i++) if (weight[i] > 0) out.push({ token: index[i], weight: weight[i] });
  return out;
}

/** The most that a key which this row does not list can weigh. */
const unseen = (r) => (K < N ? Math.min(weight[r * K + K - 1], rest[r]) : 0);

/** The weight of one edge, or null where the key is not listed (then `bound` is the most it can be). */
function edge(layer, head, token, key) {
  const found = looksAt(layer, head, token).find((k) => k.token === key);
  const bound = unseen(row(layer, head, token));
  return { weight: found ? found.weight : bound > 0 ? null : 0, bound };
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
const shown = (t) => CONTROL[tokens[t]] ?? tokens[t].replace(/[\u0000-\u001f\u007f]/g, (c) => CONTROL[c] ?? "�");
const special = (t) => /^(\[[A-Z]+\]|<[^<>]*>)$/.test(tokens[t]);
