"""One reading as a picture in a file, drawn without a screen: what a token looks at, and how much is not shown."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import InvalidInput
from foveate.installing import how_to_install

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

    from foveate.see.report import Report

LONGEST, SIGNS = 18, {"\n": "⏎", "\t": "⇥"}
SHORT = 40  # tokens; a longer text is shown by its top keys and the words around them
PAPER, INK, QUIET, EYE = "#fffefb", "#211d17", "#6d6558", "#0f6c8d"
RAMP = ["#fffefb", "#ffe2b5", "#fb9a41", "#c2410c"]  # as on the page; heat follows the square root of the weight


def picture(report: Report, *, layer: int, head: int, token: int | Sequence[int] | None, path: Path) -> None:
    """Write where `token` looks in one head, as PNG or SVG; `None` draws every row and what each key receives.

    Several tokens are a word: its bars are the mean of where they look.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise InvalidInput(f"cannot write {path.name!r}: a picture ends in .png or .svg")
    rows, length = report.rows(layer, head, token), len(report.tokens)
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise InvalidInput(f"drawing needs matplotlib: {how_to_install('see')}") from missing

    short = length <= SHORT
    shown = range(length) if short else _top(report, layer, head, rows)
    with _fonts():
        figure = Figure(figsize=(9, 1.7 + 0.3 * (len(shown) + 1)), facecolor=PAPER)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 9), ylim=(0, 1.7 + 0.3 * (len(shown) + 1)))
        axes.invert_yaxis()
        axes.axis("off")
        _heading(axes, report, layer, head, rows)
        if short:
            _columns(axes, report, layer, head, rows)
        _bars(axes, report, layer, head, rows, list(shown), short)
        figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)


def _top(report: Report, layer: int, head: int, rows: list[int]) -> list[int]:
    """The keys that a long text is shown by, largest first."""
    if not rows:
        return [int(key) for key in report.received[layer, head].topk(min(16, len(report.tokens))).indices]
    return list(_looks_at(report, layer, head, rows))[:24]


def _looks_at(report: Report, layer: int, head: int, rows: list[int]) -> dict[int, float]:
    """The keys with a weight, the largest first."""
    looks = report.looks(layer, head, rows).tolist()
    return {key: looks[key] for key in sorted(range(len(looks)), key=lambda key: -looks[key]) if looks[key] > 0}


def _heading(axes: Axes, report: Report, layer: int, head: int, rows: list[int]) -> None:
    if rows:
        mean = f", mean of its {len(rows)} tokens," if len(rows) > 1 else ""
        reading = f"What “{' '.join(_visible(report.tokens[row]) for row in rows)}”{mean} looks at"
    else:
        reading = "What every token looks at" if len(report.tokens) <= SHORT else "What is looked at most"
    _write(axes, 0.4, 0.42, reading, size=15, weight="bold")
    where = f"layer {layer}, head {head} of {report.model} · attention is a weight, not a cause"
    _write(axes, 0.4, 0.75, where, size=9, color=QUIET)


def _columns(axes: Axes, report: Report, layer: int, head: int, rows: list[int]) -> None:
    """Rows on the left, keys on the right, a line for every weight between them."""
    each = rows or range(len(report.tokens))
    edges = [(weight, row, key) for row in each for key, weight in _looks_at(report, layer, head, [row]).items()]
    for weight, row, key in sorted(edges):  # the heaviest on top
        x = [2.0 + 1.5 * i / 24 for i in range(25)]
        bend = [t * t * (3 - 2 * t) for t in (i / 24 for i in range(25))]  # leaves and arrives level
        y = [_at(row) + (_at(key) - _at(row)) * b for b in bend]
        alpha = min(1.0, 0.5 + weight)
        axes.plot(x, y, color=_heat(max(weight, 0.05)), lw=0.6 + 5 * weight, alpha=alpha, zorder=1)
    for row, word in enumerate(report.tokens):
        chosen = not rows or row in rows
        box = {"boxstyle": "round,pad=0.25", "fc": PAPER, "ec": EYE, "lw": 1.4} if row in rows else None
        color = EYE if row in rows else INK if chosen else QUIET
        _write(
            axes,
            1.92,
            _at(row),
            _visible(word),
            ha="right",
            size=10,
            color=color,
            alpha=1 if chosen else 0.65,
            bbox=box,
        )


