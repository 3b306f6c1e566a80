"""Where results are to be written: looked at before anything is computed; and what is read from standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foveate.errors import InvalidInput


def checked(path: Path, suffixes: tuple[str, ...]) -> Path:
    """The path, whose ending says what to write; a file that is there already is left as it is.

    Raises:
        InvalidInput: it ends in something else, names a folder, or cannot be written.
    """
    with writing(path):
        if path.is_dir():
            raise InvalidInput(f"--out {path} is a folder: wanted a file in it that ends in {' or '.join(suffixes)}")
        if path.suffix not in suffixes:
            raise InvalidInput(f"--out {path} ends in {path.suffix or 'nothing'}: wanted one of {', '.join(suffixes)}")
        folder = path.absolute().parent
        if not folder.is_dir():
            how = "is no folder" if folder.exists() else "does not exist"
            raise InvalidInput(f"--out {path}: the folder {path.parent} {how}")
        # Permissions do not tell all (root, read-only disks, /proc): only opening does.
        there = path.exists()
        if not there or path.is_file():
            with path.open("ab"):
                pass
        if not there:
            path.resolve().unlink()  # where a link points to, the link stays
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever the system has against writing this file, as one sentence: a full disk, no permission.

    Raises:
        InvalidInput: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise InvalidInput(
            f"--out {path} cannot be written: {error.strerror or error}; choose another place"
        ) from error


def standard_input() -> str:
    """All of standard input, which is UTF-8 whatever the terminal's own encoding is.

    Raises:
        InvalidInput: it is closed, a folder, or not UTF-8.
    """
    if sys.stdin is None:
        raise InvalidInput("there is no standard input: give the text itself, or a file with < FILE")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"standard input is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}): save the file as "
            "UTF-8, or turn it into that with iconv"
        ) from error
    except OSError as error:
        raise InvalidInput(f"standard input cannot be read: {error.strerror or error}") from error
    return text.replace("\r\n", "\n")
