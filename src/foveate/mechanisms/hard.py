"""Hard attention: every query takes one key. By the largest score, or at random with the weights as probabilities.

A choice has no derivative, so each way says what stands in for one:

    argmax            none: `normalizer=hardmax`
    straight-through  forward the choice, backward the softmax
    Gumbel            the same with noise: −log(−log u) on every score makes the largest a draw from the weights
    sampled           none, but the log-probability of the choice: `reinforce` makes a loss of it

Scores are worked out some rows at a time and again in the backward pass: memory is linear in the length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.dispatch.choose import dispatch
from foveate.eager import is_known
from foveate.errors import InvalidInput
from foveate.normalizers import hardmax
from foveate.pattern.algebra import Pattern
from foveate.primitives import (
    Compute,
    by_blocks,
    group,
    gumbel_noise,
    masked_softmax,
    raw_scores,
    ungroup,
    weigh,
)
from foveate.problem import Problem, accumulator, batched_problem
from foveate.score import Score, parse
from foveate.values import at_hand, describe, integers, number, positive
from foveate.words import Others, explained, lenient, refused

_SCORES = 1 << 20  # scores at once: a part stays in the cache


class Chosen(NamedTuple):
    """What hard attention took.

    `out` `[B, H, Nq, Dv]`: the value of the chosen key, 0 where a row sees none.
    `choices` `[B, H, Nq]`: the key, −1 where a row sees none or took the mean of all instead.
    `log_prob` `[B, H, Nq]`: the logarithm of its weight, with a gradient; 0 where the choice is −1.
    `entropy` `[B, H, Nq]`: of the weights, in nats, with a gradient.
    """

    out: Tensor
    choices: Tensor
    log_prob: Tensor
    entropy: Tensor


def check(call: Problem, temperature: float = 1.0) -> None:
    """Raise `InvalidInput` for what hard attention has no meaning for."""
    if call.score is not None and call.score.sinks is not None:
        raise InvalidInput("hard attention chooses a key, and a sink is none: drop the sinks")
    positive(temperature, "the temperature")


def seed_of(generator: torch.Generator | None) -> Tensor:
    """A seed of 63 bits from a generator, or from torch's default one; a tensor, so that a graph sees it drawn."""
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**63 - 1, (), generator=generator, device=device)


def _straight_through(call: Problem, temperature: float, seed: Tensor | None) -> Chosen:
    """The largest of scores (+ Gumbel noise, if there is a seed) forward, their softmax(· / temperature) backward."""

    def compute(batch: slice, rows: slice, held: list[Tensor]) -> tuple[Tensor, ...]:
        q, k, v, *tensors = held
        logs = _log_weights(call, batch, rows, q, k, tensors)
        noisy = logs
        if seed is not None:
            noisy = logs + gumbel_noise(seed, call.pairs(_box(call, batch, rows)), logs.dtype)
        hidden = logs == -math.inf
        soft, _ = masked_softmax(noisy / temperature, None)
        one = hardmax.weights(noisy.detach())
        given = group(one + (soft - soft.detach()), k)
        out = ungroup(weigh(given, v.to(logs.dtype)), logs).to(call.q.dtype)
        choices = _first(noisy).masked_fill(hidden.all(-1), -1)
        return out, choices, *_facts(logs, choices)

    return Chosen(*_blocks(call, compute, call.v))


def _sampled(
    call: Problem, generator: torch.Generator | None, choices: Tensor | None = None, soft_share: float = 0.0
) -> Chosen:
    """One key a row, drawn with the weights as probabilities (or given); a share of the batch takes the mean."""
    soft_share = number(soft_share, "soft_share", "a share from 0 to 1", least=0, most=1)
    shape = call.shape[:3]
    if choices is None:
        choices = _draw(call, generator)
    elif (choices := integers(choices, "choices=", [2, 3])).shape != shape:
        raise InvalidInput(
            f"the choices are {describe(choices)}: wanted integers [batch, heads, queries] = {list(shape)}"
        )
    elif at_hand(choices) and not -1 <= int(choices.min()) <= int(choices.max()) < call.shape[3]:
        raise InvalidInput(f"the choices go from {int(choices.min())} to {int(choices.max())}: "
                           f"wanted keys from 0 to {call.shape[3] - 1}, or −1 for none")  # fmt: skip
    soft = None
    if soft_share:
        drawn = torch.rand(shape[0], generator=generator, device=call.q.device)
        soft = (drawn < soft_share).view(-1, 1, 1)
        choices = choices.masked_fill(soft, -1)
    taken = choices

    def compute(batch: slice, rows: slice, held: list[Tensor]) -> tuple[Tensor, ...]:
        q, k, *tensors = held
        return _facts(_log_weights(call, batch, rows, q, k, tensors), taken[batch, :, rows])

    log_prob, entropy = _blocks(call, compute)
    where = group(choices.clamp(min=0)[..., None], call.v)
    if call.shape[3]:
        out = ungroup(call.v.gather(2, where.expand(*where.shape[:3], call.v.shape[3])), choices[..., None])
        out = out.where((choices >= 0)[..., None], 0)
    else:
        out = call.v.new_zeros(*shape, call.v.shape[3])
    if soft is not None and (not is_known(soft) or bool(soft.any())):
        out = torch.where(soft[..., None], dispatch(call).out, out)
    return Chosen(out, choices, log_prob, entropy)


