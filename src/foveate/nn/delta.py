"""The delta rule as modules: DeltaNet, Gated DeltaNet, Kimi Delta Attention.

x ─ q, k, v ─ short convolution ─ SiLU ─ q, k of length 1 ─┐
x ─ beta ─ σ ─────────────────────────────────────────────┼─ delta rule ─ norm ─ (∘ gate) ─ out
x ─ decay ────────────────────────────────────────────────┘
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from foveate.errors import InvalidInput
from foveate.linear.forms import delta, gated_delta, kimi_delta
from foveate.nn.mixing import MixerState, ShortConvolution, entered, head_size, joined, of_length_one, parted
from foveate.pattern.algebra import Pattern
from foveate.problem import accumulator
from foveate.values import whole


class _Reader(nn.Module):
    """q, k, v: projected, convolved, cut into heads, q and k of length 1 and repeated for the heads that share them."""

    def __init__(self, dim: int, key_heads: int, key_dim: int, heads: int, value_dim: int, width: int) -> None:
        super().__init__()
        if heads % whole(key_heads, "the number of key heads", 1):
            raise InvalidInput(f"{heads} heads are no multiple of {key_heads} key heads: change one of them")
        self.key_heads, self.heads = key_heads, heads
        self.sizes = [key_heads * key_dim, key_heads * key_dim, heads * value_dim]
        self.query, self.key, self.value = (nn.Linear(dim, size, bias=False) for size in self.sizes)
        self.convolution = ShortConvolution(sum(self.sizes), width)

    def forward(self, x: Tensor, state: MixerState | None, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q, k, v, the last inputs of the convolution)."""
        mixed = torch.cat([self.query(x), self.key(x), self.value(x)], -1)
        mixed, last = self.convolution(mixed, None if state is None else state.convolution, ids)
        q, k, v = mixed.split(self.sizes, -1)
        group = self.heads // self.key_heads
        q, k = (of_length_one(parted(y, self.key_heads)).repeat_interleave(group, 1) for y in (q, k))
        return q, k, parted(v, self.heads), last


