"""Patterns of a picture: positions that lie on a grid, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.pattern.algebra import Pattern
from foveate.positions import Pairs, Tiles
from foveate.values import Name, whole
from foveate.words import explained


@dataclass(frozen=True, eq=False, repr=False)
class Neighborhood(Pattern):
    """At most `reach` rows and columns away, on a grid of `width` columns whose first place is position `start`."""

    reach: int
    width: int
    start: int

    def visible(self, at: Pairs) -> Tensor:
        query, key = at.query - self.start, at.key - self.start
        rows = (query // self.width - key // self.width).abs()
        columns = (query % self.width - key % self.width).abs()
        return (query >= 0) & (key >= 0) & (rows <= self.reach) & (columns <= self.reach)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        query = tiles.query - self.start, tiles.query_end - 1 - self.start
        key = tiles.key - self.start, tiles.key_end - 1 - self.start
        may = (query[1] >= 0) & (key[1] >= 0)
        must = (query[0] >= 0) & (key[0] >= 0)
        for one, other in ((self._rows(*query), self._rows(*key)), (self._columns(*query), self._columns(*key))):
            nearest = torch.maximum(one[0] - other[1], other[0] - one[1])
            farthest = torch.maximum(one[1] - other[0], other[1] - one[0])
            may, must = may & (nearest <= self.reach), must & (farthest <= self.reach)
        return may, must

    def _rows(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        return first // self.width, last // self.width

    def _columns(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the most column of a run of places: all of them, where it goes over the end of a row."""
        one_row = first // self.width == last // self.width
        return torch.where(one_row, first % self.width, 0), torch.where(one_row, last % self.width, self.width - 1)

    def write(self, name: Name) -> str:
        start = f", start={self.start}" if self.start else ""
        return f"neighborhood({self.reach + 1}, {self.width}{start})"


@explained
def neighborhood(size: int, width: int, *, start: int = 0) -> Pattern:
    """On a grid of `width` columns, read row by row: the places at most size − 1 rows and size − 1 columns away.

    A window in two dimensions, cut off at the border (Ramachandran et al. 2019, 1906.05909). The grid begins at
    position `start`; what stands before it, class tokens say, sees nothing and is seen by nobody, unless you add
    `| global_tokens([0])`.

    >>> import foveate as fv
    >>> print(fv.neighborhood(2, 3).picture(6, 6))
    1 1 . 1 1 .
    1 1 1 1 1 1
    . 1 1 . 1 1
    1 1 . 1 1 .
    1 1 1 1 1 1
    . 1 1 . 1 1
    """
    return Neighborhood(
        whole(size, "neighborhood's size", 1) - 1, whole(width, "neighborhood's width", 1),
        whole(start, "neighborhood(start=)", 0),
    )  # fmt: skip
