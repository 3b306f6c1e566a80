"""Who may attend to whom, as a value: patterns compose with `&`, `|` and `~`.

A pattern is a function of (batch, head, query position, key position). Three questions can be put to it:

    visible(pairs)   is this pair allowed?                     one boolean a pair
    bounds(tiles)    may any / must every pair of this tile be?  two booleans a tile: interval logic
    spec()           how would you write it?                    a canonical string and its tensors

`bounds` may answer "perhaps" (may, not must) where it does not know; it is never wrong, so everything
that skips tiles by it stays exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.installing import how_to_install
from foveate.pattern.strange import wanted_pattern
from foveate.positions import Extent, Pairs, Tiles, grid
from foveate.values import Held, Name, describe, device_misfits, identity, spelled, whole
from foveate.words import NOTHING, lenient

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from foveate.pattern.block_mask import Summary

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Pattern:
    """A set of (batch, head, query, key) that may attend; immutable, hashable, composed with `& | ~`.

    Equality is by value; tensors count by identity and version.
    """

    def visible(self, at: Pairs) -> Tensor:
        """Whether each pair may attend; broadcasts like the members of `at`."""
        raise NotImplementedError

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """(may, must): whether some pair of the tile could be visible, and whether all of them surely are."""
        may = torch.ones_like(tiles.key, dtype=torch.bool)
        return may, ~may

    def misfits(self, extent: Extent) -> list[str]:
        """Every reason for which this pattern's tensors do not fit a call of this extent."""
        return device_misfits(self, self.tensors(), extent)

    def write(self, name: Name) -> str:
        """The expression that makes this pattern; `name` writes what no literal can: tensors and functions."""
        raise NotImplementedError

    def spec(self) -> tuple[str, list[Held]]:
        """The canonical string, and what it calls t[0], t[1]…; `catalogue.parse` reads the two back."""
        return spelled(self.write)

    def tensors(self) -> list[Tensor]:
        """The tensors this pattern holds."""
        return [thing for thing in self.spec()[1] if isinstance(thing, Tensor)]

    def __repr__(self) -> str:
        return self.write(describe)

    def _identity(self) -> tuple[Any, ...]:
        return (type(self), *(identity(getattr(self, field.name)) for field in fields(self)))  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __bool__(self) -> bool:
        raise InvalidInput(f"{self!r} is neither true nor false: combine patterns with & | ~, not with and, or, not")

    def __and__(self, other: Pattern) -> Pattern:
        return _join(And, self, other)

    def __or__(self, other: Pattern) -> Pattern:
        return _join(Or, self, other)

    def __invert__(self) -> Pattern:
        return self.pattern if isinstance(self, Not) else Not(self)

    __array_ufunc__ = None  # so that an array & a pattern is asked of the pattern, whole

    def __rand__(self, other: object) -> Pattern:
        return _join(And, self, other)

    def __ror__(self, other: object) -> Pattern:
        return _join(Or, self, other)

    @lenient
    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """FlexAttention's mask_mod, with queries that start at position 0; see `mask_mod` to shift them."""
        if key is NOTHING:
            raise InvalidInput(
                f"{self!r} is a pattern, and was called as if it made one: write it without the parentheses; as "
                "FlexAttention's mask_mod it takes (batch, head, query, key)"
            )
        return self.visible(Pairs(batch, head, query, query, key))

    def mask_mod(self, query_start: int | Tensor = 0, keys: int | None = None, heads: int | None = None) -> MaskMod:
        """A mask_mod whose first query stands at `query_start` (an int, or [batch]), of `keys` keys and query heads."""

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            start = query_start[batch] if isinstance(query_start, Tensor) else query_start
            return self.visible(Pairs(batch, head, query, query + start, key, keys, heads=heads))

        return mask_mod

    def summary(
        self,
        queries: int,
        keys: int,
        *,
        query_start: int | Tensor | None = None,
        batch: int = 1,
        heads: int = 1,
        tile: int = 128,
    ) -> Summary:
        """Which tiles of `tile` × `tile` pairs are empty, full or partial; memory follows what is not empty."""
        from foveate.pattern.block_mask_cache import summarise

        self._check(batch, heads, queries, keys, query_start)
        return summarise(self, batch, heads, queries, keys, query_start, tile)

    def _check(
        self, batch: int | None, heads: int | None, queries: int, keys: int, query_start: int | Tensor | None
    ) -> None:
        for size, what in ((queries, "the number of queries"), (keys, "the number of keys")):
            whole(size, what, 0)
        start = keys - queries if query_start is None else query_start
        last = None if isinstance(start, Tensor) else start + queries
        reasons = self.misfits(Extent(batch, heads, queries, keys, last, device_of(self)))
        if reasons:
            raise InvalidInput("; ".join(reasons))

    def density(
        self, queries: int, keys: int, *, query_start: int | Tensor | None = None, batch: int = 1, heads: int = 1
    ) -> float:
        """The share of all pairs that may attend, exactly: 1.0 is dense, 0.0 for no pairs at all."""
        return self.summary(queries, keys, query_start=query_start, batch=batch, heads=heads).density()

    def dense(
        self, queries: int, keys: int, *, query_start: int | Tensor | None = None, batch: int = 1, heads: int = 1
    ) -> Tensor:
        """The boolean matrix `[batch, heads, queries, keys]` itself: n×n memory, because it was asked for."""
        self._check(batch, heads, queries, keys, query_start)
        at = grid(batch, heads, queries, keys, query_start, device_of(self))
        return self.visible(at).broadcast_to(batch, heads, queries, keys)

    def picture(
        self,
        queries: int,
        keys: int,
        *,
        query_start: int | Tensor | None = None,
        batch: int = 0,
        head: int = 0,
        heads: int | None = None,
    ) -> str:
        """The matrix of one head (of `heads`) as text, a row for each query: 1 may attend, · a dot may not.

        >>> import foveate as fv
        >>> print((fv.causal & fv.window(2)).picture(3, 3))
        1 . .
        1 1 .
        . 1 1
        """
        box = slice(batch, batch + 1), slice(head, head + 1), slice(0, queries), slice(0, keys)
        self._check(None, heads, queries, keys, query_start)
        at = grid(batch + 1, heads or head + 1, queries, keys, query_start, device_of(self), box)
        seen = self.visible(at).broadcast_to(1, 1, queries, keys)[0, 0]
        return "\n".join(" ".join("1" if one else "." for one in row) for row in seen.tolist())

    def plot(self, queries: int = 64, keys: int = 64, *, ax: Axes | None = None, **where: Any) -> Axes:
        """The matrix as an image (needs matplotlib, which the extra `see` installs); returns its axes."""
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise InvalidInput(f"plot() needs matplotlib: {how_to_install('see')}") from error
        axes: Axes = ax if ax is not None else pyplot.subplots(figsize=(3, 3))[1]
        axes.imshow(self.dense(queries, keys, **where)[-1, -1].tolist(), cmap="Blues", vmin=0, vmax=1.3)
        axes.set(title=repr(self), xlabel="key", ylabel="query", xticks=[], yticks=[])
        return axes


