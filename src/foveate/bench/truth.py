"""The truth of a row in float64, and how far from it a result may be: no figure without this check.

error ≤ 2 × (error of plain torch in the same dtype) + 2·eps·max(1, |truth|max), gradients 3 ×; in dtypes narrower than
float32 without the 1. All rows are compared where that is cheap; else some in every head, the first and the last among
them. Gradients are compared whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.bench.contestants import TOP
from foveate.bench.rows import Row
from foveate.pattern.algebra import Pattern
from foveate.positions import Pairs
from foveate.primitives import group, ungroup

_PAIRS = 1 << 25  # weighed at once in float64: 256 MiB


@dataclass(frozen=True)
class Truth:
    """What each part of a result should be in the compared rows, and how far it may be off."""

    names: tuple[str, ...]
    rows: Tensor  # of the queries
    wanted: tuple[Tensor, ...]
    allowed: tuple[float, ...]
    looks: bool = False

    def complaint(self, found: tuple[Tensor, ...]) -> str:
        """What is wrong with a result; empty when it is right."""
        found = tuple(part.detach() for part in found)
        if self.looks:
            return self._looked(*found)
        for name, mine, true, bound in zip(self.names, found, self.wanted, self.allowed, strict=True):
            if not bool(mine.isfinite().all()):
                return f"{name} is not finite"
            part = mine[:, :, self.rows] if name == "out" else mine
            if part.shape != true.shape:
                return f"{name} has shape {list(mine.shape)}"
            words = _off(name, part, true, bound)
            if words:
                return words
        return ""

    def _looked(self, indices: Tensor, weights: Tensor, rest: Tensor, received: Tensor, lse: Tensor) -> str:
        """The listed weights are the largest, they are where they are said to be, and nothing else is lost."""
        shares, true_lse = self.wanted
        bound, lse_bound = self.allowed
        top = shares.topk(TOP, -1).values
        return (
            _off("the largest weights", weights, top, bound)
            or _off("the weights at the listed keys", weights, shares.gather(-1, indices), bound)
            or _off("the weight not listed", rest, 1 - top.sum(-1), TOP * bound)
            # A sum over all rows: each adds its own error.
            or _off("the weight received", received, shares.sum(2), bound * math.sqrt(shares.shape[2]))
            or _off("the log-sum-exp", lse, true_lse, lse_bound)
        )


def truth(
    row: Row,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    upstream: Tensor,
    *,
    visible: Callable[[Tensor], Tensor | None] | None = None,
) -> Truth:
    """The truth of attention on these inputs; `visible`: what some rows see, if not what the row's pattern says."""
    rows = torch.arange(row.queries) if row.gradients else _some(row)
    seen = _visible(row.pattern, row, rows) if visible is None else visible(rows)
    parts = (q, k, v, upstream)
    names = ("out", "dQ", "dK", "dV") if row.gradients else ("out",)
    wide = tuple(x.detach().double() for x in parts)
    wanted = _plain(row, wide, seen, rows)
    plain = _plain(row, tuple(x.detach() for x in parts), seen, rows)
    allowed = [
        (2 if name == "out" else 3) * float((rough.double() - true).abs().max()) + rounding(row.dtype, true)
        for name, rough, true in zip(names, plain, wanted, strict=True)
    ]
    return Truth(names, rows, wanted, tuple(allowed))


def truth_of_looked(row: Row, q: Tensor, k: Tensor) -> Truth:
    """The truth of what was looked at: all weights and every log-sum-exp."""
    rows = torch.arange(row.queries)
    visible = _visible(row.pattern, row, rows)
    scores = _scores(q.double(), k.double(), visible)
    shares, lse = scores.softmax(-1), scores.logsumexp(-1)
    rough = _scores(q, k, visible)
    bounds = [
        2 * float((mine.double() - true).abs().max()) + rounding(torch.float32, true)
        for mine, true in ((rough.softmax(-1), shares), (rough.logsumexp(-1), lse))
    ]
    return Truth(("weights", "lse"), rows, (shares, lse), tuple(bounds), looks=True)


def _plain(row: Row, parts: tuple[Tensor, ...], visible: Tensor | None, rows: Tensor) -> tuple[Tensor, ...]:
    """The formula, every step in the dtype of its inputs, with gradients where the row has them."""
    q, k, v, upstream = parts
    q = q[:, :, rows]
    with torch.set_grad_enabled(row.gradients):
        leaves = [x.requires_grad_(row.gradients) for x in (q, k.detach(), v.detach())]
        weights = _scores(leaves[0], leaves[1], visible).softmax(-1)
        out = ungroup(group(weights, k) @ leaves[2], q)
    if not row.gradients:
        return (out,)
    return (out.detach(), *torch.autograd.grad(out, leaves, upstream))


def _scores(q: Tensor, k: Tensor, visible: Tensor | None) -> Tensor:
    scores: Tensor = ungroup(group(q, k) @ k.mT, q) * (1 / math.sqrt(q.shape[-1]))
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return scores


def _some(row: Row) -> Tensor:
    """The places of the rows to compare: all, or as many as `_PAIRS` allows."""
    count = max(2, _PAIRS // (row.batch * row.heads * row.keys))
    if count >= row.queries:
        return torch.arange(row.queries)
    drawn = torch.randperm(row.queries, generator=torch.Generator().manual_seed(11))[: count - 2]
    return torch.cat([torch.tensor([0, row.queries - 1]), drawn]).sort().values


def _visible(pattern: Pattern | None, row: Row, rows: Tensor) -> Tensor | None:
    if pattern is None:
        return None
    at = rows.view(1, 1, -1, 1)
    batch, head = torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.arange(row.heads).view(1, -1, 1, 1)
    key = torch.arange(row.keys).view(1, 1, 1, -1)
    return pattern.visible(Pairs(batch, head, at, at + row.keys - row.queries, key, row.keys, heads=row.heads))


def rounding(dtype: torch.dtype, true: Tensor) -> float:
    """What rounding alone may take: 2·eps of the largest true value."""
    most = float(true.abs().max())
    # An output is a mean of many values, far below 1: in a narrow dtype 2·eps alone would forgive many keys lost.
    return 2 * torch.finfo(dtype).eps * (max(1.0, most) if dtype == torch.float32 else most)


def _off(name: str, mine: Tensor, true: Tensor, bound: float) -> str:
    off = float((mine.double() - true).abs().max())
    # A NaN is smaller than nothing, so the question is whether it is inside.
    return "" if off <= bound else f"{name} is off by {off:.2g}, allowed {bound:.2g}"
