"""The command line: each command is one call of a public function; heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from foveate.errors import FoveateError, InvalidInput

if TYPE_CHECKING:
    from foveate.bench.linear import LinearRow
    from foveate.bench.models import ModelRow
    from foveate.bench.results import Measured, Results
    from foveate.bench.rows import Row

    _Row = TypeVar("_Row", Row, ModelRow, LinearRow)

try:
    import typer
except ImportError:
    sys.exit('the command line needs typer and rich: pip install "foveate[see]"')

app = typer.Typer(
    help="Every attention mechanism under one meaning, and a way to see what a model looks at.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

bench = typer.Typer(help="Measure Foveate beside its peers.", no_args_is_help=True)
app.add_typer(bench, name="bench")

_SUFFIXES = (".html", ".png", ".svg")
_BENCH_SUFFIXES = (".json", ".csv", ".png", ".svg")


def _version(wanted: bool) -> None:
    if wanted:
        from foveate import __version__

        typer.echo(f"foveate {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = (
        False
    ),
) -> None:
    """Options that come before a command."""


@app.command()
def see(
    text: Annotated[str, typer.Argument(help="The text to read; - reads it from standard input.")],
    model: Annotated[
        str | None, typer.Option(help="A Hugging Face model: a folder or a hub id. Default: the bundled MiniLM.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="One layer, counted from 0.")] = None,
    head: Annotated[int | None, typer.Option(help="One head, counted from 0.")] = None,
    word: Annotated[str | None, typer.Option("--from", metavar="WORD", help="The word that looks.")] = None,
    out: Annotated[
        list[Path] | None, typer.Option(help="Also write a page (.html) or a picture (.png, .svg); may be repeated.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many keys of each row to keep.", min=1)] = 16,
) -> None:
    """Show what each word of a text looks at, in every layer and head of a model."""
    from rich.console import Console

    from foveate.see.terminal import check_place, show
    from foveate.see.text import see_text

    paths = [_checked_path(path) for path in out or []]
    sentence = see_text(sys.stdin.read() if text == "-" else text, model, k=k)
    check_place(sentence.report, layer, head)
    row = sentence.places(word)[0] if word is not None else None
    console = Console(emoji=False)
    show(sentence, console, layer=layer, head=head, word=word)
    for path in paths:
        if path.suffix == ".html":
            from foveate.see.page import render

            page = render(sentence.report, layer=layer or 0, head=head or 0, token=row)
            path.write_text(page, encoding="utf-8")
        else:
            from foveate.see.plots import picture

            picture(sentence.report, layer=layer or 0, head=head or 0, token=row, path=path)
        console.print(f"wrote {path}", highlight=False)


def _checked_path(path: Path, suffixes: tuple[str, ...] = _SUFFIXES) -> Path:
    if path.suffix not in suffixes:
        raise InvalidInput(f"--out {path} ends in {path.suffix or 'nothing'}: wanted one of {', '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise InvalidInput(f"--out {path}: the folder {path.parent} does not exist")
    return path


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[Path, typer.Argument(help="The Python script to run, unchanged.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="What the script is given.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not report how many calls went where.")] = False,
) -> None:
    """Run a script with PyTorch's attention on our kernels; at its end say on standard error what was reached."""
    import runpy

    from foveate.integrations.arrival import once_loaded
    from foveate.integrations.torch import accelerate

    if not script.exists():
        raise InvalidInput(f"run was given {script}: there is no such file")
    sys.argv = [str(script), *(arguments or [])]
    sys.path[0] = str(script.absolute().parent)  # where a script finds its neighbours
    with accelerate() as acceleration, once_loaded("transformers.modeling_utils", _register):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Exception as error:  # a fault of the script's own, of whatever kind, is shown as Python shows it
            sys.excepthook(type(error), error, error.__traceback__)
            raise typer.Exit(1) from error
        finally:
            if not quiet:
                print(acceleration.report(), file=sys.stderr)


def _register() -> None:
    """Let a script that loads transformers ask for attn_implementation="foveate"; one too old for it knows no such."""
    with suppress(FoveateError):
        from foveate.integrations.transformers import register

        register()


