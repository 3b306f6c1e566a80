"""docs/models-of-our-own.md: the table of the files in foveate.models, from the formats that they open."""

from __future__ import annotations

import importlib
from importlib.metadata import version

from foveate.models import FAMILIES, formats
from making.filling import filled


def own_models() -> str:
    """The page of our own models, with what each file opens and the versions that it was compared with."""
    lines = ["| file | `model_type`, or the class of diffusers | modules | presets |", "|:--|:--|:--|:--|"]
    for file in sorted(set(FAMILIES.values())):
        kinds = [kind for kind, home in FAMILIES.items() if home == file]
        made = {module for kind in kinds for module in formats(kind)[kind].architectures.values()}
        homes = {module.__module__.rpartition(".")[2] for module in made}
        modules = _code(sorted(module.__name__ for module in made))
        if file not in homes:
            modules = f"those of `{homes.pop()}.py`"
        presets = importlib.import_module(f"foveate.models.{file}").PRESETS
        lines.append(f"| `{file}.py` | {_code(kinds)} | {modules} | {_code(presets)} |")
    versions = {package: version(package).partition("+")[0] for package in ("transformers", "diffusers", "torch")}
    return filled("models-of-our-own.md", table="\n".join(lines), **versions)


def _code(names: object) -> str:
    assert hasattr(names, "__iter__")
    return ", ".join(f"`{name}`" for name in names)
