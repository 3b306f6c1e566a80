"""The summary of patterns that hold a selection: its indices are scattered to tiles and bits.

    touched tiles  ←  every index marks the tile that it falls in
    bits           ←  every index sets its bit, a few tile rows at a time

What else the pattern asks, causality say, is asked of the touched tiles alone. The cost follows the indices and the
tiles that they touch, never the n² pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.pattern import quadtree
from foveate.pattern.algebra import And, Not, Or, Pattern
from foveate.pattern.as_pattern import drawn
from foveate.pattern.block_mask import Summary
from foveate.pattern.blocked import Blockwise
from foveate.pattern.quadtree import Cells, Plane
from foveate.pattern.selected import Selected

_ENTRIES = 1 << 21  # indices at once, with their index tensors


def build(pattern: Pattern, batch: int, heads: int, queries: int, keys: int, start: Tensor, tile: int) -> Summary:
    """The summary of any pattern for a call of these sizes, `start` being `[1]` or `[batch]`."""
    if not (batch and heads and queries and keys):
        return quadtree.build(pattern, batch, heads, queries, keys, start, tile)
    parts = pattern.parts if isinstance(pattern, And) else (pattern,)
    selections = [part for part in parts if isinstance(part, Selected)]
    others = [
        _resolved(part, batch, heads, queries, keys, start, tile) for part in parts if not isinstance(part, Selected)
    ]
    rest = And(tuple(others)) if len(others) > 1 else others[0] if others else None
    if not selections:
        assert rest is not None
        return quadtree.build(rest, batch, heads, queries, keys, start, tile)
    reasons = [reason for part in selections for reason in part.outside(keys)]
    if reasons:
        raise InvalidInput("; ".join(reasons))
    grids = [_Grid(part, heads, queries, keys, tile) for part in selections]
    sizes = [(part.indices.shape[0], heads if part.indices.shape[1] > 1 else 1) for part in selections]
    if rest is not None:
        sizes.append(quadtree.extent(rest, batch, heads, keys, start))
    most = [max(size) for size in zip(*sizes, strict=True)]
    plane = Plane(rest, most[0], most[1], queries, keys, start)
    touched = torch.ones(*most, -(-queries // tile), -(-keys // tile), dtype=torch.bool, device=start.device)
    for grid in grids:
        touched &= grid.touched()
    b, h, row, column = touched.nonzero().unbind(1)
    tiles = Cells(tile, b, h, row, column, torch.zeros_like(b))
    tiles = tiles[tiles.bounds(plane)[0]]

    def paint(plane: Plane, tiles: Cells) -> Tensor:
        seen = quadtree.within(grids[0].painted(plane, tiles), plane, tiles)
        for grid in grids[1:]:
            seen &= grid.painted(plane, tiles)
        unsure = (~tiles.bounds(plane)[1]).nonzero().flatten()
        if len(unsure):
            seen[unsure] &= quadtree.paint(plane, tiles[unsure])
        return seen

    return quadtree.in_rows(plane, tiles, torch.zeros_like(tiles.row, dtype=torch.bool), tile, paint)


def _resolved(
    pattern: Pattern, batch: int, heads: int, queries: int, keys: int, start: Tensor, tile: int
) -> Pattern:  # fmt: skip
    """The same pattern, every selection in it replaced by its own summary, which knows its tiles."""
    if isinstance(pattern, Selected):
        return drawn(build(pattern, batch, heads, queries, keys, start, tile))
    if isinstance(pattern, And | Or):
        parts = tuple(_resolved(part, batch, heads, queries, keys, start, tile) for part in pattern.parts)
        return type(pattern)(parts)
    if isinstance(pattern, Not):
        return Not(_resolved(pattern.pattern, batch, heads, queries, keys, start, tile))
    if isinstance(pattern, Blockwise):
        queries, keys = (-(-size // pattern.block) for size in (queries, keys))
        return Blockwise(_resolved(pattern.pattern, batch, heads, queries, keys, start, tile), pattern.block)
    return pattern


@dataclass(frozen=True)
class _Grid:
    """One selection on the tiles of a call. Its grain is the largest run of keys that blocks and tiles are made of."""

    pattern: Selected
    heads: int
    queries: int
    keys: int
    tile: int

    @property
    def grain(self) -> int:
        return math.gcd(self.pattern.block, self.tile)

    @property
    def each(self) -> int:
        """Grains that an index stands for."""
        return self.pattern.block // self.grain

    def grains(self, indices: Tensor) -> Tensor:
        """The grains of `[…, k]` indices, `[…, k · each]`; those that are none lie in a column behind the last one."""
        indices = indices.long()[..., None]
        grain = indices * self.each + torch.arange(self.each, device=indices.device)
        there = (indices >= 0) & (grain * self.grain < self.keys)
        return torch.where(there, grain, -(-self.keys // self.tile) * (self.tile // self.grain)).flatten(-2)

    def _parts(self, count: int, width: int) -> Iterator[Tensor]:
        """Numbers below `count`, so many at once that `width` lists of each are few entries."""
        step = max(1, _ENTRIES // max(1, width * self.pattern.indices.shape[3] * self.each))
        yield from torch.arange(count, device=self.pattern.indices.device).split(step)

    def touched(self) -> Tensor:
        """Which tiles hold an entry, `[batch or 1, heads or 1, tile rows, tile columns]`."""
        table, columns = self.pattern.indices, -(-self.keys // self.tile)
        batch, heads, rows, _ = table.shape
        down = -(-rows // self.tile)
        flags = torch.zeros(batch, heads, down, columns + 1, dtype=torch.bool, device=table.device)
        for part in self._parts(batch * heads * rows, 1):
            b, h, row = torch.unravel_index(part, (batch, heads, rows))
            column = self.grains(table[b, h, row]) // (self.tile // self.grain)
            flags[b[:, None], h[:, None], (row // self.tile)[:, None], column] = True
        flags = flags[..., :columns].expand(-1, -1, -(-self.queries // self.tile), -1)
        return flags.repeat_interleave(self.heads // heads, 1) if heads > 1 else flags

    def painted(self, plane: Plane, tiles: Cells) -> Tensor:
        """The pairs of some tiles that lie in order, `[tiles, tile, tile]`; rows past the last are as the last."""
        table, tile, per = self.pattern.indices, self.tile, self.tile // self.grain
        count, down, columns = len(tiles.row), -(-plane.queries // tile), -(-plane.keys // tile)
        device = table.device
        line = (tiles.batch * plane.heads + tiles.head) * down + tiles.row
        lines, line = line.unique_consecutive(return_inverse=True)
        label = torch.full((len(lines), columns + 1), count, dtype=torch.int32, device=device)
        label[line, tiles.column] = torch.arange(count, dtype=torch.int32, device=device)
        group = self.heads // table.shape[1]
        inside = torch.arange(tile, device=device)
        canvas = torch.zeros(count * tile * per + 1, dtype=torch.bool, device=device)  # the last one is nowhere
        for part in self._parts(len(lines), tile):
            b, h, row = torch.unravel_index(lines[part], (plane.batch, plane.heads, down))
            rows = (row[:, None] * tile + inside).clamp(max=table.shape[2] - 1)
            b, h = b.clamp(max=table.shape[0] - 1)[:, None], (h // group)[:, None]
            grain = self.grains(table[b, h, rows])
            which = label[part[:, None, None], grain // per].long()
            canvas[torch.where(which < count, (which * tile + inside[:, None]) * per + grain % per, -1)] = True
        return canvas[:-1].view(count, tile, per).repeat_interleave(self.grain, 2)
