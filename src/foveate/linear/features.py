"""Feature maps φ, so that φ(q)·φ(k) stands for the weight of a pair.

    elu_plus_one   elu(x) + 1                                 any positive weight
    favor          exp(ω·x − ‖x‖²/2)/√m, ω random             softmax's own weight, on average
    taylor         1, x, x⊗x/√2                               1 + s + s²/2 ≈ eˢ
    hedgehog       softmax(x·W), softmax(−x·W)                what W learned
    cosformer      relu(x)·(cos, sin)(π·t/2M)                 relu(q)·relu(k)·cos(π·(t − t′)/2M): nearer weighs more

φ = relu is `torch.relu`, as it is. All of them have products that are never negative, so `normalize=True` is sound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import elu

from foveate.errors import InvalidInput
from foveate.values import describe, floating, whole
from foveate.words import explained


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1: x + 1 above 0 and eˣ below.

    Katharopoulos et al. 2020, section 3.2.1: https://arxiv.org/abs/2006.16236

    >>> elu_plus_one(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0.3679, 1.0000, 3.0000])
    """
    return elu(x) + 1


def taylor(x: Tensor) -> Tensor:
    """(1, x′, x′⊗x′/√2) with x′ = x·dim^-¼: its product is 1 + s + s²/2 with s = q·k/√dim, near eˢ for small s.

    `[…, dim]` → `[…, 1 + dim + dim²]`. Arora et al. 2024, "Based", section 4: https://arxiv.org/abs/2402.18668

    >>> taylor(torch.tensor([2.0]))
    tensor([1.0000, 2.0000, 2.8284])
    """
    x = x * x.shape[-1] ** -0.25 if x.shape[-1] else x
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2)
    return torch.cat([torch.ones_like(x[..., :1]) if x.shape[-1] else x.new_ones(*x.shape[:-1], 1), x, squares], -1)


@explained
def hedgehog(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """(softmax(x·W), softmax(−x·W)) with a learned W, `[dim, features]` or `[heads, dim, features]`.

    `[…, dim]` → `[…, 2 · features]`. q and k mostly learn their own: `feature=(hedgehog(w_q), hedgehog(w_k))`.
    Zhang et al. 2024, "The Hedgehog & the Porcupine": https://arxiv.org/abs/2402.04347

    >>> hedgehog(torch.zeros(3, 2))(torch.ones(1, 1, 1, 3))
    tensor([[[[0.5000, 0.5000, 0.5000, 0.5000]]]])
    """
    weight = floating(weight, "hedgehog's weight", [2, 3])

    def feature(x: Tensor) -> Tensor:
        if weight.shape[-2] != x.shape[-1] or (weight.dim() == 3 and weight.shape[0] not in (1, x.shape[1])):
            raise InvalidInput(
                f"hedgehog's weight is {describe(weight)} beside {describe(x)}: wanted [dim, features] or [heads, dim, "
                f"features] with dim = {x.shape[-1]} and heads = {x.shape[1]}"
            )
        scores = x @ weight.to(x.dtype)
        return torch.cat([scores.softmax(-1), (-scores).softmax(-1)], -1)

    return feature


@explained
def cosformer(length: int, *, start: int = 0) -> Callable[[Tensor], Tensor]:
    """relu(x)·(cos, sin)(π·t/2M), so that a pair at distance n weighs relu(q)·relu(k)·cos(π·n/2M); M = `length`.

    `[…, steps, dim]` → `[…, steps, 2 · dim]`. The first step stands at t = `start` (when a state is handed on), and no
    step may stand at `length` or after. Qin et al. 2022, "cosFormer", equation 10: https://arxiv.org/abs/2202.08791

    >>> cosformer(2)(torch.ones(1, 1, 2, 1))
    tensor([[[[1.0000, 0.0000],
              [0.7071, 0.7071]]]])
    """
    length, start = whole(length, "cosformer's length", 1), whole(start, "cosformer's start", 0)

    def feature(x: Tensor) -> Tensor:
        if start + x.shape[-2] > length:
            raise InvalidInput(
                f"cosformer({length}) was given steps up to {start + x.shape[-2]}: wanted a length that covers them "
                "all, since its weights would turn negative"
            )
        place = torch.arange(start, start + x.shape[-2], device=x.device, dtype=x.dtype)[:, None]
        angle = place * (math.pi / 2 / length)
        x = x.relu()
        return torch.cat([x * angle.cos(), x * angle.sin()], -1)

    return feature


@dataclass(frozen=True, eq=False)
class Favor:
    """FAVOR+ with its random directions, `[features, dim]`; `redrawn` gives it new ones."""

    directions: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        count, dim = self.directions.shape
        if x.shape[-1] != dim:
            raise InvalidInput(
                f"favor was drawn for dim = {dim} and given {describe(x)}: wanted the same last dimension"
            )
        x = x * dim**-0.25
        # One exponential, so that a long x does not overflow before ‖x‖²/2 is taken off.
        return (x @ self.directions.to(x).mT - (x * x).sum(-1, keepdim=True) / 2).exp() / math.sqrt(count)

    def redrawn(self, generator: torch.Generator | None = None) -> Favor:
        """The same map with fresh directions: training redraws them now and then."""
        count, dim = self.directions.shape
        return Favor(_orthogonal(count, dim, generator).to(self.directions))

    def __repr__(self) -> str:
        return f"favor({self.directions.shape[1]}, {self.directions.shape[0]})"


@explained
def favor(dim: int, features: int | None = None, *, generator: torch.Generator | None = None) -> Favor:
    """FAVOR+: exp(ω·x′ − ‖x′‖²/2)/√m with x′ = x·dim^-¼, so that E[φ(q)·φ(k)] = exp(q·k/√dim): softmax's weight.

    `[…, dim]` → `[…, features]`; None takes dim·ln(dim), the paper's. The directions ω are Gaussian, and orthogonal to
    each other in blocks of dim; they are drawn once, here, from `generator`, and `.redrawn(generator)` draws others.
    Whoever hands a state on keeps the map. Choromanski et al. 2020, "Performers": https://arxiv.org/abs/2009.14794

    >>> phi = favor(4, 4096, generator=torch.Generator().manual_seed(0))
    >>> x = torch.full((1, 4), 0.5)
    >>> abs((phi(x) @ phi(x).mT).item() - math.exp(1 / 4**0.5)) < 0.05
    True
    """
    dim = whole(dim, "favor's dim", 1)
    count = whole(max(1, round(dim * math.log(dim))) if features is None else features, "favor's features", 1)
    return Favor(_orthogonal(count, dim, generator))


def _orthogonal(count: int, dim: int, generator: torch.Generator | None) -> Tensor:
    """Rows that are each Gaussian, but at right angles to the others of their block of `dim`."""
    device = generator.device if generator is not None else None

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)

    blocks = gaussian(-(-count // dim), dim, dim)
    q, r = torch.linalg.qr(blocks)
    # QR picks the signs: with those of r's diagonal the rotation is uniform.
    rotations = (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]).mT
    lengths = gaussian(count, dim).norm(dim=-1, keepdim=True)
    directions: Tensor = rotations.flatten(0, 1)[:count] * lengths
    return directions
