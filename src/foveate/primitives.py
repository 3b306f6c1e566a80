"""Mathematics that implementations share unchanged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.eager import is_known
from foveate.positions import Pairs
from foveate.problem import Problem, without_autocast


def raw_scores(q: Tensor, k: Tensor) -> Tensor:
    """q·kᵀ, over grouped heads without repeating k; a row or key that is not finite gives NaN.

    q `[B, Hq, Nq, D]`, k `[B, Hk, Nk, D]` → `[B, Hq, Nq, Nk]`. The product itself is taken of finite numbers, so
    that no gradient of a hidden key is 0 · NaN.
    """
    q_finite, k_finite = q.isfinite(), k.isfinite()
    scores = ungroup(group(q.where(q_finite, 0), k) @ k.where(k_finite, 0).transpose(-1, -2), q)
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
    if seen.device.type == "cpu" and is_known(seen) and bool(seen.all()):
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


Compute = Callable[[slice, slice, list[Tensor]], tuple[Tensor, ...]]


def by_blocks(
    compute: Compute, by_row: list[Tensor], by_batch: list[Tensor], whole: list[Tensor], cost: int, at_once: int
) -> tuple[Tensor, ...]:
    """compute(batch, rows, tensors) over parts of a call, joined: `at_once` numbers at most, `cost` of them a row.

    The tensors come as `by_row` `[batch, _, rows, …]` and `by_batch` `[batch, …]` cut to the part, and `whole` as they
    are; what is computed is `[batch, heads, rows, …]`. Nothing in between is kept: the backward pass computes each part
    again (Chen et al. 2016, 1604.06174), and has no second derivative if there is more than one.
    """
    batch, rows = by_row[0].shape[0], by_row[0].shape[2]
    together = max(1, min(batch, at_once // max(cost, 1)))
    step = max(1, at_once // max(cost * together, 1))
    places = [
        (slice(first, min(first + together, batch)), slice(row, min(row + step, rows)))
        for first in range(0, max(batch, 1), together)
        for row in range(0, max(rows, 1), step)
    ]
    with without_autocast(by_row[0].device):
        if len(places) == 1:
            return compute(*places[0], [*by_row, *by_batch, *whole])
        tensors = [*by_row, *by_batch, *whole]
        counts = len(by_row), len(by_batch)
        made: tuple[Tensor, ...] = _Blocks.apply(compute, places, counts, *tensors)  # type: ignore[no-untyped-call]
    return made


class _Blocks(torch.autograd.Function):
    # No graph is built while the parts are computed: thousands of small allocations that outlive a part would tear
    # holes into the memory that it gives back, and checkpoint() then takes as much as keeping everything.

    @staticmethod
    def forward(
        ctx: Any, compute: Compute, places: list[tuple[slice, slice]], counts: tuple[int, int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.compute, ctx.places, ctx.counts = compute, places, counts
        ctx.save_for_backward(*tensors)
        outs: list[Tensor] = []
        for batch, rows in places:
            parts = compute(batch, rows, _cut(tensors, counts, batch, rows))
            if not outs:
                size = tensors[0].shape[0], parts[0].shape[1], tensors[0].shape[2]
                outs = [part.new_empty(*size, *part.shape[3:]) for part in parts]
            for out, part in zip(outs, parts, strict=True):
                out[batch, :, rows] = part
        ctx.mark_non_differentiable(*(out for out in outs if not out.dtype.is_floating_point))
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[3:]
        by_row, by_batch = ctx.counts
        nothing = sum(
            torch.zeros_like(x).sum() for x in gradients if x.dtype.is_floating_point
        )  # batched where they are
        totals: list[Any] = [
            torch.zeros_like(x) + torch.as_tensor(nothing).to(x.dtype) if want else None
            for x, want in zip(tensors, wanted, strict=True)
        ]
        with without_autocast(tensors[0].device):
            for batch, rows in ctx.places:
                pieces = _cut(tensors, ctx.counts, batch, rows)
                leaves = [piece.detach().requires_grad_(want) for piece, want in zip(pieces, wanted, strict=True)]
                with torch.enable_grad():
                    parts = ctx.compute(batch, rows, leaves)
                made = [part for part in parts if part.requires_grad]
                given = [x[batch, :, rows] for x, part in zip(gradients, parts, strict=True) if part.requires_grad]
                asked = [leaf for leaf in leaves if leaf.requires_grad]
                if made:
                    found = torch.autograd.grad(made, asked, given, allow_unused=True)
                    into = [total for total, want in zip(totals, wanted, strict=True) if want]
                    counts = sum(wanted[:by_row]), sum(wanted[by_row : by_row + by_batch])
                    for total, gradient in zip(_cut(into, counts, batch, rows), found, strict=True):
                        if gradient is not None:
                            total += gradient
        return None, None, None, *totals


def _cut(tensors: Sequence[Tensor], counts: tuple[int, int], batch: slice, rows: slice) -> list[Tensor]:
    """Views of the part of each tensor that belongs to some batch rows and some rows of queries."""
    by_row, by_batch = counts
    return [
        *(x[batch, :, rows] for x in tensors[:by_row]),
        *(x[batch] for x in tensors[by_row : by_row + by_batch]),
        *tensors[by_row + by_batch :],
    ]


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


def dropout_mask(seed: int | Tensor, rate: float, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Which weights dropout keeps: those whose number is at least `rate`. The index tensors broadcast."""
    return uniform_words(seed, batch, head, query, key) >= round(rate * 2**32)


