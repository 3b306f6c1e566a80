"""Results as one picture, PNG or SVG: how many times faster, with what was wanted, and two curves of cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.bench.results import Measured, Results, Verdict, counted
from foveate.errors import InvalidInput
from foveate.installing import how_to_install

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER, INK, QUIET, RULE = "#fffefb", "#211d17", "#6d6558", "#e5ded1"
BLUE, ORANGE, GREY, GREEN = (
    "#0072b2",
    "#d55e00",
    "#b9b2a5",
    "#009e73",
)  # Okabe and Ito: told apart without red and green
_BAR, _HEAD = 0.235, 0.42  # inches: one bar, and the heading of a section
_CURVE, _GAP = 4.1, 1.15  # inches: a curve, and what is under it


def picture(results: Results, path: Path) -> None:
    """Draw results into a file; raises `InvalidInput` where matplotlib is missing."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise InvalidInput(f"drawing needs matplotlib: {how_to_install('see')}") from missing

    bars, curves = _sections(results), [sweep for sweep in _SWEEPS if any(row.sweep == sweep for row in results.rows)]
    right = len(curves) * (_CURVE + _GAP) + 1.0
    tall = max(right if curves else 1.0, sum(_HEAD + _BAR * len(section) for _, section in bars))
    top, bottom, wide = 1.5, 0.75, 13.6 if curves else 8.6
    style: Any = {"font.family": "DejaVu Sans", "svg.hashsalt": "foveate", "axes.edgecolor": QUIET, "text.color": INK}
    with rc_context(style):
        figure = Figure(figsize=(wide, tall + top + bottom), facecolor=PAPER)
        high = tall + top + bottom
        figure.text(0.35 / wide, 1 - 0.45 / high, "Foveate beside its peers", size=17, weight="bold")
        figure.text(0.35 / wide, 1 - 0.78 / high, _where(results), size=9, color=QUIET)
        if bars:
            says = "How many times faster than the peer (to the left of 1: slower)"
            figure.text(0.35 / wide, 1 - 1.2 / high, says, size=11, weight="bold")
            axes = figure.add_axes((4.2 / wide, bottom / high, 4.1 / wide, tall / high))
            _bars(axes, bars, tall)
        if curves:
            for place, sweep in enumerate(curves):
                at = 1 - (top + _CURVE + place * (_CURVE + _GAP)) / high
                _curve(figure.add_axes((9.25 / wide, at, 4.0 / wide, _CURVE / high)), results, sweep)
            at = 1 - (top + right) / high
            _facts(figure.add_axes((9.25 / wide, at, 4.0 / wide, 1.0 / high)), results)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _where(results: Results) -> str:
    about = results.about
    small = " · short shapes: these figures mean nothing" if about["quick"] else ""
    return (
        f"{about['machine']['cpu']}, {counted(about['threads'], 'thread')} · torch {about['versions']['torch']} · "
        f"the worst of {counted(about['runs'], 'run')} · {about['date'][:10]}{small}"
    )


def _sections(results: Results) -> list[tuple[str, list[tuple[Measured, Verdict]]]]:
    """The claims that are ratios of times, section by section; `auto` is a mark on the bar of its row."""
    found: dict[str, list[tuple[Measured, Verdict]]] = {}
    for row in results.rows:
        for claim in row.claims:
            if claim.unit == "×" and claim.contestant != "auto":
                found.setdefault(row.section, []).append((row, claim))
    return list(found.items())


