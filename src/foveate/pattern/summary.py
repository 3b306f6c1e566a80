"""Which tiles of a pattern are empty, full or partial, and for partial ones a bit for each pair.

The plane is split like a quadtree: a coarse tile that the pattern's `bounds` rule out is dropped with all it
covers, the others are split in four until they have the asked size. Memory follows the tiles that are not
empty, so a window over 131,072 positions costs megabytes where the boolean matrix would cost 16 GiB.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.pattern.algebra import Pattern
from foveate.positions import Pairs, Tiles, starts
from foveate.values import Held, identity

_PAIRS_AT_ONCE = 1 << 20  # how many pairs of partial tiles are evaluated in one go: what a cache holds


@dataclass(frozen=True)
class Summary:
    """The tiles of one pattern, in rows: tile row i of (batch b, head h) has the entries offsets[b, h, i : i + 2].

    `batch` and `heads` are 1 where the pattern is the same for all of them. `columns[e]` is an entry's key tile,
    `partial[e]` its place in `bits`, or −1 for a full tile. `bits` is uint8 `[partial tiles, tile, tile / 8]`, bit j
    of byte i being key 8 i + j; pairs outside the call are 0.
    """

    queries: int
    keys: int
    tile: int
    offsets: Tensor
    columns: Tensor
    partial: Tensor
    bits: Tensor

    @property
    def batch(self) -> int:
        return self.offsets.shape[0]

    @property
    def heads(self) -> int:
        return self.offsets.shape[1]

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, head, tile row) of every entry."""
        shape = (self.batch, self.heads, self.offsets.shape[2] - 1)
        counts = self.offsets[..., 1:] - self.offsets[..., :-1]
        flat = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts.flatten())
        batch, head, row = torch.unravel_index(flat, shape)
        return batch, head, row

    def masks(self, places: Tensor) -> Tensor:
        """The partial tiles at these places of `bits`, as booleans `[places, tile, tile]`."""
        shifts = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        return ((self.bits[places, :, :, None] >> shifts) & 1).bool().flatten(2)[..., : self.tile]

    def visible_pairs(self) -> int:
        """How many pairs may attend, over the batch rows and heads that differ."""
        _, _, row = self.rows()
        full = self.partial < 0
        height = (self.queries - row[full] * self.tile).clamp(max=self.tile)
        width = (self.keys - self.columns[full] * self.tile).clamp(max=self.tile)
        count = sum(int(self.masks(part).sum()) for part in _chunked(self.bits.shape[0], self.tile, self.bits.device))
        return int((height * width).sum()) + count

    def density(self) -> float:
        """The share of all pairs that may attend."""
        total = self.batch * self.heads * self.queries * self.keys
        return self.visible_pairs() / total if total else 0.0

    def kinds(self) -> Tensor:
        """0 empty, 1 partial, 2 full for every tile: `[batch, heads, tile rows, tile columns]`, for pictures."""
        rows, columns = self.offsets.shape[2] - 1, -(-self.keys // self.tile)
        kinds = torch.zeros(self.batch, self.heads, rows, columns, dtype=torch.uint8, device=self.columns.device)
        batch, head, row = self.rows()
        kinds[batch, head, row, self.columns] = torch.where(self.partial < 0, 2, 1).to(torch.uint8)
        return kinds

    def keys_seen(self) -> Tensor:
        """Whether any query may see a key: boolean `[batch, heads, keys]`."""
        columns = -(-self.keys // self.tile)
        seen = torch.zeros(self.batch, self.heads, columns, self.tile, dtype=torch.bool, device=self.columns.device)
        batch, head, _ = self.rows()
        full = self.partial < 0
        seen[batch[full], head[full], self.columns[full]] = True
        some = ~full
        batch, head, column, place = batch[some], head[some], self.columns[some], self.partial[some]
        for part in _chunked(len(place), self.tile, self.columns.device):
            seen.index_put_((batch[part], head[part], column[part]), self.masks(place[part]).any(1), accumulate=True)
        return seen.flatten(2)[..., : self.keys]


def summarise(
    pattern: Pattern, batch: int, heads: int, queries: int, keys: int, query_start: int | Tensor | None, tile: int
) -> Summary:
    """The summary of `pattern`; a repeated call with the same pattern and sizes is remembered."""
    spec, held = pattern.spec()
    if isinstance(query_start, Tensor):
        held = [*held, query_start]
    tensors = [thing for thing in held if isinstance(thing, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    start = starts(query_start, batch, queries, keys, device)
    if any(tensor.is_inference() for tensor in tensors):  # no version counter: a change could not be seen
        return _build(pattern, batch, heads, queries, keys, start, tile)
    shift = None if isinstance(query_start, Tensor) else query_start
    key = (spec, *map(identity, held), batch, heads, queries, keys, shift, tile)
    return _REMEMBERED.get(key, held, lambda: _build(pattern, batch, heads, queries, keys, start, tile))


class _Memory:
    """The last few summaries. Tensors and functions count by identity (tensors by version too) and are held weakly."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: OrderedDict[object, tuple[list[weakref.ref[Held]], Summary]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: tuple[object, ...], held: list[Held], build: Callable[[], Summary]) -> Summary:
        key = tuple(id(part) if callable(part) else part for part in key)
        with self.lock:
            entry = self.entries.get(key)
            # An identity may have been given to a new object after the old one died.
            if entry and all(ref() is thing for ref, thing in zip(entry[0], held, strict=True)):
                self.entries.move_to_end(key)
                return entry[1]
        summary = build()
        with self.lock:
            self.entries[key] = ([weakref.ref(thing) for thing in held], summary)
            while len(self.entries) > self.size:
                self.entries.popitem(last=False)
        return summary


_REMEMBERED = _Memory(32)


def _build(pattern: Pattern, batch: int, heads: int, queries: int, keys: int, start: Tensor, tile: int) -> Summary:
    device = start.device
    if not (queries and keys and batch and heads):
        shape = (1, 1, -(-queries // tile) + 1)
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        bits = torch.zeros(0, tile, -(-tile // 8), dtype=torch.uint8, device=device)
        return Summary(
            queries, keys, tile, torch.zeros(shape, dtype=torch.int64, device=device), nothing, nothing, bits
        )
    batch, heads = _extent(pattern, batch, heads, keys, start)
    size = tile << max(0, math.ceil(math.log2(max(queries, keys) / tile)))
    b, h = torch.meshgrid(torch.arange(batch, device=device), torch.arange(heads, device=device), indexing="ij")
    b, h = b.flatten(), h.flatten()
    row, column = torch.zeros_like(b), torch.zeros_like(b)
    while True:
        tiles = _tiles(b, h, row, column, size, queries, keys, start)
        may, must = pattern.bounds(tiles)
        b, h, row, column, must = b[may], h[may], row[may], column[may], must[may]
        if size == tile:
            break
        size //= 2
        corner = torch.tensor([0, 0, 1, 1], device=device), torch.tensor([0, 1, 0, 1], device=device)
        b, h = b.repeat_interleave(4), h.repeat_interleave(4)
        row = (row[:, None] * 2 + corner[0]).flatten()
        column = (column[:, None] * 2 + corner[1]).flatten()
        inside = (row * size < queries) & (column * size < keys)
        b, h, row, column = b[inside], h[inside], row[inside], column[inside]
    return _settle(pattern, batch, heads, queries, keys, start, tile, (b, h, row, column, must))


def _extent(pattern: Pattern, batch: int, heads: int, keys: int, start: Tensor) -> tuple[int, int]:
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
    )
    shape = (1, 1, 1, 1, *pattern.visible(at).shape)[-4:]
    return shape[0], shape[1]


def _tiles(
    b: Tensor, h: Tensor, row: Tensor, column: Tensor, size: int, queries: int, keys: int, start: Tensor
) -> Tiles:
    first, first_key = row * size, column * size
    end, end_key = (first + size).clamp(max=queries), (first_key + size).clamp(max=keys)
    shift = start[b] if start.shape[0] > 1 else start
    return Tiles(b, h, first, end, first + shift, end + shift, first_key, end_key, keys)


def _settle(
    pattern: Pattern,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    start: Tensor,
    tile: int,
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> Summary:
    """Sort the tiles into rows, evaluate those that may be partial, and drop or promote what turns out uniform."""
    b, h, row, column, full = found
    device, tile_rows = b.device, -(-queries // tile)
    place = (b * heads + h) * tile_rows + row
    order = torch.argsort(place * -(-keys // tile) + column)
    b, h, row, column, full, place = (x[order] for x in (b, h, row, column, full, place))
    keep = torch.ones_like(full)
    packed: list[Tensor] = []
    inside = torch.arange(tile, device=device)
    powers = (1 << torch.arange(8, device=device)).to(torch.uint8)
    for part in (~full).nonzero().flatten().split(max(1, _PAIRS_AT_ONCE // tile**2)):
        rows = (row[part, None] * tile + inside)[:, :, None]
        columns = (column[part, None] * tile + inside)[:, None, :]
        shift = (start[b[part]] if start.shape[0] > 1 else start)[:, None, None]
        # Positions past the end are clamped, so that no lookup leaves its table, and then masked away.
        at_row, at_key = rows.clamp(max=queries - 1), columns.clamp(max=keys - 1)
        at = Pairs(b[part, None, None], h[part, None, None], at_row, at_row + shift, at_key, keys)
        valid = (rows < queries) & (columns < keys)
        seen = pattern.visible(at).broadcast_to(len(part), tile, tile) & valid
        count, most = seen.sum((1, 2)), valid.sum((1, 2))
        full[part], keep[part] = count == most, count > 0
        mixed = seen[(count > 0) & (count < most)]
        mixed = torch.nn.functional.pad(mixed, (0, -tile % 8)).unflatten(2, (-1, 8))
        packed.append((mixed * powers).sum(-1, dtype=torch.uint8))
    place, column, full = place[keep], column[keep], full[keep]
    counts = torch.bincount(place, minlength=batch * heads * tile_rows).view(batch, heads, tile_rows)
    ends = counts.flatten().cumsum(0).view_as(counts)
    offsets = torch.cat([(ends - counts)[..., :1], ends], -1)
    partial = torch.where(full, -1, (~full).cumsum(0) - 1)
    bits = torch.cat(packed) if packed else torch.zeros(0, tile, -(-tile // 8), dtype=torch.uint8, device=device)
    return Summary(queries, keys, tile, offsets, column, partial, bits)


def _chunked(count: int, tile: int, device: torch.device) -> tuple[Tensor, ...]:
    return torch.arange(count, device=device).split(max(1, _PAIRS_AT_ONCE // tile**2)) if count else ()