def gumbel_noise(seed: int | Tensor, at: Pairs, dtype: torch.dtype) -> Tensor:
    """−log(−log u), u from Philox of (seed, batch, head, query, key) alone: the same in any order and at any time."""
    words = uniform_words(seed, at.batch, at.head, at.query, at.key)
    # The half keeps u inside (0, 1), in float64 because float32 has no number so near to 1.
    return -(-((words.double() + 0.5) / 2**32).log()).log().to(dtype)


def uniform_words(seed: int | Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whole numbers from 0 to 2³² − 1: Philox-4x32-10 of (seed, batch, query head, query position, key) alone.

    The counter is (key // 4, query, head, batch), the key of the generator the two halves of seed, and key mod 4
    picks one of the four words (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
    """
    if torch.compiler.is_compiling():  # Inductor loses digits of such whole numbers, so that they come in an operator
        seed = seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device="cpu")
        found: Tensor = _words_op(seed, batch, head, query, key)
        return found
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
    return torch.stack(words, -1).gather(-1, (key % 4).expand(shape)[..., None]).squeeze(-1)


@torch.library.custom_op("foveate::uniform_words", mutates_args=())
def _words_op(seed: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return uniform_words(seed, batch, head, query, key)


@_words_op.register_fake
def _words_fake(seed: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key.new_empty(torch.broadcast_shapes(batch.shape, head.shape, query.shape, key.shape))


def room_for_out(q: Tensor, value_dim: int) -> Tensor:
    """Memory for a result `[B, H, Nq, value dim]`, laid out as q is: dense, its dimensions in the same order.

    So `.view` works on a result wherever it would on q, whichever implementation ran. It is no view itself, which an
    autograd function may not return to someone who changes it in place.
    """
    if q.shape[3] == value_dim and q.stride(3) == 1:
        return torch.empty_like(q)
    return q.new_empty_strided((*q.shape[:3], value_dim), (*(step * max(value_dim, 1) for step in _row_strides(q)), 1))


def laid_out_as(q: Tensor, out: Tensor) -> Tensor:
    """A result as `room_for_out` lays it out; copied only if it lies otherwise."""
    strides = _row_strides(q)
    order = sorted(range(3), key=lambda n: strides[n], reverse=True)
    back = [order.index(n) for n in range(3)]
    return out.permute(*order, 3).contiguous().permute(*back, 3)


def _row_strides(q: Tensor) -> tuple[int, ...]:
    """Of a dense `[B, H, Nq]` whose dimensions are in the order of q's."""
    return torch.empty_like(q[..., 0] if q.shape[3] else q.new_empty(q.shape[:3]), device="meta").stride()


def readable(x: Tensor) -> Tensor:
    """x with a unit last stride and an aligned address, copied only if it has to be."""
    aligned = x.data_ptr() % x.element_size() == 0
    return x if aligned and (x.stride(3) == 1 or x.shape[3] == 1) else x.clone(memory_format=torch.contiguous_format)
