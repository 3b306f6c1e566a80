"""`foveate bench`: each command measures one table; heavy imports happen inside the commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from foveate.errors import InvalidInput
from foveate.once import Once
from foveate.paths import checked, writing

if TYPE_CHECKING:
    from foveate.bench.linear import LinearRow
    from foveate.bench.models import ModelRow
    from foveate.bench.results import Measured, Results
    from foveate.bench.rows import Row

    _Row = TypeVar("_Row", Row, ModelRow, LinearRow)

bench = typer.Typer(help="Measure Foveate beside its peers.", no_args_is_help=True)

_SUFFIXES = (".json", ".csv", ".png", ".svg")

_Out = Annotated[
    list[Path] | None,
    typer.Option(help="Also write results (.json), claims (.csv) or a picture (.png, .svg); may be repeated."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of tables.")]
_Compare = Annotated[Path | None, typer.Option(help="Earlier results (.json): show what changed.")]
_Only = Annotated[str | None, typer.Option(metavar="TEXT", help="Only rows with this text in their name or section.")]
_Runs = Annotated[int, typer.Option(help="How often each row is measured; the worst counts.", min=1)]
_Quick = Annotated[bool, typer.Option(help="Small shapes and no compiler: to test the benchmark.")]


@bench.command("softmax", cls=Once)
def bench_softmax(
    json: _Json = False,
    out: _Out = None,
    compare: _Compare = None,
    only: _Only = None,
    runs: _Runs = 3,
    quick: _Quick = False,
) -> None:
    """Softmax attention beside PyTorch's SDPA, FlexAttention and others, each checked before it is timed."""
    from foveate.bench.about import ceilings
    from foveate.bench.measuring import measure
    from foveate.bench.tables import chosen, softmax

    paths, old = _checked(out, compare, json=json)
    rows = chosen(softmax(quick=quick), only)
    tops = ceilings(row.ceiling for row in rows if not row.weighs_memory)
    left_out = {"flex": "left out by --quick: it compiles for half a minute"} if quick else {}
    seconds = 0.01 if quick else 0.5

    def turn(row: Row) -> Measured:
        return measure(row, runs=runs, ceilings=tops, seconds=seconds, left_out=left_out)

    _deliver(_results(rows, turn, tops, quick=quick, runs=runs), paths, json=json, old=old)


@bench.command("linear", cls=Once)
def bench_linear(
    json: _Json = False,
    out: _Out = None,
    compare: _Compare = None,
    only: _Only = None,
    runs: _Runs = 3,
    quick: _Quick = False,
) -> None:
    """Linear attention beside that of transformers, plain PyTorch and softmax, each checked before it is timed."""
    from foveate.bench.linear import table
    from foveate.bench.linear_measuring import measure_linear
    from foveate.bench.tables import chosen

    paths, old = _checked(out, compare, json=json)
    rows, seconds = chosen(table(quick=quick), only), 0.01 if quick else 1.0
    found = _results(rows, lambda row: measure_linear(row, runs=runs, seconds=seconds), {}, quick=quick, runs=runs)
    _deliver(found, paths, json=json, old=old)


@bench.command("models", cls=Once)
def bench_models(
    json: _Json = False,
    out: _Out = None,
    compare: _Compare = None,
    only: _Only = None,
    runs: _Runs = 3,
    quick: _Quick = False,
) -> None:
    """Whole models of Hugging Face, with their own attention and with ours, each checked before it is timed."""
    from foveate.bench.modelling import measure_model
    from foveate.bench.models import table
    from foveate.bench.tables import chosen

    paths, old = _checked(out, compare, json=json)
    rows, seconds = chosen(table(quick=quick), only), 0.01 if quick else 1.0
    found = _results(rows, lambda row: measure_model(row, runs=runs, seconds=seconds), {}, quick=quick, runs=runs)
    _deliver(found, paths, json=json, old=old)


@bench.command("sparse", cls=Once)
def bench_sparse(
    json: _Json = False,
    out: _Out = None,
    compare: _Compare = None,
    only: _Only = None,
    runs: _Runs = 3,
    quick: _Quick = False,
) -> None:
    """Attention to chosen keys beside attention to all, and additive scores beside a broadcast; each checked first."""
    from foveate.bench.sparse import measure_sparse, table
    from foveate.bench.tables import chosen

    paths, old = _checked(out, compare, json=json)
    rows, seconds = chosen(table(quick=quick), only), 0.01 if quick else 0.5
    found = _results(rows, lambda row: measure_sparse(row, runs=runs, seconds=seconds), {}, quick=quick, runs=runs)
    _deliver(found, paths, json=json, old=old)


@bench.command("show", cls=Once)
def bench_show(
    results: Annotated[Path, typer.Argument(help="Results (.json) that a benchmark wrote.")],
    json: _Json = False,
    out: _Out = None,
    compare: _Compare = None,
) -> None:
    """Show results again, write them in another form, or compare them with earlier ones; nothing is measured."""
    from foveate.bench.results import read

    paths, old = _checked(out, compare, json=json)
    _deliver(read(results), paths, json=json, old=old)


@bench.command("preferences", cls=Once)
def bench_preferences(
    results: Annotated[Path, typer.Argument(help="Results (.json) that a benchmark wrote.")],
) -> None:
    """Print, as JSON, for which calls our kernels were at least as fast as PyTorch's."""
    import json

    from foveate.bench.preferences import preferences
    from foveate.bench.results import read

    typer.echo(json.dumps(preferences(read(results)), indent=1))


def _checked(out: list[Path] | None, compare: Path | None, *, json: bool) -> tuple[list[Path], Results | None]:
    """The files to write, and earlier results: read before anything is measured."""
    from foveate.bench.results import read

    if json and compare is not None:
        raise InvalidInput("--json prints the results alone: leave out --compare, or --json to read the comparison")
    paths = [checked(path, _SUFFIXES) for path in out or []]
    return paths, None if compare is None else read(compare)


def _results(
    rows: list[_Row], measure: Callable[[_Row], Measured], tops: Mapping[str, float], *, quick: bool, runs: int
) -> Results:
    """Measure row after row, under a progress bar on standard error; an interruption keeps the rows that are done."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from foveate.bench.about import about
    from foveate.bench.results import Results

    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[row]}"),
    )
    measured: list[Measured] = []
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("measuring", total=len(rows), row="")
            for row in rows:
                progress.update(task, row=row.name)
                measured.append(measure(row))
                progress.advance(task)
    except KeyboardInterrupt:
        if not measured:
            raise
        typer.echo(f"interrupted: {len(measured)} of {len(rows)} rows were measured", err=True)
    return Results(about(tops, quick=quick, runs=runs), measured)


def _deliver(results: Results, paths: list[Path], *, json: bool, old: Results | None) -> None:
    """Print, write, and end with exit code 1 if a result of ours was not the truth."""
    from rich.console import Console

    from foveate.bench.picture import picture
    from foveate.bench.results import to_csv, to_json
    from foveate.bench.terminal import show

    if json:
        typer.echo(to_json(results), nl=False)
    else:
        console = Console(emoji=False, highlight=False)
        if not console.is_terminal:
            console.width = 160  # a file has no edge to wrap at
        show(results, console, old=old)
    for path in paths:
        with writing(path):
            if path.suffix in (".png", ".svg"):
                picture(results, path)
            else:
                path.write_text(to_json(results) if path.suffix == ".json" else to_csv(results), encoding="utf-8")
        typer.echo(f"wrote {path}", err=True)
    if results.wrong():
        for words in results.wrong():
            typer.echo(f"foveate: {words}", err=True)
        raise typer.Exit(1)
