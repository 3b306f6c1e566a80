"""timm, where the torchvision that it imports cannot load its own operators."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_OPERATORS = ("nms", "qnms")
_DEFINED: list[torch.library.Library] = []  # a library that is let go takes its operators along


def load_timm() -> ModuleType:
    """Timm itself.

    PyPI's torchvision is compiled for PyPI's torch. Beside a torch for CPUs alone its operators do not load, and then
    it cannot be imported: it says what shapes they have. So they are declared here, without a computation. Nothing that
    timm does with a model calls them.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in _OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DEFINED.append(library)
    return importlib.import_module("timm")
