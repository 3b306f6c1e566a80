"""Where results are to be written: looked at before anything is computed."""

from __future__ import annotations

from pathlib import Path

from foveate.errors import InvalidInput


def checked(path: Path, suffixes: tuple[str, ...]) -> Path:
    """The path, whose ending says what to write.

    Raises:
        InvalidInput: it ends in something else, or its folder does not exist.
    """
    if path.suffix not in suffixes:
        raise InvalidInput(f"--out {path} ends in {path.suffix or 'nothing'}: wanted one of {', '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise InvalidInput(f"--out {path}: the folder {path.parent} does not exist")
    return path
