"""Who may attend to whom, as a value: patterns compose with `&`, `|` and `~`.

A pattern is a function of (batch, head, query position, key position). Three questions can be put to it:

    visible(pairs)   is this pair allowed?                     one boolean a pair
    bounds(tiles)    may any / must every pair of this tile be?  two booleans a tile: interval logic
    spec()           how would you write it?                    a canonical string and its tensors

`bounds` may answer "perhaps" (may, not must) where it does not know; it is never wrong, so everything
that skips tiles by it stays exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from foveate.pattern.summary import Summary

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Held = Tensor | MaskMod
Name = Callable[[Held], str]


@dataclass(frozen=True)
class Pairs:
    """Index tensors that broadcast against each other; `query` is the position, `row` the place in q.

    `query = row + query_start`. `keys` is how many keys there are, None where nobody said (a bare mask_mod).
    `box` says the same as batch, head, row and key where these are contiguous: it reads a matrix without a copy.
    """

    batch: Tensor
    head: Tensor
    row: Tensor
    query: Tensor
    key: Tensor
    keys: int | None = None
    box: tuple[slice, slice, slice, slice] | None = None

    def of(self, table: Tensor) -> Tensor:
        """The entries of `[batch, heads, queries, keys]` at these pairs; a dimension of size 1 stands for all."""
        shape = table.shape
        if self.box is not None:
            return table[tuple(slice(None) if n == 1 else part for n, part in zip(shape, self.box, strict=True))]
        places = (self.batch, self.head, self.row, self.key)
        return table[
            tuple(
                place.clamp(0, n - 1) if n > 1 else torch.zeros_like(place)
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
    """The sizes of a call that a pattern has to fit; `last` is the highest query position + 1, None if unknown."""

    batch: int
    heads: int
    queries: int
    keys: int
    last: int | None
    device: torch.device


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
        return [
            f"{self!r} has a tensor on {tensor.device} but q is on {extent.device}: move it"
            for tensor in self.tensors()
            if tensor.device != extent.device
        ]

    def write(self, name: Name) -> str:
        """The expression that makes this pattern; `name` writes what no literal can: tensors and functions."""
        raise NotImplementedError

    def spec(self) -> tuple[str, list[Held]]:
        """The canonical string, and what it calls t[0], t[1]…; `catalogue.parse` reads the two back."""
        held: list[Held] = []

        def name(thing: Held) -> str:
            held.append(thing)
            return f"t[{len(held) - 1}]"

        return self.write(name), held

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

    def __and__(self, other: Pattern) -> Pattern:
        return _join(And, self, other)

    def __or__(self, other: Pattern) -> Pattern:
        return _join(Or, self, other)

    def __invert__(self) -> Pattern:
        return self.pattern if isinstance(self, Not) else Not(self)

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """FlexAttention's mask_mod, with queries that start at position 0; see `mask_mod` to shift them."""
        return self.visible(Pairs(batch, head, query, query, key))

    def mask_mod(self, query_start: int | Tensor = 0, keys: int | None = None) -> MaskMod:
        """A mask_mod whose first query stands at `query_start` (an int, or [batch]), among `keys` keys."""

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            start = query_start[batch] if isinstance(query_start, Tensor) else query_start
            return self.visible(Pairs(batch, head, query, query + start, key, keys))

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
        from foveate.pattern.summary import summarise

        return summarise(self, batch, heads, queries, keys, query_start, tile)

    def density(
        self, queries: int, keys: int, *, query_start: int | Tensor | None = None, batch: int = 1, heads: int = 1
    ) -> float:
        """The share of all pairs that may attend, exactly: 1.0 is dense, 0.0 for no pairs at all."""
        return self.summary(queries, keys, query_start=query_start, batch=batch, heads=heads).density()

    def dense(
        self, queries: int, keys: int, *, query_start: int | Tensor | None = None, batch: int = 1, heads: int = 1
    ) -> Tensor:
        """The boolean matrix `[batch, heads, queries, keys]` itself: n×n memory, because it was asked for."""
        at = grid(batch, heads, queries, keys, query_start, device_of(self))
        return self.visible(at).broadcast_to(batch, heads, queries, keys)

    def picture(
        self, queries: int, keys: int, *, query_start: int | Tensor | None = None, batch: int = 0, head: int = 0
    ) -> str:
        """The matrix as text, a row for each query: 1 may attend, · a dot may not.

        >>> from foveate.pattern.catalogue import causal, window
        >>> print((causal & window(2)).picture(3, 3))
        1 . .
        1 1 .
        . 1 1
        """
        seen = self.dense(queries, keys, query_start=query_start, batch=batch + 1, heads=head + 1)[batch, head]
        return "\n".join(" ".join("1" if one else "." for one in row) for row in seen.tolist())

    def plot(self, queries: int = 64, keys: int = 64, *, ax: Axes | None = None, **where: Any) -> Axes:
        """The matrix as an image (needs matplotlib: `pip install "foveate[see]"`); returns its axes."""
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise InvalidInput('plot() needs matplotlib: pip install "foveate[see]"') from error
        axes: Axes = ax if ax is not None else pyplot.subplots(figsize=(3, 3))[1]
        axes.imshow(self.dense(queries, keys, **where)[-1, -1].cpu(), cmap="Blues", vmin=0, vmax=1.3)
        axes.set(title=repr(self), xlabel="key", ylabel="query", xticks=[], yticks=[])
        return axes


