// One page, one state: `view` says what is shown, `draw()` shows it. Tokens only ever become textContent.

const view = { ...about.start, hover: null, target: null, received: false, pattern: false };
const SHORT = N <= 48; // large type and wide arcs; longer texts scroll
const LINES = SHORT ? 0.01 : 0.03;
let ramp;

/** A color by its name in viewer.css, as the light or the dark page has it. */
const named = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function readRamp() {
  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  ramp = named("--ramp").split(/\s+/).map(channels);
}

/** Heat follows the square root of the share, so that 4% is visible beside 100%. */
function color(share) {
  const x = Math.sqrt(Math.min(1, Math.max(0, share))) * (ramp.length - 1);
  const i = Math.min(Math.floor(x), ramp.length - 2);
  return ramp[i].map((c, j) => Math.round(c + (ramp[i + 1][j] - c) * (x - i)));
}
const css = (rgb) => `rgb(${rgb.join(",")})`;

/** Dark or light letters, whichever reads better on this color (its luminance as WCAG has it). */
function ink(rgb) {
  const [r, g, b] = rgb.map((c) => (c / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.2 ? "#211d17" : "#fff";
}

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
function shape(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

const chips = [];
let heated = [], scheduled = false;
function later() {
  if (!scheduled) requestAnimationFrame(draw);
  scheduled = true;
}

function draw() {
  scheduled = false;
  const { layer, head } = view, source = view.hover ?? view.token;
  const list = looksAt(layer, head, source);
  const target = (view.hover === null ? view.target : null) ?? list[0]?.token ?? source;
  const first = row(layer, head, 0), means = average.subarray(first, first + N);
  const top = view.received ? means.reduce((a, b) => Math.max(a, b), 1e-9) : 1;
  drawClaim(source, target);
  drawTokens(source, target, list, top);
  drawKeys(source, target, list);
  drawHeads(source, target);
  $("low").textContent = "0%";
  $("high").textContent = percent(top, true);
  const pen = $("ramp").getContext("2d");
  for (let x = 0; x < 160; x++) {
    pen.fillStyle = css(color((x / 159) ** 2));
    pen.fillRect(x, 0, 1, 10);
  }
  $("layer").value = layer;
  $("head").value = head;
  const { pattern } = view;
  const pressed = { from: !view.received, received: view.received, "by-weight": !pattern, "by-pattern": pattern };
  for (const [id, on] of Object.entries(pressed)) $(id).setAttribute("aria-pressed", on);
  Object.assign(document.body.dataset, { layer, head, token: source, target, received: view.received });
}

/** What each token receives is kept on two bytes always. */
const percentNow = (value) => (view.received ? percent(value, true) : percent(value));

function drawClaim(source, target) {
  const { layer, head } = view, e = edge(layer, head, source, target);
  const strong = (textContent, className = "") => make("b", { textContent, className });
  const value = view.received ? received(layer, head, source) : e.weight;
  const number = strong(value === null ? `at most ${percent(e.bound)}` : percentNow(value), "number");
  const words = view.received ? [" receives ", number, " on average"] : [" → ", strong(shown(target)), " ", number];
  const count = rowsOf(source).length, many = count > 1 ? `, ${view.received ? "sum" : "mean"} of its ${count} tokens` : "";
  const where = make("span", { className: "quiet", textContent: ` in layer ${layer}, head ${head}${many}` });
  $("claim").replaceChildren(strong(shown(source), "source"), ...words, where);
}

function drawTokens(source, target, list, top) {
  for (const t of heated) chips[t].style.background = chips[t].style.color = "";
  for (const chip of document.querySelectorAll("#tokens .source, #tokens .target")) {
    chip.classList.remove("source", "target");
    chip.removeAttribute("aria-current");
    chip.tabIndex = -1;
  }
  const first = row(view.layer, view.head, 0);
  const heat = view.received ? tokens.map((_, t) => ({ token: t, weight: average[first + t] })) : list;
  for (const { token, weight: w } of heat) {
    const rgb = color(w / top);
    chips[token].style.background = css(rgb);
    chips[token].style.color = w / top > 0.02 ? ink(rgb) : "";
  }
  heated = heat.map((k) => k.token);
  for (const t of rowsOf(source)) {
    chips[t].classList.add("source");
    chips[t].setAttribute("aria-current", "true");
  }
  chips[rowsOf(source)[0]].tabIndex = 0;
  if (!view.received) for (const t of rowsOf(target)) chips[t].classList.add("target");
  const lines = view.received ? [] : list.filter((k) => k.weight >= LINES).reverse();
  $("lines").replaceChildren(...lines.map((key) => line(source, key)));
  drawStrip(source, heat, top);
}

/** A curve behind the tokens: an arc on one line of text, a bend between two, a loop from a token to itself. */
function line(source, { token, weight: w }) {
  const from = rowsOf(source), a = chips[from[from.length >> 1]], b = chips[token], y0 = $("tokens").offsetTop;
  const x1 = a.offsetLeft + a.offsetWidth / 2, x2 = b.offsetLeft + b.offsetWidth / 2;
  let y1 = y0 + a.offsetTop, y2 = y0 + b.offsetTop, path;
  if (y1 === y2) {
    const lift = Math.min(SHORT ? 64 : 24, 18 + Math.abs(x2 - x1) * 0.16), side = a === b ? 16 : 0;
    path = `M${x1 - side / 2} ${y1}C${x1 - side} ${y1 - lift} ${x2 + side} ${y2 - lift} ${x2 + side / 2} ${y2}`;
  } else {
    if (y2 < y1) y2 += b.offsetHeight; else y1 += a.offsetHeight;
    path = `M${x1} ${y1}C${x1} ${(y1 + y2) / 2} ${x2} ${(y1 + y2) / 2} ${x2} ${y2}`;
  }
  const stroke = css(color(Math.max(w, 0.08))), width = (1 + 7 * w).toFixed(1);
  return shape("path", { d: path, fill: "none", stroke, "stroke-width": width, "stroke-linecap": "round" });
}

/** Where in a long text the weight lies: one tick a key, the chosen token in blue. */
function drawStrip(source, heat, top) {
  const canvas = $("strip");
  if ((canvas.hidden = SHORT)) return;
  const scale = devicePixelRatio, pen = canvas.getContext("2d");
  const width = (canvas.width = canvas.clientWidth * scale), height = (canvas.height = 40 * scale);
  const tick = (token, share, fill) => {
    pen.fillStyle = fill;
    pen.fillRect((token / N) * width, height * (1 - share), Math.max(2 * scale, width / N), height * share);
  };
  pen.fillStyle = named("--line");
  pen.fillRect(0, height - scale, width, scale);
  for (const t of rowsOf(source)) tick(t, 1, named("--eye"));
  for (const { token, weight: w } of heat) tick(token, Math.sqrt(w / top), css(color(Math.max(0.1, w / top))));
}

/** A key as a button, in a long text between its neighbors. */
function keyLabel(token, pressed, number) {
  const key = make("button", { type: "button", textContent: shown(token), title: `token ${token}` });
  key.dataset.key = token;
  key.setAttribute("aria-pressed", pressed);
  key.setAttribute("aria-label", `${shown(token)}, token ${token}, ${number}`);
  if (SHORT) return [key];
  const around = (from, to) => Array.from({ length: Math.max(0, to - from) }, (_, i) => shown(from + i)).join(" ");
  const before = around(Math.max(0, token - 2), token), after = around(token + 1, Math.min(N, token + 3));
  const span = (textContent) => make("span", { className: "around", textContent });
  return [span(before), key, span(after)];
}

function tableRow(label, share, number, fill) {
  const bar = make("span", { className: fill ? "weight" : "weight hatched" });
  bar.style.width = `${Math.min(1, share) * 100}%`;
  if (fill) bar.style.background = fill;
  return make("tr", {}, make("td", {}, ...label), make("td", {}, bar), make("td", { textContent: number }));
}

const ROWS = 64;
function drawKeys(source, target, list) {
  const { layer, head } = view, left = unlisted(layer, head, source);
  const { rows, bound } = view.received ? lookedAtBy(layer, head, source) : { rows: list, bound: 0 };
  const bars = rows.slice(0, ROWS).map(({ token, weight: w }) => {
    const label = keyLabel(token, !view.received && token === target, percent(w));
    return tableRow(label, w, percent(w), css(color(Math.max(0.05, w))));
  });
  const more = rows.slice(ROWS), others = sum(more.map((k) => k.weight));
  const total = view.received ? "" : percent(others); // weights of several rows have no sum that means anything
  if (more.length) bars.push(tableRow([`${more.length} more`], view.received ? 0 : others, total, named("--line")));
  $("keys").tBodies[0].replaceChildren(...bars);
  const [unshown, number] = view.received ? [bound, `≤${percent(bound)}`] : [left, percent(left, true)];
  $("keys").tFoot.replaceChildren(tableRow(["not shown: "], unshown, number));
  const name = `“${shown(source)}”`;
  $("keys-title").textContent = view.received ? `Who looks at ${name}` : `${name} looks at`;
  $("keys-note").textContent = view.received ? listedRows(rows.length, bound) : listedKeys(list.length);
}

function listedKeys(count) {
  const some = `The ${count} largest of ${N} keys; what is not shown lies on other tokens.`;
  return `${K < N ? some : "Every key is listed."} Choose a key to follow it through every head.`;
}

function listedRows(count, bound) {
  if (K >= N) return "Every row is listed. The average above is over the rows that may see this token.";
  return `Approximate: ${count || "no"} rows list this token among their ${K} largest keys and only those are known; `
    + `any other row gives it at most ${percent(bound)}. The average above is exact.`;
}

let size = 24, patterns = null;
function drawHeads(source, target) {
  const canvas = $("squares"), scale = devicePixelRatio, pen = canvas.getContext("2d"), side = size * scale;
  canvas.width = H * side;
  canvas.height = L * side;
  canvas.style.width = `${H * size}px`;
  pen.imageSmoothingEnabled = false;
  const hidden = named("--line"), inner = side - 2 * scale;
  let dots = false;
  if (view.pattern) patterns ??= drawPatterns();
  for (const cell of cells) {
    const { layer, head } = cell, x = head * side + scale, y = layer * side + scale;
    const e = view.received ? { weight: received(layer, head, source) } : edge(layer, head, source, target);
    if (view.pattern) pen.drawImage(patterns, head * PATCH, layer * PATCH, PATCH, PATCH, x, y, inner, inner);
    else {
      const dot = e.weight === null ? 0.4 : 0;
      dots ||= dot > 0;
      pen.fillStyle = dot ? hidden : css(color(e.weight));
      pen.fillRect(x + inner * dot, y + inner * dot, inner * (1 - 2 * dot), inner * (1 - 2 * dot));
    }
    pen.strokeStyle = hidden;
    pen.strokeRect(x, y, inner, inner);
    const here = layer === view.layer && head === view.head;
    const value = e.weight === null ? `not shown, at most ${percent(e.bound)}` : percentNow(e.weight);
    cell.title = `layer ${layer} head ${head}: ${value}`;
    cell.setAttribute("aria-label", cell.title);
    cell.setAttribute("aria-pressed", here);
    cell.tabIndex = here ? 0 : -1;
  }
  const pair = view.received ? `“${shown(source)}” receives` : `“${shown(source)}” → “${shown(target)}”`;
  $("heads-title").textContent = view.pattern ? "Every head" : pair;
  $("heads-note").textContent = view.pattern ? "In a square: rows look at columns, from the first token to the last."
    : dots ? `Layers down, heads across. A dot: not among the ${K} largest keys there.` : "Layers down, heads across.";
}

/** All heads as small pictures of their rows and columns; a pixel is the largest weight that falls into it. */
const PATCH = Math.min(N, 48);
function drawPatterns() {
  const canvas = make("canvas", { width: H * PATCH, height: L * PATCH }), pen = canvas.getContext("2d");
  for (let l = 0; l < L; l++) for (let h = 0; h < H; h++) {
    const most = new Float32Array(PATCH * PATCH), image = pen.createImageData(PATCH, PATCH), first = row(l, h, 0) * K;
    const place = (token) => Math.floor((token * PATCH) / N);
    for (let i = 0; i < N * K; i++) {
      const at = place(Math.floor(i / K)) * PATCH + place(index[first + i]);
      if (weight[first + i] > most[at]) most[at] = weight[first + i];
    }
    most.forEach((w, i) => image.data.set([...color(w), 255], i * 4));
    pen.putImageData(image, h * PATCH, l * PATCH);
  }
  return canvas;
}

const cells = [];
function build() {
  $("model").textContent = about.model;
  document.title = `What ${about.model} attended to`;
  $("note").textContent = about.note;
  $("cause").hidden = about.note.includes("a weight, not a cause"); // said once is enough
  const kept = K < N ? `, the ${K} largest keys of every row` : "";
  $("size").textContent = `${N} tokens, ${L} layers × ${H} heads${kept}`;
  $("hint").textContent = `Point at a token, click to pin it. Lines: ${LINES * 100}% or more.`
    + (SHORT ? "" : " Ticks: where in the whole text.");
  document.body.classList.toggle("short", SHORT);
  for (let t = 0; t < N; t++) {
    const className = special(t) ? "special" : "";
    const chip = make("button", { type: "button", textContent: shown(t), className, tabIndex: -1 });
    chip.dataset.token = t;
    chips.push(chip);
  }
  $("tokens").append(...chips);
  for (const [id, count] of [["layer", L], ["head", H]]) {
    for (let i = 0; i < count; i++) $(id).append(make("option", { value: i, textContent: i }));
  }
  size = Math.max(12, Math.min(40, Math.floor(540 / H)));
  $("cells").style.gridTemplateColumns = `repeat(${H}, ${size}px)`;
  $("cells").style.gridAutoRows = `${size}px`;
  for (let i = 0; i < L * H; i++) cells.push(make("button", { type: "button", layer: Math.floor(i / H), head: i % H }));
  $("cells").append(...cells);
  const name = (textContent, left, top) => {
    const node = make("span", { className: "name", textContent });
    Object.assign(node.style, { left: `${left}px`, top: `${top}px` });
    $("heads").append(node);
  };
  for (let h = 0; h < H; h++) name(h, 26 + (h + 0.5) * size, 9);
  for (let l = 0; l < L; l++) name(l, 13, 18 + (l + 0.5) * size);
}