def _bars(axes: Axes, sections: Sequence[tuple[str, list[tuple[Measured, Verdict]]]], tall: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    known = [claim.worst for _, section in sections for _, claim in section if claim.worst]
    wanted = [mark for _, section in sections for _, claim in section for mark in (claim.target, claim.aim) if mark]
    low = 2 ** math.floor(math.log2(min([0.5, *known])))
    high = 2 ** math.ceil(math.log2(1.3 * max([2.0, *known, *wanted])))
    axes.set(xscale="log", xlim=(low, high), ylim=(tall, 0), facecolor=PAPER, yticks=[])
    powers = range(round(math.log2(low)), round(math.log2(high)) + 1)
    ticks = [power for power in powers if len(powers) < 10 or power % 2 == 0]
    labels = [f"{2**power}×" if power >= 0 else f"1/{2**-power}×" for power in ticks]
    axes.set_xticks([2.0**power for power in ticks], labels, size=8.5)
    axes.minorticks_off()
    axes.tick_params(length=0, colors=QUIET, labeltop=True)
    axes.spines[:].set_visible(False)
    axes.grid(axis="x", color=RULE, lw=0.7)
    axes.axvline(1, color=INK, lw=1.1)
    y = 0.0
    for name, section in sections:
        _label(axes, y + 0.27, name, weight="bold", size=10)
        y += _HEAD
        above = ""
        for row, claim in section:
            _label(axes, y + _BAR / 2, row.name if row.name != above else "", size=8.5)
            _bar(axes, y + _BAR / 2, row, claim)
            y, above = y + _BAR, row.name
    legend = [
        Patch(color=BLUE, label="reaches what was wanted"), Patch(color=ORANGE, label="does not"),
        Line2D([], [], color=INK, marker="|", ms=11, mew=2, ls="", label="wanted"),
        Line2D([], [], color=QUIET, marker="|", ms=11, mew=1, ls="", label="hoped for"),
        Line2D([], [], color=INK, marker="o", mfc=PAPER, ms=5, ls="", label='backend="auto"'),
    ]  # fmt: skip
    axes.legend(
        handles=legend, loc="upper center", bbox_to_anchor=(0.05, -0.3 / tall), ncols=5, frameon=False, fontsize=8.5,
        handletextpad=0.5, columnspacing=1.6,
    )  # fmt: skip


def _bar(axes: Axes, y: float, row: Measured, claim: Verdict) -> None:
    """A bar from 1 to the ratio, so that slower points to the left; the number behind its end."""
    against = f"accelerate, {claim.against}" if claim.contestant == "accelerate" else claim.against
    axes.text(-0.015, y, against, transform=axes.get_yaxis_transform(), ha="right", va="center", size=8, color=QUIET)
    reached = claim.aim_met if claim.target is None else claim.met
    if claim.worst is None:
        why = "no figure" if row.figures[claim.contestant].refused else f"no figure of {claim.against}"
        place = max([1.0, *(mark for mark in (claim.target, claim.aim) if mark)])
        axes.text(
            place * 1.1, y, why, va="center", size=7.5, color=ORANGE if reached is False else QUIET, style="italic"
        )
    else:
        axes.barh(y, claim.worst - 1, left=1, height=0.62 * _BAR, color=ORANGE if reached is False else BLUE, zorder=2)
        ends = [claim.worst, 1.0, *(mark for mark in (claim.target, claim.aim) if mark)]
        auto = _auto(row, claim)
        place = max([*ends, *([auto] if auto else [])])
        axes.annotate(f"{claim.worst:.3g}×", (place, y), (6, 0), textcoords="offset points", va="center", size=8)
        if auto:
            axes.plot(auto, y, "o", mfc=PAPER, mec=INK, ms=4.2, mew=1, zorder=5)
    half = 0.42 * _BAR
    for mark, color, width in ((claim.target, INK, 2.0), (claim.aim, QUIET, 1.0)):
        if mark:
            axes.plot([mark, mark], [y - half, y + half], color=color, lw=width, zorder=4, solid_capstyle="butt")


def _auto(row: Measured, claim: Verdict) -> float | None:
    """The ratio of backend="auto" against the same peer."""
    return next((c.worst for c in row.claims if c.contestant == "auto" and c.against == claim.against), None)


def _label(axes: Axes, y: float, words: str, *, size: float, weight: str = "normal") -> None:
    axes.text(
        -0.94, y, words, transform=axes.get_yaxis_transform(), va="center", size=size, weight=weight, parse_math=False
    )


def _curve(axes: Axes, results: Results, sweep: str) -> None:
    rows = [row for row in results.rows if row.sweep == sweep]
    axes.set(xscale="log", yscale="log", facecolor=PAPER)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", colors=QUIET, labelsize=8.5)
    axes.grid(which="major", color=RULE, lw=0.7)
    axes.set_ylabel("milliseconds", size=9, color=QUIET)
    _SWEEPS[sweep](axes, rows)


def _facts(axes: Axes, results: Results) -> None:
    """The claims that are no ratios, as lines of text: percent of the machine's peak, and megabytes."""
    axes.set_axis_off()
    axes.set(xlim=(0, 4), ylim=(1, 0))  # inches
    lines = [(row.name, claim) for row in results.rows for claim in row.claims if claim.unit != "×"]
    if lines:
        axes.text(0, -0.1, "Of the machine's peak, and memory", size=11, weight="bold", va="center")
    for place, (name, claim) in enumerate(lines):
        y = 0.2 + 0.2 * place
        found = "no figure" if claim.worst is None else f"{claim.worst:.3g} {claim.unit}"
        sign, color = "≤" if claim.bound == "at most" else "≥", ORANGE if claim.met is False else BLUE
        axes.text(0, y, name.replace(" D=64, memory of", ",").replace("causal & ", ""), size=8.5, va="center")
        axes.text(3.4, y, found, size=8.5, va="center", ha="right", color=color, weight="bold")
        axes.text(4, y, f"{sign} {claim.target:g} {claim.unit}", size=8.5, va="center", ha="right", color=QUIET)


def _by_length(axes: Axes, rows: Sequence[Measured]) -> None:
    axes.set_title("The cost of a window grows with the length", loc="left", size=11, weight="bold", pad=12)
    axes.set_xlabel("length, with a causal window", size=9, color=QUIET)
    _lines(axes, rows, "sdpa mask", "SDPA with the\nwindow as a mask")


def _by_steps(axes: Axes, rows: Sequence[Measured]) -> None:
    axes.set_title("The cost of linear attention grows with the length", loc="left", size=11, weight="bold", pad=12)
    axes.set_xlabel("length", size=9, color=QUIET)
    _lines(axes, rows, "softmax", "causal softmax,\nour kernel too")


def _lines(axes: Axes, rows: Sequence[Measured], peer: str, peer_words: str) -> None:
    """Ours, a peer, and the straight line of a cost that grows as the length does."""
    for name, color, words, marker in (("native", BLUE, "native", "o"), (peer, ORANGE, peer_words, "s")):
        points = [(row.queries, row.figures[name].middle) for row in rows if name in row.figures]
        known = [(x, y) for x, y in points if y is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=color, marker=marker, ms=5, lw=1.8)
            at = known[-1] if name != "native" else known[len(known) // 2]
            axes.annotate(words, at, (9, -9), textcoords="offset points", size=9, color=color, ha="left", va="top")
        if name == "native" and len(known) > 1:
            first = known[0]
            axes.plot(
                [first[0], known[-1][0]], [first[1], first[1] * known[-1][0] / first[0]], ":", color=QUIET, lw=1.2
            )
            axes.annotate(
                f"dotted: linear; found: N^{_slope(known):.2f}", (0.98, 0.04), xycoords="axes fraction", ha="right",
                size=8.5, color=QUIET,
            )  # fmt: skip
    ticks = sorted({row.queries for row in rows})
    axes.set_xticks(ticks, [f"{tick // 1024}k" if tick >= 1024 else str(tick) for tick in ticks])
    axes.minorticks_off()


def _by_density(axes: Axes, rows: Sequence[Measured]) -> None:
    axes.set_title("The cost of a pattern follows its density", loc="left", size=11, weight="bold", pad=12)
    length = rows[0].queries if rows else 0
    axes.set_xlabel(f"share of the {length}² pairs that are visible", size=9, color=QUIET)
    kinds = {
        "window": ("causal & window", BLUE, "o"), "chunks": ("chunks", GREEN, "s"), "bigbird": ("BigBird", ORANGE, "D"),
        "longformer": ("Longformer", "#cc79a7", "^"), "causal": ("causal", INK, "*"),
    }  # fmt: skip
    named: set[str] = set()
    known = [(row.density, row.figures["native"].middle or 0.0, row.name) for row in rows]
    for x, y, name in sorted(known):
        kind = next(kind for kind in ("longformer", "bigbird", "chunks", "window", "causal") if kind in name)
        words, color, marker = kinds[kind]
        if y:
            label = None if kind in named else words
            axes.plot(x, y, marker, color=color, ms=9 if marker == "*" else 6, ls="", label=label, zorder=3)
            named.add(kind)
    points = [(x, y) for x, y, _ in sorted(known) if y]
    if len(points) > 1:
        (x, y), far = points[-1], points[0][0]
        axes.plot([far, x], [y * far / x, y], ":", color=QUIET, lw=1.2)
        axes.legend(frameon=False, fontsize=8.5, loc="upper left")
        axes.annotate(
            "dotted: in proportion", (0.98, 0.04), xycoords="axes fraction", ha="right", size=8.5, color=QUIET
        )
        shares = _steps(far, x)
        axes.set_xticks(shares, [f"{100 * share:g}%" for share in shares])
        times = _steps(min(y for _, y in points), max(y for _, y in points))
        axes.set_yticks(times, [f"{time:g}" for time in times])
    axes.minorticks_off()


def _steps(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20 … between two numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step for power in powers for lead in (1, 2, 5) if low <= (step := float(f"{lead}e{power}")) <= high]


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """The power with which y grows, by least squares of the logarithms."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    along = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return along / sum((x - mean_x) ** 2 for x in xs)


_SWEEPS: dict[str, Callable[[Axes, Sequence[Measured]], None]] = {
    "length": _by_length,
    "density": _by_density,
    "steps": _by_steps,
}
