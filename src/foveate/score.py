"""How a raw score becomes the one that is normalised: cap, bias, sinks, composed with `+`.

The order of `+` does not matter. What happens to a scaled score is always: soft-cap, then every bias, then the
pattern, then the sinks. Each term says how it changes a score (`apply`) and what a score's gradient means for
its own tensor (`collect`), so that implementations that recompute their scores share one definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.positions import Extent, Pairs
from foveate.values import (
    Name,
    describe,
    device_misfits,
    floating,
    identity,
    mask_misfit,
    positive,
    read,
    spelled,
    whole,
)
from foveate.words import explained


@dataclass(frozen=True, eq=False)
class Softcap:
    """cap · tanh(score / cap)."""

    cap: float

    def apply(self, scores: Tensor, at: Pairs) -> Tensor:
        return self.cap * torch.tanh(scores / self.cap)

    def write(self, name: Name) -> str:
        return f"softcap({self.cap})"


@dataclass(frozen=True, eq=False)
class Alibi:
    """score − slope · |query − key|."""

    slopes: Tensor

    def _slope(self, at: Pairs) -> Tensor:
        return self.slopes[at.head] if self.slopes.dim() == 1 else self.slopes[at.batch, at.head]

    def apply(self, scores: Tensor, at: Pairs) -> Tensor:
        return scores - self._slope(at).to(scores.dtype) * (at.query - at.key).abs()

    def collect(self, gradient: Tensor, at: Pairs, total: Tensor) -> None:
        change = -(gradient * (at.query - at.key).abs()).sum((2, 3))
        if self.slopes.dim() == 1:
            total.index_add_(0, at.head.flatten(), change.sum(0))
        else:
            total.index_put_((at.batch.view(-1, 1), at.head.view(1, -1)), change, accumulate=True)

    def misfits(self, extent: Extent) -> list[str]:
        want = (extent.heads,) if self.slopes.dim() == 1 else (extent.batch, extent.heads)
        if tuple(self.slopes.shape) == want:
            return []
        return [f"alibi's slopes are {describe(self.slopes)}: wanted [heads] = {list(want)} or [batch, heads]"]

    def write(self, name: Name) -> str:
        return f"alibi({name(self.slopes)})"


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """score + table[bucket(key − query), head]."""

    table: Tensor
    max_distance: int | None
    bidirectional: bool

    def bucket(self, distance: Tensor) -> Tensor:
        """The row of the table for a distance = key − query."""
        entries = self.table.shape[0]
        if self.max_distance is None:
            reach = entries // 2
            return distance.clamp(-reach, reach) + reach
        return t5_bucket(distance, entries, self.max_distance, self.bidirectional)

    def apply(self, scores: Tensor, at: Pairs) -> Tensor:
        return scores + self.table[self.bucket(at.key - at.query), at.head].to(scores.dtype)

    def collect(self, gradient: Tensor, at: Pairs, total: Tensor) -> None:
        entry = self.bucket(at.key - at.query) * total.shape[1] + at.head
        total.view(-1).index_add_(0, entry.expand(gradient.shape).flatten(), gradient.flatten())

    def misfits(self, extent: Extent) -> list[str]:
        if self.table.shape[1] == extent.heads:
            return []
        return [f"the table of relative_bias is {describe(self.table)}: wanted [entries, {extent.heads} heads]"]

    def write(self, name: Name) -> str:
        more = "" if self.max_distance is None else f", {self.max_distance}, bidirectional={self.bidirectional}"
        return f"relative_bias({name(self.table)}{more})"


@dataclass(frozen=True, eq=False)
class Bias:
    """score + tensor; −inf hides the key."""

    tensor: Tensor

    def full(self) -> Tensor:
        """The tensor with all four dimensions."""
        return self.tensor.reshape((1,) * (4 - self.tensor.dim()) + tuple(self.tensor.shape))

    def seen(self) -> Tensor:
        """Which keys it leaves to some row: `[batch, heads, keys]`, any of them 1."""
        return (self.full() != -math.inf).any(2)

    def apply(self, scores: Tensor, at: Pairs) -> Tensor:
        bias = at.of(self.full()).to(scores.dtype)
        # Not a plain sum: a hidden key stays hidden even if its score is NaN.
        return torch.where(bias == -math.inf, -math.inf, scores + bias)

    def collect(self, gradient: Tensor, at: Pairs, total: Tensor) -> None:
        view = at.of(total.view(self.full().shape))
        hidden = at.of(self.full()) == -math.inf
        view += gradient.masked_fill(hidden, 0).sum_to_size(view.shape)

    def misfits(self, extent: Extent) -> list[str]:
        return mask_misfit("bias", self.tensor, extent)

    def write(self, name: Name) -> str:
        return f"bias({name(self.tensor)})"


@dataclass(frozen=True, eq=False)
class Sinks:
    """One more logit for each head in the denominator, with no value behind it."""

    logits: Tensor

    def of(self, at: Pairs) -> Tensor:
        """The sink of every row: `[1, heads, 1, 1]`."""
        return self.logits[at.head]

    def misfits(self, extent: Extent) -> list[str]:
        if tuple(self.logits.shape) == (extent.heads,):
            return []
        return [f"the logits of sinks are {describe(self.logits)}: wanted [heads] = [{extent.heads}]"]

    def write(self, name: Name) -> str:
        return f"sinks({name(self.logits)})"


BiasTerm = Alibi | RelativeBias | Bias
Term = Softcap | BiasTerm | Sinks


@dataclass(frozen=True, eq=False, repr=False)
class Score:
    """A sum of terms, in the order in which they act; immutable, made by the functions below and composed with `+`."""

    softcap: Softcap | None = None
    biases: tuple[BiasTerm, ...] = ()
    sinks: Sinks | None = None

    def __add__(self, other: Score) -> Score:
        if not isinstance(other, Score):
            raise InvalidInput(f"{self!r} + a {type(other).__name__}: wanted a score; bias(tensor) makes one")
        for mine, theirs, what in (
            (self.softcap, other.softcap, "soft-caps"),
            (self.sinks, other.sinks, "sets of sinks"),
        ):
            if mine is not None and theirs is not None:
                raise InvalidInput(f"{self!r} + {other!r} has two {what}: their order would matter, so give one")
        return Score(self.softcap or other.softcap, self.biases + other.biases, self.sinks or other.sinks)

    @property
    def terms(self) -> tuple[Term, ...]:
        """Every term, in the order in which it acts."""
        return (*(() if self.softcap is None else (self.softcap,)), *self.biases,
                *(() if self.sinks is None else (self.sinks,)))  # fmt: skip

    def apply(self, scores: Tensor, at: Pairs) -> Tensor:
        """Scaled scores → capped and biased ones; sinks act when the row is normalised."""
        for term in (self.softcap, *self.biases):
            if term is not None:
                scores = term.apply(scores, at)
        return scores

    def misfits(self, extent: Extent) -> list[str]:
        """Every reason for which these tensors do not fit a call of this extent."""
        reasons = device_misfits("the score", self.tensors(), extent)
        for term in (*self.biases, self.sinks):
            if term is not None:
                reasons.extend(term.misfits(extent))
        return reasons

    def spec(self) -> tuple[str, list[Tensor]]:
        """The canonical string, and the tensors that it calls t[0], t[1]…; `parse` reads the two back."""
        return spelled(lambda name: " + ".join(term.write(name) for term in self.terms))

    def tensors(self) -> list[Tensor]:
        """The tensors of all terms, in the order of `spec`."""
        return self.spec()[1]

    def __repr__(self) -> str:
        return " + ".join(term.write(describe) for term in self.terms)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Score) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[object, ...]:
        words, tensors = self.spec()
        return (words, *map(identity, tensors))


@explained
def alibi(slopes: Tensor) -> Score:
    """−slope · |query − key|, one slope a head (`[heads]` or `[batch, heads]`); Press et al. 2021, 2108.12409."""
    return Score(biases=(Alibi(floating(slopes, "alibi's slopes", (1, 2))),))


@explained
def alibi_slopes(heads: int) -> Tensor:
    """The paper's slopes: 2^(−8 i / heads) for a power of two; else those, and every second of the next power."""

    def geometric(count: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / count) for i in range(count)]

    heads = whole(heads, "the number of heads", 1)
    power = 1 << (heads.bit_length() - 1)
    return torch.tensor(geometric(power) + geometric(2 * power)[::2][: heads - power])


