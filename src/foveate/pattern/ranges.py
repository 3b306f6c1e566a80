"""Facts about ranges of positions, for all tiles at once: how many, how low, how high; and a stateless hash."""

import torch
from torch import Tensor


def count_in(table: Tensor, batch: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """How many entries of the boolean table `[batch, length]` are True in [first, end), by prefix sums."""
    before = torch.nn.functional.pad(table.cumsum(1), (1, 0))
    row = batch if table.shape[0] > 1 else torch.zeros_like(batch)
    length = table.shape[1]
    return before[row, end.clamp(0, length)] - before[row, first.clamp(0, length)]


def count_inside(
    table: Tensor, batch: Tensor, head: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]
) -> Tensor:
    """How many entries of the boolean table `[batch or 1, heads or 1, rows, columns]` are True in each rectangle.

    A summed-area table has what is above and left of a corner, so any rectangle is four look-ups.
    """
    sums = torch.nn.functional.pad(table.cumsum(-1).cumsum(-2), (1, 0, 1, 0))
    batch = batch if table.shape[0] > 1 else torch.zeros_like(batch)
    head = head if table.shape[1] > 1 else torch.zeros_like(head)
    top, bottom = (row.clamp(0, table.shape[2]) for row in rows)
    left, right = (column.clamp(0, table.shape[3]) for column in columns)
    return (
        sums[batch, head, bottom, right]
        - sums[batch, head, top, right]
        - sums[batch, head, bottom, left]
        + sums[batch, head, top, left]
    )


def extremes_in(table: Tensor, batch: Tensor, first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest entry of table `[batch, length]` in [first, end), by doubling.

    Two overlapping runs of the largest power of two inside the range cover it: O(length) for each level of the
    doubling, O(1) for each tile.
    """
    length = table.shape[1]
    row = batch if table.shape[0] > 1 else torch.zeros_like(batch)
    first = first.clamp(0, max(length - 1, 0))
    end = torch.maximum(end.clamp(0, length), first + 1)
    size = end - first
    level = (size.double().log2() + 1e-9).floor().long()
    low, high = table, table
    lowest, highest = torch.zeros_like(first, dtype=table.dtype), torch.zeros_like(first, dtype=table.dtype)
    for step in range(int(level.max()) + 1 if level.numel() else 0):
        here = level == step
        run = 1 << step
        left, right = first[here], end[here] - run
        lowest[here] = torch.minimum(low[row[here], left], low[row[here], right])
        highest[here] = torch.maximum(high[row[here], left], high[row[here], right])
        if low.shape[1] <= run:
            break
        low = torch.minimum(low[:, :-run], low[:, run:])
        high = torch.maximum(high[:, :-run], high[:, run:])
    return lowest, highest


def hashed(seed: int, first: Tensor, second: Tensor, third: int) -> Tensor:
    """A 32-bit hash of its arguments as int64: the finaliser of MurmurHash3 after each word."""
    value = torch.full_like(first + second, seed & 0xFFFFFFFF)
    for word in (first, second, third):
        value = value ^ (word & 0xFFFFFFFF)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            value = ((value ^ (value >> shift)) * factor) & 0xFFFFFFFF
        value = value ^ (value >> 16)
        value = (value * 5 + 0xE6546B64) & 0xFFFFFFFF
    return value


def lookup(table: Tensor, batch: Tensor, position: Tensor, outside: int | bool) -> Tensor:
    """table[batch, position], or `outside` for a position that the table does not have."""
    same, length = table.shape[0] == 1, table.shape[1]  # no batch dimension where there is no difference
    if length == 0:
        return torch.full_like(position if same else batch + position, outside, dtype=table.dtype)
    place = position.clamp(0, length - 1)
    found = table[0][place] if same else table[batch, place]
    inside = (position >= 0) & (position < length)
    return (
        found & inside if outside is False else torch.where(inside, found, outside)
    )  # a trace has no bool for `where`
