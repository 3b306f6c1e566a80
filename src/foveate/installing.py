"""How Foveate was installed, and so the command that installs an optional part of it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname


def how_to_install(extra: str) -> str:
    """The command that adds an extra to this installation: from its checkout, its file, its repository or an index."""
    source = _source()
    url = str(source.get("url", ""))
    if "vcs_info" in source:
        vcs = source["vcs_info"]
        at = vcs.get("requested_revision")
        return _from_url(extra, f"{vcs['vcs']}+{url}" + (f"@{at}" if at else ""), source)
    if "archive_info" in source:
        return _from_url(extra, url, source)
    if "dir_info" in source:
        folder = Path(url2pathname(urlsplit(url).path))
        edits = "-e " if source["dir_info"].get("editable") else ""
        here = "." if folder == Path.cwd() else folder
        return f'pip install {edits}"{here}[{extra}]"'
    return f'pip install "foveate[{extra}]"'


def _from_url(extra: str, url: str, source: dict[str, Any]) -> str:
    below = source.get("subdirectory")
    return f'pip install "foveate[{extra}] @ {url}' + (f'#subdirectory={below}"' if below else '"')


def _source() -> dict[str, Any]:
    """Where pip got Foveate, as it wrote it down (PEP 610): nothing for an index."""
    try:
        said = importlib.metadata.distribution("foveate").read_text("direct_url.json")
        found = json.loads(said) if said else {}
    except importlib.metadata.PackageNotFoundError:
        # Not installed at all, but on the path: a checkout.
        checkout = Path(__file__).parents[2]
        editable = {"url": checkout.as_uri(), "dir_info": {"editable": True}}
        found = editable if (checkout / "pyproject.toml").is_file() else {}
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}
