"""Attention with a feature map instead of the softmax, as modules: linear transformers and Performers."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.errors import InvalidInput
from foveate.linear.features import Favor, elu_plus_one, favor
from foveate.linear.functional import linear_attention
from foveate.linear.problem import Feature
from foveate.nn.mixing import MixerState, entered, head_size, joined, parted
from foveate.pattern.algebra import Pattern
from foveate.values import describe, sequence


class LinearAttention(nn.Module):
    """Multi-head attention whose weights are φ(q)·φ(k) / Σ φ(q)·φ(k): time and memory follow the length.

        x ─ query ─ φ ─┐
        c ─ key ── φ ──┼─ Σ_j φ(q_t)·φ(k_j)·v_j / Σ_j φ(q_t)·φ(k_j) ─ out     over j ≤ t where it is causal
        c ─ value ─────┘

    c is x, or the context of a call that is not causal. A causal call gives the state for the next one.

    Args:
        dim: the size of x and of the output.
        heads: how many there are.
        feature: φ, of `[batch, heads, steps, head_dim]`; a module's parameters are trained with the rest.
        causal: whether a step sees those after it.
        head_dim: the size of a head; None = dim / heads.
        context_dim: the size of the context; None = dim.
        bias: of the projections.

    Raises:
        InvalidInput: sizes that do not fit; a feature map whose products are negative.

    Katharopoulos et al. 2020, "Transformers are RNNs": https://arxiv.org/abs/2006.16236

    >>> import torch
    >>> import foveate as fv
    >>> layer = fv.nn.LinearAttention(16, 4)
    >>> x = torch.randn(2, 9, 16)
    >>> whole, _ = layer(x)
    >>> first, state = layer(x[:, :8])
    >>> last, _ = layer(x[:, 8:], state=state)
    >>> torch.allclose(torch.cat([first, last], 1), whole, atol=1e-5)
    True
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        feature: Feature = elu_plus_one,
        causal: bool = True,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.causal = dim, heads, causal
        self.head_dim = head_size(dim, heads, head_dim, "head_dim")
        if context_dim is not None and causal:
            raise InvalidInput("a causal layer has no context: leave out context_dim, or say causal=False")
        self.context_dim = dim if context_dim is None else context_dim
        self.query = nn.Linear(dim, heads * self.head_dim, bias)
        self.key = nn.Linear(self.context_dim, heads * self.head_dim, bias)
        self.value = nn.Linear(self.context_dim, heads * self.head_dim, bias)
        self.out = nn.Linear(heads * self.head_dim, dim, bias)
        self.feature = feature

    def forward(
        self,
        x: Float[Tensor, "batch steps dim"],
        context: Float[Tensor, "batch keys context_dim"] | None = None,
        *,
        keep: Bool[Tensor, "batch keys"] | None = None,
        state: MixerState | None = None,
        documents: Tensor | Pattern | None = None,
    ) -> tuple[Float[Tensor, "batch steps dim"], MixerState]:
        """(output, the state after the last step).

        Args:
            context: what is attended to instead of x, where the layer is not causal.
            keep: True at the keys that are there, False at padding, where the layer is not causal.
            state: what an earlier call returned.
            documents: of a causal call, as in `linear_attention`; a negative id is padding.
        """
        x, ids = entered(x, self.dim, documents, state)
        if self.causal and (context is not None or keep is not None):
            raise InvalidInput("a causal layer reads x alone: give documents= for padding, or say causal=False")
        if context is None:
            context = x
        else:
            sequence(context, self.context_dim, "the context is", "keys")
        write = None
        if keep is not None:
            if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != context.shape[:2]:
                raise InvalidInput(
                    f"keep is {describe(keep)}: wanted booleans [batch, keys] = {list(context.shape[:2])}"
                )
            context, write = context.masked_fill(~keep[..., None], 0), keep[:, None].to(x.dtype)
        q, k, v = (parted(y, self.heads) for y in (self.query(x), self.key(context), self.value(context)))
        memory = None if state is None else state.memory
        out, memory = linear_attention(
            q, k, v, beta=write, feature=self.feature, normalize=True, causal=self.causal, documents=ids, state=memory
        )
        return self.out(joined(out)), MixerState(memory)


class Performer(LinearAttention):
    """`LinearAttention` with FAVOR+: softmax attention on average over random directions.

        φ(x) = exp(ω·x′ − ‖x′‖²/2)/√m,  x′ = x·head_dim^-¼,  E[φ(q)·φ(k)] = exp(q·k/√head_dim)

    The directions ω are a buffer, so they are saved with the weights; `redraw` gives others, which training does now
    and then, but never between a call and one that takes its state.

    Args:
        features: m, how many directions; None = head_dim · ln(head_dim), the paper's.
        generator: of the directions.

    Choromanski et al. 2020, "Rethinking Attention with Performers": https://arxiv.org/abs/2009.14794

    >>> import torch
    >>> import foveate as fv
    >>> layer = fv.nn.Performer(16, 2, features=64, causal=False)
    >>> layer(torch.randn(2, 5, 16))[0].shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        features: int | None = None,
        causal: bool = True,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        phi = _Directions(head_size(dim, heads, head_dim, "head_dim"), features, generator)
        super().__init__(dim, heads, feature=phi, causal=causal, head_dim=head_dim, context_dim=context_dim, bias=bias)

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw other directions."""
        cast(_Directions, self.feature).redraw(generator)


class _Directions(nn.Module):
    """FAVOR+ with its random directions as a buffer."""

    directions: Tensor

    def __init__(self, dim: int, features: int | None, generator: torch.Generator | None) -> None:
        super().__init__()
        drawn = favor(dim, features, generator=generator).directions
        self.register_buffer("directions", drawn.to(torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        return Favor(self.directions)(x)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None) -> None:
        self.directions.copy_(Favor(self.directions).redrawn(generator).directions)
