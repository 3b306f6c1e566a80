"""Which tiles of a pattern are empty, full or partial, and for partial ones a bit for each pair.

Memory follows the tiles that are not empty, so a window over 131,072 positions costs megabytes where the boolean
matrix would cost 16 GiB; `quadtree` says how they are found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_PAIRS_AT_ONCE = 1 << 20  # how many pairs of partial tiles are evaluated in one go: what a cache holds


@dataclass(frozen=True, eq=False)
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

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.offsets, self.columns, self.partial, self.bits))

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

    def watchers(self) -> Tensor:
        """How many queries may see each key: int64 `[batch, heads, keys]`."""
        columns, device = -(-self.keys // self.tile), self.columns.device
        whole = torch.zeros(self.batch, self.heads, columns, dtype=torch.int64, device=device)
        batch, head, row = self.rows()
        full = self.partial < 0
        height = (self.queries - row * self.tile).clamp(max=self.tile)
        whole.index_put_((batch[full], head[full], self.columns[full]), height[full], accumulate=True)
        count = whole[..., None].repeat(1, 1, 1, self.tile)
        some = ~full
        batch, head, column, place = batch[some], head[some], self.columns[some], self.partial[some]
        for part in _chunked(len(place), self.tile, device):
            count.index_put_((batch[part], head[part], column[part]), self.masks(place[part]).sum(1), accumulate=True)
        return count.flatten(2)[..., : self.keys]


def _chunked(count: int, tile: int, device: torch.device) -> tuple[Tensor, ...]:
    return torch.arange(count, device=device).split(max(1, _PAIRS_AT_ONCE // tile**2)) if count else ()
