"""Scores that are no dot product: additive (Bahdanau; Luong's concat), and windows around a position that is learned.

    additive   e_ij = w · tanh(q_i + k_j),  q and k already projected
    local      softmax over |j − p_i| ≤ D,  times exp(−(j − p_i)² / 2σ²), with a gradient to p_i

The rest is what it always is: score terms, pattern, normalizer, values. Neither a queries × keys × dim tensor nor a
queries × keys one ever exists: some rows are worked out at a time, and again in the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from foveate.eager import is_known
from foveate.errors import InvalidInput
from foveate.positions import Pairs
from foveate.primitives import by_blocks, group, normalized, ungroup, weigh
from foveate.problem import Problem, accumulator
from foveate.score import parse
from foveate.values import describe, number, whole

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


def additive(call: Problem, vector: Tensor) -> Tensor:
    """Σ_j normalizer(w · tanh(q_i + k_j)) · v_j."""
    clean = _is_clean(call)

    def compute(batch: slice, rows: slice, held: list[Tensor]) -> tuple[Tensor, ...]:
        q, k, v, vector, *tensors = held
        weights = _weights(call, clean, batch, rows, q, k, vector, tensors)
        return (ungroup(weigh(group(weights, k), v.to(weights.dtype)), q).to(q.dtype),)

    return by_blocks(compute, [call.q], [call.k, call.v], [vector, *_tensors(call)], _cost(call), _limit(call))[0]


def additive_weights(call: Problem, vector: Tensor) -> Tensor:
    """The weights themselves, `[B, H, Nq, Nk]`."""
    clean = _is_clean(call)

    def compute(batch: slice, rows: slice, held: list[Tensor]) -> tuple[Tensor, ...]:
        q, k, vector, *tensors = held
        return (_weights(call, clean, batch, rows, q, k, vector, tensors),)

    return by_blocks(compute, [call.q], [call.k], [vector, *_tensors(call)], _cost(call), _limit(call))[0]


def local(call: Problem, center: Tensor, width: int, sigma: float | None, vector: Tensor | None) -> Tensor:
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
    if call.q.device.type != "cpu" or not (is_known(call.q) and is_known(call.k)) or call.is_transformed:
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
