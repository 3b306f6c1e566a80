"""The tiles of a pattern as FlexAttention lists them: for each row of tiles how many, and which columns.

Partial and full tiles are listed apart. They come from a summary, or from the runs of keys of an interval, and then
without a look at the data. No list is shorter than two: a size of 1 would be a constant of the compiled kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.pattern.block_mask import Summary

TILE = 128
Tells = Callable[[tuple[Tensor, Tensor], Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Listing:
    """Tiles by row: counts `[batch or 1, heads or 1, rows]`, columns `[batch or 1, heads or 1, rows, columns]`, int32.

    `seen` says which keys some row may see, `[batch or 1, heads or 1, keys]`, or is None: each of them.
    `tells(tables, steps, batch, head, row, key)` says of one pair whether it may attend. The tables are flat, and where
    to read them is worked out with `steps`, which is a tensor: no size of a mask is a constant of the compiled kernel.
    """

    partial: tuple[Tensor, Tensor]
    full: tuple[Tensor, Tensor]
    tables: tuple[Tensor, Tensor]
    steps: Tensor
    tells: Tells
    seen: Tensor | None = None

    @functools.cached_property
    def by_column(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(counts, rows) of partial and of full tiles for each column of them: what a backward pass goes through."""
        return (*_transposed(*self.partial), *_transposed(*self.full))

    def to(self, device: torch.device) -> Listing:
        """The same on another device."""

        def moved(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return pair[0].to(device), pair[1].to(device)

        seen = None if self.seen is None else self.seen.to(device)
        lists = moved(self.partial), moved(self.full), moved(self.tables)
        return Listing(*lists, self.steps.to(device), self.tells, seen)


def _transposed(counts: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    most = columns.shape[-1]
    there = torch.arange(most, device=columns.device) < counts[..., None]
    dense = torch.zeros(*columns.shape[:-1], most + 1, dtype=torch.int32, device=columns.device)
    dense.scatter_(-1, torch.where(there, columns, most).long(), 1)
    return _listed(dense[..., :most].mT)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(how many, which first) along the last dimension of ones and zeros."""
    return chosen.sum(-1, dtype=torch.int32), torch.argsort(chosen.int(), dim=-1, descending=True, stable=True).int()


def list_runs(low: Tensor, high: Tensor, keys: int, *, all_seen: bool) -> Listing:
    """The tiles of queries that see the keys [low, high), `[batch or 1, queries]` each; `all_seen`: every key is."""
    batch, queries = low.shape
    device = low.device
    rows, columns = -(-queries // TILE), -(-keys // TILE)
    padded = max(rows, 2)
    row = torch.arange(padded * TILE, device=device)
    first, end = (x[:, row.clamp(max=queries - 1)].view(batch, padded, TILE) for x in (low, high))
    sees = first < end
    may, may_end = first.where(sees, keys).amin(2), end.where(sees, 0).amax(2)
    must, must_end = first.amax(2), end.amin(2)
    # In tiles, from left to right: partial ones from `left` on, full ones from `middle` on, partial ones from `right`.
    left, stop = may // TILE, (may_end + TILE - 1) // TILE
    inside = torch.arange(padded, device=device) < rows
    stop = torch.maximum(stop, left).where(inside, left)
    middle = torch.minimum((must + TILE - 1) // TILE, stop)
    right = torch.minimum(torch.where(must_end == keys, columns, must_end // TILE), stop).clamp(min=middle)
    place = torch.arange(max(columns, 2), device=device)
    before = (middle - left)[..., None]
    partial = torch.where(place < before, left[..., None] + place, right[..., None] + place - before)

    def listed(counts: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        return counts[:, None].int(), which.clamp(max=columns - 1)[:, None].int()

    return Listing(
        listed(middle - left + stop - right, partial),
        listed(right - middle, middle[..., None] + place),
        (low.int().flatten(), high.int().flatten()),
        torch.full((1,), queries if batch > 1 else 0, device=device),
        _in_run,
        None if all_seen else _between(low, high, keys)[:, None],
    )


def _between(low: Tensor, high: Tensor, keys: int) -> Tensor:
    """Which keys lie between the first and the last one that some row sees: all of those, as rows come in order."""
    sees, key = low < high, torch.arange(keys, device=low.device)
    return (key >= low.where(sees, keys).amin(1, keepdim=True)) & (key < high.where(sees, 0).amax(1, keepdim=True))


def _in_run(
    tables: tuple[Tensor, Tensor], steps: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor
) -> Tensor:
    low, high = tables
    at = batch * steps[0] + row
    return (key >= low[at]) & (key < high[at])


def list_summary(summary: Summary) -> Listing:
    """The tiles of a summary whose tiles are of this size."""
    assert summary.tile == TILE
    rows, columns = max(summary.offsets.shape[2] - 1, 2), max(-(-summary.keys // TILE), 2)
    shape = (summary.batch, summary.heads, rows, columns)
    device = summary.columns.device
    at = (*summary.rows(), summary.columns)
    empty = -2
    place = torch.full(shape, empty, dtype=torch.int32, device=device)
    place[at] = summary.partial.int()  # −1 for a full tile

    bits = summary.bits if summary.bits.shape[0] else summary.bits.new_zeros(1, *summary.bits.shape[1:])
    steps = [rows * columns * summary.heads * (summary.batch > 1), rows * columns * (summary.heads > 1), columns]
    tables, seen = (place.flatten(), bits.flatten()), summary.keys_seen()
    return Listing(
        _listed(place >= 0), _listed(place == -1), tables, torch.tensor(steps, device=device), _in_tile,
        None if bool(seen.all()) else seen,
    )  # fmt: skip


def _in_tile(
    tables: tuple[Tensor, Tensor], steps: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor
) -> Tensor:
    place, bits = tables
    tile = place[batch * steps[0] + head * steps[1] + row // TILE * steps[2] + key // TILE]
    byte = bits[tile.clamp(min=0).long() * (TILE * TILE // 8) + row % TILE * (TILE // 8) + key % TILE // 8]
    # int32: FlexAttention's compiler has no shift of bytes by a tensor.
    bit = ((byte.to(torch.int32) >> (key % 8).to(torch.int32)) & 1).to(torch.bool)
    return torch.where(tile >= 0, bit, tile == -1)
