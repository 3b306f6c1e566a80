"""Patterns of positions alone: before, near, in the same chunk, at the start, again and again, in chosen places."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.pattern.algebra import Pattern
from foveate.pattern.checks import batch_misfit, row_misfit
from foveate.pattern.ranges import count_in, lookup
from foveate.positions import Extent, Pairs, Tiles
from foveate.values import Name, as_tensor, describe, integers, is_listed, whole
from foveate.words import explained


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
        if self.step > 1:  # a multiple of the step between the least and the most
            may = may & (most // self.step * self.step >= least)
        return may, must

    def write(self, name: Name) -> str:
        step = f", step={self.step}" if self.step > 1 else ""
        if self.left is not None and self.left == self.right and self.left % self.step == 0:
            return f"window({self.left // self.step + 1}{step})"
        return f"window(left={self.left}, right={self.right}{step})"


@explained
def window(size: int | None = None, *, left: int | None = None, right: int | None = None, step: int = 1) -> Pattern:
    """`window(w)`: a query's own position and the w − 1 positions on each side, `step` apart (dilation).

    `window(left=l, right=r)`: l positions before and r after, beside its own; None = no limit.
    `causal & window(w)` shows w keys, as Mistral (2310.06825) and Hugging Face count; the dilation is
    Longformer's (2004.05150).

    >>> import foveate as fv
    >>> print(fv.window(2).picture(3, 3))
    1 1 .
    1 1 1
    . 1 1
    """
    step = whole(step, "window(step=)", 1)
    if size is None and left is None and right is None:
        raise InvalidInput("window was given no size: give window(w) or window(left=, right=)")
    if size is not None:
        if left is not None or right is not None:
            raise InvalidInput(
                "window was given a size and also left or right: give window(w) or window(left=, right=)"
            )
        reach = (whole(size, "window's size", 1) - 1) * step
        return Window(reach, reach, step)
    if left is not None:
        left = whole(left, "window(left=)", 0)
    if right is not None:
        right = whole(right, "window(right=)", 0)
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
        return super().misfits(extent) + batch_misfit(self, self.tensors(), extent)

    def write(self, name: Name) -> str:
        return f"prefix({name(self.length) if isinstance(self.length, Tensor) else self.length})"


@explained
def prefix(length: int | Tensor) -> Pattern:
    """The first `length` keys, an int or an integer tensor `[batch]`; `causal | prefix(n)` is a prefix LM (1910.10683).

    >>> import foveate as fv
    >>> print((fv.causal | fv.prefix(2)).picture(3, 3))
    1 1 .
    1 1 .
    1 1 1
    """
    if is_listed(length) or (isinstance(length, Tensor) and length.dim()):
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


@explained
def chunks(size: int) -> Pattern:
    """Only inside the own chunk of `size` positions; `causal & chunks(8192)` is Llama 4's local attention.

    >>> import foveate as fv
    >>> print(fv.chunks(2).picture(4, 4))
    1 1 . .
    1 1 . .
    . . 1 1
    . . 1 1
    """
    return Chunks(whole(size, "the size of chunks", 1))


@dataclass(frozen=True, eq=False, repr=False)
class Every(Pattern):
    """The last keys of every `stride`."""

    stride: int
    last: int

    def visible(self, at: Pairs) -> Tensor:
        return at.key % self.stride >= self.stride - self.last

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        def before(key: Tensor) -> Tensor:
            rest = key % self.stride - (self.stride - self.last)
            return key // self.stride * self.last + rest.clamp(min=0)

        count = before(tiles.key_end) - before(tiles.key)
        return count > 0, count == tiles.key_end - tiles.key

    def write(self, name: Name) -> str:
        return f"every({self.stride}{f', {self.last}' if self.last > 1 else ''})"


@explained
def every(stride: int, last: int = 1) -> Pattern:
    """For everyone, the last `last` keys of each block of `stride`: places that can sum up what came before them.

    >>> import foveate as fv
    >>> print(fv.every(3).picture(2, 6))
    . . 1 . . 1
    . . 1 . . 1
    """
    stride, last = whole(stride, "every's stride", 1), whole(last, "every's last", 1)
    if last > stride:
        raise InvalidInput(
            f"every was given stride {stride} and last {last}: wanted at most as many keys as the stride"
        )
    return Every(stride, last)


@dataclass(frozen=True, eq=False, repr=False)
class Pooled(Pattern):
    """Key j stands for `length` positions from j · stride on, and is seen once the last of them is no later."""

    length: int
    stride: int

    def visible(self, at: Pairs) -> Tensor:
        return at.key * self.stride + (self.length - 1) <= at.query

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        ahead = self.length - 1
        may = tiles.key * self.stride + ahead <= tiles.query_end - 1
        return may, (tiles.key_end - 1) * self.stride + ahead <= tiles.query

    def write(self, name: Name) -> str:
        return f"pooled({self.length}, {self.stride})"


@explained
def pooled(length: int, stride: int | None = None) -> Pattern:
    """Causality for keys that are each made of `length` positions, `stride` apart (None = length): only whole ones.

    The positions of queries are those of tokens, so give `query_start=` where the keys are fewer than the tokens. The
    compressed branch of Native Sparse Attention (2502.11089) sees so.

    >>> import foveate as fv
    >>> print(fv.pooled(2).picture(5, 2, query_start=0))
    . .
    1 .
    1 .
    1 1
    1 1
    """
    size = whole(length, "pooled's length", 1)
    return Pooled(size, size if stride is None else whole(stride, "pooled's stride", 1))


_PLACES = "a list of whole numbers"
_FEW = 8  # positions that are compared one by one, which FlexAttention can trace


@dataclass(frozen=True, eq=False, repr=False)
class GlobalTokens(Pattern):
    """Some positions see all and are seen by all: rows and columns."""

    positions: tuple[int, ...] | Tensor

    def _is_global(self, batch: Tensor, position: Tensor, keys: int | None) -> Tensor:
        if isinstance(self.positions, Tensor):
            return lookup(self.positions, batch, position, False)
        places = [_from_the_end(self, place, keys) for place in self.positions]
        if len(places) > _FEW:
            return torch.isin(position, torch.tensor(places, device=position.device))
        result = torch.zeros_like(position, dtype=torch.bool)
        for place in places:
            result = result | (position == place)
        return result

    def visible(self, at: Pairs) -> Tensor:
        return self._is_global(at.batch, at.query, at.keys) | self._is_global(at.batch, at.key, at.keys)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        def count(first: Tensor, end: Tensor) -> Tensor:
            if isinstance(self.positions, Tensor):
                return count_in(self.positions, tiles.batch, first, end)
            places = sorted({_from_the_end(self, place, tiles.keys) for place in self.positions})
            table = torch.tensor(places, dtype=torch.int64, device=first.device)
            return torch.searchsorted(table, end) - torch.searchsorted(table, first)

        rows, columns = count(tiles.query, tiles.query_end), count(tiles.key, tiles.key_end)
        full = (rows == tiles.query_end - tiles.query) | (columns == tiles.key_end - tiles.key)
        return (rows > 0) | (columns > 0), full

    def misfits(self, extent: Extent) -> list[str]:
        if not isinstance(self.positions, Tensor):
            return []
        need = max(extent.keys, extent.last or 0)
        return super().misfits(extent) + row_misfit(self, self.positions, extent, need, "positions")

    def write(self, name: Name) -> str:
        return f"global_tokens({name(self.positions) if isinstance(self.positions, Tensor) else self.positions})"


@explained
def global_tokens(positions: Iterable[int] | Tensor) -> Pattern:
    """Positions that see everything and that everything sees (Longformer, 2004.05150).

    Ints (a negative one counts from the last key), or a boolean tensor `[batch, length]` by absolute position.

    >>> import foveate as fv
    >>> print((fv.window(1) | fv.global_tokens([0])).picture(3, 3))
    1 1 1
    1 1 .
    1 . 1
    """
    if is_listed(positions) and (listed := as_tensor(positions, "what global_tokens was given", _PLACES)).dim() > 1:
        positions = listed
    if isinstance(positions, Tensor):
        if positions.dtype == torch.bool:
            if positions.dim() != 2:
                raise InvalidInput(f"global_tokens was given {describe(positions)}: wanted a boolean [batch, length]")
            return GlobalTokens(positions)
        positions = integers(positions, "the positions of global_tokens", [1])
        if torch._C._get_tracing_state() is not None:
            raise InvalidInput(
                "global_tokens was given a tensor of positions in a trace, which would keep the numbers of today: give "
                "a boolean tensor [batch, length], or a list"
            )
        positions = positions.tolist()
    places = tuple(positions) if isinstance(positions, Iterable) else (None,)
    if not all(isinstance(place, numbers.Integral) and not isinstance(place, bool) for place in places):
        raise InvalidInput(f"global_tokens was given {positions!r}: wanted {_PLACES}")
    return GlobalTokens(tuple(map(int, places)))


def _from_the_end(pattern: Pattern, place: int, keys: int | None) -> int:
    if place >= 0:
        return place
    if keys is None:
        raise InvalidInput(f"{pattern!r} counts from the last key: use pattern.mask_mod(query_start, keys)")
    return keys + place
