"""A pattern that reads its summary: for what has no interval logic of its own, inside a composition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.pattern.algebra import Pattern
from foveate.pattern.block_mask import Summary
from foveate.pattern.ranges import count_inside
from foveate.positions import Pairs, Tiles
from foveate.values import Name

_EMPTY, _FULL = -2, -1


@dataclass(frozen=True, eq=False, repr=False)
class Drawn(Pattern):
    """The pairs of a summary, by row; `place` is every tile's place in its bits, −1 full, −2 empty."""

    made: Summary
    place: Tensor

    def visible(self, at: Pairs) -> Tensor:
        tile, bits = self.made.tile, self.made.bits
        place = Pairs(at.batch, at.head, at.row // tile, at.query, at.key // tile).of(self.place)
        if bits.shape[0] == 0:
            return place == _FULL
        key = at.key % tile
        byte = bits[place.clamp(min=0), at.row % tile, key // 8].long()
        return torch.where(place >= 0, (byte >> key % 8) & 1 == 1, place == _FULL)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        tile = self.made.tile
        rows = tiles.row // tile, (tiles.row_end - 1) // tile + 1
        columns = tiles.key // tile, (tiles.key_end - 1) // tile + 1
        area = (rows[1] - rows[0]) * (columns[1] - columns[0])
        may = count_inside(self.place != _EMPTY, tiles.batch, tiles.head, rows, columns) > 0
        return may, count_inside(self.place == _FULL, tiles.batch, tiles.head, rows, columns) == area

    def write(self, name: Name) -> str:
        return f"drawn({self.made.queries} × {self.made.keys})"


def drawn(summary: Summary) -> Pattern:
    """The pattern of a summary."""
    rows, columns = summary.offsets.shape[2] - 1, -(-summary.keys // summary.tile)
    shape = (summary.batch, summary.heads, rows, columns)
    place = torch.full(shape, _EMPTY, dtype=torch.int64, device=summary.columns.device)
    batch, head, row = summary.rows()
    place[batch, head, row, summary.columns] = summary.partial
    return Drawn(summary, place)
