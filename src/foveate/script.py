"""Whether what `foveate run` was given is a script: looked at before it runs, so that its own faults stay its own."""

from __future__ import annotations

import sys
import warnings
import zipfile
from pathlib import Path

from foveate.errors import InvalidInput


def is_sound(path: Path) -> bool:
    """Whether Python can read the script; False where it has told of a mistake in a .py file, as Python does itself.

    Raises:
        InvalidInput: there is no such file, it cannot be read, or is something else than Python.
    """
    if not path.exists():
        raise InvalidInput(f"run was given {path}: there is no such file")
    if path.is_dir():
        if not (path / "__main__.py").is_file():
            raise InvalidInput(f"run was given {path}, a folder without a __main__.py: wanted a Python script")
        return True
    # A pipe can be read once, by whom it is for; archives and compiled files hold no source.
    if not path.is_file() or path.suffix == ".pyc" or zipfile.is_zipfile(path):
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are given when it runs
            compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except OSError as error:
        raise InvalidInput(f"run was given {path}, which cannot be read: {error.strerror or error}") from error
    except (SyntaxError, ValueError) as error:
        if path.suffix in (".py", ".pyw"):
            sys.excepthook(type(error), error.with_traceback(None), None)
            return False
        line = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
        what = error.msg if isinstance(error, SyntaxError) else error
        raise InvalidInput(
            f"run was given {path}, which is not Python ({line}{what}): wanted a Python script"
        ) from error
    return True
