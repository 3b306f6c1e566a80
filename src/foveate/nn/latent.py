"""Multi-head latent attention: all heads of keys and values are made of one short vector for each token, the latent.

    x ─ latent ─ norm ─ c ──┬─ up ──▶ k_h (head_dim), v_h      every head, worked out of c when it is needed
      └ key_turned ─ turn ──┴──────▶ k (rope_dim), the same for all heads
    x ─ query ─────────────────────▶ q_h (head_dim), and q_h (rope_dim) ─ turn

Only c and the turned key are kept. When decoding, up moves to the query: q·(U·c) = (Uᵀ·q)·c, so that attention is over
the latents themselves, with one key head for all (absorbed). Both ways give the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.functional import attention
from foveate.nn.attention import LayerCache
from foveate.nn.position import Rotary
from foveate.pattern.algebra import Pattern
from foveate.rotary import Angles, Scaling
from foveate.values import dropout_of, scale_of, sequence, whole


class LatentAttention(nn.Module):
    """DeepSeek's multi-head latent attention (MLA): a cache of latent_dim + rope_dim numbers a token for all heads.

    Args:
        dim, heads: the size of x, and how many queries look at once.
        latent_dim: the size of what keys and values are made of.
        query_latent_dim: the same for queries; None = they are made of x.
        head_dim: entries of q and k without positions.
        rope_dim: entries with rotary positions; those of k are shared by all heads.
        value_dim: the size of a value.
        base, interleaved, scaling: of the rotary positions.
        scale: of the scores; None = (head_dim + rope_dim)^-½.
        dropout: the probability that a weight is dropped, in training.

    DeepSeek-AI 2024, section 2.1: https://arxiv.org/abs/2405.04434

    >>> import torch
    >>> import foveate as fv
    >>> layer = fv.nn.LatentAttention(32, 4, latent_dim=16, query_latent_dim=24, head_dim=8, rope_dim=4, value_dim=8)
    >>> x = torch.randn(2, 5, 32)
    >>> plain, absorbed = (layer(x, fv.causal, absorbed=way) for way in (False, True))
    >>> torch.allclose(plain, absorbed, atol=1e-6)
    True
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        latent_dim: int = 512,
        query_latent_dim: int | None = 1536,
        head_dim: int = 128,
        rope_dim: int = 64,
        value_dim: int = 128,
        base: float = 10000.0,
        interleaved: bool = True,
        scaling: Scaling | None = None,
        scale: float | None = None,
        eps: float = 1e-6,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "the number of heads": heads, "latent_dim": latent_dim, "head_dim": head_dim}
        for what, size in {**sizes, "value_dim": value_dim}.items():
            whole(size, what, 1)
        self.dim, self.heads, self.latent_dim, self.head_dim = dim, heads, latent_dim, head_dim
        self.rope_dim, self.value_dim, self.dropout = rope_dim, value_dim, dropout_of(dropout)
        self.scale = (head_dim + rope_dim) ** -0.5 if scale is None else scale_of(scale)
        self.rotary = Rotary(rope_dim, base=base, interleaved=interleaved, scaling=scaling)
        query_from = dim if query_latent_dim is None else whole(query_latent_dim, "query_latent_dim", 1)
        self.query_latent = None if query_latent_dim is None else nn.Linear(dim, query_from, bias)
        self.query_norm = None if query_latent_dim is None else nn.RMSNorm(query_from, eps)
        self.query = nn.Linear(query_from, heads * (head_dim + rope_dim), False)
        self.latent = nn.Linear(dim, latent_dim + rope_dim, bias)  # of the latent, and of the key that is turned
        self.latent_norm = nn.RMSNorm(latent_dim, eps)
        self.up = nn.Linear(latent_dim, heads * (head_dim + value_dim), False)
        self.out = nn.Linear(heads * value_dim, dim, bias)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        pattern: Pattern | Tensor | None = None,
        *,
        positions: Tensor | Angles | None = None,
        cache: LayerCache | None = None,
        absorbed: bool | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attention of x to itself and to what is in the cache.

        Args:
            pattern: as in `fv.attention`.
            positions: of x, as in `SelfAttention`; None = 0, 1, 2…, after those in the cache.
            cache: latents `[batch, 1, length, latent_dim]`, and as their values turned keys `[batch, 1, length,
                rope_dim]`, of earlier calls.
            absorbed: attend to the latents themselves; None = where that is less work: for few queries and many keys.
        """
        sequence(x, self.dim)
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + x.shape[1], device=x.device)
        if not isinstance(positions, Angles):
            positions = self.rotary.angles(positions, x.dtype)
        asked = x if self.query_latent is None or self.query_norm is None else self.query_norm(self.query_latent(x))
        q = self.query(asked).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, q_turned = q.split([self.head_dim, self.rope_dim], -1)
        latent, k_turned = self.latent(x)[:, None].split([self.latent_dim, self.rope_dim], -1)
        latent = self.latent_norm(latent)
        q_turned, k_turned = self.rotary(q_turned, positions), self.rotary(k_turned, positions)
        if cache is not None:
            latent, k_turned = cache.append(latent, k_turned)
        if absorbed is None:
            absorbed = self._less_work_absorbed(q.shape[2], latent.shape[2])
        options: dict[str, Any] = {"scale": self.scale}
        if self.dropout and self.training:
            options["dropout"] = self.dropout
        run = self._absorbed if absorbed else self._plain
        made: Tensor = self.out(run(q, q_turned, latent, k_turned, pattern, options).transpose(1, 2).flatten(2))
        return made

    def _plain(
        self, q: Tensor, q_turned: Tensor, latent: Tensor, k_turned: Tensor, pattern: Any, options: dict[str, Any]
    ) -> Tensor:
        heads = self.up(latent[:, 0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = heads.split([self.head_dim, self.value_dim], -1)
        k = torch.cat([k, k_turned.expand(-1, self.heads, -1, -1)], -1)
        return attention(torch.cat([q, q_turned], -1), k, v, pattern, **options)

    def _absorbed(
        self, q: Tensor, q_turned: Tensor, latent: Tensor, k_turned: Tensor, pattern: Any, options: dict[str, Any]
    ) -> Tensor:
        to_k, to_v = self.up.weight.unflatten(0, (self.heads, -1)).split([self.head_dim, self.value_dim], 1)
        q = torch.cat([q @ to_k, q_turned], -1)
        out = attention(q, torch.cat([latent, k_turned], -1), latent, pattern, **options)
        values: Tensor = out @ to_v.mT
        return values

    def _less_work_absorbed(self, queries: int, keys: int) -> bool:
        """Whether longer products for each pair cost less than keys and values for each token that has them not."""
        longer = 2 * self.latent_dim - self.head_dim - self.value_dim
        return queries * keys * longer < (keys - queries) * self.latent_dim * (self.head_dim + self.value_dim)

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, head_dim={self.head_dim}, rope_dim={self.rope_dim}"
