"""The command line before its libraries are needed: the version, the doctor, and what to install for all else."""

from __future__ import annotations

import sys

from foveate.errors import FoveateError
from foveate.installing import how_to_install


def main() -> None:
    """Run the command line; an error of ours is one sentence and exit code 2."""
    try:
        _run(sys.argv[1:])
    except FoveateError as error:
        print(f"foveate: {error}", file=sys.stderr)
        sys.exit(2)


def _run(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        from foveate import __version__

        print(f"foveate {__version__}")
    elif arguments == ["doctor"]:
        from foveate.doctor import report

        print(report())
    else:
        try:
            import rich  # noqa: F401
            import typer  # noqa: F401
        except ImportError as missing:
            raise FoveateError(
                f"only `foveate --version` and `foveate doctor` work without typer and rich: {how_to_install('see')}"
            ) from missing
        from foveate.commands import app

        app()
        return
    sys.exit()
