"""Where the pairs of a call are: index tensors that patterns and scores are functions of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Index tensors that broadcast against each other; `query` is the position, `row` the place in q.

    `query = row + query_start`. `keys` and `heads` are how many keys and query heads there are, None where nobody said
    (a bare mask_mod).
    `box` says the same as batch, head, row and key where these are contiguous: it reads a matrix without a copy.
    """

    batch: Tensor
    head: Tensor
    row: Tensor
    query: Tensor
    key: Tensor
    keys: int | None = None
    box: tuple[slice, slice, slice, slice] | None = None
    heads: int | None = None

    def of(self, table: Tensor) -> Tensor:
        """The entries of `[batch, heads, queries, keys]` at these pairs; a dimension of size 1 stands for all."""
        shape = table.shape
        if self.box is not None:
            return table[tuple(slice(None) if n == 1 else part for n, part in zip(shape, self.box, strict=True))]
        places = (self.batch, self.head, self.row, self.key)
        return table[
            tuple(
                # Not a scalar where there are dimensions: as an index it would be a number, which no graph can hold.
                place.clamp(0, n - 1) if n > 1 else place.new_zeros((1,) * place.dim())
                for place, n in zip(places, shape, strict=True)
            )
        ]


@dataclass(frozen=True)
class Tiles:
    """Rectangles of pairs, one entry a tile; the `_end` bounds are exclusive and no tile is without a pair."""

    batch: Tensor
    head: Tensor
    row: Tensor
    row_end: Tensor
    query: Tensor
    query_end: Tensor
    key: Tensor
    key_end: Tensor
    keys: int


@dataclass(frozen=True)
class Extent:
    """The sizes of a call that a pattern has to fit, None where unknown; `last` is the highest query position + 1."""

    batch: int | None
    heads: int | None
    queries: int
    keys: int
    last: int | None
    device: torch.device


def starts(query_start: int | Tensor | None, batch: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """`query_start` as a tensor `[batch]`, or `[1]` where all share it; None: the last query is at the last key."""
    if isinstance(query_start, Tensor):
        return query_start.to(device=device, dtype=torch.int64)
    return torch.full((1,), keys - queries if query_start is None else query_start, device=device)


def grid(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    query_start: int | Tensor | None,
    device: torch.device,
    box: tuple[slice, slice, slice, slice] | None = None,
) -> Pairs:
    """All pairs of a call, or those of a `box` of it, as tensors that broadcast to `[batch, heads, queries, keys]`."""
    all_of = slice(0, batch), slice(0, heads), slice(0, queries), slice(0, keys)
    b, h, r, k = box or all_of
    row = torch.arange(r.start, r.stop, device=device).view(1, 1, -1, 1)
    start = starts(query_start, batch, queries, keys, device)
    return Pairs(
        batch=torch.arange(b.start, b.stop, device=device).view(-1, 1, 1, 1),
        head=torch.arange(h.start, h.stop, device=device).view(1, -1, 1, 1),
        row=row,
        query=row + (start[b] if start.shape[0] > 1 else start).view(-1, 1, 1, 1),
        key=torch.arange(k.start, k.stop, device=device).view(1, 1, 1, -1),
        keys=keys,
        box=box or all_of,
        heads=heads,
    )
