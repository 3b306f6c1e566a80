"""How a summary is made: the plane is split like a quadtree, and only undecided cells are ever looked into.

A coarse cell that the pattern's `bounds` rule out is dropped with all it covers; the others are split in four until
they are tiles. A tile that is neither empty nor full goes on being split, into cells of 16 × 16, before any single
pair is asked for: a diagonal or the edge of a block touches few of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.pattern.algebra import Pattern
from foveate.pattern.block_mask import Summary
from foveate.positions import Pairs, Tiles

_CELL = 16  # the side of the smallest cell that bounds decide
_PAINTED_AT_ONCE = 1 << 24  # pairs of partial tiles held as booleans
_ASKED_AT_ONCE = 1 << 20  # pairs asked for one by one, with their index tensors: what a cache holds


@dataclass(frozen=True)
class Plane:
    """The call: its pattern (None: all), its sizes over the batch rows and heads that differ, its first positions."""

    pattern: Pattern | None
    batch: int
    heads: int
    queries: int
    keys: int
    start: Tensor

    def shift(self, batch: Tensor) -> Tensor:
        """The position of row 0, for each entry."""
        return self.start[batch] if self.start.shape[0] > 1 else self.start.expand_as(batch)


@dataclass(frozen=True)
class Cells:
    """Squares of `size` pairs in a grid: (batch, head, row, column) of each, and `label`, what it belongs to."""

    size: int
    batch: Tensor
    head: Tensor
    row: Tensor
    column: Tensor
    label: Tensor

    def __getitem__(self, chosen: Tensor) -> Cells:
        members = (self.batch, self.head, self.row, self.column, self.label)
        return Cells(self.size, *(member[chosen] for member in members))

    def bounds(self, plane: Plane) -> tuple[Tensor, Tensor]:
        """(may, must) of every cell."""
        if len(self.row) == 0:
            nothing = torch.zeros_like(self.row, dtype=torch.bool)
            return nothing, nothing
        if plane.pattern is None:
            everything = torch.ones_like(self.row, dtype=torch.bool)
            return everything, everything
        first, first_key = self.row * self.size, self.column * self.size
        end = (first + self.size).clamp(max=plane.queries)
        end_key = (first_key + self.size).clamp(max=plane.keys)
        shift = plane.shift(self.batch)
        tiles = Tiles(self.batch, self.head, first, end, first + shift, end + shift, first_key, end_key, plane.keys)
        return plane.pattern.bounds(tiles)

    def split(self, plane: Plane) -> Cells:
        """Four cells of half the size for each, without those that lie outside the call."""
        device, size = self.row.device, self.size // 2
        down, right = torch.tensor([0, 0, 1, 1], device=device), torch.tensor([0, 1, 0, 1], device=device)
        batch, head, label = (x.repeat_interleave(4) for x in (self.batch, self.head, self.label))
        row = (self.row[:, None] * 2 + down).flatten()
        column = (self.column[:, None] * 2 + right).flatten()
        inside = (row * size < plane.queries) & (column * size < plane.keys)
        return Cells(size, batch, head, row, column, label)[inside]

    def visible(self, plane: Plane) -> Tensor:
        """Every pair of every cell, `[cells, size, size]`; pairs outside the call are not visible."""
        inside = torch.arange(self.size, device=self.row.device)
        rows = (self.row[:, None] * self.size + inside)[:, :, None]
        columns = (self.column[:, None] * self.size + inside)[:, None, :]
        # Clamped, so that no lookup leaves its table, and then masked away.
        row, key = rows.clamp(max=plane.queries - 1), columns.clamp(max=plane.keys - 1)
        batch, head = self.batch[:, None, None], self.head[:, None, None]
        assert plane.pattern is not None
        at = Pairs(batch, head, row, row + plane.shift(self.batch)[:, None, None], key, plane.keys)
        seen = plane.pattern.visible(at).broadcast_to(len(self.row), self.size, self.size)
        return seen & (rows < plane.queries) & (columns < plane.keys)


def build(pattern: Pattern, batch: int, heads: int, queries: int, keys: int, start: Tensor, tile: int) -> Summary:
    """The summary of `pattern` for a call of these sizes, `start` being `[1]` or `[batch]`."""
    device = start.device
    if not (queries and keys and batch and heads):
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        offsets = torch.zeros(1, 1, -(-queries // tile) + 1, dtype=torch.int64, device=device)
        return Summary(queries, keys, tile, offsets, nothing, nothing, _pack(nothing.bool().view(0, 1, 1), tile))
    plane = Plane(pattern, *extent(pattern, batch, heads, keys, start), queries, keys, start)
    size = tile << max(0, math.ceil(math.log2(max(queries, keys) / tile)))
    b, h = torch.meshgrid(
        torch.arange(plane.batch, device=device), torch.arange(plane.heads, device=device), indexing="ij"
    )
    cells = Cells(size, b.flatten(), h.flatten(), *(torch.zeros_like(b).flatten() for _ in range(3)))
    may, full = cells.bounds(plane)
    while cells.size > tile:
        cells = cells[may].split(plane)
        may, full = cells.bounds(plane)
    return in_rows(plane, cells[may], full[may], tile, paint)


def extent(pattern: Pattern, batch: int, heads: int, keys: int, start: Tensor) -> tuple[int, int]:
    """Over how many batch rows and heads the pattern really differs: the shape of its answer for one pair."""
    device = start.device
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    at = Pairs(
        batch=torch.arange(batch, device=device).view(batch, 1, 1, 1),
        head=torch.arange(heads, device=device).view(1, heads, 1, 1),
        row=zero,
        query=zero + start.view(-1, 1, 1, 1),
        key=zero,
        keys=keys,
        heads=heads,
    )
    shape = (1, 1, 1, 1, *pattern.visible(at).shape)[-4:]
    return shape[0], shape[1]


def in_rows(plane: Plane, tiles: Cells, full: Tensor, tile: int, paint: Callable[[Plane, Cells], Tensor]) -> Summary:
    """Sort the tiles into rows, paint those that may be partial, and drop or promote what turns out uniform."""
    tile_rows = -(-plane.queries // tile)
    place = (tiles.batch * plane.heads + tiles.head) * tile_rows + tiles.row
    order = torch.argsort(place * -(-plane.keys // tile) + tiles.column)
    tiles, full, place = tiles[order], full[order], place[order]
    keep = torch.ones_like(full)
    packed: list[Tensor] = []
    for part in (~full).nonzero().flatten().split(max(1, _PAINTED_AT_ONCE // tile**2)):
        seen = paint(plane, tiles[part])
        count = seen.flatten(1).sum(1)
        height = (plane.queries - tiles.row[part] * tile).clamp(max=tile)
        width = (plane.keys - tiles.column[part] * tile).clamp(max=tile)
        full[part], keep[part] = count == height * width, count > 0
        packed.append(_pack(seen[(count > 0) & (count < height * width)], tile))
    place, column, full = place[keep], tiles.column[keep], full[keep]
    counts = torch.bincount(place, minlength=plane.batch * plane.heads * tile_rows)
    ends = counts.cumsum(0).view(plane.batch, plane.heads, tile_rows)
    offsets = torch.cat([(ends - counts.view_as(ends))[..., :1], ends], -1)
    partial = torch.where(full, -1, (~full).cumsum(0) - 1)
    bits = torch.cat(packed) if packed else _pack(full.new_zeros(0, 1, 1), tile)
    return Summary(plane.queries, plane.keys, tile, offsets, column, partial, bits)


def paint(plane: Plane, tiles: Cells) -> Tensor:
    """Every pair of some tiles, `[tiles, tile, tile]`: full cells at once, and undecided ones pair by pair."""
    count, tile = len(tiles.row), tiles.size
    canvas = torch.zeros(count, tile, tile, dtype=torch.bool, device=tiles.row.device)
    cells = Cells(tile, tiles.batch, tiles.head, tiles.row, tiles.column, torch.arange(count, device=canvas.device))
    while cells.size > _CELL and cells.size % 2 == 0:
        cells = cells.split(plane)
        may, must = cells.bounds(plane)
        _fill(canvas, cells[must], torch.ones((), dtype=torch.bool, device=canvas.device))
        cells = cells[may & ~must]
    for part in torch.arange(len(cells.row), device=canvas.device).split(max(1, _ASKED_AT_ONCE // cells.size**2)):
        _fill(canvas, cells[part], cells[part].visible(plane))
    return within(canvas, plane, tiles)  # a cell that was filled at once may reach over the end of the call


def within(canvas: Tensor, plane: Plane, tiles: Cells) -> Tensor:
    """The canvas without the pairs that lie outside the call; changed in place."""
    tile = tiles.size
    inside = torch.arange(tile, device=canvas.device)
    canvas &= (tiles.row[:, None] * tile + inside < plane.queries)[:, :, None]
    canvas &= (tiles.column[:, None] * tile + inside < plane.keys)[:, None, :]
    return canvas


def _fill(canvas: Tensor, cells: Cells, seen: Tensor) -> None:
    """Write cells into the tiles that their labels name."""
    across = canvas.shape[1] // cells.size
    grid = canvas.view(-1, across, cells.size, across, cells.size).permute(0, 1, 3, 2, 4)
    grid[cells.label, cells.row % across, cells.column % across] = seen


def _pack(seen: Tensor, tile: int) -> Tensor:
    """Booleans `[tiles, tile, tile]` as bits, uint8 `[tiles, tile, tile / 8]`."""
    if seen.shape[0] == 0:
        return torch.zeros(0, tile, -(-tile // 8), dtype=torch.uint8, device=seen.device)
    seen = torch.nn.functional.pad(seen, (0, -tile % 8)).unflatten(2, (-1, 8))
    packed = seen[..., 0].to(torch.uint8)
    for bit in range(1, 8):
        packed |= seen[..., bit].to(torch.uint8) << bit
    return packed
