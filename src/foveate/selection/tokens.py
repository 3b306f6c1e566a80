"""Tokens by a score: the exact top-k, and the keys that much attention went to."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.pattern.algebra import Pattern
from foveate.pattern.custom import as_pattern
from foveate.pattern.selected import selected
from foveate.positions import grid
from foveate.primitives import normalized, raw_scores
from foveate.problem import accumulator, problem
from foveate.score import Score
from foveate.selection.choosing import by_rows, highest, how_many, within_reach
from foveate.values import describe, floating
from foveate.words import explained


@explained
def topk(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch key_heads keys dim"],
    pattern: Pattern | Tensor | None = None,
    *,
    top_k: int,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
    shared: bool = False,
) -> Pattern:
    """The `top_k` keys of highest score for every query, exactly, among those that `pattern` lets it see.

    The scores are those of attention: scale · q·kᵀ and what `score` makes of it. A query that sees fewer keys chooses
    them all. The time is that of all scores, the memory that of some rows of them.

    Args:
        shared: the query heads of a group choose together, by the sum of their attention weights, so that their list
            captures as much of it as any list of that length can.

    Returns:
        `selected(indices)`, which lies inside `pattern`: indices int32 `[batch, heads, queries, top_k]`.

    Raises:
        InvalidInput: top_k is larger than the number of keys, or the call is wrong as in `attention`.

    Gupta et al. 2021: https://arxiv.org/abs/2106.06899

    >>> import torch
    >>> import foveate as fv
    >>> q, k = torch.ones(1, 1, 3, 1), torch.tensor([2.0, 1.0, 3.0]).view(1, 1, 3, 1)
    >>> print(fv.selection.topk(q, k, fv.causal, top_k=1).picture(3, 3))
    1 . .
    1 . .
    . . 1
    """
    call = problem(q, k, k, pattern, score=score, scale=scale, query_start=query_start)
    heads, keys = call.shape[1], call.shape[3]
    count, wide = how_many(top_k, keys), accumulator(q.dtype)

    def compute(b: slice, rows: slice, held: list[Tensor]) -> Tensor:
        some_q, some_k = held
        columns = within_reach(call, rows)
        scores = raw_scores(some_q.to(wide), some_k[:, :, columns].to(wide)) * call.scale
        at = call.pairs((b, slice(0, heads), rows, columns))
        if shared:
            weights, visible, _ = normalized(call, scores, at)
            weights = weights.unflatten(1, (-1, call.group)).sum(2)
            if visible is not None:  # a hidden key is not one whose weight is 0 by rounding
                weights = weights.masked_fill(~visible.unflatten(1, (-1, call.group)).any(2), -math.inf)
            return highest(weights, count, columns.start)
        if call.score is not None:
            scores = call.score.apply(scores, at)
        if call.pattern is not None:
            scores = scores.masked_fill(~call.pattern.visible(at), -math.inf)
        return highest(scores, count, columns.start)

    return selected(by_rows(compute, [call.q], [call.k], heads * keys))


@explained
def topk_of(
    scores: Float[Tensor, "batch heads queries keys"],
    pattern: Pattern | Tensor | None = None,
    *,
    top_k: int,
    query_start: int | Tensor | None = None,
) -> Pattern:
    """The `top_k` highest of given scores for every query, among the keys that `pattern` lets it see; −inf is none.

    Raises:
        InvalidInput: top_k is larger than the number of keys, or pattern and scores do not fit each other.

    >>> import torch
    >>> import foveate as fv
    >>> print(fv.selection.topk_of(torch.tensor([[[[1.0, 3.0, 2.0]]]]), top_k=2).picture(1, 3))
    . 1 1
    """
    floating(scores, "scores", [4])
    batch, heads, queries, keys = scores.shape
    count = how_many(top_k, keys)
    who = None if pattern is None else as_pattern(pattern)
    if who is not None:
        who._check(batch, heads, queries, keys, query_start)

    def compute(b: slice, rows: slice, held: list[Tensor]) -> Tensor:
        if who is None:
            return highest(held[0], count)
        box = b, slice(0, heads), rows, slice(0, keys)
        at = grid(batch, heads, queries, keys, query_start, scores.device, box)
        return highest(held[0].masked_fill(~who.visible(at), -math.inf), count)

    return selected(by_rows(compute, [scores], [], heads * keys))


@explained
def heavy_hitters(received: Float[Tensor, "batch heads keys"], *, top_k: int, key_heads: int | None = None) -> Pattern:
    """The `top_k` keys that received most attention, for every query alike: what a cache would keep of a long text.

    `received` is the sum of the weights that each key got, `fv.watch`'s `looked(call).received` for one. It knows what
    all those queries looked at, so it is for queries that come after them. Recent keys have had little time to receive
    any, so the paper keeps a window beside: `heavy_hitters(…) | fv.window(left=w)`, with `fv.causal &` around both.

    Args:
        key_heads: the query heads that share a key head choose together, by the sum of what their key received.

    Raises:
        InvalidInput: top_k is larger than the number of keys.

    Zhang et al. 2023, "H2O": https://arxiv.org/abs/2306.14048

    >>> import torch
    >>> import foveate as fv
    >>> print(fv.selection.heavy_hitters(torch.tensor([[[0.1, 2.0, 0.3, 0.9]]]), top_k=2).picture(2, 4))
    . 1 . 1
    . 1 . 1
    """
    floating(received, "received", [3])
    heads, keys = received.shape[1:]
    count = how_many(top_k, keys)
    if key_heads is not None:
        if key_heads < 1 or heads % key_heads:
            raise InvalidInput(
                f"received is {describe(received)} but key_heads is {key_heads}: wanted heads that are a multiple of it"
            )
        received = received.unflatten(1, (key_heads, -1)).sum(2)
    return selected(highest(received.detach(), count)[:, :, None])