class DeltaNet(nn.Module):
    """DeltaNet's layer: a key replaces what is stored under it, as far as β_t says.

        S_t = (I − β_t·k_t·k_tᵀ)·S_{t−1} + β_t·k_t·v_tᵀ,  β_t = σ(x W_β)
        y = out(RMSNorm(Sᵀq/√d));  q, k = SiLU(conv(x W)) / length,  v = SiLU(conv(x W))

    Args:
        dim: the size of x and of the output.
        heads: how many there are.
        key_dim, value_dim: of a head; None = dim / heads.
        width: of the short convolution.
        reflecting: β from 0 to 2 instead of 1, so that a state may change its sign (https://arxiv.org/abs/2411.12537).
        eps: of the norm.

    Raises:
        InvalidInput: heads that do not divide.

    Yang et al. 2024, section 3.3: https://arxiv.org/abs/2406.06484

    >>> import torch
    >>> import foveate as fv
    >>> layer = fv.nn.DeltaNet(16, 2)
    >>> x = torch.randn(2, 9, 16)
    >>> _, state = layer(x[:, :8])
    >>> torch.allclose(layer(x[:, 8:], state)[0], layer(x)[0][:, 8:], atol=1e-5)
    True
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        width: int = 4,
        reflecting: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        key_dim, value_dim = head_size(dim, heads, key_dim, "key_dim"), head_size(dim, heads, value_dim, "value_dim")
        self.dim, self.reflecting = dim, reflecting
        self.read = _Reader(dim, heads, key_dim, heads, value_dim, width)
        self.beta = nn.Linear(dim, heads, bias=False)
        self.norm = nn.RMSNorm(value_dim, eps)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch steps dim"],
        state: MixerState | None = None,
        documents: Tensor | Pattern | None = None,
    ) -> tuple[Float[Tensor, "batch steps dim"], MixerState]:
        """(output, the state after the last step); `documents` as in `linear_attention`."""
        x, ids = entered(x, self.dim, documents, state)
        q, k, v, last = self.read(x, state, ids)
        beta = _beta(self.beta(x), self.reflecting)
        out, memory = delta(q, k, v, beta, documents=ids, state=None if state is None else state.memory)
        return self.out(joined(self.norm(out))), MixerState(memory, last)


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet's layer: the delta rule, and at every step each head forgets as much as that step says.

        S_t = (I − β_t·k_t·k_tᵀ)·α_t·S_{t−1} + β_t·k_t·v_tᵀ,  α_t = exp(−A·softplus(x W_α + b)),  β_t = σ(x W_β)
        y = out(SiLU(x W_g) ∘ RMSNorm(Sᵀq/√d));  q, k = SiLU(conv(x W)) / length,  v = SiLU(conv(x W))

    Args:
        dim: the size of x and of the output.
        heads: how many states there are.
        key_heads: fewer heads of queries and keys than of values, as in Qwen3-Next; None = heads.
        key_dim, value_dim: of a head; None = dim / heads.
        width: of the short convolution.
        reflecting: β from 0 to 2 instead of 1, so that a state may change its sign (https://arxiv.org/abs/2411.12537).
        eps: of the norm.

    Raises:
        InvalidInput: heads that do not divide.

    Yang et al. 2024, section 3.4: https://arxiv.org/abs/2412.06464

    >>> import torch
    >>> import foveate as fv
    >>> layer = fv.nn.GatedDeltaNet(16, 4, key_heads=2)
    >>> out, state = layer(torch.randn(2, 9, 16))
    >>> out.shape, state.memory.s.shape, state.convolution.shape
    (torch.Size([2, 9, 16]), torch.Size([2, 4, 4, 4]), torch.Size([2, 3, 32]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        width: int = 4,
        reflecting: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        key_dim, value_dim = head_size(dim, heads, key_dim, "key_dim"), head_size(dim, heads, value_dim, "value_dim")
        self.dim, self.reflecting = dim, reflecting
        self.read = _Reader(dim, heads if key_heads is None else key_heads, key_dim, heads, value_dim, width)
        self.beta, self.decay = nn.Linear(dim, heads, bias=False), nn.Linear(dim, heads, bias=False)
        self.rate, self.rest = _rates(heads), _rests(heads)
        self.gate, self.norm = nn.Linear(dim, heads * value_dim, bias=False), nn.RMSNorm(value_dim, eps)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch steps dim"],
        state: MixerState | None = None,
        documents: Tensor | Pattern | None = None,
    ) -> tuple[Float[Tensor, "batch steps dim"], MixerState]:
        """(output, the state after the last step); `documents` as in `linear_attention`."""
        x, ids = entered(x, self.dim, documents, state)
        q, k, v, last = self.read(x, state, ids)
        wide = accumulator(x.dtype)
        decay = -self.rate.to(wide).exp() * softplus(self.decay(x).to(wide) + self.rest.to(wide))
        memory = None if state is None else state.memory
        out, memory = gated_delta(q, k, v, decay.mT, _beta(self.beta(x), self.reflecting), documents=ids, state=memory)
        return self.out(joined(self.norm(out)) * silu(self.gate(x))), MixerState(memory, last)


class KimiDeltaAttention(nn.Module):
    """Kimi Delta Attention: Gated DeltaNet with a rate of forgetting for every channel of the keys.

        S_t = (I − β_t·k_t·k_tᵀ)·diag(α_t)·S_{t−1} + β_t·k_t·v_tᵀ,  α_t = exp(−A·softplus(x W₁ W₂ + b))
        y = out(σ(x W₃ W₄) ∘ RMSNorm(Sᵀq/√d));  q, k = SiLU(conv(x W)) / length,  v = SiLU(conv(x W))

    Args:
        dim: the size of x and of the output.
        heads: how many there are.
        key_dim, value_dim: of a head; None = dim / heads.
        rank: of W₁ W₂ and W₃ W₄; None = value_dim.
        width: of the short convolution.
        eps: of the norm.

    Raises:
        InvalidInput: heads that do not divide.

    Kimi Team 2025, "Kimi Linear", section 3: https://arxiv.org/abs/2510.26692

    >>> import torch
    >>> import foveate as fv
    >>> layer = fv.nn.KimiDeltaAttention(16, 2)
    >>> out, state = layer(torch.randn(2, 9, 16))
    >>> out.shape, state.memory.s.shape
    (torch.Size([2, 9, 16]), torch.Size([2, 2, 8, 8]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        rank: int | None = None,
        width: int = 4,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        key_dim, value_dim = head_size(dim, heads, key_dim, "key_dim"), head_size(dim, heads, value_dim, "value_dim")
        rank = value_dim if rank is None else whole(rank, "rank", 1)
        self.dim, self.heads = dim, heads
        self.read = _Reader(dim, heads, key_dim, heads, value_dim, width)
        self.beta = nn.Linear(dim, heads, bias=False)
        self.decay = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, heads * key_dim, bias=False))
        self.rate, self.rest = _rates(heads), _rests(heads * key_dim)
        self.gate = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, heads * value_dim, bias=False))
        self.norm = nn.RMSNorm(value_dim, eps)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch steps dim"],
        state: MixerState | None = None,
        documents: Tensor | Pattern | None = None,
    ) -> tuple[Float[Tensor, "batch steps dim"], MixerState]:
        """(output, the state after the last step); `documents` as in `linear_attention`."""
        x, ids = entered(x, self.dim, documents, state)
        q, k, v, last = self.read(x, state, ids)
        wide = accumulator(x.dtype)
        gone = parted(softplus(self.decay(x).to(wide) + self.rest.to(wide)), self.heads)
        decay = -self.rate.to(wide).exp()[:, None, None] * gone
        memory = None if state is None else state.memory
        out, memory = kimi_delta(q, k, v, decay, _beta(self.beta(x)), documents=ids, state=memory)
        return self.out(joined(self.norm(out)) * self.gate(x).sigmoid()), MixerState(memory, last)


def _beta(x: Tensor, reflecting: bool = False) -> Tensor:
    """`[batch, heads, steps]` from 0 to 1, or to 2."""
    beta = x.to(accumulator(x.dtype)).sigmoid().mT
    return 2 * beta if reflecting else beta


def _rates(heads: int) -> nn.Parameter:
    """log A with A from 1 to 16, as in Mamba-2."""
    return nn.Parameter(torch.empty(heads).uniform_(1, 16).log())


def _rests(count: int) -> nn.Parameter:
    """b with softplus(b) from 0.001 to 0.1, spread evenly in its logarithm, as in Mamba-2."""
    step = torch.empty(count).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return nn.Parameter(step + torch.log(-torch.expm1(-step)))
