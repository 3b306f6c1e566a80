"""Reformer's attention with its projections."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.errors import InvalidInput
from foveate.mechanisms.lsh import lsh_attention
from foveate.pattern.algebra import Pattern
from foveate.values import sequence, whole


class ReformerAttention(nn.Module):
    """out(lsh_attention(x·QK, x·V)): one projection for queries and keys, attention among those that a hash joins.

    In training every call hashes anew; in eval mode by `seed`, the same each time.

    Args:
        dim, heads, head_dim: as in `SelfAttention`.
        chunk, buckets, rounds: as in `fv.lsh_attention`.
        seed: of the hashes in eval mode.

    Kitaev et al. 2020: https://arxiv.org/abs/2001.04451

    >>> import torch
    >>> import foveate as fv
    >>> fv.nn.ReformerAttention(32, 4, chunk=16, rounds=2)(torch.randn(2, 100, 32), fv.causal).shape
    torch.Size([2, 100, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        chunk: int = 64,
        buckets: int | tuple[int, ...] | None = None,
        rounds: int = 1,
        head_dim: int | None = None,
        bias: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if head_dim is None and whole(dim, "dim", 1) % whole(heads, "the number of heads", 1):
            raise InvalidInput(f"dim {dim} does not divide into {heads} heads: change one, or give head_dim")
        self.dim, self.heads, self.chunk, self.buckets = dim, heads, whole(chunk, "the chunk", 1), buckets
        self.rounds, self.seed = whole(rounds, "the rounds", 1), seed
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.query_key, self.value = (nn.Linear(dim, heads * self.head_dim, bias) for _ in range(2))
        self.out = nn.Linear(heads * self.head_dim, dim, bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights as Glorot & Bengio (2010) draw them, biases 0."""
        for part in (self.query_key, self.value, self.out):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)

    def forward(
        self, x: Float[Tensor, "batch length dim"], pattern: Pattern | None = None
    ) -> Float[Tensor, "batch length dim"]:
        sequence(x, self.dim)
        qk, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query_key, self.value))
        generator = None if self.training else torch.Generator().manual_seed(self.seed)
        out = lsh_attention(
            qk, v, pattern, chunk=self.chunk, buckets=self.buckets, rounds=self.rounds, generator=generator
        )
        made: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return made

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, chunk={self.chunk}, rounds={self.rounds}"
