"""Our states and caches, for `torch.load`: by itself it makes nothing of a file but tensors and plain values.

It is told their names as soon as torch is loaded, and their modules are loaded once a file asks for one.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "foveate.generation.cache": ("restored", "restored_layer", "GrowingLayer"),
    "foveate.integrations.transformers.cache": ("restored", "_restored_layer"),
    "foveate.linear.problem": ("LinearState",),
    "foveate.nn.attention": ("KeysValues",),
    "foveate.nn.decoder": ("DecoderState",),
    "foveate.nn.mixing": ("MixerState",),
    "foveate.rotary": ("Angles",),
}


class _Later:
    """Stands for a class or a function until a file asks for it."""

    def __init__(self, module: str, name: str) -> None:
        self._place = module, name
        vars(self)["__new__"] = lambda _, *args: self(*args)  # what torch asks of the object itself, as of a class

    def __call__(self, *args: Any) -> Any:
        module, name = self._place
        return getattr(importlib.import_module(module), name)(*args)


def allow() -> None:
    """Let `torch.load` make our states and caches of a file that holds them."""
    from torch.serialization import add_safe_globals

    add_safe_globals([(_Later(module, name), f"{module}.{name}") for module, names in _HOMES.items() for name in names])
