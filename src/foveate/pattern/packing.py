"""Patterns of what a batch holds: documents packed into one row, and padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.pattern.algebra import Pattern
from foveate.pattern.checks import batch_misfit, row_misfit
from foveate.pattern.ranges import count_in, extremes_in, lookup
from foveate.positions import Extent, Pairs, Tiles
from foveate.values import Integers, Name, as_tensor, at_hand, dense, describe, extremes, integers
from foveate.words import explained


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Pattern):
    """Equal ids see each other, by absolute position; a negative id belongs to no document."""

    ids: Tensor

    def visible(self, at: Pairs) -> Tensor:
        ids = _with_batch(self.ids)
        query, key = lookup(ids, at.batch, at.query, -1), lookup(ids, at.batch, at.key, -1)
        return (query == key) & (query >= 0)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        ids = _with_batch(self.ids)
        return _same_document(
            _ids_in(ids, tiles.batch, tiles.query, tiles.query_end),
            _ids_in(ids, tiles.batch, tiles.key, tiles.key_end),
        )

    def misfits(self, extent: Extent) -> list[str]:
        need = max(extent.keys, extent.last or 0)
        return super().misfits(extent) + row_misfit(self, _with_batch(self.ids), extent, need, "positions")

    def write(self, name: Name) -> str:
        return f"documents({name(self.ids)})"


@dataclass(frozen=True, eq=False, repr=False)
class DocumentPairs(Pattern):
    """Equal ids see each other, where queries and keys are numbered apart, by their row in q and in k."""

    query_ids: Tensor
    key_ids: Tensor

    def visible(self, at: Pairs) -> Tensor:
        query = lookup(_with_batch(self.query_ids), at.batch, at.row, -1)
        return (query == lookup(_with_batch(self.key_ids), at.batch, at.key, -1)) & (query >= 0)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        return _same_document(
            _ids_in(_with_batch(self.query_ids), tiles.batch, tiles.row, tiles.row_end),
            _ids_in(_with_batch(self.key_ids), tiles.batch, tiles.key, tiles.key_end),
        )

    def misfits(self, extent: Extent) -> list[str]:
        return [
            *super().misfits(extent),
            *row_misfit(self, _with_batch(self.query_ids), extent, extent.queries, "queries", exact=True),
            *row_misfit(self, _with_batch(self.key_ids), extent, extent.keys, "keys", exact=True),
        ]

    def write(self, name: Name) -> str:
        return f"documents({name(self.query_ids)}, {name(self.key_ids)})"


@dataclass(frozen=True, eq=False, repr=False)
class PackedDocuments(Pattern):
    """Documents laid end to end: number i covers positions cu_seqlens[i] to cu_seqlens[i + 1]; past the last, none."""

    cu_seqlens: Tensor

    def number(self, position: Tensor) -> Tensor:
        """Which document a position belongs to; −1 is none."""
        number = torch.searchsorted(self.cu_seqlens.long(), position.contiguous(), right=True) - 1
        return torch.where(number < self.cu_seqlens.shape[0] - 1, number, -1)

    def visible(self, at: Pairs) -> Tensor:
        query, key = self.number(at.query), self.number(at.key)
        return (query == key) & (query >= 0)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        past = self.cu_seqlens.shape[0] - 1  # sorts what belongs to no document behind the last one

        def ends(first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
            low, high = self.number(first), self.number(end - 1)
            low_known = torch.where((low < 0) & (first >= self.cu_seqlens[-1]), past, low)
            return low_known, torch.where((high < 0) & (end > self.cu_seqlens[-1]), past, high)

        (low_q, high_q), (low_k, high_k) = ends(tiles.query, tiles.query_end), ends(tiles.key, tiles.key_end)
        may = (low_q <= high_k) & (low_k <= high_q) & (high_q >= 0) & (low_q < past)
        return may, may & (low_q == high_q) & (low_k == high_k) & (low_q == low_k) & (low_q >= 0)

    def misfits(self, extent: Extent) -> list[str]:
        reasons = super().misfits(extent)
        if extent.batch is None or extent.last is None or not at_hand(self.cu_seqlens):
            return reasons  # a picture may show a part of the text
        most = max(extent.keys, extent.last)
        if (end := int(self.cu_seqlens[-1])) > most:
            reasons.append(
                f"the last offset of {self!r} is {end}: wanted at most the {most} positions of the call, so give a "
                f"part of the text offsets.clamp(max={most})"
            )
        return reasons

    def write(self, name: Name) -> str:
        return f"documents(cu_seqlens={name(self.cu_seqlens)})"


@explained
def documents(
    ids: Integers | None = None, key_ids: Integers | None = None, *, cu_seqlens: Integers | None = None
) -> Pattern:
    """Packed sequences: different documents never see each other, and a negative id belongs to none.

    `documents(ids)`: ids `[batch, length]` or `[length]` by absolute position, for queries and keys alike.
    `documents(query_ids, key_ids)`: apart, by row of q and of k (cross-attention).
    `documents(cu_seqlens=)`: `[documents + 1]` offsets 0, len₁, len₁ + len₂, … as flash-attn's varlen calls take them;
    tokens behind the last offset belong to no document and give 0.

    >>> import foveate as fv
    >>> print(fv.documents(torch.tensor([0, 0, 1])).picture(3, 3))
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
        if at_hand(offsets):
            _check_offsets(offsets)
        return PackedDocuments(offsets)
    if ids is None:
        raise InvalidInput("documents was given nothing: give ids, or query_ids and key_ids, or cu_seqlens=")
    first = integers(ids, "the ids of documents", [1, 2])
    if key_ids is None:
        return Documents(first)
    return DocumentPairs(first, integers(key_ids, "the key_ids of documents", [1, 2]))