@app.command()
def doctor() -> None:
    """Say what this machine can run."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from foveate.dispatch import NAMES, choose
    from foveate.machine import facts, packages
    from foveate.problem import problem

    console = Console()
    for title, rows in (("machine", facts()), ("optional packages", packages())):
        table = Table("", "", "", title=title, title_justify="left", show_header=False, box=None)
        for fact in rows:
            table.add_row(fact.name, fact.value, fact.hint.replace("[", r"\["))
        console.print(table)
        console.print()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    table = Table(
        *("implementation", *devices), title="implementations, for a plain float32 call", title_justify="left"
    )
    columns = []
    for device in devices:
        x = torch.zeros(1, 1, 2, 8, device=device)
        choice = choose(problem(x, x, x))
        columns.append([("chosen" if name == choice.chosen else "; ".join(choice.refusals[name])) or "can run"
                        for name in NAMES])  # fmt: skip
    for name, *cells in zip(NAMES, *columns, strict=True):
        table.add_row(name, *cells)
    console.print(table)


@app.command()
def patterns(
    out: Annotated[Path | None, typer.Option(help="Write the gallery as a picture (.png or .svg) instead.")] = None,
) -> None:
    """Draw every pattern: who may attend to whom."""
    from rich.columns import Columns
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    from foveate.see.gallery import draw, gallery

    console = Console()
    if out is not None:
        if _checked_path(out).suffix == ".html":
            raise InvalidInput(f"--out {out}: the gallery is a picture, .png or .svg")
        draw(out)
        console.print(f"wrote {out}", highlight=False)
        return
    pictures = []
    for name, pattern in gallery():
        dots = pattern.picture(16, 16).replace("1", "■").replace(".", "·")
        pictures.append(Panel(Text(dots), title=Text(name), width=max(35, min(len(name) + 6, 52)), padding=0))
    console.print(Columns(pictures))


@app.command()
def mechanisms(
    text: Annotated[str | None, typer.Argument(help="Only those with this text in their row.")] = None,
) -> None:
    """Print the whole family: equation, call, cost, paper, and what each one can do."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from foveate.mechanisms import chosen

    console = Console(emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file has no edge to wrap at
    table = Table(show_lines=True)
    for heading in ("mechanism", "equation, call", "cost", "can", "runs in", "paper"):
        table.add_column(heading, overflow="fold")
    for one in chosen(text):
        cells = (
            f"{one.name}\n{one.family}",
            "\n".join(
                [one.equation, one.call, *([f"fv.nn.{one.layer}"] if one.layer and one.layer not in one.call else [])]
            ),
            one.cost,
            "\n".join(one.abilities),
            ", ".join(one.backends) or "one way",
            f"{one.paper}\n{one.link}",
        )
        table.add_row(*map(Text, cells))
    console.print(table)


_Out = Annotated[
    list[Path] | None,
    typer.Option(help="Also write results (.json), claims (.csv) or a picture (.png, .svg); may be repeated."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of tables.")]
_Compare = Annotated[Path | None, typer.Option(help="Earlier results (.json): show what changed.")]

_Only = Annotated[str | None, typer.Option(metavar="TEXT", help="Only rows with this text in their name or section.")]
_Runs = Annotated[int, typer.Option(help="How often each row is measured; the worst counts.", min=1)]


@bench.command("softmax")
def bench_softmax(
    json: _Json = False,
    out: _Out = None,
    compare: _Compare = None,
    only: _Only = None,
    runs: _Runs = 3,
    quick: Annotated[bool, typer.Option(help="Short shapes and no compiler: to test the benchmark.")] = False,
) -> None:
    """Softmax attention beside PyTorch's SDPA, FlexAttention and others, each checked before it is timed."""
    from foveate.bench.about import about, ceilings
    from foveate.bench.measuring import measure
    from foveate.bench.results import Results
    from foveate.bench.tables import chosen, softmax

    paths, old = _checked_outputs(out, compare, json=json)
    rows = chosen(softmax(quick=quick), only)
    tops = ceilings(row.ceiling for row in rows if not row.weighs_memory)
    left_out = {"flex": "left out by --quick: it compiles for half a minute"} if quick else {}
    measured = _in_turn(
        rows,
        lambda row: measure(row, runs=runs, ceilings=tops, seconds=0.01 if quick else 0.5, left_out=left_out),
    )
    _deliver(Results(about(tops, quick=quick, runs=runs), measured), paths, json=json, old=old)


@bench.command("linear")
def bench_linear(
    json: _Json = False,
    out: _Out = None,
    compare: _Compare = None,
    only: _Only = None,
    runs: _Runs = 3,
    quick: Annotated[bool, typer.Option(help="Short shapes: to test the benchmark.")] = False,
) -> None:
    """Linear attention beside that of transformers, plain PyTorch and softmax, each checked before it is timed."""
    from foveate.bench.about import about
    from foveate.bench.linear import table
    from foveate.bench.linear_measuring import measure_linear
    from foveate.bench.results import Results
    from foveate.bench.tables import chosen

    paths, old = _checked_outputs(out, compare, json=json)
    rows = chosen(table(quick=quick), only)
    measured = _in_turn(rows, lambda row: measure_linear(row, runs=runs, seconds=0.01 if quick else 1.0))
    _deliver(Results(about({}, quick=quick, runs=runs), measured), paths, json=json, old=old)


@bench.command("models")
def bench_models(
    json: _Json = False,
    out: _Out = None,
    compare: _Compare = None,
    only: _Only = None,
    runs: _Runs = 3,
    quick: Annotated[bool, typer.Option(help="Tiny models: to test the benchmark.")] = False,
) -> None:
    """Whole models of Hugging Face, with their own attention and with ours, each checked before it is timed."""
    from foveate.bench.about import about
    from foveate.bench.modelling import measure_model
    from foveate.bench.models import table
    from foveate.bench.results import Results
    from foveate.bench.tables import chosen

    paths, old = _checked_outputs(out, compare, json=json)
    rows = chosen(table(quick=quick), only)
    measured = _in_turn(rows, lambda row: measure_model(row, runs=runs, seconds=0.01 if quick else 1.0))
    _deliver(Results(about({}, quick=quick, runs=runs), measured), paths, json=json, old=old)


def _in_turn(rows: list[_Row], measure: Callable[[_Row], Measured]) -> list[Measured]:
    """Measure row after row, under a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[row]}"),
    )
    measured = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(rows), row="")
        for row in rows:
            progress.update(task, row=row.name)
            measured.append(measure(row))
            progress.advance(task)
    return measured


@bench.command("sparse")
def bench_sparse(
    json: _Json = False,
    out: _Out = None,
    compare: _Compare = None,
    only: _Only = None,
    runs: _Runs = 3,
    quick: Annotated[bool, typer.Option(help="Short shapes: to test the benchmark.")] = False,
) -> None:
    """Attention to chosen keys beside attention to all, and additive scores beside a broadcast; each checked first."""
    from foveate.bench.about import about
    from foveate.bench.results import Results
    from foveate.bench.sparse import measure_sparse, table
    from foveate.bench.tables import chosen

    paths, old = _checked_outputs(out, compare, json=json)
    rows = chosen(table(quick=quick), only)
    measured = _in_turn(rows, lambda row: measure_sparse(row, runs=runs, seconds=0.01 if quick else 0.5))
    _deliver(Results(about({}, quick=quick, runs=runs), measured), paths, json=json, old=old)


@bench.command("show")
def bench_show(
    results: Annotated[Path, typer.Argument(help="Results (.json) that a benchmark wrote.")],
    json: _Json = False,
    out: _Out = None,
    compare: _Compare = None,
) -> None:
    """Show results again, write them in another form, or compare them with earlier ones; nothing is measured."""
    from foveate.bench.results import read

    paths, old = _checked_outputs(out, compare, json=json)
    _deliver(read(results), paths, json=json, old=old)


@bench.command("preferences")
def bench_preferences(
    results: Annotated[Path, typer.Argument(help="Results (.json) that a benchmark wrote.")],
) -> None:
    """Print, as JSON, for which calls our kernels were at least as fast as PyTorch's."""
    import json

    from foveate.bench.preferences import preferences
    from foveate.bench.results import read

    typer.echo(json.dumps(preferences(read(results)), indent=1))


def _checked_outputs(out: list[Path] | None, compare: Path | None, *, json: bool) -> tuple[list[Path], Results | None]:
    """The files to write, and earlier results: read before anything is measured."""
    from foveate.bench.results import read

    if json and compare is not None:
        raise InvalidInput("--json prints the results alone: leave out --compare, or --json to read the comparison")
    paths = [_checked_path(path, _BENCH_SUFFIXES) for path in out or []]
    return paths, None if compare is None else read(compare)


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
        if path.suffix in (".png", ".svg"):
            picture(results, path)
        else:
            path.write_text(to_json(results) if path.suffix == ".json" else to_csv(results), encoding="utf-8")
        typer.echo(f"wrote {path}", err=True)
    if results.wrong():
        for words in results.wrong():
            typer.echo(f"foveate: {words}", err=True)
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; an error of ours is one sentence and exit code 2."""
    try:
        app()
    except FoveateError as error:
        print(f"foveate: {error}", file=sys.stderr)
        sys.exit(2)
