"""A report in the terminal: a heat-coloured sentence and a table, with the weight that is not shown."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.see.report import Report
from foveate.see.text import Sentence


def show(
    sentence: Sentence, console: Console, *, layer: int | None = None, head: int | None = None, word: str | None = None
) -> None:
    """Print what `word` looks at (or, without one, what all tokens look at) in one head, or where it is strongest."""
    report = sentence.report
    check_place(report, layer, head)
    rows = sentence.places(word) if word is not None else list(range(len(report.tokens)))
    console.print(f"[bold]{escape(report.model)}[/] · {_size(report)} · layers and heads counted from 0\n")
    console.print(_heat(report, _colours(report, layer, head, rows, word)))
    console.print(_caption(report, layer, head, word, rows), style="dim", markup=False)
    console.print()
    console.print(_table(report, layer, head, rows, word))
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


def _dense(report: Report, layer: int, head: int, rows: list[int]) -> Tensor:
    """The mean of some rows' shown weights, `[tokens]`."""
    total = report.received.new_zeros(len(report.tokens))
    for row in rows:
        total.index_add_(0, report.indices[layer, head, row], report.weights[layer, head, row])
    return total / len(rows)


def _colours(report: Report, layer: int | None, head: int | None, rows: list[int], word: str | None) -> Tensor:
    layers = range(report.weights.shape[0]) if layer is None else [layer]
    heads = range(report.weights.shape[1]) if head is None else [head]
    places = [(each, other) for each in layers for other in heads]
    if word is None:
        shares = [report.received[place] for place in places]
    else:
        shares = [_dense(report, *place, rows) for place in places]
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


def _caption(report: Report, layer: int | None, head: int | None, word: str | None, rows: list[int]) -> str:
    where = "mean of all heads" if layer is None and head is None else _place(layer, head)
    if word is None:
        return f"{where}: the mean weight that each token receives"
    pieces = f", mean of its {len(rows)} tokens" if len(rows) > 1 else ""
    return f"{where}: where “{word}”{pieces} looks"


def _place(layer: int | None, head: int | None) -> str:
    return f"layer {'all' if layer is None else layer}, head {'all' if head is None else head}"


def _table(report: Report, layer: int | None, head: int | None, rows: list[int], word: str | None) -> Table:
    """One row a head, the strongest first: which tokens it looks at, with what weight, and what is not shown."""
    title = f"where “{escape(word)}” looks" if word is not None else "the strongest single looks"
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in ("layer", "head"):
        table.add_column(name, justify="right")
    if word is None:
        table.add_column("from")
    for name in ("looks at", "and", "and"):
        table.add_column(name)
    table.add_column("not shown", justify="right")
    found = []
    for each in range(report.weights.shape[0]) if layer is None else [layer]:
        for other in range(report.weights.shape[1]) if head is None else [head]:
            if word is not None:
                found.append((each, other, rows))
            else:
                strongest = int(report.weights[each, other, :, 0].argmax())
                found.append((each, other, [strongest]))
    shares = [(_dense(report, *place), place) for place in found]
    shares.sort(key=lambda item: -_strength(report, item[0], item[1][2]))
    for share, (each, other, of) in shares[:12]:
        top = share.topk(min(3, len(report.tokens)))
        cells = [
            f"{escape(report.tokens[place].strip())} [bold]{weight:.2f}[/]"
            for place, weight in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        cells += [""] * (3 - len(cells))
        origin = [escape(report.tokens[of[0]].strip())] if word is None else []
        table.add_row(str(each), str(other), *origin, *cells, f"{max(0.0, 1 - float(top.values.sum())):.0%}")
    return table


def _strength(report: Report, share: Tensor, rows: list[int]) -> float:
    """How much a head says: its largest weight to another token, leaving out the first and last, which act as sinks."""
    inner = share.clone()
    inner[rows] = 0
    if len(inner) > 2:
        inner[[0, -1]] = 0
    return float(inner.max())