def _check_offsets(offsets: Tensor) -> None:
    """Raise `InvalidInput` unless offsets start at 0 and never fall."""
    if first := int(offsets[0]):
        hint = "lengths become offsets by" if int(offsets.min()) > 0 else "wanted 0, len₁, len₁ + len₂, …, as of"
        raise InvalidInput(f"cu_seqlens starts at {first}: {hint} torch.nn.functional.pad(lengths.cumsum(0), (1, 0))")
    steps = offsets.diff()
    if bool((steps < 0).any()):
        at = int((steps < 0).nonzero()[0])
        raise InvalidInput(
            f"cu_seqlens falls from {int(offsets[at])} to {int(offsets[at + 1])}: wanted the offsets 0, len₁, "
            "len₁ + len₂, …"
        )


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
        reasons = super().misfits(extent) + batch_misfit(self, [self.lengths], extent)
        # A picture, which has no batch, may show a part of the keys.
        if extent.batch is not None and at_hand(self.lengths) and (most := extremes(self.lengths)[1]) > extent.keys:
            reasons.append(
                f"{self!r} has a length of {most}: wanted at most the {extent.keys} keys of the call, so give a part "
                f"of them lengths.clamp(max={extent.keys})"
            )
        return reasons

    def write(self, name: Name) -> str:
        return f"padding({name(self.lengths)})"


@dataclass(frozen=True, eq=False, repr=False)
class PaddingKeep(Pattern):
    """The keys marked True are real, on whichever side the padding lies."""

    keep: Tensor

    def visible(self, at: Pairs) -> Tensor:
        return lookup(self.keep, at.batch, at.key, False)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        count = count_in(self.keep, tiles.batch, tiles.key, tiles.key_end)
        return count > 0, count == tiles.key_end - tiles.key

    def misfits(self, extent: Extent) -> list[str]:
        return super().misfits(extent) + row_misfit(self, self.keep, extent, extent.keys, "keys", exact=True)

    def write(self, name: Name) -> str:
        return f"padding({name(self.keep)})"


@explained
def padding(real: Integers) -> Pattern:
    """Which keys are real: lengths `[batch]`, from 0 to the keys there are, or `[batch, keys]` for left padding.

    The latter holds booleans, True = real, or 1 and 0, as an `attention_mask` of Hugging Face does.

    >>> import foveate as fv
    >>> print(fv.padding(torch.tensor([2])).picture(3, 3))
    1 1 .
    1 1 .
    1 1 .
    """
    given = dense(as_tensor(real, "what padding was given", "lengths [batch], or booleans [batch, keys]"), "padding")
    if given.dtype == torch.bool:
        if given.dim() != 2:
            raise InvalidInput(
                f"padding was given {describe(given)}: wanted a boolean [batch, keys] or lengths [batch]"
            )
        return PaddingKeep(given)
    if given.dim() == 2:
        return PaddingKeep(_ones(given))
    lengths = integers(given, "padding's lengths", [1])
    if at_hand(lengths) and (least := extremes(lengths)[0]) < 0:
        raise InvalidInput(f"padding was given a length of {least}: wanted at least 0")
    return PaddingLengths(lengths)


def _ones(mask: Tensor) -> Tensor:
    """A mask of 1 and 0 as booleans."""
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise InvalidInput(f"padding was given {describe(mask)}: wanted booleans, or integers 1 and 0; mask.bool()")
    if at_hand(mask) and bool(((mask != 0) & (mask != 1)).any()):
        low, high = extremes(mask.flatten())
        raise InvalidInput(
            f"padding was given {describe(mask)} with numbers from {low} to {high}: wanted 1 for a real key and 0 for "
            "padding, or lengths [batch]"
        )
    return mask != 0


def _with_batch(ids: Tensor) -> Tensor:
    return ids if ids.dim() == 2 else ids[None]


def _ids_in(ids: Tensor, batch: Tensor, first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest id at the positions [first, end); a position without an id belongs to no document."""
    low, high = extremes_in(ids, batch, first, end)
    length = ids.shape[1]
    low = torch.where((first < 0) | (end > length), torch.clamp(low, max=-1), low)
    return low, torch.where((end <= 0) | (first >= length), -1, high)


def _same_document(query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(may, must) from the lowest and highest id among a tile's queries and among its keys."""
    (low_q, high_q), (low_k, high_k) = query, key
    may = (low_q <= high_k) & (low_k <= high_q) & (high_q >= 0) & (high_k >= 0)
    return may, may & (low_q == high_q) & (low_k == high_k) & (low_q >= 0)
