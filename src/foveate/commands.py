"""The commands: each is one call of a public function; heavy imports happen inside the commands."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from foveate.bench.command import bench
from foveate.errors import FoveateError, InvalidInput
from foveate.once import Once
from foveate.paths import checked, standard_input, writing

app = typer.Typer(
    help="Every attention mechanism under one meaning, and a way to see what a model looks at.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(bench, name="bench")

_SUFFIXES = (".html", ".png", ".svg")


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


@app.command(cls=Once)
def see(
    text: Annotated[str, typer.Argument(help="The text to read; - reads it from standard input.")],
    model: Annotated[
        str | None, typer.Option(help="A Hugging Face model: a folder or a hub id. Default: the bundled MiniLM.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="One layer, counted from 0.")] = None,
    head: Annotated[int | None, typer.Option(help="One head, counted from 0.")] = None,
    word: Annotated[
        str | None, typer.Option("--from", metavar="WORD", help="The word that looks: the mean of its tokens.")
    ] = None,
    out: Annotated[
        list[Path] | None, typer.Option(help="Also write a page (.html) or a picture (.png, .svg); may be repeated.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many keys of each row to keep.", min=1)] = 16,
) -> None:
    """Show what each word of a text looks at, in every layer and head of a model."""
    from rich.console import Console

    from foveate.see.terminal import check_place, show
    from foveate.see.text import see_text

    paths = [checked(path, _SUFFIXES) for path in out or []]
    if os.path.isfile(text):  # a Path would not forgive a long text
        print(f"foveate: {text} is the name of a file, and the name is what is read: did you mean "
              f"`foveate see - < {shlex.quote(text)}`?", file=sys.stderr)  # fmt: skip
    sentence = see_text(standard_input() if text == "-" else text, model, k=k)
    check_place(sentence.report, layer, head)
    rows = sentence.places(word) if word is not None else None
    console = Console(emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160  # a file has no edge to wrap at
    show(sentence, console, layer=layer, head=head, word=word)
    for path in paths:
        if path.suffix == ".html":
            from foveate.see.page import render

            page = render(sentence.report, layer=layer or 0, head=head or 0, token=rows)
            with writing(path):
                path.write_text(page, encoding="utf-8")
        else:
            from foveate.see.plots import picture

            with writing(path):
                picture(sentence.report, layer=layer or 0, head=head or 0, token=rows, path=path)
        console.print(f"wrote {path}", highlight=False)


@app.command(cls=Once, context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[Path, typer.Argument(help="The Python script to run, unchanged.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="What the script is given.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not report how many calls went where.")] = False,
) -> None:
    """Run a script with PyTorch's attention on our kernels; at its end say on standard error what was reached."""
    import runpy

    from foveate.import_hook import once_loaded
    from foveate.integrations.torch import accelerate
    from foveate.script import is_sound

    if not is_sound(script):
        raise typer.Exit(1)
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
    from foveate.doctor import report

    typer.echo(report())


@app.command(cls=Once)
def patterns(
    name: Annotated[str | None, typer.Argument(help="Only this one, such as longformer.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write a picture (.png or .svg) instead.")] = None,
) -> None:
    """Draw every pattern, or one by its name: who may attend to whom."""
    from rich.columns import Columns
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    from foveate.see.gallery import draw, examples_of

    console = Console()
    if out is not None:
        if checked(out, _SUFFIXES).suffix == ".html":
            raise InvalidInput(f"--out {out}: the gallery is a picture, .png or .svg")
        examples_of(name)  # a name that is none is told before anything is drawn
        with writing(out):
            draw(out, name)
        console.print(f"wrote {out}", highlight=False)
        return
    pictures = []
    for expression, pattern in examples_of(name):
        dots = pattern.picture(16, 16).replace("1", "■").replace(".", "·")
        width = max(35, min(len(expression) + 6, 52))
        if width <= console.width:
            pictures.append(Panel(Text(dots), title=Text(expression), width=width, padding=0))
        else:  # a title would be cut: as a line it wraps
            pictures.append(Panel(Text(f"{expression}\n{dots}"), width=35, padding=0))
    console.print(Columns(pictures))


@app.command()
def mechanisms(
    text: Annotated[str | None, typer.Argument(help="Only those with this text in their row.")] = None,
) -> None:
    """Print the whole family: equation, call, cost, paper, and what each one can do."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from foveate.mechanisms.table import chosen

    console = Console(emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file has no edge to wrap at
    narrow = console.width < 100  # six columns would be a few letters wide each
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
        if narrow:
            console.print(Text("\n".join(filter(None, cells)) + "\n"))
        else:
            table.add_row(*map(Text, cells))
    if not narrow:
        console.print(table)
