"""Scores that are no dot product: additive (Bahdanau; Luong's concat), and windows around a position that is learned.

    additive   e_ij = w · tanh(q_i + k_j),  q and k already projected
    local      softmax over |j − p_i| ≤ D,  times exp(−(j − p_i)² / 2σ²), with a gradient to p_i

The rest is what it always is: score terms, pattern, normalizer, values. Neither a queries × keys × dim tensor nor a
queries × keys one ever exists: some rows are worked out at a time, and again in the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.normalizers import Normalizer
from foveate.pattern.algebra import Pattern
from foveate.positions import Pairs
from foveate.primitives import by_blocks, group, normalized, ungroup, weigh
from foveate.problem import Problem, accumulator, batched_problem
from foveate.score import Score, parse
from foveate.values import at_hand, describe, number, whole
from foveate.words import Others, lenient, refused

_CPU, _MOST, _GPU = 1 << 20, 1 << 23, 1 << 26  # entries of a rows × keys × dim tensor at once


def check_vector(call: Problem, vector: Tensor) -> None:
    """Raise `InvalidInput` unless there is one weight for each entry of a query, or one set of them a head."""
    wanted = [(call.q.shape[3],), (call.q.shape[1], call.q.shape[3])]
    fits = isinstance(vector, Tensor) and vector.dtype.is_floating_point and tuple(vector.shape) in wanted
    if not fits or vector.device != call.q.device:
        raise InvalidInput(
            f"the vector is {describe(vector)} beside q {describe(call.q)}: "
            f"wanted floats [dim] = {list(wanted[0])} or [heads, dim] = {list(wanted[1])} on {call.q.device}"
        )


def _additive(call: Problem, vector: Tensor) -> Tensor:
    """Σ_j normalizer(w · tanh(q_i + k_j)) · v_j."""
    clean = _is_clean(call)

    def compute(batch: slice, rows: slice, held: list[Tensor]) -> tuple[Tensor, ...]:
        q, k, v, vector, *tensors = held
        weights = _weights(call, clean, batch, rows, q, k, vector, tensors)
        return (ungroup(weigh(group(weights, k), v.to(weights.dtype)), q).to(q.dtype),)

    return by_blocks(compute, [call.q], [call.k, call.v], [vector, *_tensors(call)], _cost(call), _limit(call))[0]


def _additive_weights(call: Problem, vector: Tensor) -> Tensor:
    """The weights themselves, `[B, H, Nq, Nk]`."""
    clean = _is_clean(call)

    def compute(batch: slice, rows: slice, held: list[Tensor]) -> tuple[Tensor, ...]:
        q, k, vector, *tensors = held
        return (_weights(call, clean, batch, rows, q, k, vector, tensors),)

    return by_blocks(compute, [call.q], [call.k], [vector, *_tensors(call)], _cost(call), _limit(call))[0]


def _local(call: Problem, center: Tensor, width: int, sigma: float | None, vector: Tensor | None) -> Tensor:
    """Attention to the keys at most `width` from a center, which gets its gradient from the Gaussian."""
    _, heads, queries, keys = call.shape
    width = whole(width, "the width", 0)
    wanted = "a positive number, math.inf for no Gaussian"
    sigma = number(width / 2 if sigma is None else sigma, "sigma", wanted, above=0)
    shapes = [(call.shape[0], some, queries) for some in (heads, 1)]
    if not isinstance(center, Tensor) or not center.dtype.is_floating_point or tuple(center.shape) not in shapes:
        raise InvalidInput(
            f"the center is {describe(center)}: wanted floats [batch, heads or 1, queries] = {list(shapes[0])}"
        )
    reach, deviation, wide = width, sigma, accumulator(call.q.dtype)
    by_batch = [call.k, call.v]
    shared = [] if vector is None else [vector]

    def compute(batch: slice, rows: slice, held: list[Tensor]) -> tuple[Tensor, ...]:
        q, p, k, v, *rest = held
        some, p = rest[: len(shared)], p.to(wide)[..., None]
        index = (p - reach).ceil().long() + torch.arange(2 * reach + 1, device=q.device)
        near = (index <= p + reach) & (index >= 0) & (index < keys)
        box = call.pairs((batch, slice(0, heads), rows, slice(0, keys)))
        at = Pairs(box.batch, box.head, box.row, box.query, index.clamp(0, keys - 1), keys, heads=heads)
        if call.pattern is not None:
            near = near & call.pattern.visible(at)
        place = torch.arange(k.shape[0], device=q.device).view(-1, 1, 1, 1), box.head // call.group, at.key
        asked, nearby = q.to(wide)[..., None, :], k[place].to(wide).masked_fill(~near[..., None], 0)
        # Products of finite numbers, so that no gradient of a hidden key is 0 · NaN.
        good = asked.isfinite().all(-1) & nearby.isfinite().all(-1)
        asked, nearby = asked.where(asked.isfinite(), 0), nearby.where(nearby.isfinite(), 0)
        if some:
            scores = _weighed((asked + nearby).tanh(), some[0].to(wide), heads)
        else:
            scores = (asked * nearby).sum(-1) * call.scale
        scores = scores.masked_fill(~good, math.nan)
        scores = scores.masked_fill(~near, -math.inf)
        weights, _, _ = normalized(_with(call, rest[len(shared) :]), scores, at)
        if deviation < math.inf:
            weights = weights * (-((index - p) ** 2) / (2 * deviation**2)).exp()
        values = v[place].to(wide).masked_fill((weights == 0)[..., None], 0)
        return ((weights[..., None] * values).sum(-2).to(q.dtype),)

    if not keys:
        return call.q.new_zeros(*call.shape[:3], call.v.shape[3])
    cost = heads * (2 * reach + 1) * max(call.q.shape[3], call.v.shape[3])
    return by_blocks(compute, [call.q, center], by_batch, [*shared, *_tensors(call)], cost, _limit(call))[0]


def _weights(
    call: Problem, clean: bool, batch: slice, rows: slice, q: Tensor, k: Tensor, vector: Tensor, tensors: list[Tensor]
) -> Tensor:
    """The weights of some rows, from their part of q and k."""
    wide = accumulator(q.dtype)
    heads, keys = k.shape[1], k.shape[2]
    asked, key = q.to(wide), k.to(wide)
    if not clean:  # tanh of numbers alone, so that no gradient of a hidden key is 0 · NaN
        asked, key = asked.where(~asked.isnan(), 0), key.where(~key.isnan(), 0)
    sums = (asked.reshape(q.shape[0], heads, call.group, q.shape[2], 1, q.shape[3]) + key[:, :, None, None]).tanh_()
    scores = _weighed(sums.flatten(1, 2), vector.to(wide), q.shape[1])
    if not clean:
        bad_query, bad_key = q.isnan().any(-1), k.isnan().any(-1).repeat_interleave(call.group, 1)
        scores = scores.masked_fill(bad_key[:, :, None], math.nan).masked_fill(bad_query[..., None], math.nan)
    at = call.pairs((batch, slice(0, q.shape[1]), rows, slice(0, keys)))
    return normalized(_with(call, tensors), scores, at)[0]


def _is_clean(call: Problem) -> bool:
    """Whether it is known that neither q nor k holds a NaN, which saves five passes over k for every block."""
    if not (at_hand(call.q) and at_hand(call.k)):
        return False
    return not bool(call.q.isnan().any()) and not bool(call.k.isnan().any())


def _weighed(features: Tensor, vector: Tensor, heads: int) -> Tensor:
    """w · features over the last dimension of `[b, H, rows, keys, dim]`, w for all heads or for each."""
    if vector.dim() == 1:
        return features @ vector
    return (features @ vector.view(heads, 1, -1, 1)).squeeze(-1)


def _with(call: Problem, tensors: list[Tensor]) -> Problem:
    """The call, its score's tensors replaced by these."""
    return call if call.score is None else replace(call, score=parse(call.score.spec()[0], tensors))


