// The text as it is on the screen, saved as a picture: an SVG is written, a PNG is that SVG painted.

/** Everything visible in the text's own frame, with the claim above and what is not shown below. */
function picture() {
  const box = $("scroll"), pad = 24, top = 56, from = box.scrollTop;
  const width = box.clientWidth + 2 * pad, height = box.clientHeight + top + 64, viewBox = `0 0 ${width} ${height}`;
  const font = "system-ui, 'Noto Sans', 'DejaVu Sans', sans-serif";
  const svg = shape("svg", { xmlns: "http://www.w3.org/2000/svg", width, height, viewBox, "font-family": font });
  const text = (x, y, size, fill, content) => {
    const node = shape("text", { x, y, "font-size": size, fill, "xml:space": "preserve" });
    node.textContent = content;
    return node;
  };
  const band = (y, height) => shape("rect", { y, width, height, fill: named("--card") });
  const lines = shape("g", { transform: `translate(${pad} ${top - from})` }), marks = lines.cloneNode();
  lines.append(...[...$("lines").children].map((path) => path.cloneNode()));
  for (const chip of chips) {
    const { offsetLeft: x, offsetWidth, offsetHeight } = chip, y = chip.offsetTop + $("tokens").offsetTop;
    if (y + offsetHeight < from || y > from + box.clientHeight) continue;
    const style = getComputedStyle(chip), fill = style.backgroundColor;
    const stroke = chip.classList.contains("source") ? named("--eye") : "none";
    const size = { x, y, width: offsetWidth, height: offsetHeight, rx: 7 };
    marks.append(shape("rect", { ...size, fill, stroke, "stroke-width": 2 }));
    const left = x + parseFloat(style.paddingLeft) + 1, baseline = y + offsetHeight * 0.7;
    marks.append(text(left, baseline, style.fontSize, style.color, chip.textContent));
  }
  const under = `${$("keys").tFoot.textContent} · ${about.model} · attention is a weight, not a cause`;
  // Bands of the paper's color hide what runs over the frame, as scrolling does on the page.
  svg.append(band(0, height), lines, marks, band(0, top - 2), band(height - 60, 60));
  svg.append(text(pad, 36, 19, named("--ink"), $("claim").textContent));
  svg.append(text(pad, height - 24, 13, named("--quiet"), under));
  return { svg: new XMLSerializer().serializeToString(svg), width, height };
}

function download(blob, suffix) {
  const name = `attention-layer${view.layer}-head${view.head}.${suffix}`;
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const asSvg = ({ svg }) => new Blob([svg], { type: "image/svg+xml" });

$("save-svg").addEventListener("click", () => download(asSvg(picture()), "svg"));
$("save-png").addEventListener("click", () => {
  const made = picture(), image = new Image(), url = URL.createObjectURL(asSvg(made));
  image.onload = () => {
    const canvas = make("canvas", { width: made.width * 2, height: made.height * 2 });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    URL.revokeObjectURL(url);
    canvas.toBlob((blob) => download(blob, "png"));
  };
  image.src = url;
});
