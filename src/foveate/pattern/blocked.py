"""Patterns of blocks of positions: chosen, random, or any pattern over blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.pattern.algebra import Pattern
from foveate.pattern.ranges import count_inside, hashed
from foveate.pattern.strange import wanted_pattern
from foveate.positions import Extent, Pairs, Tiles
from foveate.values import Name, booleans, whole
from foveate.words import explained


@dataclass(frozen=True, eq=False, repr=False)
class RandomBlocks(Pattern):
    """`count` key blocks for every head and query block, drawn without replacement from `seed`."""

    count: int
    block: int
    seed: int

    # Above this many query blocks a tile, `bounds` says "perhaps": most such tiles hold a drawn block anyway.
    _COARSE = 16

    def _drawn(self, head: Tensor, query_block: Tensor, keys: int) -> list[Tensor]:
        """The drawn key blocks by Floyd's algorithm (CACM 1987): uniform, no repeats, no state."""
        blocks = -(-keys // self.block)
        drawn: list[Tensor] = []
        for turn in range(blocks - self.count, blocks):
            pick = hashed(self.seed, head, query_block, turn) % (turn + 1)
            repeated = torch.zeros_like(pick, dtype=torch.bool)
            for earlier in drawn:
                repeated = repeated | (pick == earlier)
            drawn.append(torch.where(repeated, turn, pick))
        return drawn

    def visible(self, at: Pairs) -> Tensor:
        if at.keys is None:
            raise InvalidInput(f"{self!r} depends on the number of keys: use pattern.mask_mod(query_start, keys)")
        key_block = at.key // self.block
        if self.count * self.block >= at.keys:
            return (key_block >= 0) & (at.query == at.query)
        result = torch.zeros((), dtype=torch.bool, device=at.key.device)
        for pick in self._drawn(at.head, at.query // self.block, at.keys):
            result = result | (pick == key_block)
        return result

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        everything = torch.ones_like(tiles.key, dtype=torch.bool)
        if self.count * self.block >= tiles.keys:
            return everything, everything
        first_q, last_q = tiles.query // self.block, (tiles.query_end - 1) // self.block
        span = int((last_q - first_q).max()) + 1
        if span > self._COARSE:
            return everything, ~everything
        first_k, last_k = tiles.key // self.block, (tiles.key_end - 1) // self.block
        may, must = ~everything, everything & (first_k == last_k)
        for step in range(span):
            query_block = first_q + step
            hits = torch.zeros_like(may)
            for pick in self._drawn(tiles.head, query_block, tiles.keys):
                hits = hits | ((first_k <= pick) & (pick <= last_k))
            inside = query_block <= last_q
            may, must = may | (hits & inside), must & (hits | ~inside)
        return may, must

    def write(self, name: Name) -> str:
        return f"random_blocks({self.count}, {self.block}, seed={self.seed})"


@explained
def random_blocks(count: int, block: int = 64, seed: int = 0) -> Pattern:
    """`count` random key blocks of `block` keys for every block of queries (BigBird, 2007.14062).

    A function of seed, head, query block and the number of key blocks alone: no state, the same on every device.
    """
    return RandomBlocks(
        whole(count, "the count of random_blocks", 0),
        whole(block, "the block of random_blocks", 1),
        whole(seed, "the seed of random_blocks", 0),
    )


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Pattern):
    """A boolean matrix of blocks: entry (i, j) opens block i of the queries to block j of the keys."""

    matrix: Tensor
    block: int

    def _full(self) -> Tensor:
        return self.matrix.view((1,) * (4 - self.matrix.dim()) + tuple(self.matrix.shape))

    def visible(self, at: Pairs) -> Tensor:
        size, rows, columns = self.block, *self.matrix.shape[-2:]
        row, column = at.query // size, at.key // size
        inside = (row >= 0) & (row < rows) & (column < columns)
        row, column = row.clamp(0, rows - 1), column.clamp(0, columns - 1)
        return Pairs(at.batch, at.head, row, at.query, column).of(self._full()) & inside

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        table = self._full()
        top, bottom = tiles.query // self.block, (tiles.query_end - 1) // self.block + 1
        left, right = tiles.key // self.block, (tiles.key_end - 1) // self.block + 1
        area = (bottom - top) * (right - left)
        count = count_inside(table, tiles.batch, tiles.head, (top, bottom), (left, right))
        return count > 0, count == area

    def misfits(self, extent: Extent) -> list[str]:
        batch, heads, rows, columns = self._full().shape
        reasons = super().misfits(extent)
        need_rows, need_columns = -(-(extent.last or 0) // self.block), -(-extent.keys // self.block)
        if not all(n == 1 or of in (None, n) for n, of in ((batch, extent.batch), (heads, extent.heads))):
            reasons.append(f"{self!r} does not fit batch {extent.batch} and {extent.heads} heads")
        if rows < need_rows or columns < need_columns:
            reasons.append(
                f"{self!r} is too small: wanted at least {need_rows} × {need_columns} blocks of {self.block}"
            )
        return reasons

    def write(self, name: Name) -> str:
        return f"blocks({name(self.matrix)}, {self.block})"


@explained
def blocks(matrix: Tensor, block: int) -> Pattern:
    """Whole blocks, by position: boolean `[query blocks, key blocks]`, `[heads, …]` or `[batch, heads, …]`."""
    found = booleans(matrix, "blocks", "a boolean tensor of 2, 3 or 4 dimensions", (2, 3, 4))
    return Blocks(found, whole(block, "the block size", 1))


@dataclass(frozen=True, eq=False, repr=False)
class Blockwise(Pattern):
    """A pattern over blocks of positions instead of single ones."""

    pattern: Pattern
    block: int

    def visible(self, at: Pairs) -> Tensor:
        size, keys = self.block, None if at.keys is None else -(-at.keys // self.block)
        at = Pairs(
            at.batch, at.head, at.row // size, at.query // size, at.key // size, keys, heads=at.heads
        )  # fmt: skip
        return self.pattern.visible(at)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        def up(end: Tensor) -> Tensor:
            return (end - 1) // self.block + 1

        size = self.block
        return self.pattern.bounds(
            Tiles(
                tiles.batch, tiles.head, tiles.row // size, up(tiles.row_end), tiles.query // size, up(tiles.query_end),
                tiles.key // size, up(tiles.key_end), -(-tiles.keys // size),
            )
        )  # fmt: skip

    def misfits(self, extent: Extent) -> list[str]:
        def up(n: int) -> int:
            return -(-n // self.block)

        last = None if extent.last is None else up(extent.last)
        return self.pattern.misfits(
            Extent(extent.batch, extent.heads, up(extent.queries), up(extent.keys), last, extent.device)
        )

    def write(self, name: Name) -> str:
        return f"blockwise({self.pattern.write(name)}, {self.block})"


@explained
def blockwise(pattern: Pattern, block: int) -> Pattern:
    """`pattern` over blocks of `block` positions: `blockwise(window(2), 64)` sees the own block and one on each side.

    >>> import foveate as fv
    >>> print(fv.blockwise(fv.causal, 2).picture(4, 4))
    1 1 . .
    1 1 . .
    1 1 1 1
    1 1 1 1
    """
    if not isinstance(pattern, Pattern):
        raise InvalidInput(f"blockwise was given {wanted_pattern(pattern)}")
    return Blockwise(pattern, whole(block, "the block size", 1))
