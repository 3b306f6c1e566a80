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
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.dispatch import dispatch
from foveate.eager import is_known
from foveate.errors import InvalidInput
from foveate.normalizers import hardmax
from foveate.primitives import Compute, by_blocks, group, gumbel_noise, masked_softmax, raw_scores, ungroup, weigh
from foveate.problem import Problem, accumulator
from foveate.score import parse
from foveate.values import describe, integers, number, positive

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


def straight_through(call: Problem, temperature: float, seed: Tensor | None) -> Chosen:
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


def sampled(
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
    elif is_known(choices) and not -1 <= int(choices.min()) <= int(choices.max()) < call.shape[3]:
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


def reinforce(
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
