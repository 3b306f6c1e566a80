"""Mathematics that implementations share unchanged."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.positions import Pairs
from foveate.problem import Problem


def raw_scores(q: Tensor, k: Tensor) -> Tensor:
    """q·kᵀ, over grouped heads without repeating k; a row or key that is not finite gives NaN.

    q `[B, Hq, Nq, D]`, k `[B, Hk, Nk, D]` → `[B, Hq, Nq, Nk]`. The product itself is taken of finite numbers, so
    that no gradient of a hidden key is 0 · NaN.
    """
    q_finite, k_finite = q.isfinite(), k.isfinite()
    scores = ungroup(group(q.where(q_finite, 0), k) @ k.where(k_finite, 0).mT, q)
    bad_key = ~k_finite.all(-1).repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1)
    return scores.masked_fill(bad_key[:, :, None, :], math.nan).masked_fill(~q_finite.all(-1, keepdim=True), math.nan)


def group(q: Tensor, k: Tensor) -> Tensor:
    """`[B, Hq, N, D]` → `[B, Hk, group · N, D]`: the heads that read one key head lie one after the other."""
    batch, _, rows, dim = q.shape
    heads = k.shape[1]
    return q.reshape(batch, heads, q.shape[1] // max(heads, 1) * rows, dim)


def ungroup(x: Tensor, q: Tensor) -> Tensor:
    """The inverse of `group`, for anything that has its rows: `[B, Hk, group · N, X]` → `[B, Hq, N, X]`."""
    return x.reshape(q.shape[0], q.shape[1], q.shape[2], x.shape[3])


def without_unseen(x: Tensor, seen: Tensor) -> Tensor:
    """k or v with zeros where no row may see the key, so that what it holds never matters.

    seen is `[batch or 1, query heads or 1, keys or 1]`; a key head is seen if one query head of its group sees it.
    """
    if seen.device.type == "cpu" and not torch.compiler.is_compiling() and bool(seen.all()):
        return x
    if seen.shape[1] > 1:
        seen = seen.unflatten(1, (x.shape[1], -1)).any(2)
    return x.masked_fill(~seen[..., None], 0)


def weigh(weights: Tensor, v: Tensor) -> Tensor:
    """weights @ v, where a weight of exactly 0 lets nothing through: 0 · inf is 0 here and not NaN.

    A value that is not finite reaches the rows that give it weight, and no others.
    """
    out = weights @ v.where(v.isfinite(), 0)
    nan = v.isnan()
    given = (weights != 0).to(v.dtype)
    up, down = given @ ((v == math.inf) | nan).to(v.dtype), given @ ((v == -math.inf) | nan).to(v.dtype)
    return out + torch.where(up > 0, math.inf, 0) + torch.where(down > 0, -math.inf, 0)


def masked_softmax(scores: Tensor, visible: Tensor | None, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(weights, log-sum-exp `[..., rows]`) over the visible keys; a row without one gets weights 0 and −inf.

    `sinks` broadcasts to `[..., rows, 1]` and takes part in the sum alone.
    """
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    shape = (*scores.shape[:-1], 1)
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full(shape, -math.inf)
    if sinks is not None:
        sinks = sinks.to(scores.dtype).expand(shape)
        top = torch.maximum(top, sinks.detach())
    top = top.masked_fill(top == -math.inf, 0)
    # A NaN elsewhere in the row gives a hidden key no weight either.
    terms = (scores - top).exp().masked_fill(scores == -math.inf, 0)
    total = terms.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - top).exp()
    empty = total == 0
    total = total.masked_fill(empty, 1)
    lse = (total.log() + top).masked_fill(empty, -math.inf)
    return terms / total, lse.squeeze(-1)


def normalized(call: Problem, scores: Tensor, at: Pairs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(weights, which keys may be seen, log-sum-exp) of scaled raw scores `[B, H, rows, keys]` at these pairs.

    The pattern is None where all may be seen, the log-sum-exp where the normalizer has none.
    """
    sinks = None
    if call.score is not None:
        scores = call.score.apply(scores, at)
        sinks = call.score.sinks.of(at) if call.score.sinks else None
    visible = None if call.pattern is None else call.pattern.visible(at).broadcast_to(scores.shape)
    if call.normalizer is None:
        weights, lse = masked_softmax(scores, visible, sinks)
        return weights, visible, lse
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return call.normalizer.weights(scores), visible, None


def merge_states(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from (out, lse) over each of them.

    out = Σ exp(lse_i − lse)·out_i with lse = log Σ exp(lse_i); a part without a key (lse −inf) has no say, whatever
    it holds, and no keys at all give 0 and −inf.
    """
    lse = torch.stack([part_lse for _, part_lse in parts], -1)
    top = lse.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)
    terms = (lse - top).exp()
    total = terms.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    shares = terms / total
    dtype = parts[0][0].dtype
    out = sum(
        (out.to(lse.dtype).masked_fill((share == 0)[..., None], 0) * share[..., None])
        for (out, _), share in zip(parts, shares.unbind(-1), strict=True)
    )
    merged = (total.log() + top).masked_fill(empty, -math.inf).squeeze(-1)
    return torch.as_tensor(out).to(dtype), merged


def dropout_mask(seed: int, rate: float, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Which weights dropout keeps: Philox-4x32-10 of (seed, batch, query head, query position, key) alone.

    The counter is (key // 4, query, head, batch), the key of the generator the two halves of seed, and key mod 4
    picks one of the four words; a weight is kept if its word / 2³² ≥ rate (Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3"). The index tensors broadcast.
    """
    low = 0xFFFFFFFF
    shape = torch.broadcast_shapes(batch.shape, head.shape, query.shape, key.shape)
    words = [x.expand(shape) & low for x in (key // 4, query, head, batch)]
    first, second = seed & low, (seed >> 32) & low
    for turn in range(10):
        if turn:
            first, second = (first + 0x9E3779B9) & low, (second + 0xBB67AE85) & low
        # int64 wraps modulo 2⁶⁴, so the bits of the unsigned product are all there; >> 32 then needs its sign cut off.
        left, right = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            ((right >> 32) & low) ^ words[1] ^ first,
            right & low,
            ((left >> 32) & low) ^ words[3] ^ second,
            left & low,
        ]
    word = torch.stack(words, -1).gather(-1, (key % 4).expand(shape)[..., None]).squeeze(-1)
    return word >= round(rate * 2**32)
