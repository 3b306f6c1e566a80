"""Every pattern by name. Each is a few lines: what is visible, and what a whole tile can be."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.pattern.algebra import Extent, Held, Name, Pairs, Pattern, Tiles, describe, integers, whole
from foveate.pattern.ranges import count_in, extremes_in, hashed


@dataclass(frozen=True, eq=False, repr=False)
class Causal(Pattern):
    """A query sees its own position and what came before (Vaswani et al. 2017, 1706.03762, section 3.2.3)."""

    def visible(self, at: Pairs) -> Tensor:
        return at.key <= at.query

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        return tiles.key < tiles.query_end, tiles.key_end <= tiles.query + 1

    def write(self, name: Name) -> str:
        return "causal"


causal = Causal()


@dataclass(frozen=True, eq=False, repr=False)
class Window(Pattern):
    """−right ≤ query − key ≤ left, in steps of `step`; None = no limit on that side."""

    left: int | None
    right: int | None
    step: int = 1

    def visible(self, at: Pairs) -> Tensor:
        back = at.query - at.key
        # With no limit on either side this keeps the shape and forbids nothing.
        result = back >= -self.right if self.right is not None else back == back
        if self.left is not None:
            result = result & (back <= self.left)
        return result & (back % self.step == 0) if self.step > 1 else result

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        least, most = tiles.query - (tiles.key_end - 1), (tiles.query_end - 1) - tiles.key
        may, must = least == least, torch.full_like(least, self.step == 1, dtype=torch.bool)
        if self.right is not None:
            may, must = may & (most >= -self.right), must & (least >= -self.right)
        if self.left is not None:
            may, must = may & (least <= self.left), must & (most <= self.left)
        return may, must

    def write(self, name: Name) -> str:
        step = f", step={self.step}" if self.step > 1 else ""
        if self.left is not None and self.left == self.right and self.left % self.step == 0:
            return f"window({self.left // self.step + 1}{step})"
        return f"window(left={self.left}, right={self.right}{step})"


def window(size: int | None = None, *, left: int | None = None, right: int | None = None, step: int = 1) -> Pattern:
    """`window(w)`: a query's own position and the w − 1 positions on each side, `step` apart (dilation).

    `window(left=l, right=r)`: l positions before and r after, beside its own; None = no limit.
    `causal & window(w)` shows w keys, as Mistral (2310.06825) and Hugging Face count; the dilation is
    Longformer's (2004.05150).

    >>> print(window(2).picture(3, 3))
    1 1 .
    1 1 1
    . 1 1
    """
    whole(step, "window(step=)", 1)
    if size is not None:
        if left is not None or right is not None:
            raise InvalidInput(
                "window was given a size and also left or right: give window(w) or window(left=, right=)"
            )
        reach = (whole(size, "window's size", 1) - 1) * step
        return Window(reach, reach, step)
    for side, name in ((left, "left"), (right, "right")):
        if side is not None:
            whole(side, f"window({name}=)", 0)
    return Window(left, right, step)


@dataclass(frozen=True, eq=False, repr=False)
class Prefix(Pattern):
    """The first n keys, for everyone."""

    length: int | Tensor

    def _length(self, batch: Tensor) -> int | Tensor:
        return self.length[batch] if isinstance(self.length, Tensor) else self.length

    def visible(self, at: Pairs) -> Tensor:
        return at.key < self._length(at.batch)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        length = self._length(tiles.batch)
        return tiles.key < length, tiles.key_end <= length

    def misfits(self, extent: Extent) -> list[str]:
        return super().misfits(extent) + _batch_misfit(self, self.tensors(), extent)

    def write(self, name: Name) -> str:
        return f"prefix({name(self.length) if isinstance(self.length, Tensor) else self.length})"


def prefix(length: int | Tensor) -> Pattern:
    """The first `length` keys (an int, or an integer tensor `[batch]`); `causal | prefix(n)` is a prefix LM (1910.10683).

    >>> print((causal | prefix(2)).picture(3, 3))
    1 1 .
    1 1 .
    1 1 1
    """
    if isinstance(length, Tensor):
        return Prefix(integers(length, "prefix's length", [1]))
    return Prefix(whole(length, "prefix's length", 0))


@dataclass(frozen=True, eq=False, repr=False)
class Chunks(Pattern):
    """Blocks of `size` positions on the diagonal."""

    size: int

    def visible(self, at: Pairs) -> Tensor:
        return at.query // self.size == at.key // self.size

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        first_q, last_q = tiles.query // self.size, (tiles.query_end - 1) // self.size
        first_k, last_k = tiles.key // self.size, (tiles.key_end - 1) // self.size
        may = (first_q <= last_k) & (first_k <= last_q)
        return may, may & (first_q == last_q) & (first_k == last_k)

    def write(self, name: Name) -> str:
        return f"chunks({self.size})"


def chunks(size: int) -> Pattern:
    """Only inside the own chunk of `size` positions; `causal & chunks(8192)` is Llama 4's local attention.

    >>> print(chunks(2).picture(4, 4))
    1 1 . .
    1 1 . .
    . . 1 1
    . . 1 1
    """
    return Chunks(whole(size, "the size of chunks", 1))


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Pattern):
    """Equal ids see each other, by absolute position; a negative id belongs to no document."""

    ids: Tensor

    def visible(self, at: Pairs) -> Tensor:
        ids = _with_batch(self.ids)
        query, key = _lookup(ids, at.batch, at.query), _lookup(ids, at.batch, at.key)
        return (query == key) & (query >= 0)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        ids = _with_batch(self.ids)
        return _same_document(
            extremes_in(ids, tiles.batch, tiles.query, tiles.query_end),
            extremes_in(ids, tiles.batch, tiles.key, tiles.key_end),
        )

    def misfits(self, extent: Extent) -> list[str]:
        need = max(extent.keys, extent.last or 0)
        return super().misfits(extent) + _row_misfit(self, _with_batch(self.ids), extent, need, "positions")

    def write(self, name: Name) -> str:
        return f"documents({name(self.ids)})"


@dataclass(frozen=True, eq=False, repr=False)
class DocumentPairs(Pattern):
    """Equal ids see each other, where queries and keys are numbered apart, by their row in q and in k."""

    query_ids: Tensor
    key_ids: Tensor

    def visible(self, at: Pairs) -> Tensor:
        query = _lookup(_with_batch(self.query_ids), at.batch, at.row)
        return (query == _lookup(_with_batch(self.key_ids), at.batch, at.key)) & (query >= 0)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        return _same_document(
            extremes_in(_with_batch(self.query_ids), tiles.batch, tiles.row, tiles.row_end),
            extremes_in(_with_batch(self.key_ids), tiles.batch, tiles.key, tiles.key_end),
        )

    def misfits(self, extent: Extent) -> list[str]:
        return [
            *super().misfits(extent),
            *_row_misfit(self, _with_batch(self.query_ids), extent, extent.queries, "queries", exact=True),
            *_row_misfit(self, _with_batch(self.key_ids), extent, extent.keys, "keys", exact=True),
        ]

    def write(self, name: Name) -> str:
        return f"documents({name(self.query_ids)}, {name(self.key_ids)})"


@dataclass(frozen=True, eq=False, repr=False)
class PackedDocuments(Pattern):
    """Documents laid end to end: number i covers positions cu_seqlens[i] to cu_seqlens[i + 1]; past the last, none."""

    cu_seqlens: Tensor

    def _id(self, position: Tensor) -> Tensor:
        number = torch.searchsorted(self.cu_seqlens, position.to(self.cu_seqlens.dtype).contiguous(), right=True) - 1
        return torch.where(number < self.cu_seqlens.shape[0] - 1, number, -1)

    def visible(self, at: Pairs) -> Tensor:
        query, key = self._id(at.query), self._id(at.key)
        return (query == key) & (query >= 0)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        past = self.cu_seqlens.shape[0] - 1  # sorts what belongs to no document behind the last one

        def ends(first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
            low, high = self._id(first), self._id(end - 1)
            low_known = torch.where((low < 0) & (first >= self.cu_seqlens[-1]), past, low)
            return low_known, torch.where((high < 0) & (end > self.cu_seqlens[-1]), past, high)

        (low_q, high_q), (low_k, high_k) = ends(tiles.query, tiles.query_end), ends(tiles.key, tiles.key_end)
        may = (low_q <= high_k) & (low_k <= high_q) & (high_q >= 0) & (low_q < past)
        return may, may & (low_q == high_q) & (low_k == high_k) & (low_q == low_k) & (low_q >= 0)

    def write(self, name: Name) -> str:
        return f"documents(cu_seqlens={name(self.cu_seqlens)})"


def documents(ids: Tensor | None = None, key_ids: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Pattern:
    """Packed sequences: different documents never see each other, and a negative id belongs to none.

    `documents(ids)`: ids `[batch, length]` or `[length]` by absolute position, for queries and keys alike.
    `documents(query_ids, key_ids)`: apart, by row of q and of k (cross-attention).
    `documents(cu_seqlens=)`: `[documents + 1]` offsets, as flash-attn's varlen calls take them.

    >>> print(documents(torch.tensor([0, 0, 1])).picture(3, 3))
    1 1 .
    1 1 .
    . . 1
    """
    if cu_seqlens is not None:
        if ids is not None or key_ids is not None:
            raise InvalidInput("documents was given ids and also cu_seqlens: give one of them")
        offsets = integers(cu_seqlens, "cu_seqlens", [1])
        if offsets.shape[0] < 1:
            raise InvalidInput("cu_seqlens is empty: wanted the offsets 0, len₁, len₁ + len₂, …")
        return PackedDocuments(offsets)
    if ids is None:
        raise InvalidInput("documents was given nothing: give ids, or query_ids and key_ids, or cu_seqlens=")
    first = integers(ids, "the ids of documents", [1, 2])
    if key_ids is None:
        return Documents(first)
    return DocumentPairs(first, integers(key_ids, "the key_ids of documents", [1, 2]))


@dataclass(frozen=True, eq=False, repr=False)
class PaddingLengths(Pattern):
    """The first lengths[b] keys of each batch row are real."""

    lengths: Tensor

    def visible(self, at: Pairs) -> Tensor:
        return at.key < self.lengths[at.batch]

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        length = self.lengths[tiles.batch]
        return tiles.key < length, tiles.key_end <= length

    def misfits(self, extent: Extent) -> list[str]:
        return super().misfits(extent) + _batch_misfit(self, [self.lengths], extent)

    def write(self, name: Name) -> str:
        return f"padding({name(self.lengths)})"


@dataclass(frozen=True, eq=False, repr=False)
class PaddingKeep(Pattern):
    """The keys marked True are real, on whichever side the padding lies."""

    keep: Tensor

    def visible(self, at: Pairs) -> Tensor:
        return _lookup(self.keep, at.batch, at.key)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        count = count_in(self.keep, tiles.batch, tiles.key, tiles.key_end)
        return count > 0, count == tiles.key_end - tiles.key

    def misfits(self, extent: Extent) -> list[str]:
        return super().misfits(extent) + _row_misfit(self, self.keep, extent, extent.keys, "keys", exact=True)

    def write(self, name: Name) -> str:
        return f"padding({name(self.keep)})"


def padding(real: Tensor) -> Pattern:
    """Which keys are real: lengths `[batch]`, or a boolean `[batch, keys]` (True = real) for left padding.

    >>> print(padding(torch.tensor([2])).picture(3, 3))
    1 1 .
    1 1 .
    1 1 .
    """
    if isinstance(real, Tensor) and real.dtype == torch.bool:
        if real.dim() != 2:
            raise InvalidInput(f"padding was given {describe(real)}: wanted a boolean [batch, keys] or lengths [batch]")
        return PaddingKeep(real)
    return PaddingLengths(integers(real, "padding's lengths", [1]))


@dataclass(frozen=True, eq=False, repr=False)
class GlobalTokens(Pattern):
    """Some positions see all and are seen by all: rows and columns."""

    positions: tuple[int, ...] | Tensor

    def _is_global(self, batch: Tensor, position: Tensor, keys: int | None) -> Tensor:
        if isinstance(self.positions, Tensor):
            return _lookup(self.positions, batch, position)
        result = torch.zeros_like(position, dtype=torch.bool)
        for place in self.positions:
            result = result | (position == _from_the_end(self, place, keys))
        return result

    def visible(self, at: Pairs) -> Tensor:
        return self._is_global(at.batch, at.query, at.keys) | self._is_global(at.batch, at.key, at.keys)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        def count(first: Tensor, end: Tensor) -> Tensor:
            if isinstance(self.positions, Tensor):
                return count_in(self.positions, tiles.batch, first, end)
            places = {_from_the_end(self, place, tiles.keys) for place in self.positions}
            return sum(((first <= p) & (p < end)).long() for p in places) + torch.zeros_like(first)

        rows, columns = count(tiles.query, tiles.query_end), count(tiles.key, tiles.key_end)
        full = (rows == tiles.query_end - tiles.query) | (columns == tiles.key_end - tiles.key)
        return (rows > 0) | (columns > 0), full

    def misfits(self, extent: Extent) -> list[str]:
        if not isinstance(self.positions, Tensor):
            return []
        need = max(extent.keys, extent.last or 0)
        return super().misfits(extent) + _row_misfit(self, self.positions, extent, need, "positions")

    def write(self, name: Name) -> str:
        return f"global_tokens({name(self.positions) if isinstance(self.positions, Tensor) else self.positions})"


def global_tokens(positions: Iterable[int] | Tensor) -> Pattern:
    """Positions that see everything and that everything sees (Longformer, 2004.05150).

    Ints (a negative one counts from the last key), or a boolean tensor `[batch, length]` by absolute position.

    >>> print((window(1) | global_tokens([0])).picture(3, 3))
    1 1 1
    1 1 .
    1 . 1
    """
    if isinstance(positions, Tensor):
        if positions.dtype == torch.bool:
            if positions.dim() != 2:
                raise InvalidInput(f"global_tokens was given {describe(positions)}: wanted a boolean [batch, length]")
            return GlobalTokens(positions)
        positions = integers(positions, "the positions of global_tokens", [1]).tolist()
    places = tuple(positions)
    if not all(isinstance(place, int) for place in places):
        raise InvalidInput(f"global_tokens was given {places}: wanted whole numbers")
    return GlobalTokens(places)


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
        size = self.block
        return Pairs(at.batch, at.head, at.query // size, at.query, at.key // size).of(self._full())

    def misfits(self, extent: Extent) -> list[str]:
        batch, heads, rows, columns = self._full().shape
        reasons = super().misfits(extent)
        need_rows, need_columns = -(-(extent.last or 0) // self.block), -(-extent.keys // self.block)
        if batch not in (1, extent.batch) or heads not in (1, extent.heads):
            reasons.append(f"{self!r} does not fit batch {extent.batch} and {extent.heads} heads")
        if rows < need_rows or columns < need_columns:
            reasons.append(
                f"{self!r} is too small: wanted at least {need_rows} × {need_columns} blocks of {self.block}"
            )
        return reasons

    def write(self, name: Name) -> str:
        return f"blocks({name(self.matrix)}, {self.block})"


def blocks(matrix: Tensor, block: int) -> Pattern:
    """Whole blocks: matrix is boolean `[query blocks, key blocks]`, `[heads, …]` or `[batch, heads, …]`, by position."""
    if not isinstance(matrix, Tensor) or matrix.dtype != torch.bool or matrix.dim() not in (2, 3, 4):
        given = describe(matrix) if isinstance(matrix, Tensor) else repr(matrix)
        raise InvalidInput(f"blocks was given {given}: wanted a boolean tensor of 2, 3 or 4 dimensions")
    return Blocks(matrix, whole(block, "the block size", 1))


@dataclass(frozen=True, eq=False, repr=False)
class Blockwise(Pattern):
    """A pattern over blocks of positions instead of single ones."""

    pattern: Pattern
    block: int

    def visible(self, at: Pairs) -> Tensor:
        size, keys = self.block, None if at.keys is None else -(-at.keys // self.block)
        return self.pattern.visible(Pairs(at.batch, at.head, at.row // size, at.query // size, at.key // size, keys))

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


def blockwise(pattern: Pattern, block: int) -> Pattern:
    """`pattern` over blocks of `block` positions: `blockwise(window(2), 64)` sees the own block and one on each side.

    >>> print(blockwise(causal, 2).picture(4, 4))
    1 1 . .
    1 1 . .
    1 1 1 1
    1 1 1 1
    """
    if not isinstance(pattern, Pattern):
        raise InvalidInput(f"blockwise was given a {type(pattern).__name__}: wanted a pattern")
    return Blockwise(pattern, whole(block, "the block size", 1))


@dataclass(frozen=True, eq=False, repr=False)
class Rule(Pattern):
    """Any function of positions."""

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def visible(self, at: Pairs) -> Tensor:
        result = self.function(at.batch, at.head, at.query, at.key)
        if not isinstance(result, Tensor) or result.dtype != torch.bool:
            given = describe(result) if isinstance(result, Tensor) else type(result).__name__
            raise InvalidInput(f"{self!r} returned {given}: wanted a boolean tensor")
        return result

    def write(self, name: Name) -> str:
        return f"rule({name(self.function)})"


def rule(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Pattern:
    """Any function of (batch, head, query, key) index tensors that broadcasts and returns booleans.

    Nothing is known about its tiles, so every pair is evaluated: exact, but its cost is n². It cannot cross into a
    `torch.compile`d graph; compose named patterns there.
    """
    if not callable(function):
        raise InvalidInput(
            f"rule was given a {type(function).__name__}: wanted a function of (batch, head, query, key)"
        )
    return Rule(function)


@dataclass(frozen=True, eq=False, repr=False)
class FromMask(Pattern):
    """A boolean matrix that the caller has: `[batch, heads, queries, keys]`, any of them 1, by row of q and of k."""

    mask: Tensor

    def full(self) -> Tensor:
        """The mask with all four dimensions."""
        return self.mask.view((1,) * (4 - self.mask.dim()) + tuple(self.mask.shape))

    def visible(self, at: Pairs) -> Tensor:
        return at.of(self.full())

    def misfits(self, extent: Extent) -> list[str]:
        return super().misfits(extent) + mask_misfit("mask", self.mask, extent)

    def write(self, name: Name) -> str:
        return f"from_mask({name(self.mask)})"


def from_mask(mask: Tensor) -> Pattern:
    """A boolean tensor that broadcasts to `[batch, heads, queries, keys]`; True = may attend."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() > 4:
        given = describe(mask) if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidInput(
            f"from_mask was given {given}: wanted a boolean tensor of at most 4 dimensions, True = may attend"
        )
    return FromMask(mask)


