"""docs/mechanisms/index.md: the table of `foveate mechanisms`."""

from __future__ import annotations

from foveate.mechanisms.table import MECHANISMS, Mechanism
from making.filling import filled


def mechanisms() -> str:
    """The page of the whole family, a table for each part of it."""
    lines = []
    for family in dict.fromkeys(one.family for one in MECHANISMS):
        lines += [f"## {family.capitalize()}", "", "| mechanism | equation, call | cost | can | runs in |",
                  "|:--|:--|:--|:--|:--|"]  # fmt: skip
        lines += [row(one) for one in MECHANISMS if one.family == family]
        lines.append("")
    return filled("mechanisms/index.md", tables="\n".join(lines).rstrip())


def row(one: Mechanism) -> str:
    """One line of a table."""
    name = f"[{one.name}]({one.page})" if one.page else one.name
    layer = f"<br>`nn.{one.layer}`" if one.layer else ""
    cells = (
        f"{name}<br>[{one.paper}]({one.url}){layer}",
        f"{one.equation}<br>`{one.call}`",
        one.cost,
        "<br>".join(one.abilities),
        ", ".join(one.backends) or "one way",
    )
    return "| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |"
