"""Patterns that the caller brings: a function or a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.pattern.algebra import Pattern
from foveate.pattern.strange import wanted_pattern
from foveate.positions import Extent, Pairs
from foveate.values import Name, as_tensor, booleans, describe, is_listed, mask_misfit
from foveate.words import explained


@dataclass(frozen=True, eq=False, repr=False)
class Rule(Pattern):
    """Any function of positions."""

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def visible(self, at: Pairs) -> Tensor:
        result = self.function(at.batch, at.head, at.query, at.key)
        if not isinstance(result, Tensor) or result.dtype != torch.bool:
            given = describe(result) if isinstance(result, Tensor) else type(result).__name__
            raise InvalidInput(f"{self!r} returned {given}: wanted a boolean tensor")
        return result

    def write(self, name: Name) -> str:
        return f"rule({name(self.function)})"


@explained
def rule(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Pattern:
    """Any function of (batch, head, query, key) index tensors that broadcasts and returns booleans.

    Nothing is known about its tiles, so every pair is evaluated: exact, but its cost is n². It cannot cross into a
    `torch.compile`d graph; compose named patterns there.
    """
    if not callable(function):
        raise InvalidInput(
            f"rule was given a {type(function).__name__}: wanted a function of (batch, head, query, key)"
        )
    return Rule(function)


@dataclass(frozen=True, eq=False, repr=False)
class FromMask(Pattern):
    """A boolean matrix that the caller has: `[batch, heads, queries, keys]`, any of them 1, by row of q and of k."""

    mask: Tensor

    def full(self) -> Tensor:
        """The mask with all four dimensions."""
        return self.mask.view((1,) * (4 - self.mask.dim()) + tuple(self.mask.shape))

    def visible(self, at: Pairs) -> Tensor:
        return at.of(self.full())

    def misfits(self, extent: Extent) -> list[str]:
        return super().misfits(extent) + mask_misfit("mask", self.mask, extent)

    def write(self, name: Name) -> str:
        return f"from_mask({name(self.mask)})"


def as_pattern(given: object) -> Pattern:
    """What was given as the pattern of a call: one, or a boolean mask, which may be a list or an array."""
    if isinstance(given, Pattern):
        return given
    mask = as_tensor(given, "the pattern", "booleans, True = may attend") if is_listed(given) else given
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise InvalidInput(f"the pattern is {wanted_pattern(mask)}")
    return from_mask(mask)


@explained
def from_mask(mask: Tensor) -> Pattern:
    """A boolean tensor that broadcasts to `[batch, heads, queries, keys]`; True = may attend."""
    wanted = "a boolean tensor of at most 4 dimensions, True = may attend"
    return FromMask(booleans(mask, "from_mask", wanted, range(5)))