def _reinforce(
    reward: Tensor, drawn: Sequence[Chosen], *, baseline: Tensor | float, weight: float, entropy_weight: float
) -> Tensor:
    """−mean[reward + weight · (reward − baseline) · log p(choices) + entropy_weight · H]; see `reinforce_loss`."""
    if not isinstance(reward, Tensor) or not reward.dtype.is_floating_point or reward.dim() > 3:
        raise InvalidInput(
            f"the reward is {describe(reward)}: wanted floats [batch], or as many dimensions as log_prob"
        )
    log_prob, entropy = torch.zeros_like(reward), torch.zeros_like(reward)
    for one in drawn:
        if one.log_prob.shape[: reward.dim()] != reward.shape:
            raise InvalidInput(
                f"the reward is {describe(reward)} and log_prob {describe(one.log_prob)}: wanted its first dimensions"
            )
        over = tuple(range(reward.dim(), one.log_prob.dim()))
        log_prob = log_prob + (one.log_prob.sum(over) if over else one.log_prob)
        entropy = entropy + (one.entropy.sum(over) if over else one.entropy)
    earned = reward.detach()
    known = baseline.detach() if isinstance(baseline, Tensor) else baseline
    gain = reward + weight * (earned - known) * log_prob + entropy_weight * entropy
    loss = -gain.mean()
    if isinstance(baseline, Tensor) and baseline.requires_grad:
        loss = loss + ((earned - baseline) ** 2).mean()  # a learned baseline is fitted to the reward
    return loss


def _box(call: Problem, batch: slice, rows: slice) -> tuple[slice, slice, slice, slice]:
    return batch, slice(0, call.shape[1]), rows, slice(0, call.shape[3])


def _blocks(call: Problem, compute: Compute, *values: Tensor) -> tuple[Tensor, ...]:
    tensors = call.score.tensors() if call.score is not None else []
    return by_blocks(compute, [call.q], [call.k, *values], tensors, call.shape[1] * call.shape[3], _SCORES)


def _log_weights(call: Problem, batch: slice, rows: slice, q: Tensor, k: Tensor, tensors: list[Tensor]) -> Tensor:
    """log softmax of some rows `[b, H, rows, Nk]`, from their part of q and k: −inf where a key is hidden."""
    wide = accumulator(q.dtype)
    scores = raw_scores(q.to(wide), k.to(wide)) * call.scale
    at = call.pairs(_box(call, batch, rows))
    if call.score is not None:
        scores = parse(call.score.spec()[0], tensors).apply(scores, at)
    if call.pattern is not None:
        scores = scores.masked_fill(~call.pattern.visible(at), -math.inf)
    _, lse = masked_softmax(scores, None)
    return scores - lse.masked_fill(lse == -math.inf, 0)[..., None]


def _first(scores: Tensor) -> Tensor:
    return scores.argmax(-1) if scores.shape[-1] else torch.full(scores.shape[:-1], -1, device=scores.device)


