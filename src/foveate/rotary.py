"""Rotary positions: q and k turned, pair by pair of entries, by angles that grow with the position.

    pair i at position n turns by n · θ_i,   θ_i = base^(−2i / dim)

A dot product of two turned vectors depends on the distance of their positions alone. To reach beyond the length of the
training, the frequencies θ are stretched by one of four laws:

    Linear      θ / factor                                                      Chen et al. 2023, 2306.15595
    DynamicNTK  a larger base, the larger the longer the text                   Peng et al. 2023, 2309.00071, section 3
    YaRN        low frequencies / factor, high ones as they are, q·k sharper    Peng et al. 2023, 2309.00071
    Llama3      low frequencies / factor, high ones as they are                 Grattafiori et al. 2024, 2407.21783
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.eager import is_plain, is_transformed
from foveate.errors import InvalidInput
from foveate.names import explained_names
from foveate.problem import accumulator
from foveate.values import dense, describe, integers, no_number, number, positive, whole
from foveate.words import explained, explained_class


@runtime_checkable
class Scaling(Protocol):
    """How frequencies are stretched; Linear, DynamicNTK, YaRN and Llama3 are four ways."""

    def frequencies(self, dim: int, base: float, positions: Tensor) -> Tensor:
        """θ, `[dim / 2]`, in float32."""

    @property
    def attention_factor(self) -> float:
        """The length that a vector of length 1 has after it was turned."""


class Angles(NamedTuple):
    """cos and sin of what each pair turns by, `[length, dim / 2]` or `[batch, length, dim / 2]`, worked out once."""

    cos: Tensor
    sin: Tensor


def frequencies(dim: int, base: float | Tensor, device: torch.device | None = None) -> Tensor:
    """θ_i = base^(−2i / dim), `[dim / 2]`."""
    # In float32, as every checkpoint was trained: a rounding here is an angle n times as large.
    result: Tensor = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    return result


@explained_class
@dataclass(frozen=True)
class Linear:
    """Position interpolation: θ / factor, https://arxiv.org/abs/2306.15595."""

    factor: float
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "factor")

    def frequencies(self, dim: int, base: float, positions: Tensor) -> Tensor:
        return frequencies(dim, base, positions.device) / self.factor


@explained_class
@dataclass(frozen=True)
class DynamicNTK:
    """base · (factor · length / original_length − (factor − 1))^(dim / (dim − 2)), for texts beyond original_length.

    The length is the largest position of the call and one more. https://arxiv.org/abs/2309.00071, section 3.3
    """

    factor: float
    original_length: int
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "factor", "original_length")

    def frequencies(self, dim: int, base: float, positions: Tensor) -> Tensor:
        if dim <= 2:
            raise InvalidInput(f"the dim of a rotary position with DynamicNTK is {dim}: wanted at least 4")
        length = positions.amax() + 1 if positions.numel() else positions.new_zeros(())
        length = length.clamp(min=self.original_length)
        stretch = (self.factor * length / self.original_length) - (self.factor - 1)
        return frequencies(dim, base * stretch ** (dim / (dim - 2)), positions.device)


