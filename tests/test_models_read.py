"""A model's file is what one reads to learn that architecture, and everything that it opens is compared."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from parity import Case
from torch import nn

import foveate.models
from foveate.models import FAMILIES, formats

FILES = sorted(path for path in Path(foveate.models.__path__[0]).glob("*.py") if path.stem != "__init__")
filed = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@filed
def test_a_file_is_short_and_links_its_paper(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") < 250
    module = importlib.import_module(f"foveate.models.{file.stem}")
    assert re.search(r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}|cdn\.openai\.com/\S+)", module.__doc__ or "")


@filed
def test_no_family_inherits_from_another(file: Path) -> None:
    module = importlib.import_module(f"foveate.models.{file.stem}")
    for made in (thing for thing in vars(module).values() if isinstance(thing, type)):
        if made.__module__ == module.__name__:
            homes = {base.__module__ for base in made.__mro__[1:]}
            assert not [home for home in homes if home.startswith("foveate.models.")], made


def test_every_file_is_opened_by_some_folder() -> None:
    parts = {"resnet"}  # of DETR
    assert {file.stem for file in FILES} - parts == set(FAMILIES.values())


def test_every_kind_and_every_module_is_compared_with_hugging_faces() -> None:
    kinds, modules = set(), set()
    for file in Path(__file__).parent.glob("test_models_*.py"):
        for table in vars(importlib.import_module(file.stem)).values():
            for case in table.values() if isinstance(table, dict) else ():
                if isinstance(case, Case):
                    model: nn.Module = case.make()
                    kind = getattr(model.config, "model_type", type(model).__name__)  # diffusers: the class
                    kinds.add(kind)
                    modules.add(formats(kind)[kind].architectures[type(model).__name__])
    assert FAMILIES.keys() - kinds == set()
    assert {made for kind in FAMILIES for made in formats(kind)[kind].architectures.values()} - modules == set()
