"""Where tokens stand: rotary positions of q and k, sinusoidal and learned ones that are added to x."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.errors import InvalidInput
from foveate.rotary import Angles, Scaling, angles, check_size, frequencies, turn
from foveate.values import describe, integers, sequence, whole


class Rotary(nn.Module):
    """Rotary positions: pair i of q and k turns by position · base^(−2i / dim).

    It has no parameters and no buffers, so there is nothing to load, and no `.to(bfloat16)` rounds its angles.

    Args:
        dim: how many entries of a head are turned; those behind stay as they are.
        base: the larger, the slower the last pairs turn; θ of the configurations.
        interleaved: pairs (2i, 2i + 1), as the paper and GPT-J; else (i, i + dim/2), as Llama and most others.
        scaling: how to reach beyond the length of the training: `fv.rotary.YaRN(4.0, 4096)`, or another of them.

    Raises:
        InvalidInput: an odd dim; positions or heads that do not fit.

    Su et al. 2021: https://arxiv.org/abs/2104.09864

    >>> import torch
    >>> import foveate as fv
    >>> rotary = fv.nn.Rotary(4)
    >>> q = torch.ones(1, 1, 2, 4)  # [batch, heads, length, dim]
    >>> rotary(q, torch.tensor([0, 1]))[0, 0]
    tensor([[ 1.0000,  1.0000,  1.0000,  1.0000],
            [-0.3012,  0.9900,  1.3818,  1.0099]])
    """

    def __init__(
        self, dim: int, *, base: float = 10000.0, interleaved: bool = False, scaling: Scaling | None = None
    ) -> None:
        super().__init__()
        check_size(dim, base)
        self.dim, self.base, self.interleaved, self.scaling = dim, base, interleaved, scaling

    def angles(
        self, positions: Int[Tensor, " length"] | Int[Tensor, "batch length"], dtype: torch.dtype = torch.float32
    ) -> Angles:
        """cos and sin for these positions, to be worked out once and handed to every layer."""
        return angles(positions, self.dim, self.base, self.scaling, dtype)

    def forward(
        self, x: Float[Tensor, "*batch heads length size"], positions: Tensor | Angles
    ) -> Float[Tensor, "*batch heads length size"]:
        by = positions if isinstance(positions, Angles) else self.angles(positions, x.dtype)
        return turn(x, by, self.interleaved)

    def extra_repr(self) -> str:
        scaling = "" if self.scaling is None else f", scaling={self.scaling}"
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}{scaling}"


class Sinusoidal(nn.Module):
    """x + (sin(n·θ_i), cos(n·θ_i)), θ_i = base^(−2i / dim): the positions of the first Transformer.

    Args:
        interleaved: sine and cosine in turn, as the paper; else all sines, then all cosines, as Marian.

    Vaswani et al. 2017, section 3.5: https://arxiv.org/abs/1706.03762

    >>> import torch
    >>> import foveate as fv
    >>> fv.nn.Sinusoidal(4)(torch.zeros(1, 2, 4))
    tensor([[[0.0000, 1.0000, 0.0000, 1.0000],
             [0.8415, 0.5403, 0.0100, 0.9999]]])
    """

    def __init__(self, dim: int, *, base: float = 10000.0, interleaved: bool = True) -> None:
        super().__init__()
        if whole(dim, "the dim of sinusoidal positions", 2) % 2:
            raise InvalidInput(f"the dim of sinusoidal positions is {dim}: wanted an even one, for sines and cosines")
        self.dim, self.base, self.interleaved = dim, base, interleaved

    def table(self, positions: Tensor) -> Tensor:
        """The encoding itself, `[*positions, dim]` in float32."""
        turned = positions[..., None].float() * frequencies(self.dim, self.base, positions.device)
        pair = turned.sin(), turned.cos()
        return torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)

    def forward(
        self, x: Float[Tensor, "batch length dim"], positions: Tensor | None = None
    ) -> Float[Tensor, "batch length dim"]:
        positions = _positions(x, self.dim, positions)
        return x + self.table(positions).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"


class Learned(nn.Module):
    """x + table[n]: one learned vector for each of `length` positions.

    Raises:
        InvalidInput: x is longer than the table.

    Gehring et al. 2017: https://arxiv.org/abs/1705.03122

    >>> import torch
    >>> import foveate as fv
    >>> fv.nn.Learned(512, 4)(torch.zeros(1, 3, 4)).shape
    torch.Size([1, 3, 4])
    """

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.length, self.dim = whole(length, "the number of learned positions", 1), whole(dim, "dim", 1)
        self.weight = nn.Parameter(torch.empty(length, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(
        self, x: Float[Tensor, "batch length dim"], positions: Tensor | None = None
    ) -> Float[Tensor, "batch length dim"]:
        rows = _positions(x, self.dim, positions)
        if positions is not None:
            return x + nn.functional.embedding(rows, self.weight)
        if x.shape[1] > self.length:
            raise InvalidInput(f"x has length {x.shape[1]} but there are {self.length} learned positions: cut it")
        return x + self.weight[: x.shape[1]]

    def extra_repr(self) -> str:
        return f"{self.length}, {self.dim}"


def _positions(x: Tensor, dim: int, positions: Tensor | None) -> Tensor:
    """The positions of x `[batch, length, dim]`, 0, 1, 2… where none are given."""
    sequence(x, dim)
    if positions is None:
        return torch.arange(x.shape[1], device=x.device)
    positions = integers(positions, "positions", (1, 2))
    if positions.shape[-1] != x.shape[1]:
        raise InvalidInput(f"positions are {describe(positions)} for x {describe(x)}: wanted one for each token")
    return positions
