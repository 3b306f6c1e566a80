"""How a row of scores becomes weights, where that is not softmax: sigmoid, sparsemax, entmax, hardmax.

A normalizer sees scores that are scaled, capped, biased and −inf where hidden. Each one says what the weights are
(`weights`, plain torch that differentiates twice) and what a gradient of the weights is one of (`pull`, from the
weights alone), so that an implementation that computes its weights again shares one definition. A row without a key
gets weights of 0; a NaN among the scores of a row reaches the row, and never a hidden key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from foveate.eager import is_known
from foveate.errors import InvalidInput
from foveate.values import number, read
from foveate.words import explained


class Normalizer:
    """How scores become weights: a value, given as `normalizer=`; None is softmax."""

    def __call__(self, *_: object, **__: object) -> NoReturn:
        raise InvalidInput(f"{self!r} is a normalizer, and was called as if it made one: write it without parentheses")


@dataclass(frozen=True, repr=False)
class SoftmaxPlusOne(Normalizer):
    """exp(s) / (1 + Σ exp(s)): softmax beside a sink of logit 0, and computed as that."""

    def __repr__(self) -> str:
        return "softmax_plus_one"


@dataclass(frozen=True, repr=False)
class Sigmoid(Normalizer):
    """1 / (1 + exp(−s)), each key for itself."""

    def weights(self, scores: Tensor) -> Tensor:
        return scores.sigmoid().masked_fill(scores == -math.inf, 0)

    def pull(self, weights: Tensor, gradient: Tensor) -> Tensor:
        return gradient * weights * (1 - weights)

    def __repr__(self) -> str:
        return "sigmoid"


@dataclass(frozen=True, repr=False)
class Entmax(Normalizer):
    """[(α − 1)·s − τ]₊^(1 / (α − 1)), with the τ that makes a row sum to 1; α = 2 is sparsemax."""

    alpha: float

    def weights(self, scores: Tensor) -> Tensor:
        shape = (*scores.shape[:-1], 1)
        top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(shape)
        x = (scores - top.masked_fill(top == -math.inf, 0)) * (self.alpha - 1)
        with torch.no_grad():
            tau = self._threshold(x.detach())
        # From the root on, each step of Newton doubles how many derivatives of τ are right: two steps give three.
        for _ in range(2):
            tau = tau + self._step(x, tau)
        return _power(x - tau, 1 / (self.alpha - 1)).masked_fill(scores == -math.inf, 0)

    def pull(self, weights: Tensor, gradient: Tensor) -> Tensor:
        slope = _power(weights, 2 - self.alpha)
        total = slope.sum(-1, keepdim=True)
        # Where a weight is 0 its gradient is, whatever a value that nobody reads makes of it.
        gradient = gradient.masked_fill(weights == 0, 0)
        return slope * (gradient - (slope * gradient).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1))

    def _threshold(self, x: Tensor) -> Tensor:
        """The root of f(τ) = Σ [x − τ]₊^(1/(α−1)) − 1.

        f is convex and falls, so that from the left of the root Newton climbs to it and never passes it, and f·f′
        is at most a quarter after each step (Dinkelbach): 64 steps are enough for any row that fits a memory.
        """
        tau = torch.full((*x.shape[:-1], 1), -1.0, dtype=x.dtype, device=x.device)
        for _ in range(64):
            step = self._step(x, tau)
            tau = tau + step
            if is_known(step) and not bool((step > torch.finfo(x.dtype).eps).any()):
                break
        return tau

    def _step(self, x: Tensor, tau: Tensor) -> Tensor:
        power = 1 / (self.alpha - 1)
        above = x - tau
        terms = _power(above, power - 1)
        slope = power * terms.sum(-1, keepdim=True)
        excess = (terms * above.clamp(min=0)).sum(-1, keepdim=True) - 1
        return (excess / slope.masked_fill(slope == 0, 1)).masked_fill(slope == 0, 0)

    def __repr__(self) -> str:
        return "sparsemax" if self.alpha == 2 else f"entmax({self.alpha})"


@dataclass(frozen=True, repr=False)
class Hardmax(Normalizer):
    """1 for the largest score of a row, the first of equal ones, and 0 for every other: argmax."""

    def weights(self, scores: Tensor) -> Tensor:
        if not scores.shape[-1]:
            return scores
        top = scores.detach().max(-1, keepdim=True)
        chosen = torch.zeros_like(scores).scatter(-1, top.indices, 1)
        return chosen.masked_fill(top.values.isnan(), math.nan).masked_fill(scores == -math.inf, 0)

    def pull(self, weights: Tensor, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)

    def __repr__(self) -> str:
        return "hardmax"


Rowwise = Sigmoid | Entmax | Hardmax  # what is no softmax in disguise

softmax_plus_one = SoftmaxPlusOne()
sigmoid = Sigmoid()
sparsemax = Entmax(2.0)
hardmax = Hardmax()


@explained
def entmax(alpha: float = 1.5) -> Normalizer:
    """Sparse weights, from softmax (α → 1) to sparsemax (α = 2): [(α − 1)·s − τ]₊^(1 / (α − 1)).

    τ is what makes a row sum to 1; a key whose score is too low gets a weight of exactly 0. Scores that differ by
    more than 1 / (α − 1) from the largest never get any. Peters et al. 2019, equation 10: 1905.05702

    Raises `InvalidInput` for an α that is not above 1 and at most 2.

    >>> import torch
    >>> import foveate as fv
    >>> q, k = torch.ones(1, 1, 1), torch.tensor([[[2.0], [1.0], [-1.0]]])
    >>> fv.weights(q, k, k, normalizer=fv.entmax(1.5))
    tensor([[[0.8307, 0.1693, 0.0000]]])
    """
    wanted = "more than 1 (which is softmax) and at most 2 (sparsemax)"
    return Entmax(number(alpha, "entmax's α", wanted, above=1, most=2))


NAMES = {"sigmoid": sigmoid, "sparsemax": sparsemax, "entmax": entmax, "hardmax": hardmax}


def parse(spec: str) -> Rowwise:
    """The normalizer whose repr this is."""
    normalizer: Rowwise = read(spec, NAMES, [])
    return normalizer


def _power(base: Tensor, exponent: float) -> Tensor:
    """[base]₊^exponent, 0 where base ≤ 0 also for exponent 0, with derivatives that are finite there; NaN stays."""
    if exponent == 1:
        return base.clamp(min=0)
    none = base <= 0
    if exponent == 0:
        return torch.ones_like(base).masked_fill(none, 0)
    return base.masked_fill(none, 1).pow(exponent).masked_fill(none, 0)
