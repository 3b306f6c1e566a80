"""A pattern as lists of keys beside a reach: what a kernel that gathers takes, so that its cost follows the lists.

The lists are the table of a selection. What else the pattern asks is a reach, which the kernel applies by itself, or it
is asked of every listed key here, and those that it hides become −1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.pattern.algebra import And, Pattern
from foveate.pattern.band import Reach, reach
from foveate.pattern.quadtree import extent
from foveate.pattern.selected import Selected
from foveate.positions import Pairs, starts

_LARGEST = 4096  # keys of a block; of larger ones tiles are as good as lists
_ASKED_AT_ONCE = 1 << 20  # keys of lists, with their index tensors


@dataclass(frozen=True)
class Lists:
    """indices `[batch or 1, heads, queries or 1, k]` of blocks of `block` keys: int32 or int64, the last stride 1."""

    indices: Tensor
    block: int
    reach: Reach


def is_listed(pattern: Pattern | None) -> bool:
    """Whether the pattern is one selection, and whatever else beside it."""
    parts = pattern.parts if isinstance(pattern, And) else (pattern,)
    own = [part for part in parts if isinstance(part, Selected)]
    others = [part for part in parts if part is not None and not isinstance(part, Selected)]
    return len(own) == 1 and own[0].block <= _LARGEST and not any("selected(" in part.spec()[0] for part in others)


def lists(pattern: Pattern, batch: int, heads: int, queries: int, keys: int, query_start: int | Tensor) -> Lists:
    """The lists of a pattern that `is_listed`."""
    parts = pattern.parts if isinstance(pattern, And) else (pattern,)
    (own,) = (part for part in parts if isinstance(part, Selected))
    others = tuple(part for part in parts if part is not own)
    rest = And(others) if len(others) > 1 else others[0] if others else None
    simple = reach(rest)
    if simple is not None:
        return Lists(_plain(own.indices), own.block, simple)
    assert rest is not None
    start = starts(query_start, batch, queries, keys, own.indices.device)
    return Lists(_visible(own, rest, batch, heads, queries, keys, start), 1, Reach())


def _plain(indices: Tensor) -> Tensor:
    if indices.dtype not in (torch.int32, torch.int64):
        indices = indices.int()
    return indices if indices.stride(3) == 1 or indices.shape[3] == 1 else indices.contiguous()


def _visible(own: Selected, rest: Pattern, batch: int, heads: int, queries: int, keys: int, start: Tensor) -> Tensor:
    """Every listed key that `rest` lets a query see, as tokens; −1 for the others."""
    table, block, device = own.indices, own.block, own.indices.device
    differ = extent(rest, batch, heads, keys, start)
    sizes = max(table.shape[0], differ[0]), max(table.shape[1], heads if differ[1] > 1 else 1)
    found = torch.full((*sizes, queries, table.shape[3] * block), -1, dtype=torch.int32, device=device)
    b = torch.arange(sizes[0], device=device).view(-1, 1, 1, 1)
    h = torch.arange(sizes[1], device=device).view(1, -1, 1, 1)
    inside = torch.arange(block, device=device)
    step = max(1, _ASKED_AT_ONCE // max(1, found[:, :, 0].numel()))
    for row in torch.arange(queries, device=device).split(step):
        row = row.view(1, 1, -1, 1)
        at = b.clamp(max=table.shape[0] - 1), h // (sizes[1] // table.shape[1]), row.clamp(max=table.shape[2] - 1)
        listed = table[*(place[..., 0] for place in at)].long()
        key = (listed[..., None] * block + inside).flatten(3)
        there = (key >= 0) & (key < keys)
        query = row + (start[b] if start.shape[0] > 1 else start)
        head = h * (heads // sizes[1])
        pairs = Pairs(b, head, row, query, key.clamp(0, keys - 1), keys, heads=heads)
        seen = there & rest.visible(pairs)
        found[:, :, row.flatten()] = torch.where(seen, key, -1).int()
    return found