def _facts(logs: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of the choices, 0 for −1; entropy of every row)."""
    finite = logs.masked_fill(logs == -math.inf, 0)
    entropy = -(logs.exp() * finite).sum(-1)
    if not logs.shape[-1]:
        return entropy, entropy
    log_prob = logs.gather(-1, choices.clamp(min=0)[..., None]).squeeze(-1)
    return log_prob.masked_fill(choices < 0, 0), entropy


@torch.no_grad()
def _draw(call: Problem, generator: torch.Generator | None) -> Tensor:
    """One key of every row by its weight: the first whose running sum passes a uniform number."""
    wide, device = accumulator(call.q.dtype), call.q.device
    uniform = torch.rand(call.shape[:3], generator=generator, device=device, dtype=wide)

    def compute(batch: slice, rows: slice, held: list[Tensor]) -> tuple[Tensor, ...]:
        q, k, *tensors = held
        weights = _log_weights(call, batch, rows, q, k, tensors).exp()
        if not weights.shape[-1]:
            return (_first(weights),)
        running = weights.cumsum(-1)
        total = running[..., -1:]
        found = torch.searchsorted(running, uniform[batch, :, rows, None] * total, right=True).squeeze(-1)
        # Rounding may leave the number at the sum itself: then nothing passes it, and the likeliest key is as good.
        found = torch.where(found < weights.shape[-1], found, weights.argmax(-1))
        return (found.masked_fill(total.squeeze(-1) == 0, -1),)

    return _blocks(call, compute)[0]


@lenient
def straight_through(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
    temperature: float = 1.0,
    **others: Unpack[Others],
) -> Chosen:
    """Hard attention with a gradient: forward the value of the best key, backward softmax(scores / temperature)·v.

    The output is exactly `attention(…, normalizer=hardmax)`; its gradient is biased. Sinks are refused.
    Bengio et al. 2013, section 4: https://arxiv.org/abs/1308.3432

    >>> import torch
    >>> import foveate as fv
    >>> k = torch.eye(3)[None].requires_grad_()
    >>> taken = fv.straight_through(torch.tensor([[[0.0, 2.0, 1.0]]]), k, k)
    >>> taken.choices, taken.out.tolist()
    (tensor([[1]]), [[[0.0, 1.0, 0.0]]])
    """
    if others:
        raise refused(straight_through, others)
    call, batched = batched_problem(q, k, v, pattern, score, scale, query_start, None, 0.0, None, needs_lse=False)
    check(call, temperature)
    return _chosen(_straight_through(call, temperature, None), batched)


@lenient
def gumbel_attention(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    **others: Unpack[Others],
) -> Chosen:
    """`straight_through` with Gumbel noise on the scores, so that the key is a draw from the softmax weights.

    Forward v at argmax(s + g), g = −log(−log u); backward softmax((s + g) / temperature)·v. The noise comes from
    Philox by (a seed of the generator, batch, head, query, key), so it takes no memory.
    Jang et al. 2016, https://arxiv.org/abs/1611.01144; Maddison et al. 2016, https://arxiv.org/abs/1611.00712

    >>> import torch
    >>> import foveate as fv
    >>> q = torch.zeros(1, 1000, 4)
    >>> taken = fv.gumbel_attention(q, q[:, :2], q[:, :2], generator=torch.Generator().manual_seed(0))
    >>> 400 < taken.choices.sum() < 600
    tensor(True)
    """
    if others:
        raise refused(gumbel_attention, others)
    call, batched = batched_problem(q, k, v, pattern, score, scale, query_start, None, 0.0, None, needs_lse=False)
    check(call, temperature)
    return _chosen(_straight_through(call, temperature, seed_of(generator)), batched)


@lenient
def sampled_attention(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
    choices: Tensor | None = None,
    soft_share: float = 0.0,
    generator: torch.Generator | None = None,
    **others: Unpack[Others],
) -> Chosen:
    """The value of one key for each query, drawn with the softmax weights as probabilities; train by `reinforce_loss`.

    `choices` `[batch, heads, queries]` are taken instead of drawn ones, −1 for none: what would these have cost?
    `soft_share` of the batch, at random, takes the mean of all values instead, as attention does (choice −1), which
    steadies the gradient. Memory is linear in the length.
    Xu et al. 2015, section 4.1: https://arxiv.org/abs/1502.03044

    >>> import torch
    >>> import foveate as fv
    >>> q = torch.zeros(1, 1000, 4)
    >>> taken = fv.sampled_attention(q, q[:, :2], q[:, :2], generator=torch.Generator().manual_seed(0))
    >>> 400 < taken.choices.sum() < 600, taken.log_prob[0, 0].exp()
    (tensor(True), tensor(0.5000))
    """
    if others:
        raise refused(sampled_attention, others)
    call, batched = batched_problem(q, k, v, pattern, score, scale, query_start, None, 0.0, None, needs_lse=False)
    check(call)
    if choices is not None:
        choices = integers(choices, "choices=", [2 + batched])
        choices = choices if batched else choices[None]
    return _chosen(_sampled(call, generator, choices, soft_share), batched)


@explained
def reinforce_loss(
    reward: Tensor,
    drawn: Chosen | Sequence[Chosen],
    *,
    baseline: Tensor | float = 0.0,
    weight: float = 1.0,
    entropy_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """The loss whose gradient is REINFORCE's: −mean[r + weight · (r − b) · Σ log p(choices) + entropy_weight · Σ H].

    Args:
        reward: what is to become large, `[batch]`, `[batch, heads]` or `[batch, heads, queries]`. If it is log p(y)
            and depends on the output, its own gradient is part of the estimate, as in equation 11.
        drawn: what `sampled_attention` gave, or the list of all draws that the reward depends on.
        baseline: subtracted from the reward, no more; a tensor that needs a gradient is fitted to it by a square.
        weight: λ_r of the paper. With 1 the expected gradient is that of the expected reward, whatever the baseline.
        entropy_weight: λ_e of the paper, 0.002 there; the terms of rows are summed, those of the batch averaged.

    Raises:
        InvalidInput: the reward does not have the first dimensions of `log_prob`.

    Xu et al. 2015, equations 10 to 12: https://arxiv.org/abs/1502.03044; Williams 1992

    >>> import torch
    >>> import foveate as fv
    >>> q = torch.randn(5, 1, 3, 4, requires_grad=True)
    >>> drawn = fv.sampled_attention(q, q, q, soft_share=0.5)
    >>> fv.reinforce_loss(-drawn.out.square().mean((1, 2, 3)), drawn, entropy_weight=0.002).backward()
    """
    parts = [drawn] if isinstance(drawn, Chosen) else list(drawn)
    return _reinforce(reward, parts, baseline=baseline, weight=weight, entropy_weight=entropy_weight)


def _chosen(chosen: Chosen, batched: bool) -> Chosen:
    return chosen if batched else Chosen(*(part[0] for part in chosen))
