"""Llama 4's attention: layers that see their own chunk, and every fourth that sees everything, without positions."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.errors import InvalidInput
from foveate.functional import attention
from foveate.nn.attention import LayerCache, SelfAttention
from foveate.nn.position import Rotary
from foveate.pattern.algebra import Pattern
from foveate.pattern.positional import causal, chunks
from foveate.problem import accumulator
from foveate.rotary import Angles, Scaling
from foveate.score import Score
from foveate.values import whole


class ChunkedAttention(SelfAttention):
    """Layer number `layer` of a stack: causal inside chunks with rotary positions, or causal over all without any.

    Every `every`-th layer (number 3, 7, 11, … for 4) is of the second kind, and the longer the text the sharper its
    scores: the query at position n grows by 1 + sharpen · log(1 + ⌊(n + 1) / sharpen_from⌋).

    Args:
        layer: its number in the stack, from 0.
        chunk: tokens in a chunk.
        every: one layer in so many sees everything.
        norm: q and k of chunked layers get the root mean square 1, so no score is large; Llama 4 Scout has it.
        sharpen: 0 for none.
        sharpen_from: the length from which it does.
        base, scaling: of the rotary positions, which turn pairs (2i, 2i + 1).
        dim, heads, key_heads, head_dim, bias, dropout: as in `SelfAttention`.

    Meta 2025, Llama 4, https://ai.meta.com/blog/llama-4-multimodal-intelligence; layers without positions: Yang et al.
    2025, https://arxiv.org/abs/2501.18795; sharper scores: Nakanishi 2025, https://arxiv.org/abs/2501.19399

    >>> import torch
    >>> import foveate as fv
    >>> stack = [fv.nn.ChunkedAttention(32, 4, layer=n, chunk=8) for n in range(4)]
    >>> [layer.sees_all for layer in stack]
    [False, False, False, True]
    >>> stack[0](torch.randn(2, 50, 32)).shape
    torch.Size([2, 50, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        layer: int,
        chunk: int = 8192,
        every: int = 4,
        norm: bool = True,
        sharpen: float = 0.1,
        sharpen_from: int = 8192,
        base: float = 500000.0,
        scaling: Scaling | None = None,
        key_heads: int | None = None,
        head_dim: int | None = None,
        eps: float = 1e-5,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        whole(chunk, "the chunk of ChunkedAttention", 1)
        sees_all = (whole(layer, "the number of the layer", 0) + 1) % whole(every, "every", 1) == 0
        size = dim // heads if head_dim is None else head_dim
        # No entry of a head is left out by the turn, so a norm before it is a norm after it.
        plain = None if sees_all or not norm else nn.RMSNorm(size, eps, elementwise_affine=False)
        turn = None if sees_all else Rotary(size, base=base, interleaved=True, scaling=scaling)
        whole(sharpen_from, "sharpen_from", 1)
        super().__init__(
            dim, heads, key_heads=key_heads, head_dim=head_dim, bias=bias, dropout=dropout,
            rotary=turn, query_norm=plain, key_norm=plain,
            attend=_Sharpened(sharpen, sharpen_from) if sees_all and sharpen else attention,
        )  # fmt: skip
        self.sees_all, self.chunk = sees_all, chunk

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch length dim"],
        pattern: Pattern | Tensor | None = None,
        *,
        score: Score | Tensor | None = None,
        positions: Tensor | Angles | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attention of x to itself and what is in the cache; `pattern` is what else limits it: documents, padding."""
        if isinstance(pattern, Tensor):
            raise InvalidInput("ChunkedAttention was given a mask: wanted a pattern; from_mask(tensor) makes one")
        own = causal if self.sees_all else causal & chunks(self.chunk)
        both = own if pattern is None else own & pattern
        return super().forward(x, both, score=score, positions=positions, cache=cache)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, " + ("sees_all=True" if self.sees_all else f"chunk={self.chunk}")


class _Sharpened(nn.Module):
    """attend(q, k, v): attention of q · (1 + by · log(1 + ⌊(n + 1) / length⌋)) at position n."""

    def __init__(self, by: float, length: int) -> None:
        super().__init__()
        self.by, self.length = by, length

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **options: Any) -> Tensor:
        first = k.shape[2] - q.shape[2]  # the last query stands at the last key
        position = torch.arange(first, k.shape[2], device=q.device, dtype=accumulator(q.dtype))
        grown = 1 + self.by * torch.log1p(((position + 1) / self.length).floor())
        return attention((q * grown[:, None]).to(q.dtype), k, v, pattern, **options)

    def extra_repr(self) -> str:
        return f"{self.by}, {self.length}"
