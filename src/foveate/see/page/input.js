// What people do: point, click, press keys. Every event becomes one change of `view`.

function show(change) {
  if ("token" in change && change.token !== view.token) view.target = null;
  Object.assign(view, { hover: null }, change);
  later();
}

function tokenOf(event) {
  const chip = event.target.closest("#tokens button");
  return chip ? Number(chip.dataset.token) : null;
}

/** Pins a token and brings it into sight, without moving the page when it is there already. */
function pin(token, focus) {
  show({ token });
  chips[token].scrollIntoView({ block: "nearest" });
  if (focus) chips[token].focus({ preventScroll: true });
}

function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.tagName === "SELECT") return; // theirs already
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  const inGrid = event.target.closest("#cells"), clamp = (x, count) => Math.max(0, Math.min(count - 1, x));
  if (event.key === "Escape") show({ target: null });
  if (!step) return;
  if (event.shiftKey || inGrid) {
    show({ layer: clamp(view.layer + step[0], L), head: clamp(view.head + step[1], H) });
    if (inGrid) cells[view.layer * H + view.head].focus();
  } else if (step[1]) pin(clamp(rowsOf(view.token)[0] + step[1], N), event.target.closest("#tokens"));
  else return;
  event.preventDefault();
}

function listen() {
  // Between two tokens the last one stays: no flicker on the way.
  $("tokens").addEventListener("pointerover", (event) => {
    const hover = tokenOf(event);
    if (hover !== null && event.pointerType === "mouse") show({ hover });
  });
  $("tokens").addEventListener("pointerleave", () => show({}));
  $("tokens").addEventListener("click", (event) => tokenOf(event) !== null && pin(tokenOf(event)));
  $("keys").addEventListener("click", (event) => {
    const key = event.target.closest("button")?.dataset.key;
    if (key === undefined) return;
    if (view.received) pin(Number(key));
    else show({ target: Number(key) });
    chips[key].scrollIntoView({ block: "nearest" });
    $("keys").querySelector(`[data-key="${key}"]`)?.focus();
  });
  $("cells").addEventListener("click", ({ target: { layer, head } }) => layer !== undefined && show({ layer, head }));
  for (const id of ["layer", "head"]) $(id).addEventListener("change", () => show({ [id]: Number($(id).value) }));
  $("from").addEventListener("click", () => show({ received: false }));
  $("received").addEventListener("click", () => show({ received: true }));
  $("by-weight").addEventListener("click", () => show({ pattern: false }));
  $("by-pattern").addEventListener("click", () => show({ pattern: true }));
  $("strip").addEventListener("click", (event) => pin(Math.floor((event.offsetX / ($("strip").clientWidth + 1)) * N)));
  addEventListener("keydown", onKey);
  addEventListener("resize", later);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    readRamp();
    patterns = null;
    later();
  });
}

load().then(() => {
  readRamp();
  build();
  listen();
  chips[rowsOf(view.token)[0]].scrollIntoView({ block: "nearest" });
  draw();
  document.documentElement.dataset.ready = "yes";
}).catch((error) => {
  $("problem").hidden = false;
  $("problem").textContent = `This page could not be drawn (${error.message}). It needs a browser of 2023 or newer.`;
});