@explained_class
@dataclass(frozen=True)
class YaRN:
    """θ / factor for pairs that turn less than beta_slow times in original_length, θ above beta_fast, a ramp between.

    q and k grow by attention_factor each, None = 0.1 · ln(factor) + 1. https://arxiv.org/abs/2309.00071, section 3.4

    Args:
        factor: how many times longer texts become.
        original_length: the length of the training.
        whole: the ramp begins and ends at a whole pair.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = None  # type: ignore[assignment]
    whole: bool = True

    def __post_init__(self) -> None:
        _check(self, "factor", "original_length", "beta_fast", "beta_slow")
        if self.attention_factor is None:
            sharper = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
            object.__setattr__(self, "attention_factor", sharper)

    def frequencies(self, dim: int, base: float, positions: Tensor) -> Tensor:
        def pair_that_turns(times: float) -> float:
            return dim * math.log(self.original_length / (times * 2 * math.pi)) / (2 * math.log(base))

        first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        pair = torch.arange(dim // 2, dtype=torch.float32, device=positions.device)
        ramp = ((pair - first) / (last - first or 0.001)).clamp(0, 1)
        plain = frequencies(dim, base, positions.device)
        return plain / self.factor * ramp + plain * (1 - ramp)


@explained_class
@dataclass(frozen=True)
class Llama3:
    """θ / factor for pairs that turn less than slow times in original_length, θ above fast, a ramp between.

    https://arxiv.org/abs/2407.21783
    """

    factor: float = 8.0
    original_length: int = 8192
    slow: float = 1.0
    fast: float = 4.0
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "factor", "original_length", "slow", "fast")
        if self.fast <= self.slow:
            raise InvalidInput(f"Llama3 has fast={self.fast} and slow={self.slow}: wanted fast above slow")

    def frequencies(self, dim: int, base: float, positions: Tensor) -> Tensor:
        plain = frequencies(dim, base, positions.device)
        turns = self.original_length / (2 * math.pi / plain)
        kept = ((turns - self.slow) / (self.fast - self.slow)).clamp(0, 1)
        return (1 - kept) * plain / self.factor + kept * plain


def _check(law: Any, *names: str) -> None:
    for name in names:
        value = getattr(law, name)
        positive(value, f"{name} of {type(law).__name__}")
        object.__setattr__(law, name, int(value) if isinstance(value, numbers.Integral) else float(value))


@explained
def grid(*sizes: int, device: torch.device | None = None) -> Tensor:
    """The positions of the places of a grid, row by row: `[axes, places]`, as `AxialRotary` takes them.

    >>> import foveate as fv
    >>> fv.rotary.grid(2, 3)
    tensor([[0, 0, 0, 1, 1, 1],
            [0, 1, 2, 0, 1, 2]])
    """
    axes = (torch.arange(whole(size, "the size of a grid", 0), device=device) for size in sizes)
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)


def check_size(dim: int, base: float) -> None:
    """Raise `InvalidInput` unless `dim` entries make pairs and `base` is a base."""
    if isinstance(dim, bool) or not isinstance(dim, numbers.Integral | torch.SymInt) or dim < 2 or dim % 2:
        raise no_number(dim, "the rotary dim", "an even number of at least 2: entries turn in pairs")
    number(base, "the rotary base", "a finite number above 1", above=1, below=math.inf)


def angles(
    positions: Tensor,
    dim: int,
    base: float,
    scaling: Scaling | None,
    dtype: torch.dtype = torch.float32,
    axis: Tensor | None = None,
) -> Angles:
    """cos and sin of positions · θ, times the attention factor, in float32 or wider.

    With `axis`, `[dim / 2]`, positions have rows in front, and pair i follows row axis[i] of them.
    """
    positions = integers(positions, "positions", (1, 2) if axis is None else (2, 3))
    wide = accumulator(dtype)
    if scaling is None:
        theta, factor = frequencies(dim, base, positions.device), 1.0
    else:
        theta, factor = scaling.frequencies(dim, base, positions), scaling.attention_factor
    of_pair = positions[..., None] if axis is None else positions[axis].movedim(0, -1)
    turned = of_pair.to(wide) * theta.to(wide)
    cos, sin = turned.cos(), turned.sin()
    return Angles(cos, sin) if factor == 1 else Angles(cos * factor, sin * factor)


def turn(x: Tensor, by: Angles, interleaved: bool) -> Tensor:
    """x `[*batch, heads, length, size]` with its first entries turned: pairs (i, i + dim/2), or (2i, 2i + 1)."""
    cos, sin = by
    dense(x, "what rotary positions turn")
    if not x.dtype.is_floating_point or x.dim() < 3 or x.shape[-1] < 2 * cos.shape[-1] or x.shape[-2] != cos.shape[-2]:
        raise InvalidInput(
            f"rotary positions were given x {describe(x)} for {cos.shape[-2]} positions and a dim of "
            f"{2 * cos.shape[-1]}: wanted floats [*batch, heads, {cos.shape[-2]}, {2 * cos.shape[-1]} or more]"
        )
    if cos.dim() == 3:
        if x.dim() != 4 or cos.shape[0] not in (1, x.shape[0]):
            raise InvalidInput(
                f"rotary positions of a batch of {cos.shape[0]} were given x {describe(x)}: wanted one row of "
                "positions for each of its batch, or one for all"
            )
        cos, sin = cos[:, None], sin[:, None]
    return _turned(x, cos, sin, interleaved)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    dim = 2 * cos.shape[-1]
    if not torch.compiler.is_compiling() and not is_transformed() and is_plain(x):
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _Turn.apply(x, cos, sin, interleaved)  # type: ignore[no-untyped-call]
            return out
        return _written(x, cos, sin, interleaved)
    first, second = _pairs(x[..., :dim] if x.shape[-1] > dim else x, interleaved)
    pair = first * cos - second * sin, second * cos + first * sin
    out = torch.stack(pair, -1).reshape(*x.shape[:-1], dim) if interleaved else torch.cat(pair, -1)
    return torch.cat((out.to(x.dtype), x[..., dim:]), -1) if x.shape[-1] > dim else out.to(x.dtype)


def _written(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    # The same with half the passes over memory.
    dim = 2 * cos.shape[-1]
    both = cos.repeat_interleave(2, -1) if interleaved else torch.cat((cos, cos), -1)
    if x.shape[-1] > dim:
        both = torch.cat((both, both.new_ones(*both.shape[:-1], x.shape[-1] - dim)), -1)
    out = x * both
    (first, second), (out_first, out_second) = (_pairs(y[..., :dim], interleaved) for y in (x, out))
    out_first.addcmul_(second, sin, value=-1)
    out_second.addcmul_(first, sin)
    return out.to(x.dtype)


class _Turn(torch.autograd.Function):
    # Nothing of x is kept: the gradient of a turn is the turn back.

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _written(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin, ctx.interleaved), None, None, None


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second entry of every pair, as views."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


if not TYPE_CHECKING:
    __getattr__ = explained_names(__name__)


@explained
def rope(
    x: Float[Tensor, "*batch heads length size"],
    positions: Int[Tensor, " length"] | Int[Tensor, "batch_or_one length"],
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    dim: int | None = None,
    scaling: Scaling | None = None,
) -> Float[Tensor, "*batch heads length size"]:
    """q or k with rotary positions: pair i turned by position · base^(−2i / dim).

    Angles are in float32 or wider, and so is the product. `fv.nn.Rotary` is the same as a part of a model.

    Args:
        positions: integers, one row for all or one for each of the batch.
        interleaved: pairs (2i, 2i + 1), as the paper; else (i, i + dim/2), as Llama and most others.
        dim: how many of the first entries are turned; None = all.
        scaling: a law for longer texts than the training's, such as `fv.rotary.YaRN(4.0, 4096)`.

    Raises:
        InvalidInput: an odd dim, or positions that do not fit.

    Su et al. 2021: https://arxiv.org/abs/2104.09864

    >>> import torch
    >>> import foveate as fv
    >>> q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)  # dot products depend on the distance alone
    >>> near, far = (fv.rope(q, torch.tensor([n + 3])) @ fv.rope(k, torch.tensor([n])).mT for n in (0, 5000))
    >>> torch.allclose(near, far)
    True
    """
    dim = dense(x, "x").shape[-1] if dim is None else dim
    check_size(dim, base)
    return turn(x, angles(positions, dim, base, scaling, x.dtype), interleaved)
