"""The forwards of one model, in whatever thread: between their begin and their end, its observer listens.

A hook stands at every module that may call our attention. Copies of the model that are made meanwhile, and what is
written to a file of it, have hooks that do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from foveate.dispatch.choose import Observation


def follow(model: nn.Module, observation: Observation, ran: Callable[[], None]) -> Callable[[], None]:
    """Let `observation` listen inside of each forward of `model` and of its parts; the returned function ends it."""
    handles = []
    for module in model.modules():
        if not is_of_torch(module):  # whose own classes never call us, and leave their fast path where they have hooks
            handles.append(module.register_forward_pre_hook(_Hook(observation.begin, ran)))
            handles.append(module.register_forward_hook(_Hook(observation.end), always_call=True))

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def is_of_torch(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own, as its class says."""
    return type(module).__module__.split(".")[0] == "torch"


class _Hook:
    """What is done before or after a forward of one module."""

    def __init__(self, *acts: Callable[[], None]) -> None:
        self._acts = acts

    def __call__(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():  # a graph tells nobody, and nothing of this is to be in it
            for act in self._acts:
                act()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # does nothing, and no file asks for foveate
