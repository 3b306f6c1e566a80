"""Where the tensors inside a layer's call come from: its own tokens, or what it was given beside them.

Names and lengths cannot tell attention among tokens from attention to a text: a text may be as long as a picture. So
every function of PyTorch that runs inside the call hands on what its inputs were made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode


class Origin(NamedTuple):
    """What a tensor was made of, and the pieces that were laid end to end in it: (of own tokens alone?, length)."""

    own: bool
    given: bool
    pieces: tuple[tuple[bool, int], ...] = ()


_OWN, _GIVEN = Origin(own=True, given=False), Origin(own=False, given=True)
# By name: in a compiled graph functions of PyTorch are found in no set.
_LIKE_ANOTHER = {"to", "type_as", "expand_as", "view_as", "reshape_as"}  # only the first of their tensors counts
_MADE_ANEW = {
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty", "new_zeros",
    "new_ones", "new_full", "new_tensor",
}  # fmt: skip
_END_TO_END = {"cat", "concat", "concatenate"}
_MARK = "_foveate_origin"


class Origins(TorchFunctionMode):
    """While it is on, `origin` knows of every tensor made meanwhile whether it depends on `own` or on what was `given`.

    A tensor carries its origin as long as it lives, and nothing holds the tensor.
    """

    def __init__(self, own: object, given: Iterable[object]) -> None:
        super().__init__()
        self.own = own
        self.given = [x for x in tensors_in(given) if x is not own]
        self._call: list[None] = []  # its identity tells this call's marks from those of earlier ones

    def origin(self, x: Tensor) -> Origin | None:
        """What a tensor was made of; None: of neither, as far as can be seen."""
        if x is self.own:
            return _OWN
        for each in self.given:
            if x is each:
                return _GIVEN
        mark = getattr(x, _MARK, None)
        return Origin(*mark[1]) if mark is not None and mark[0] is self._call else None

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, given: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        named = named or {}
        name = getattr(function, "__name__", "")
        if name == "unflatten":
            function = torch.unflatten  # the method of that name is not traced inside a mode
        out = function(*given, **named)
        made_of_tensors = out is None or (isinstance(out, Tensor | tuple | list) and not isinstance(out, torch.Size))
        if not made_of_tensors or name in _MADE_ANEW:
            return out
        if isinstance(function, HigherOrderOperator):  # FlexAttention's, whose results take no marks in a graph
            return out
        inputs = tensors_in(given[:1] if name in _LIKE_ANOTHER else (*given, *named.values()))
        own = others = False
        pieces: tuple[tuple[bool, int], ...] = ()
        for x in inputs:
            origin = self.origin(x)
            if origin is not None:
                own, others, pieces = own or origin.own, others or origin.given, pieces or origin.pieces
        if own or others:
            if name in _END_TO_END:
                pieces = self._laid(inputs, named.get("dim", given[1] if len(given) > 1 else 0))
            if torch.compiler.is_compiling() and type(out) in (tuple, list):
                out = type(out)([x[...] if isinstance(x, Tensor) else x for x in out])  # else they take no marks
            for made in tensors_in((inputs[0] if out is None else out,)):  # x[…] = y returns nothing and writes into x
                setattr(made, _MARK, (self._call, (own, others, pieces)))  # nothing of ours: a tensor may be saved
        return out

    def _laid(self, inputs: list[Tensor], axis: int) -> tuple[tuple[bool, int], ...]:
        origins = [self.origin(x) for x in inputs]
        if any(origin is None for origin in origins) or len({origin.own for origin in origins if origin}) == 1:
            return ()
        return tuple((origin.own, x.shape[axis]) for origin, x in zip(origins, inputs, strict=True) if origin)


def tensors_in(of: Iterable[object]) -> list[Tensor]:
    """All tensors among some things, and within the lists and tuples among them."""
    found: list[Tensor] = []
    for each in of:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, list | tuple):
            found += tensors_in(each)
    return found
