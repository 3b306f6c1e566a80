"""Results as tables to read: what had to come out and what did, and where there is no figure, why."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from foveate.bench.results import Figure, Measured, Results, Verdict, before, counted


def show(results: Results, console: Console, *, old: Results | None = None) -> None:
    """Print every claim beside what was found, the curves' points, what has no figure, and how many claims are met."""
    console.print(Text(_heading(results)))
    earlier = None if old is None else before(old)
    for section, group in groupby(results.rows, key=lambda row: row.section):
        rows = list(group)
        table = _points(section, rows) if rows[0].sweep else _claims(section, rows, earlier)
        console.print(Group(Text(), table))
    for why in _without_figure(results):
        console.print(Text(why, style="dim"))
    if old is not None:
        console.print(Text(f"\nbefore: {old.about['date']}, {_machine(old)}", style="dim"))
    met = [claim.met for row in results.rows for claim in row.claims if claim.met is not None]
    console.print(Text(f"\n{sum(met)} of {len(met)} targets are met; of all runs the worst counts"))


def _heading(results: Results) -> str:
    about = results.about
    tops = ", ".join(f"{name} {top:g} {'GB/s' if name == 'read' else 'GFLOP/s'}" for name, top in _ceilings(about))
    small = "\nshort shapes, for a test of the benchmark: the figures mean nothing" if about["quick"] else ""
    return f"{_machine(results)}\nceilings: {tops or 'unknown'}{small}"


def _ceilings(about: object) -> list[tuple[str, float]]:
    assert isinstance(about, dict)
    return [(name, top) for name, top in about["ceilings"].items() if top]


def _machine(results: Results) -> str:
    about = results.about
    machine, kernels = about["machine"], about["kernels"]
    return (
        f"{machine['cpu']}, {counted(about['threads'], 'thread')} · torch {about['versions']['torch']} "
        f"({machine['torch_capability']}) · kernels: {kernels[0] if kernels else 'none'}"
    )


def _claims(section: str, rows: list[Measured], earlier: dict[tuple[str, str, str], float] | None) -> Table:
    table = _table(section)
    for name in ("row", "ours", "against"):
        table.add_column(name)
    for name in ("wanted", "worst", *(["before", "change"] if earlier is not None else []), "runs", "A/A", "reached"):
        table.add_column(name, justify="right")
    for row in rows:
        for place, claim in enumerate(row.claims):
            then = () if earlier is None else _change(claim, earlier.get((row.name, claim.contestant, claim.against)))
            runs = " ".join(f"{run:.3g}" for run in claim.runs)
            again = "" if place or row.again is None else f"{row.again:.2f}"
            reached = _reached(row.figures[claim.contestant])
            table.add_row(
                escape(row.name) if place == 0 else "", claim.contestant, claim.against, _wanted(claim), _worst(claim),
                *then, runs, again, reached,
            )  # fmt: skip
    return table


def _points(section: str, rows: list[Measured]) -> Table:
    table = _table(section)
    for name in ("row", "density", "contestant", "ms", "GFLOP/s"):
        table.add_column(name, justify="left" if name in ("row", "contestant") else "right")
    for row in rows:
        for place, (name, figure) in enumerate(row.figures.items()):
            told = (escape(row.name), f"{row.density:.4f}") if place == 0 else ("", "")
            table.add_row(*told, name, _number(figure.middle), _number(figure.gflops))
    return table


def _table(section: str) -> Table:
    return Table(title=section, title_justify="left", title_style="bold", header_style="", box=None, pad_edge=False)


def _wanted(claim: Verdict) -> str:
    sign = "≤" if claim.bound == "at most" else "≥"
    parts = [] if claim.target is None else [f"{sign} {claim.target:.3g}"]
    if claim.aim is not None:
        parts.append(f"aim {claim.aim:.3g}")
    return f"{', '.join(parts)} {claim.unit}"


def _worst(claim: Verdict) -> Text:
    reached = claim.aim_met if claim.target is None else claim.met
    if claim.worst is None:
        return Text("—", style="red" if reached is False else "dim")
    sign, style = {True: ("✓", "green"), False: ("✗", "red"), None: ("", "")}[reached]
    return Text(f"{claim.worst:.3g} {claim.unit} {sign}".rstrip(), style=style)


def _change(claim: Verdict, then: float | None) -> tuple[str, str]:
    """What it was before, and by how much of that it changed."""
    if then is None or claim.worst is None or not then:
        return _number(then), ""
    return _number(then), f"{100 * (claim.worst / then - 1):+.0f}%"


def _reached(figure: Figure) -> str:
    """How long it took and how fast that is."""
    if figure.middle is None:
        return "no figure"
    parts = [f"{figure.middle:.3g} {figure.unit}"]
    if figure.gflops is not None:
        parts.append(f"{figure.gflops:.0f} GFLOP/s")
    if figure.gbytes is not None:
        parts.append(f"{figure.gbytes:.1f} GB/s")
    if figure.percent is not None:
        parts.append(f"{figure.percent:.0f}%")
    return ", ".join(parts)


def _without_figure(results: Results) -> list[str]:
    """Every reason once, with the rows that it keeps from a figure."""
    found: dict[str, list[str]] = {}
    for row in results.rows:
        for name, figure in row.figures.items():
            if figure.refused is not None:
                found.setdefault(f"{name}: {figure.refused}", []).append(row.name)
    return [f"\nno figure, {why}\n  {'; '.join(rows)}" for why, rows in found.items()]


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3g}"
