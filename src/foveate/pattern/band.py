"""Patterns that are a reach: every key from so far before a query's position to so far behind it.

Causal, windows and padded lengths, alone or together, are most of what is asked for. A kernel finds their tiles by
itself, so nothing is summarised, however the lengths change from call to call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.pattern.algebra import And, Pattern
from foveate.pattern.packing import PaddingLengths
from foveate.pattern.positional import Causal, Window


@dataclass(frozen=True)
class Reach:
    """−left ≤ key − query ≤ right, None without a limit; of batch row b only the first lengths[b] keys."""

    left: int | None = None
    right: int | None = None
    lengths: Tensor | None = None


def reach(pattern: Pattern | None) -> Reach | None:
    """The pattern as a reach; None for one that is none."""
    if pattern is None:
        return Reach()
    left: int | None = None
    right: int | None = None
    lengths: Tensor | None = None
    for part in pattern.parts if isinstance(pattern, And) else (pattern,):
        if isinstance(part, Causal):
            right = _nearer(right, 0)
        elif isinstance(part, Window) and part.step == 1:
            left, right = _nearer(left, part.left), _nearer(right, part.right)
        elif isinstance(part, PaddingLengths):
            lengths = part.lengths if lengths is None else torch.minimum(lengths, part.lengths)
        else:
            return None
    return Reach(left, right, lengths)


def _nearer(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)
