"""Patterns whose every query sees one run of keys: [low, high), worked out for all queries at once.

Causal, windows, prefixes, chunks, padded lengths and documents laid end to end, all of these together, and `|` of those
that start at the first key. Nothing is looked at on the way: for lengths on a GPU the host never waits.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from foveate.pattern.algebra import And, Or, Pattern
from foveate.pattern.packing import PackedDocuments, PaddingLengths
from foveate.pattern.positional import Causal, Chunks, Prefix, Window

_KINDS = (Causal, Window, Prefix, Chunks, PaddingLengths, PackedDocuments)
_Bound = int | Tensor | None
_FAR = 1 << 62  # a limit that is none


def is_interval(pattern: Pattern) -> bool:
    """Whether every query sees one run of keys, wherever it stands."""
    return all(
        all(map(_starts_at_first, part.parts)) if isinstance(part, Or) else _is_run(part) for part in _parts(pattern)
    )


def _is_run(part: Pattern) -> bool:
    return isinstance(part, _KINDS) and not (isinstance(part, Window) and part.step > 1)


def _starts_at_first(pattern: Pattern) -> bool:
    return all(
        _is_run(part) and not isinstance(part, Chunks | PackedDocuments) and getattr(part, "left", None) is None
        for part in _parts(pattern)
    )


def ends(pattern: Pattern, query: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """(low, high) of the queries at these positions `[batch or 1, queries]`; a run may be empty, high ≤ low.

    Both lie in 0 … keys and grow with the position.
    """
    low, high = torch.zeros_like(query), torch.full_like(query, keys)
    for part in _parts(pattern):
        first, end = _run(part, query)
        low = low if first is None else low.clamp(min=first)
        high = high if end is None else high.clamp(max=end)
    low, high = torch.broadcast_tensors(low.clamp(0, keys), high.clamp(0, keys))
    return low, high


def span(pattern: Pattern, start: int, queries: int, keys: int) -> tuple[int, int]:
    """The run of keys that some query from position `start` on sees, by the parts that hold no tensor."""
    low, high = 0, keys
    for part in _parts(pattern):
        if not part.tensors():
            (first, _), (_, end) = _run(part, start), _run(part, start + queries - 1)
            low = max(low, first) if isinstance(first, int) else low
            high = min(high, end) if isinstance(end, int) else high
    return min(low, keys), max(high, 0)


def _parts(pattern: Pattern) -> tuple[Pattern, ...]:
    return pattern.parts if isinstance(pattern, And) else (pattern,)


def _run(part: Pattern, query: int | Tensor) -> tuple[_Bound, _Bound]:
    """[low, high) of one part for a position or for all, None where it sets no limit."""
    match part:
        case Causal():
            return None, query + 1
        case Window(left=left, right=right):
            return None if left is None else query - left, None if right is None else query + right + 1
        case Chunks(size=size):
            first = query // size * size
            return first, first + size
        case Prefix(length=length):
            return None, length[:, None] if isinstance(length, Tensor) else length
        case PaddingLengths(lengths=lengths):
            return None, lengths[:, None]
        case PackedDocuments(cu_seqlens=offsets):
            assert isinstance(query, Tensor)
            number = part.number(query)
            inside, number = number >= 0, number.clamp(min=0)
            last = (number + 1).clamp(max=offsets.shape[0] - 1)  # the offsets of no document have no next one
            return torch.where(inside, offsets[number], query), torch.where(inside, offsets[last], query)
        case Or(parts=alternatives):
            return None, functools.reduce(_greater, (_end(alternative, query) for alternative in alternatives))
        case _:
            raise AssertionError(part)


def _end(pattern: Pattern, query: int | Tensor) -> int | Tensor:
    """Where the run of a pattern ends that starts at the first key."""
    nearest: int | Tensor = _FAR
    for _, end in (_run(part, query) for part in _parts(pattern)):
        nearest = nearest if end is None else _less(nearest, end)
    return nearest


def _less(one: int | Tensor, other: int | Tensor) -> int | Tensor:
    if isinstance(one, Tensor):
        return one.clamp(max=other)
    return other.clamp(max=one) if isinstance(other, Tensor) else min(one, other)


def _greater(one: int | Tensor, other: int | Tensor) -> int | Tensor:
    if isinstance(one, Tensor):
        return one.clamp(min=other)
    return other.clamp(min=one) if isinstance(other, Tensor) else max(one, other)