def _bars(axes: Axes, report: Report, layer: int, head: int, rows: list[int], keys: list[int], short: bool) -> None:
    """Each key with its share as heat and as a bar, and below them the share that no bar shows."""
    listed = _looks_at(report, layer, head, rows) if rows else {}
    mean = report.received[layer, head].tolist()
    left, full = (5.2, 2.9) if short else (5.6, 2.5)
    top = 1.0 if rows else max([*mean, 1e-9])
    for place, key in enumerate(keys):
        share = listed.get(key, 0.0) if rows else mean[key]
        y, color = _at(place), _heat(share / top)
        box = {"boxstyle": "round,pad=0.25", "fc": color, "ec": "none"}
        if short:
            _write(axes, 3.6, y, _visible(report.tokens[key]), size=10, color=_letters(color), bbox=box)
        else:
            before, after = report.tokens[max(0, key - 3) : key], report.tokens[key + 1 : key + 4]
            _write(axes, 2.2, y, _words(before), ha="right", size=8.5, color=QUIET)
            name = _write(axes, 2.35, y, _visible(report.tokens[key]), size=10, color=_letters(color), bbox=box)
            end = name.get_window_extent().transformed(axes.transData.inverted()).x1
            _write(axes, end + 0.15, y, _words(after), size=8.5, color=QUIET)
        axes.barh(y, full * share / top, height=0.17, left=left, color=_heat(max(share / top, 0.05)))
        number = f"{share:.1%}" if share or not rows else "unlisted"
        _write(axes, left + full + 0.15, y, number, size=9)

    y = _at(len(keys)) + 0.08
    axes.plot([3.6 if short else 0.4, 8.75], [y - 0.19] * 2, color="#e5ded1", lw=0.8)
    if not rows:
        lines = f"not shown as lines: {float(report.rest()[layer, head].mean()):.1%}"
        most = f"the {len(keys)} largest of {len(mean)}"
        says = f"bars: mean weight that each key receives, beside the largest; {lines if short else most}"
        _write(axes, 8.75, y, says, ha="right", size=9, color=QUIET)
        return
    hidden = min(1.0, max(0.0, 1 - sum(listed.get(key, 0.0) for key in keys)))  # of the whole row, not of the top
    _write(axes, 3.6 if short else 2.35, y, "not shown", size=10, weight="bold")
    axes.barh(y, full * hidden, height=0.17, left=left, fc="none", ec=QUIET, hatch="//////", lw=0.8)
    _write(axes, left + full + 0.15, y, f"{hidden:.1%}", size=9, weight="bold")


def _at(place: int) -> float:
    """Height of a line, in inches from the top."""
    return 1.25 + 0.3 * place


def _write(axes: Axes, x: float, y: float, words: str, *, color: str = INK, **style: Any) -> Text:
    # A token may hold dollar signs: they are no mathematics.
    return axes.text(x, y, words, color=color, va="center", parse_math=False, **style)


def _visible(token: str) -> str:
    """The token, cut where it is long, with signs in place of line breaks and of what no font draws."""
    if not token.strip(" "):
        return "␣"
    token = token if len(token) <= LONGEST else token[: LONGEST - 1] + "…"
    return "".join(letter if letter.isprintable() else SIGNS.get(letter, "·") for letter in token)


def _words(tokens: list[str]) -> str:
    return " ".join(_visible(token)[:12] for token in tokens)


def _heat(share: float) -> str:
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    return to_hex(LinearSegmentedColormap.from_list("heat", RAMP)(min(1.0, max(0.0, share)) ** 0.5))


def _letters(background: str) -> str:
    from matplotlib.colors import to_rgb

    red, green, blue = (channel**2.2 for channel in to_rgb(background))
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.2 else "#ffffff"


def _fonts() -> AbstractContextManager[None]:
    """DejaVu, and after it whatever is installed for the scripts that it lacks."""
    from matplotlib import rc_context
    from matplotlib.font_manager import get_font_names

    wanted = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Noto Emoji", "Unifont")
    installed = set(get_font_names())
    family = [name for name in wanted if name in installed]
    return rc_context({"font.family": family, "svg.hashsalt": "foveate", "hatch.linewidth": 0.6, "hatch.color": QUIET})
