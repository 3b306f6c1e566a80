"""Linear attention that forgets, as modules: RetNet's retention, Lightning attention, gated linear attention."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm, logsigmoid, silu

from foveate.errors import InvalidInput
from foveate.linear.forms import gated_linear, retention
from foveate.nn.mixing import MixerState, entered, head_size, joined, parted
from foveate.nn.position import Rotary
from foveate.pattern.algebra import Pattern
from foveate.problem import accumulator
from foveate.values import positive, whole


class MultiScaleRetention(nn.Module):
    """RetNet's layer: every head forgets at its own rate, and queries and keys turn with their position.

        o_t = Σ_{j ≤ t} γ_h^{t−j}·(q_t e^{itθ})·(k_j e^{−ijθ})·v_j/√d,  γ_h = 1 − 2^{−5−h}
        y = out(SiLU(x W_g) ∘ GroupNorm(o))

    Args:
        dim: the size of x and of the output.
        heads: how many there are.
        value_dim: of a head; None = 2 · dim / heads, as in the paper.

    Raises:
        InvalidInput: heads that do not divide, or that are of odd size.

    Sun et al. 2023, "Retentive Network", section 2.2: https://arxiv.org/abs/2307.08621

    >>> import torch
    >>> import foveate as fv
    >>> layer = fv.nn.MultiScaleRetention(16, 2)
    >>> x = torch.randn(2, 9, 16)
    >>> _, state = layer(x[:, :8])
    >>> torch.allclose(layer(x[:, 8:], state)[0], layer(x)[0][:, 8:], atol=1e-5)
    True
    """

    def __init__(self, dim: int, heads: int, *, value_dim: int | None = None) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        self.head_dim = head_size(dim, heads, None, "another dim")
        self.rotary = Rotary(self.head_dim, interleaved=True)
        wide = heads * (2 * self.head_dim if value_dim is None else whole(value_dim, "value_dim", 1))
        self.query, self.key = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.value, self.gate = nn.Linear(dim, wide, bias=False), nn.Linear(dim, wide, bias=False)
        self.out = nn.Linear(wide, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch steps dim"],
        state: MixerState | None = None,
        documents: Tensor | Pattern | None = None,
    ) -> tuple[Float[Tensor, "batch steps dim"], MixerState]:
        """(output, the state after the last step); `documents` as in `linear_attention`."""
        x, ids = entered(x, self.dim, documents, state)
        there = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device)
        if ids is not None:
            there = there * (ids >= 0)
        steps = there.cumsum(1)
        if state is not None:
            if state.steps is None:
                raise InvalidInput("the state counts no steps: wanted one that a MultiScaleRetention returned")
            steps = steps + state.steps[:, None]
        q, k = (self.rotary(parted(part(x), self.heads), steps) for part in (self.query, self.key))
        memory = None if state is None else state.memory
        out, memory = retention(q, k, parted(self.value(x), self.heads), documents=ids, state=memory)
        last = steps[:, -1] if x.shape[1] else (torch.zeros_like(there.sum(1)) if state is None else state.steps)
        mixed = joined(layer_norm(out, out.shape[-1:]))
        return self.out(silu(self.gate(x)) * mixed), MixerState(memory, steps=last)


class LightningAttention(nn.Module):
    """MiniMax-01's linear layer: q, k, v = SiLU(x W), one fixed rate of forgetting a head, an output gate.

        o_t = Σ_{j ≤ t} e^{−s_h·(t−j)}·(q_t·k_j)·v_j,  y = out(σ(x W_g) ∘ RMSNorm(o))
        s_h = 2^{−8h/H} · (1 − layer/(layers − 1)),  h = 1 … H

    Args:
        dim: the size of x and of the output.
        heads: how many there are.
        head_dim: the size of a head; None = dim / heads.
        layer, layers: which layer of how many it is: the deeper, the longer it remembers.
        eps: of the norm.

    Raises:
        InvalidInput: heads that do not divide, a layer that is none of the layers.

    Qin et al. 2024, "Lightning Attention-2": https://arxiv.org/abs/2401.04658; MiniMax 2025:
    https://arxiv.org/abs/2501.08313

    >>> import torch
    >>> import foveate as fv
    >>> layer = fv.nn.LightningAttention(16, 2)
    >>> layer(torch.randn(2, 9, 16))[0].shape
    torch.Size([2, 9, 16])
    """

    def __init__(
        self, dim: int, heads: int, *, head_dim: int | None = None, layer: int = 0, layers: int = 1, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, head_size(dim, heads, head_dim, "head_dim")
        if whole(layer, "layer", 0) >= whole(layers, "layers", 1):
            raise InvalidInput(f"layer is {layer} of {layers}: wanted 0 to {layers - 1}")
        wide = heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * wide, bias=False)  # by head: q, k, v
        self.norm = nn.RMSNorm(wide, eps)
        self.gate = nn.Linear(dim, wide, bias=False)
        self.out = nn.Linear(wide, dim, bias=False)
        # The last layer would never forget: the terms of 1e−5 are the released model's.
        share = 1 - layer / (layers - 1 + 1e-5) + 1e-5
        self.slopes = [2 ** (-8 * (h + 1) / heads) * share for h in range(heads)]

    def forward(
        self,
        x: Float[Tensor, "batch steps dim"],
        state: MixerState | None = None,
        documents: Tensor | Pattern | None = None,
    ) -> tuple[Float[Tensor, "batch steps dim"], MixerState]:
        """(output, the state after the last step); `documents` as in `linear_attention`."""
        x, ids = entered(x, self.dim, documents, state)
        q, k, v = parted(silu(self.qkv(x)), self.heads).chunk(3, -1)
        decay = -torch.tensor(self.slopes, dtype=accumulator(x.dtype), device=x.device)
        memory = None if state is None else state.memory
        out, memory = retention(q, k, v, decay, scale=1.0, documents=ids, state=memory)
        return self.out(self.gate(x).sigmoid() * self.norm(joined(out))), MixerState(memory)


class GatedLinearAttention(nn.Module):
    """GLA: every step says for every channel how much stays.

        S_t = diag(α_t)·S_{t−1} + k_t·v_tᵀ,  α_t = σ(x W₁ W₂ + b)^{1/τ}
        y = out(SiLU(x W_r + b_r) ∘ LayerNorm(Sᵀq/√d))

    Args:
        dim: the size of x and of the output.
        heads: how many there are.
        key_dim, value_dim: of a head; None = dim / 2 / heads and dim / heads, as in the paper.
        rank: of W₁ W₂.
        temperature: τ; the larger, the longer a new layer remembers.

    Raises:
        InvalidInput: sizes that do not divide.

    Yang et al. 2023, section 4.4: https://arxiv.org/abs/2312.06635

    >>> import torch
    >>> import foveate as fv
    >>> layer = fv.nn.GatedLinearAttention(16, 2)
    >>> out, state = layer(torch.randn(2, 9, 16))
    >>> out.shape, state.memory.s.shape
    (torch.Size([2, 9, 16]), torch.Size([2, 2, 4, 8]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        rank: int = 16,
        temperature: float = 16.0,
    ) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        self.value_dim = head_size(dim, heads, value_dim, "value_dim")
        if key_dim is None and dim % (2 * heads):
            raise InvalidInput(f"dim / 2 of {dim} does not divide into {heads} heads: change one, or give key_dim")
        self.key_dim = whole(dim // 2 // heads if key_dim is None else key_dim, "key_dim", 1)
        self.temperature = positive(temperature, "the temperature")
        narrow, wide = heads * self.key_dim, heads * self.value_dim
        self.query, self.key = nn.Linear(dim, narrow, bias=False), nn.Linear(dim, narrow, bias=False)
        self.value = nn.Linear(dim, wide, bias=False)
        self.decay = nn.Sequential(nn.Linear(dim, whole(rank, "rank", 1), bias=False), nn.Linear(rank, narrow))
        self.gate, self.norm = nn.Linear(dim, wide), nn.LayerNorm(self.value_dim)
        self.out = nn.Linear(wide, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch steps dim"],
        state: MixerState | None = None,
        documents: Tensor | Pattern | None = None,
    ) -> tuple[Float[Tensor, "batch steps dim"], MixerState]:
        """(output, the state after the last step); `documents` as in `linear_attention`."""
        x, ids = entered(x, self.dim, documents, state)
        q, k, v, decay = (parted(part(x), self.heads) for part in (self.query, self.key, self.value, self.decay))
        decay = logsigmoid(decay.to(accumulator(decay.dtype))) / self.temperature
        memory = None if state is None else state.memory
        out, memory = gated_linear(q, k, v, decay, documents=ids, state=memory)
        return self.out(silu(self.gate(x)) * joined(self.norm(out))), MixerState(memory)
