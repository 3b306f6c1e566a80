"""A report in the terminal: a heat-coloured sentence and a table, with the weight that is not shown.

In a pipe the weights are numbers, and where the table is too wide for the terminal its rows are lines.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.see.report import Report
from foveate.see.text import Sentence


@dataclass(frozen=True)
class _Look:
    """One row of the table: which tokens one head looks at most, and what is not among them."""

    layer: int
    head: int
    origin: str
    tops: list[tuple[str, float]]
    rest: float


def show(
    sentence: Sentence, console: Console, *, layer: int | None = None, head: int | None = None, word: str | None = None
) -> None:
    """Print what `word` looks at (or, without one, what all tokens look at) in one head, or where it is strongest."""
    report = sentence.report
    check_place(report, layer, head)
    rows = sentence.places(word) if word is not None else list(range(len(report.tokens)))
    console.print(f"[bold]{escape(report.model)}[/] · {_size(report)} · layers and heads counted from 0\n")
    colours = _colours(report, layer, head, rows, word)
    plain = console.color_system is None or console.no_color
    console.print(_numbers(report, colours) if plain else _heat(report, colours))
    console.print(_caption(report, layer, head, word, rows), style="dim", markup=False)
    console.print()
    looks = _looks(report, layer, head, rows, word)
    title = f"where “{word}” looks" if word is not None else "the strongest single looks"
    table = _table(title, looks)
    if Measurement.get(console, console.options.update_width(10_000), table).maximum <= console.width:
        console.print(table)
    else:
        console.print(Text("\n".join([title, *map(_line, looks)])))
    console.print(report.note, style="dim", markup=False)


def check_place(report: Report, layer: int | None, head: int | None) -> None:
    """A clear error for a layer or head that the model does not have."""
    layers, heads = report.weights.shape[:2]
    for name, number, count in (("layer", layer, layers), ("head", head, heads)):
        if number is not None and not 0 <= number < count:
            raise InvalidInput(f"{name} {number} was asked for, but {report.model} has {count}: 0 to {count - 1}")


def _size(report: Report) -> str:
    layers, heads, tokens = report.weights.shape[:3]
    return f"{layers} layers × {heads} heads, {tokens} tokens"


def _colours(report: Report, layer: int | None, head: int | None, rows: list[int], word: str | None) -> Tensor:
    layers = range(report.weights.shape[0]) if layer is None else [layer]
    heads = range(report.weights.shape[1]) if head is None else [head]
    places = [(each, other) for each in layers for other in heads]
    if word is None:
        shares = [report.received[place] for place in places]
    else:
        shares = [report.looks(*place, rows) for place in places]
    total = shares[0].clone()
    for share in shares[1:]:
        total += share
    return total / len(shares)


def _heat(report: Report, colours: Tensor) -> Text:
    """Each token on a background from dark to bright, brightest where the most weight goes."""
    text = Text()
    most = max(float(colours.max()), 1e-9)
    for token, share in zip(report.tokens, colours.tolist(), strict=True):
        strength = share / most
        red, green, blue = (int(low + (high - low) * strength) for low, high in ((30, 255), (34, 140), (48, 0)))
        ink = "black" if strength > 0.55 else "white"
        text.append(f" {token.strip() or token} ", style=f"{ink} on rgb({red},{green},{blue})")
        text.append(" ")
    return text


def _numbers(report: Report, colours: Tensor) -> Text:
    """The same where there are no colours: each token and its weight."""
    pairs = zip(report.tokens, colours.tolist(), strict=True)
    return Text("  ".join(f"{token.strip() or token} {share:.2f}" for token, share in pairs))


def _caption(report: Report, layer: int | None, head: int | None, word: str | None, rows: list[int]) -> str:
    where = "mean of all heads" if layer is None and head is None else _place(layer, head)
    if word is None:
        return f"{where}: the mean weight that each token receives"
    pieces = f", mean of its {len(rows)} tokens," if len(rows) > 1 else ""
    return f"{where}: where “{word}”{pieces} looks"


def _place(layer: int | None, head: int | None) -> str:
    return f"layer {'all' if layer is None else layer}, head {'all' if head is None else head}"


def _looks(report: Report, layer: int | None, head: int | None, rows: list[int], word: str | None) -> list[_Look]:
    """One row a head, the strongest first: where the word looks, or else the head's single strongest look."""
    found = []
    for each in range(report.weights.shape[0]) if layer is None else [layer]:
        for other in range(report.weights.shape[1]) if head is None else [head]:
            of = rows if word is not None else [int(report.weights[each, other, :, 0].argmax())]
            found.append((each, other, of, report.looks(each, other, of)))
    found.sort(key=lambda one: -_strength(report, one[3], one[2]))
    looks = []
    for each, other, of, share in found[:12]:
        top = share.topk(min(3, len(report.tokens)))
        tops = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        looks.append(
            _Look(
                each, other,
                "" if word is not None else report.tokens[of[0]].strip(),
                [(report.tokens[place].strip(), weight) for place, weight in tops],
                max(0.0, 1 - float(top.values.sum())),
            )
        )  # fmt: skip
    return looks


def _table(title: str, looks: list[_Look]) -> Table:
    table = Table(title=escape(title), title_justify="left", header_style="bold")
    for name in ("layer", "head"):
        table.add_column(name, justify="right")
    with_origin = any(look.origin for look in looks)
    for name in (*(["from"] if with_origin else []), "looks at", "and", "and"):
        table.add_column(name)
    table.add_column("not shown", justify="right")
    for look in looks:
        cells = [f"{escape(token)} [bold]{weight:.2f}[/]" for token, weight in look.tops]
        cells += [""] * (3 - len(cells))
        origin = [escape(look.origin)] if with_origin else []
        table.add_row(str(look.layer), str(look.head), *origin, *cells, f"{look.rest:.0%}")
    return table


def _line(look: _Look) -> str:
    """The row where the table does not fit: words that wrap, so that nothing is cut."""
    origin = f"{look.origin} looks at " if look.origin else ""
    tops = ", ".join(f"{token} {weight:.2f}" for token, weight in look.tops)
    return f"layer {look.layer}, head {look.head}: {origin}{tops}; not shown {look.rest:.0%}"


def _strength(report: Report, share: Tensor, rows: list[int]) -> float:
    """How much a head says: its largest weight to another token, leaving out the first and last, which act as sinks."""
    inner = share.clone()
    inner[rows] = 0
    if len(inner) > 2:
        inner[[0, -1]] = 0
    return float(inner.max())
