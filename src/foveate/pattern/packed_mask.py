"""The summary of a boolean matrix that is there already: packed eight pairs to a byte, not asked pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.pattern.block_mask import Summary

TILE = 64  # a row of a tile is one word
_GATHER = 0x0102040810204080  # eight bytes that are 0 or 1, times this: their bits, in order, in the highest byte


def summarise_matrix(visible: Tensor, queries: int, keys: int) -> Summary:
    """The summary of `visible`, boolean `[batch or 1, heads or 1, queries or 1, keys or 1]`, in tiles of 64.

    One pass over the matrix, at about the cost of a copy; `quadtree.build` answers the same for patterns of any kind.
    """
    batch, heads, device = *visible.shape[:2], visible.device
    down, across = -(-queries // TILE), -(-keys // TILE)
    flags = visible.expand(-1, -1, -1, keys)
    flags = torch.nn.functional.pad(flags, (0, -keys % TILE)) if keys % TILE else flags.contiguous()
    if flags.storage_offset() % 8:
        flags = flags.clone()  # eight bytes are read as one number, from where such numbers begin
    if flags.numel() and int(flags.view(torch.uint8).amax()) > 1:  # memory of NumPy's: True is any byte but 0
        flags = flags.view(torch.uint8).ne(0)
    packed = (flags.view(torch.int64) * _GATHER).bitwise_right_shift_(56).to(torch.uint8)
    rows = packed.view(torch.int64).expand(-1, -1, queries, -1)  # a word for each row of a tile
    words = torch.nn.functional.pad(rows, (0, 0, 0, -queries % TILE)).view(batch, heads, down, TILE, across).mT
    whole = torch.full((across, 1), -1, device=device)
    if keys % TILE:
        whole[-1] = (1 << keys % TILE) - 1
    height = torch.full((down, 1), TILE, device=device)
    height[-1] -= -queries % TILE
    some = (words != 0).any(-1)
    full = (words == whole).sum(-1) == height
    counts = some.sum(-1)
    ends = counts.flatten().cumsum(0).view_as(counts)
    offsets = torch.cat([(ends - counts)[..., :1], ends], -1)
    columns, full_there = some.nonzero()[:, 3], full[some]
    partial = torch.where(full_there, -1, (~full_there).cumsum(0) - 1)
    bits = words[some & ~full].view(torch.uint8).unflatten(1, (TILE, TILE // 8))
    return Summary(queries, keys, TILE, offsets, columns, partial, bits)
