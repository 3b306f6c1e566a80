"""diffusers: attention layers that a pattern narrows, by the processors that diffusers lets one set."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from foveate.errors import InvalidInput
from foveate.integrations.narrowing import narrowed
from foveate.pattern.algebra import Pattern

Places = Pattern | Callable[[int], Pattern]


class Narrowed:
    """What `narrow` returns: the layers it narrowed; `undo()`, or the end of a `with`, puts their processors back."""

    def __init__(self, layers: dict[str, Any], pattern: Places) -> None:
        self.layers = tuple(layers)
        self._own = [(layer, layer.get_processor()) for layer in layers.values()]
        for layer, own in self._own:
            layer.set_processor(_narrow(own, pattern))

    def undo(self) -> None:
        """Give every layer the processor that it had; once."""
        while self._own:
            layer, own = self._own.pop()
            layer.set_processor(own)

    def __enter__(self) -> Narrowed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def narrow(model: nn.Module, pattern: Places, *, layers: Sequence[str] | None = None) -> Narrowed:
    """Narrow attention layers of a model of diffusers: each attends where it did *and* the pattern allows it.

    It gives each layer a processor (`set_processor`) that is its own under a pattern, so what a model does around its
    attention stays its own. A UNet looks at grids of several sizes, so the pattern may also be a function of the number
    of positions.

    Args:
        model: a model, or a part of one, with layers that have processors.
        pattern: who may attend to whom, or a function of the number of positions that says it.
        layers: names, or parts of names between dots ("attn1", "down_blocks.0"); None: all that attend to themselves,
            not to a text.

    Raises:
        InvalidInput: no layer has a processor, or none has such a name.

    >>> import math
    >>> import foveate as fv
    >>> from diffusers import DiTTransformer2DModel
    >>> from foveate.integrations.diffusers import narrow
    >>> model = DiTTransformer2DModel(2, 8, num_layers=1, sample_size=8, norm_num_groups=1)
    >>> with narrow(model, lambda places: fv.neighborhood(2, math.isqrt(places))) as narrowed:
    ...     print(narrowed.layers)
    ('transformer_blocks.0.attn1',)
    """
    there = {name: layer for name, layer in model.named_modules() if hasattr(layer, "set_processor")}
    if not there:
        raise InvalidInput(f"narrow was given a {type(model).__name__}: wanted a model of diffusers that attends")
    if layers is None:
        chosen = {name: layer for name, layer in there.items() if not getattr(layer, "is_cross_attention", False)}
    else:
        chosen = {name: layer for name, layer in there.items() if any(f".{part}." in f".{name}." for part in layers)}
    if not chosen:
        raise InvalidInput(f"no attention layer is named {layers}: there are {', '.join(there)}")
    return Narrowed(chosen, pattern)


def _narrow(own: Any, pattern: Places) -> Any:
    """The same processor, of a class that calls its own under a pattern."""
    kind = type(own)

    class Under(kind):  # type: ignore[misc, valid-type]
        @functools.wraps(kind.__call__)  # diffusers reads from its signature what it takes
        def __call__(self, *given: Any, **named: Any) -> Any:
            with _Narrowing(pattern):
                return kind.__call__(self, *given, **named)

    Under.__name__ = kind.__name__  # by which diffusers tells some of them apart
    made = copy.copy(own)
    made.__class__ = Under
    return made


class _Narrowing(TorchFunctionMode):
    """Inside it PyTorch's attention is narrowed by a pattern."""

    def __init__(self, pattern: Places) -> None:
        super().__init__()
        self.pattern = pattern

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, given: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*given, **(named or {}))
        query = given[0] if given else (named or {})["query"]
        pattern = self.pattern if isinstance(self.pattern, Pattern) else self.pattern(query.shape[2])
        return narrowed(pattern, *given, **(named or {}))