@dataclass(frozen=True, eq=False, repr=False)
class And(Pattern):
    """Both: the intersection."""

    parts: tuple[Pattern, ...]

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
        raise InvalidInput(
            f"{left!r} was combined with a {type(right).__name__}: wanted a pattern; from_mask(tensor) makes one"
        )
    parts: list[Pattern] = []
    for side in (left, right):  # flat, so that (a & b) & c equals a & (b & c)
        parts.extend(side.parts if isinstance(side, kind) else (side,))
    return kind(tuple(parts))


def describe(thing: object) -> str:
    """A tensor inside a repr, `<int64 2×17>`; anything else by its name or its type."""
    if not isinstance(thing, Tensor):
        return getattr(thing, "__name__", type(thing).__name__)
    size = "×".join(str(n) for n in thing.shape) or "scalar"
    return f"<{str(thing.dtype).removeprefix('torch.')} {size}>"


def identity(value: Any) -> Any:
    """What stands for `value` in a comparison: tensors count by identity and version, all else by value."""
    if isinstance(value, Tensor):
        return (id(value), None if value.is_inference() else value._version)
    return value


def device_of(pattern: Pattern) -> torch.device:
    """Where this pattern's tensors live; the CPU for one without tensors."""
    tensors = pattern.tensors()
    return tensors[0].device if tensors else torch.device("cpu")


def starts(query_start: int | Tensor | None, batch: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """`query_start` as a tensor `[batch]`, or `[1]` where all rows share it; None aligns the last query with the last key."""
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
    )


def whole(value: object, what: str, least: int) -> int:
    """`value` as an int of at least `least`, or a clear error that names it."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value < least:
        raise InvalidInput(f"{what} is {value!r}: wanted a whole number of at least {least}")
    return value  # type: ignore[return-value]


def integers(tensor: object, what: str, dims: Sequence[int]) -> Tensor:
    """`tensor` as an integer tensor with one of these numbers of dimensions, or a clear error that names it."""
    if not isinstance(tensor, Tensor):
        raise InvalidInput(f"{what} is a {type(tensor).__name__}: wanted an integer tensor")
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise InvalidInput(f"{what} is {describe(tensor)}: wanted integers")
    if tensor.dim() not in dims:
        raise InvalidInput(f"{what} is {describe(tensor)}: wanted {' or '.join(map(str, dims))} dimension(s)")
    return tensor
