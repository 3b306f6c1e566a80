"""docs/models.md: what every Hugging Face model of tests/families.py asked of Foveate."""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib.metadata import version

import torch

import foveate as fv
from making.filling import DOCS, filled


@cache
def models() -> str:
    """The page of Hugging Face models: each of them is run, and what its layers asked for is written down."""
    sys.path.insert(0, str(DOCS.parent / "tests"))
    from families import FAMILIES, build

    def code(value: object) -> str:
        return f"`{re.sub('<[^>]*>', '…', str(value))}`"  # without the sizes of its tensors

    lines = ["| model | class | layers reached | who may attend to whom | scores |", "|:--|:--|--:|:--|:--|"]
    for name, family in FAMILIES.items():
        model = build(name)
        with torch.no_grad(), fv.patch(model) as patched, fv.watch(model) as seen:
            model(**family.inputs())
        asked = dict.fromkeys("all" if call.pattern is None else code(call.pattern) for call in seen.calls)
        scores = dict.fromkeys(code(call.score) for call in seen.calls if call.score is not None)
        lines.append(
            f"| {family.label} | `{type(model).__name__}` | {len(patched.layers)} | {'<br>'.join(asked)} "
            f"| {'<br>'.join(scores)} |"
        )
    versions = {package: version(package).partition("+")[0] for package in ("transformers", "torch")}
    return filled("models.md", table="\n".join(lines), **versions)
