"""What all selections share: some rows at a time, the highest scores of each, and no gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.pattern.band import reach
from foveate.primitives import by_blocks
from foveate.problem import Problem
from foveate.values import whole

_ENTRIES = 1 << 22  # scores at once: 16 MiB in float32


def how_many(top_k: object, there: int, what: str = "keys") -> int:
    """`top_k` as a number of what is there, or a clear error."""
    number = whole(top_k, "top_k", 1)
    if number > there:
        raise InvalidInput(f"top_k is {number} but there are {there} {what}: wanted at most {there}")
    return number


def highest(scores: Tensor, top_k: int, first: int = 0) -> Tensor:
    """The places of the `top_k` highest scores of every row, counted from `first`; −1 for what is −inf or not there."""
    top = scores.topk(min(top_k, scores.shape[-1]), -1, sorted=False)
    places = torch.where(top.values == -torch.inf, -1, top.indices + first).to(torch.int32)
    return torch.nn.functional.pad(places, (0, top_k - places.shape[-1]), value=-1)


def by_rows(
    compute: Callable[[slice, slice, list[Tensor]], Tensor],
    by_row: list[Tensor],
    by_batch: list[Tensor],
    cost: int,
) -> Tensor:
    """compute(batch, rows, tensors) over parts of a call, joined, without a gradient; `cost` numbers a row."""
    with torch.no_grad():
        return by_blocks(lambda b, rows, held: (compute(b, rows, held),), by_row, by_batch, [], cost, _ENTRIES)[0]


def within_reach(call: Problem, rows: slice) -> slice:
    """The keys that these rows could see as far as a reach says so: causality leaves half of them out."""
    keys, simple, start = call.shape[3], reach(call.pattern), call.query_start
    if simple is None or isinstance(start, Tensor):
        return slice(0, keys)
    low = 0 if simple.left is None else min(max(0, start + rows.start - simple.left), keys)
    high = keys if simple.right is None else max(low, min(keys, start + rows.stop + simple.right))
    return slice(low, high)