def _tensors(call: Problem) -> list[Tensor]:
    return [] if call.score is None else call.score.tensors()


def _cost(call: Problem) -> int:
    return call.shape[1] * call.shape[3] * call.q.shape[3]


def _limit(call: Problem) -> int:
    if call.q.device.type != "cpu":
        return _GPU
    return max(_CPU, min(16 * _cost(call), _MOST))  # a part adds to the gradients of all keys: worth 16 rows


@lenient
def additive_attention(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    vector: Tensor,
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    query_start: int | Tensor | None = None,
    normalizer: Normalizer | None = None,
    **others: Unpack[Others],
) -> Float[Tensor, "*batch heads queries value_dim"]:
    """Attention whose score is a small network: softmax_j(vector · tanh(q_i + k_j))·v, with q and k already projected.

    Bahdanau's W·s and U·h are the q and k, so that U·h is worked out once for a whole decoder; Luong's concat is the
    same with the two halves of W_a. `vector` is `[dim]` or `[heads, dim]`. There is no scale. Memory is linear in the
    length; a second derivative exists for calls that fit one block.

    Raises:
        InvalidInput: the call is wrong, as in `attention`, or the vector does not fit.

    Bahdanau et al. 2014, appendix A.1.2: https://arxiv.org/abs/1409.0473

    >>> import torch
    >>> import foveate as fv
    >>> states, memory = torch.randn(2, 1, 3, 8), torch.randn(2, 1, 5, 6)
    >>> ask, key, vector = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(6, 4), torch.randn(4)
    >>> fv.additive_attention(ask(states), key(memory), memory, vector).shape
    torch.Size([2, 1, 3, 6])
    """
    if others:
        raise refused(additive_attention, others)
    call, batched = batched_problem(q, k, v, pattern, score, 1.0, query_start, normalizer, 0.0, None, needs_lse=False)
    check_vector(call, vector)
    out = _additive(call, vector)
    return out if batched else out[0]


