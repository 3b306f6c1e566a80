"""The Hugging Face models in what is watched: on foveate as long as anyone watches them."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from foveate.errors import InvalidInput
from foveate.locks import Lock
from foveate.see.forwards import is_of_torch

if TYPE_CHECKING:
    from foveate.integrations.transformers import Patched

_LOCK = Lock()
_ON: weakref.WeakKeyDictionary[nn.Module, _Held] = weakref.WeakKeyDictionary()  # by the model that was patched


@dataclass
class _Held:
    """What `watch` did to a model, and how many watches need it."""

    patched: Patched
    watches: int = 0


def watchable(model: object) -> nn.Module:
    """The module that `watch` was given, or the one in a pipeline, or the one that was compiled.

    Raises:
        InvalidInput: it is none, or all of it is PyTorch's own.
    """
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(module, nn.Module):
        kind = type(model).__name__
        raise InvalidInput(
            f"watch was given a {kind}: wanted a model (a torch.nn.Module), a pipeline that holds one in .model, or "
            "nothing, which records every fv.attention call of this thread"
        )
    module = getattr(module, "_orig_mod", module)
    if all(map(is_of_torch, module.modules())):
        name = type(module).__name__
        if any(isinstance(part, nn.MultiheadAttention) for part in module.modules()):
            raise InvalidInput(
                f"{name} cannot be watched, for its attention is PyTorch's own: give a copy of it with foveate's "
                "attention, which the from_torch of fv.nn's classes makes"
            )
        raise InvalidInput(
            f"{name} has no attention that foveate could see: give a Hugging Face model, a module that calls "
            "fv.attention or fv.nn's layers, or nothing, which records every fv.attention call of this thread"
        )
    return module


def switch(model: nn.Module) -> list[nn.Module]:
    """Put the Hugging Face models in `model` on foveate that are not; returns what to give to `switch_back`."""
    needed: list[nn.Module] = []
    try:
        with _LOCK:
            found = list(_outermost(model))
            for part in found or [model]:
                try:
                    needed += _need(part) if found else _around(part)
                except InvalidInput as error:
                    if part is model:
                        raise
                    warnings.warn(f"watch does not see into {type(part).__name__}: {error}", stacklevel=4)
            if not found:
                _check_part(model)
    except BaseException:
        switch_back(needed)
        raise
    return needed


def switch_back(needed: list[nn.Module]) -> None:
    """Give models back as they were, if no other watch needs them."""
    with _LOCK:
        for model in needed:
            held = _ON[model]
            held.watches -= 1
            if not held.watches:
                del _ON[model]
                held.patched.__exit__(None, None, None)


def _need(part: nn.Module) -> list[nn.Module]:
    """The models that have to stay patched for this one to be watched; none if somebody else patched it."""
    if around := _around(part):
        return around
    from foveate.integrations.transformers import is_on, patch

    if is_on(part):
        return []
    _ON[part] = _Held(patch(part), 1)
    return [part]


def _around(part: nn.Module) -> list[nn.Module]:
    """The model that a watch has patched and that this is, or is a part of."""
    for model, held in _ON.items():
        if any(part is each for each in model.modules()):
            held.watches += 1
            return [model]
    return []


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """The Hugging Face models in a module that are in no other one, or it itself."""
    if hasattr(type(module), "set_attn_implementation"):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child)


def _check_part(model: nn.Module) -> None:
    """Refuse layers of a Hugging Face model that is not on foveate: what they call is chosen for the whole model."""
    if "transformers" not in sys.modules:
        return
    from foveate.integrations.transformers import NAME, is_layer

    for layer in filter(is_layer, model.modules()):
        now = getattr(getattr(layer, "config", None), "_attn_implementation", NAME)
        if now != NAME:
            raise InvalidInput(
                f"{type(model).__name__} is a part of a model that attends by {now!r}: watch the whole model, or this "
                "part of it within `with fv.patch(model)`"
            )
