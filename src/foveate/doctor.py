"""What `foveate doctor` prints: plain lines, so that it works where nothing but Foveate itself is installed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from foveate.dispatch.choose import NAMES, choose
from foveate.machine import facts, packages
from foveate.problem import problem


def report() -> str:
    """The machine, the optional packages, and which implementation a plain call gets on each device."""
    lines: list[str] = []
    for title, rows in (("machine", facts()), ("optional packages", packages())):
        lines += [title, *_aligned([(fact.name, fact.value, fact.hint) for fact in rows]), ""]
    lines += ["implementations, for a plain float32 call", *_aligned(_implementations())]
    return "\n".join(lines)


def _implementations() -> list[tuple[str, ...]]:
    import torch

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    columns = []
    for device in devices:
        x = torch.zeros(1, 1, 2, 8, device=device)
        choice = choose(problem(x, x, x))
        columns.append([("chosen" if name == choice.chosen else "; ".join(choice.refusals[name])) or "can run"
                        for name in NAMES])  # fmt: skip
    heading = [("", *devices)] if len(devices) > 1 else []
    return [*heading, *zip(NAMES, *columns, strict=True)]


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines whose columns begin below one another; the last column is as long as it likes."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield ("  " + "  ".join(cells)).rstrip()