@dataclass(frozen=True, eq=False, repr=False)
class And(Pattern):
    """Both: the intersection."""

    parts: tuple[Pattern, ...]

    def without(self, part: Pattern) -> Pattern | None:
        """The rest of the parts, or None for no pattern at all."""
        rest = tuple(each for each in self.parts if not _same(each, part))
        return And(rest) if len(rest) > 1 else rest[0] if rest else None

    def visible(self, at: Pairs) -> Tensor:
        result = self.parts[0].visible(at)
        for part in self.parts[1:]:
            result = result & part.visible(at)
        return result

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        may, must = self.parts[0].bounds(tiles)
        for part in self.parts[1:]:
            part_may, part_must = part.bounds(tiles)
            may, must = may & part_may, must & part_must
        return may, must

    def misfits(self, extent: Extent) -> list[str]:
        return [reason for part in self.parts for reason in part.misfits(extent)]

    def write(self, name: Name) -> str:
        return " & ".join(f"({part.write(name)})" if isinstance(part, Or) else part.write(name) for part in self.parts)


@dataclass(frozen=True, eq=False, repr=False)
class Or(Pattern):
    """Either: the union."""

    parts: tuple[Pattern, ...]

    def visible(self, at: Pairs) -> Tensor:
        result = self.parts[0].visible(at)
        for part in self.parts[1:]:
            result = result | part.visible(at)
        return result

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        may, must = self.parts[0].bounds(tiles)
        for part in self.parts[1:]:
            part_may, part_must = part.bounds(tiles)
            may, must = may | part_may, must | part_must
        return may, must

    def misfits(self, extent: Extent) -> list[str]:
        return [reason for part in self.parts for reason in part.misfits(extent)]

    def write(self, name: Name) -> str:
        return " | ".join(part.write(name) for part in self.parts)


@dataclass(frozen=True, eq=False, repr=False)
class Not(Pattern):
    """The complement."""

    pattern: Pattern

    def visible(self, at: Pairs) -> Tensor:
        return ~self.pattern.visible(at)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        may, must = self.pattern.bounds(tiles)
        return ~must, ~may

    def misfits(self, extent: Extent) -> list[str]:
        return self.pattern.misfits(extent)

    def write(self, name: Name) -> str:
        inner = self.pattern.write(name)
        return f"~({inner})" if isinstance(self.pattern, And | Or) else f"~{inner}"


def _join(kind: type[And] | type[Or], left: Pattern, right: object) -> Pattern:
    if not isinstance(right, Pattern):
        raise InvalidInput(f"{left!r} was combined with {wanted_pattern(right)}")
    parts: list[Pattern] = []
    for side in (left, right):  # flat, so that (a & b) & c equals a & (b & c), and each part once
        for part in side.parts if isinstance(side, kind) else (side,):
            if not any(_same(part, each) for each in parts):
                parts.append(part)
    return kind(tuple(parts)) if len(parts) > 1 else parts[0]


def _same(one: Pattern, other: Pattern) -> bool:
    return type(one) is type(other) and one == other  # of two kinds the tensors need no look


def device_of(pattern: Pattern) -> torch.device:
    """Where this pattern's tensors live; the CPU for one without tensors."""
    tensors = pattern.tensors()
    return tensors[0].device if tensors else torch.device("cpu")
