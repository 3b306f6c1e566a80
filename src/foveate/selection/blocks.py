"""Blocks of keys by a pooled key: what a whole block is worth to a query, at the cost of one score a block."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.eager import is_known
from foveate.errors import InvalidInput
from foveate.pattern.algebra import Pattern
from foveate.pattern.positional import causal
from foveate.pattern.quadtree import extent
from foveate.pattern.selected import selected
from foveate.positions import Pairs, Tiles, starts
from foveate.primitives import group, ungroup
from foveate.problem import Problem, accumulator, problem
from foveate.selection.choosing import by_rows, highest, how_many
from foveate.values import whole
from foveate.words import explained

Pool = Literal["mean", "bounds"]


@explained
def block_topk(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch key_heads keys dim"],
    pattern: Pattern | Tensor | None = None,
    *,
    block: int,
    top_k: int,
    pool: Pool = "mean",
    query_start: int | Tensor | None = None,
    shared: bool = False,
) -> Pattern:
    """The `top_k` blocks of `block` keys that fit a query best, by a score of the whole block.

    A block that the query sees in part alone, under causality its own, comes first, since a pooled key would tell of
    keys that it must not know of.

    Args:
        pool: "mean", q · mean(k of the block), or "bounds", the most that q·k can be inside the smallest box around
            the block's keys, as Quest has it: Σ_d max(q_d · min_d, q_d · max_d).
        shared: the query heads of a group choose together, by the sum of their scores.

    Returns:
        `pattern & selected(indices, block=block)`.

    Raises:
        InvalidInput: top_k is larger than the number of blocks, or the call is wrong as in `attention`.

    Tang et al. 2024, "Quest": https://arxiv.org/abs/2406.10774

    >>> import torch
    >>> import foveate as fv
    >>> q, k = torch.ones(1, 1, 6, 1), torch.tensor([1.0, 5.0, 1.0, 1.0, 2.0, 2.0]).view(1, 1, 6, 1)
    >>> print(fv.selection.block_topk(q, k, fv.causal, block=2, top_k=2).picture(6, 6))
    1 . . . . .
    1 1 . . . .
    1 1 1 . . .
    1 1 1 1 . .
    1 1 . . 1 .
    1 1 . . 1 1
    """
    if pool not in ("mean", "bounds"):
        raise InvalidInput(f"pool is {pool!r}: wanted 'mean' or 'bounds'")
    call = problem(q, k, k, pattern, query_start=query_start)
    return _blocks(call, block, top_k, pool, shared, own=False)


@explained
def moba(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch key_heads keys dim"],
    pattern: Pattern | Tensor = causal,
    *,
    block: int,
    top_k: int,
    query_start: int | Tensor | None = None,
    shared: bool = False,
) -> Pattern:
    """Mixture of block attention: the query's own block, and the `top_k` − 1 others with the highest q · mean(k).

    The softmax is then one over the union of the blocks. Later blocks never count, by `pattern`.

    Args:
        shared: the query heads of a group choose together, by the sum of their scores; each for itself in the paper.

    Raises:
        InvalidInput: top_k is larger than the number of blocks, or the call is wrong as in `attention`.

    Lu et al. 2025: https://arxiv.org/abs/2502.13189

    >>> import torch
    >>> import foveate as fv
    >>> q, k = torch.ones(1, 1, 6, 1), torch.tensor([1.0, 5.0, 1.0, 1.0, 1.0, 1.0]).view(1, 1, 6, 1)
    >>> print(fv.selection.moba(q, k, block=2, top_k=1).picture(6, 6))
    1 . . . . .
    1 1 . . . .
    . . 1 . . .
    . . 1 1 . .
    . . . . 1 .
    . . . . 1 1
    """
    return _blocks(problem(q, k, k, pattern, query_start=query_start), block, top_k, "mean", shared, own=True)


def _blocks(call: Problem, block: int, top_k: int, pool: Pool, shared: bool, *, own: bool) -> Pattern:
    heads, keys = call.shape[1], call.shape[3]
    size = whole(block, "the block size", 1)
    blocks = -(-keys // size)
    count = how_many(top_k, blocks, f"blocks of {size} keys")
    wide = accumulator(call.q.dtype)
    asked, group_size = call.q.to(wide), call.group
    if shared and pool == "mean":  # the sum of the scores is the score of the sum
        asked, group_size = asked.unflatten(1, (-1, group_size)).sum(2), 1
    pooled = _pooled(call.k.to(wide), size, pool)

    def compute(b: slice, rows: slice, held: list[Tensor]) -> Tensor:
        some, *ends = held
        if pool == "mean":
            scores = ungroup(group(some, ends[0]) @ ends[0].mT, some)
        else:
            low, high = ends
            up = group(some.clamp(min=0), high) @ high.mT + group(some.clamp(max=0), low) @ low.mT
            scores = ungroup(up, some)
            if shared:
                scores = scores.unflatten(1, (-1, call.group)).sum(2)
        if own:
            at = call.pairs((b, slice(0, heads), rows, slice(0, 1)))
            scores = scores.masked_fill(at.query // size == torch.arange(blocks, device=scores.device), math.inf)
        if call.pattern is not None:
            may, must = _shown(call, b, rows, size)
            if shared:
                may, must = _of_groups(may, call), _of_groups(must, call)
            scores = scores.masked_fill(~must, math.inf).masked_fill(~may, -math.inf)
        return highest(scores, count)

    chosen = selected(by_rows(compute, [asked], pooled, heads * blocks + keys), block=size)
    return chosen if call.pattern is None else call.pattern & chosen


def _pooled(k: Tensor, block: int, pool: Pool) -> list[Tensor]:
    """The means of the blocks, `[batch, heads, blocks, dim]`, or the lowest and the highest of every entry."""
    keys, missing = k.shape[2], -k.shape[2] % block
    if pool == "mean":
        sums = torch.nn.functional.pad(k, (0, 0, 0, missing)).unflatten(2, (-1, block)).sum(3)
        sizes = (keys - torch.arange(0, keys, block, device=k.device)).clamp(max=block)
        return [sums / sizes[:, None]]
    low, high = (
        torch.nn.functional.pad(k, (0, 0, 0, missing), value=end).unflatten(2, (-1, block))
        for end in (math.inf, -math.inf)
    )
    return [low.amin(3), high.amax(3)]


def _of_groups(shown: Tensor, call: Problem) -> Tensor:
    """What some query head of a group sees, where heads differ."""
    return shown.unflatten(1, (-1, call.group)).any(2) if shown.shape[1] > 1 else shown


def _shown(call: Problem, b: slice, rows: slice, block: int) -> tuple[Tensor, Tensor]:
    """Whether each row sees some key of each block, and whether all: `[batch or 1, heads or 1, rows, blocks]`.

    The interval logic of the pattern answers for most; the keys of the others are looked at one by one.
    """
    pattern, keys, device = call.pattern, call.shape[3], call.q.device
    assert pattern is not None
    start = starts(call.query_start, *call.shape[:1], *call.shape[2:], device)
    batches, heads = extent(pattern, call.shape[0], call.shape[1], keys, start)
    blocks = torch.arange(-(-keys // block), device=device)
    which = torch.arange(b.start, b.stop, device=device) if batches > 1 else torch.zeros(1, dtype=torch.int64)
    batch, head, row, column = (
        x.flatten()
        for x in torch.meshgrid(
            which.to(device),
            torch.arange(heads, device=device),
            torch.arange(rows.start, rows.stop, device=device),
            blocks,
            indexing="ij",
        )
    )
    shape = len(which), heads, rows.stop - rows.start, len(blocks)
    query = row + (start[batch] if len(start) > 1 else start)
    first = column * block
    end = (first + block).clamp(max=keys)
    if not len(row):
        nothing = torch.zeros(shape, dtype=torch.bool, device=device)
        return nothing, nothing
    may, must = pattern.bounds(Tiles(batch, head, row, row + 1, query, query + 1, first, end, keys))
    some = may & ~must
    unsure = some.nonzero().flatten() if is_known(some) else torch.arange(len(row), device=device)
    if len(unsure):
        key = first[unsure, None] + torch.arange(block, device=device)
        inside = key < keys
        at = Pairs(
            batch[unsure, None], head[unsure, None], row[unsure, None], query[unsure, None],
            key.clamp(max=keys - 1), keys, heads=call.shape[1],
        )  # fmt: skip
        seen = pattern.visible(at).broadcast_to(key.shape)
        may[unsure] = (seen & inside).any(1)
        must[unsure] = (seen | ~inside).all(1)
    return may.view(shape), must.view(shape)