def longformer(window_size: int = 512, positions: Iterable[int] | Tensor = (0,), *, step: int = 1) -> Pattern:
    """Longformer (2004.05150): window_size / 2 positions on each side, `step` apart, and some global tokens.

    >>> longformer(512)
    window(257) | global_tokens((0,))
    """
    return window(whole(window_size, "longformer's window", 0) // 2 + 1, step=step) | global_tokens(positions)


def bigbird(block: int = 64, *, window_blocks: int = 3, random: int = 3, seed: int = 0) -> Pattern:
    """BigBird (2007.14062): a window of blocks, the first and the last block global, some random blocks.

    >>> bigbird()
    blockwise(window(2) | global_tokens((0, -1)), 64) | random_blocks(3, 64, seed=0)
    """
    reach = whole(window_blocks, "bigbird's window_blocks", 1) // 2 + 1
    return blockwise(window(reach) | global_tokens((0, -1)), block) | random_blocks(random, block, seed)


def streaming(first: int = 4, window_size: int = 1024) -> Pattern:
    """StreamingLLM's mask (2309.17453): the first tokens, as sinks for the weight, and a causal window.

    >>> print(streaming(1, 2).picture(4, 4))
    1 . . .
    1 1 . .
    1 1 1 .
    1 . 1 1
    """
    return causal & (window(window_size) | prefix(first))


NAMES: dict[str, Pattern | Callable[..., Pattern]] = {
    "causal": causal,
    "window": window,
    "prefix": prefix,
    "chunks": chunks,
    "documents": documents,
    "padding": padding,
    "global_tokens": global_tokens,
    "random_blocks": random_blocks,
    "blocks": blocks,
    "blockwise": blockwise,
    "rule": rule,
    "from_mask": from_mask,
}  # fmt: skip


def parse(spec: str, held: Sequence[Held]) -> Pattern:
    """The pattern that `Pattern.spec` wrote; nothing but the names above is evaluated."""

    def build(node: ast.expr) -> object:
        match node:
            case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
                return build(left) & build(right)  # type: ignore[operator]
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return build(left) | build(right)  # type: ignore[operator]
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return ~build(operand)  # type: ignore[operator]
            case ast.Name(id="causal"):
                return causal
            case ast.Call(func=ast.Name(id=name)) if callable(NAMES.get(name)):
                keywords = {word.arg: build(word.value) for word in node.keywords if word.arg}
                return NAMES[name](*map(build, node.args), **keywords)  # type: ignore[operator]
            case ast.Subscript(value=ast.Name(id="t"), slice=ast.Constant(value=int(index))):
                return held[index]
            case _:
                return ast.literal_eval(node)

    pattern = build(ast.parse(spec, mode="eval").body)
    if not isinstance(pattern, Pattern):
        raise InvalidInput(f"{spec!r} is no pattern")
    return pattern


def mask_misfit(what: str, tensor: Tensor, extent: Extent) -> list[str]:
    """Why `tensor` does not broadcast to [batch, heads, queries, keys], or could mean two things."""
    want = (extent.batch, extent.heads, extent.queries, extent.keys)
    shape = tuple(tensor.shape)
    # The right-aligned reading puts a leading batch where heads belong: refuse instead of guessing.
    if len(shape) == 3 and shape[0] != 1 and not (extent.batch == 1 and shape[0] == extent.heads):
        return [
            f"the {what} {describe(tensor)} could mean [batch, queries, keys] or [heads, queries, keys]: "
            f"give 4 dimensions that broadcast to {list(want)}, mask[:, None] for a batch, mask[None] for heads"
        ]
    if any(have not in (1, size) for have, size in zip(shape[::-1], want[::-1], strict=False)):
        return [f"the {what} {describe(tensor)} does not broadcast to [batch, heads, queries, keys] = {list(want)}"]
    return []


def _with_batch(ids: Tensor) -> Tensor:
    return ids if ids.dim() == 2 else ids[None]


def _lookup(table: Tensor, batch: Tensor, position: Tensor) -> Tensor:
    """table[batch, position]; a position outside the table is clamped: its pair lies outside the call as well."""
    row = batch if table.shape[0] > 1 else torch.zeros_like(batch)
    return table[row, position.clamp(0, max(table.shape[1] - 1, 0))]


def _same_document(query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(may, must) from the lowest and highest id among a tile's queries and among its keys."""
    (low_q, high_q), (low_k, high_k) = query, key
    may = (low_q <= high_k) & (low_k <= high_q) & (high_q >= 0) & (high_k >= 0)
    return may, may & (low_q == high_q) & (low_k == high_k) & (low_q >= 0)


def _batch_misfit(pattern: Pattern, tensors: list[Tensor], extent: Extent) -> list[str]:
    return [
        f"{pattern!r} has {tensor.shape[0]} entries but the batch is {extent.batch}"
        for tensor in tensors
        if tensor.shape[0] != extent.batch
    ]


def _row_misfit(
    pattern: Pattern, table: Tensor, extent: Extent, need: int, what: str, *, exact: bool = False
) -> list[str]:
    batch, length = table.shape
    fits = length == need if exact else length >= need
    reasons = []
    if batch not in (1, extent.batch):
        reasons.append(f"{pattern!r} has {batch} batch rows but the batch is {extent.batch}")
    if not fits:
        reasons.append(f"{pattern!r} covers {length} {what}: wanted {'' if exact else 'at least '}{need}")
    return reasons


def _from_the_end(pattern: Pattern, place: int, keys: int | None) -> int:
    if place >= 0:
        return place
    if keys is None:
        raise InvalidInput(f"{pattern!r} counts from the last key: use pattern.mask_mod(query_start, keys)")
    return keys + place