@lenient
def additive_weights(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    vector: Tensor,
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    query_start: int | Tensor | None = None,
    normalizer: Normalizer | None = None,
    **others: Unpack[Others],
) -> Float[Tensor, "*batch heads queries keys"]:
    """The weights that `additive_attention` gives: the alignment of every query, float32 or wider.

    >>> import torch
    >>> import foveate as fv
    >>> fv.additive_weights(torch.zeros(1, 1, 2), torch.tensor([[[9.0, 0.0], [0.0, 0.0]]]), torch.tensor([2.0, 0.0]))
    tensor([[[0.8808, 0.1192]]])
    """
    if others:
        raise refused(additive_weights, others)
    call, batched = batched_problem(q, k, k, pattern, score, 1.0, query_start, normalizer, 0.0, None, needs_lse=False)
    check_vector(call, vector)
    shares = _additive_weights(call, vector)
    return shares if batched else shares[0]


@lenient
def local_attention(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    center: Tensor,
    pattern: Pattern | Tensor | None = None,
    *,
    width: int,
    sigma: float | None = None,
    vector: Tensor | None = None,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
    **others: Unpack[Others],
) -> Float[Tensor, "*batch heads queries value_dim"]:
    """Attention to the keys around a position of each query's own, which may be learned: Luong's local-p and local-m.

    Σ_j softmax_j(score) · exp(−(j − center)² / 2σ²) · v_j over the keys with |j − center| ≤ width. As in the paper the
    product is not normalised again, and the Gaussian is what gives `center` a gradient. Cost and memory follow
    queries · width.

    Args:
        center: positions among the keys, `[batch, heads or 1, queries]`, any numbers; no key near gives 0.
        width: D of the paper.
        sigma: of the Gaussian; None = width / 2, as in the paper; math.inf = none at all (local-m).
        vector: None for q·k times `scale`; else the score is vector · tanh(q + k), as in `additive_attention`.

    Luong et al. 2015, section 3.2: https://arxiv.org/abs/1508.04025

    >>> import torch
    >>> import foveate as fv
    >>> q, k, v = torch.zeros(1, 1, 4), torch.zeros(1, 9, 4), torch.eye(9)[None]
    >>> fv.local_attention(q, k, v, torch.tensor([[3.5]]), width=2).mul(100).round()[0, 0].tolist()
    [0.0, 0.0, 8.0, 22.0, 22.0, 8.0, 0.0, 0.0, 0.0]
    """
    if others:
        raise refused(local_attention, others)
    call, batched = batched_problem(q, k, v, pattern, score, scale, query_start, None, 0.0, None, needs_lse=False)
    if vector is not None:
        check_vector(call, vector)
    if isinstance(center, Tensor) and not batched:
        center = center[None]
    out = _local(call, center, width, sigma, vector)
    return out if batched else out[0]