@explained
def relative_bias(table: Tensor, max_distance: int | None = None, *, bidirectional: bool = True) -> Score:
    """A learned bias that depends on distance alone; table is `[entries, heads]`, the gradient goes to it.

    Without `max_distance`, entry m + (key − query) of the 2m + 1, farther distances clipped (Shaw et al. 2018,
    1803.02155). With it, T5's buckets, exact for near and logarithmic for far distances (1910.10683);
    `bidirectional=False` for decoders.
    """
    checked = floating(table, "the table of relative_bias", (2,))
    if max_distance is None and table.shape[0] % 2 == 0:
        raise InvalidInput(f"the table of relative_bias is {describe(table)}: wanted 2m + 1 entries, or max_distance=")
    if max_distance is not None:
        max_distance = whole(max_distance, "max_distance", 1)
    if max_distance is not None and max_distance <= table.shape[0] // (4 if bidirectional else 2):
        raise InvalidInput(f"max_distance is {max_distance}: too near for the {table.shape[0]} buckets of the table")
    return Score(biases=(RelativeBias(checked, max_distance, bidirectional),))


@explained
def bias(tensor: Tensor) -> Score:
    """A float tensor that broadcasts to `[batch, heads, queries, keys]`, added; its gradient has its own shape."""
    if isinstance(tensor, Tensor) and tensor.dtype == torch.bool:
        raise InvalidInput("bias was given a boolean mask: it is a pattern; give it as the pattern, or from_mask(mask)")
    return Score(biases=(Bias(floating(tensor, "the bias", (0, 1, 2, 3, 4))),))


@explained
def softcap(cap: float) -> Score:
    """cap · tanh(score / cap), before any bias (Gemma 2, 2408.00118)."""
    return Score(softcap=Softcap(positive(cap, "the cap")))


@explained
def sinks(logits: Tensor) -> Score:
    """One learned logit a head (`[heads]`) in the denominator, so that a row may attend to nothing (gpt-oss)."""
    return Score(sinks=Sinks(floating(logits, "the logits of sinks", (1,))))


def t5_bucket(distance: Tensor, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """T5's bucket of a distance = key − query (Raffel et al. 2019, 1910.10683, section 2.1)."""
    ahead = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        ahead = (distance > 0).long() * buckets
        reach = distance.abs()
    else:
        reach = (-distance).clamp(min=0)
    exact = buckets // 2
    share = torch.log(reach.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
    return ahead + torch.where(reach < exact, reach, far)


NAMES: dict[str, Callable[..., Score]] = {
    "alibi": alibi,
    "relative_bias": relative_bias,
    "bias": bias,
    "softcap": softcap,
    "sinks": sinks,
}


def parse(spec: str, tensors: Sequence[Tensor]) -> Score:
    """The score that `Score.spec` wrote."""
    score = read(spec, NAMES, tensors)
    if not isinstance(score, Score):
        raise InvalidInput(f"{spec!r} is no score")
    return score
