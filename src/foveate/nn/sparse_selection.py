"""Sparse attention that chooses its keys: DeepSeek's indexer, native sparse attention, mixture of block attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate import selection
from foveate.errors import InvalidInput
from foveate.functional import attention
from foveate.pattern.algebra import Pattern
from foveate.pattern.positional import causal, pooled, window
from foveate.score import Score
from foveate.values import sequence, whole

Turn = Callable[..., Tensor]  # rotary positions: turn(x [batch, heads, length, dim], positions) → x


class LightningIndexer(nn.Module):
    """DeepSeek Sparse Attention's indexer: I_ts = Σ_j w_tj · ReLU(q_tj · k_s), and the `top_k` keys of highest I.

    x is detached, so that the indexer learns from `loss` alone and the model from its own loss alone.

    Args:
        dim: the size of x.
        heads, head_dim: few heads, and one key of that size for all of them.
        top_k: how many keys are chosen; all of them where there are fewer.
        query_dim: the size of what queries are made of; None = dim.
        rotary: turns q and k, called as rotary(x, positions).

    DeepSeek-AI 2025, section 2.1: https://arxiv.org/abs/2512.02556

    >>> import torch
    >>> import foveate as fv
    >>> indexer, x = fv.nn.LightningIndexer(32, heads=4, head_dim=8, top_k=3), torch.randn(2, 9, 32)
    >>> keys = indexer(x, fv.causal)
    >>> q, k, v = torch.randn(2, 6, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    >>> fv.attention(q, k, v, keys).shape
    torch.Size([2, 6, 9, 16])
    >>> indexer.loss(x, q, k, keys).backward()
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 64,
        head_dim: int = 128,
        top_k: int = 2048,
        query_dim: int | None = None,
        rotary: Turn | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = whole(heads, "the number of heads", 1), whole(head_dim, "the size of a head", 1)
        self.top_k, self.rotary = whole(top_k, "top_k", 1), rotary
        self.query = nn.Linear(dim if query_dim is None else query_dim, heads * head_dim, bias=False)
        self.key = nn.Linear(dim, head_dim, bias=False)
        self.norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.weight = nn.Linear(dim, heads, bias=False)

    def project(
        self, x: Float[Tensor, "batch length dim"], query_from: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q `[batch, heads, length, head_dim]`, k `[batch, 1, length, head_dim]` and w `[batch, heads, length]`.

        `query_from` is what queries are made of, if that is not x; `positions` are those of `rotary`.
        """
        x = x.detach()
        source = x if query_from is None else query_from.detach()
        sequence(x, self.key.in_features)
        sequence(source, self.query.in_features, "query_from is")
        q = self.query(source).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        k = self.norm(self.key(x))[:, None]
        if self.rotary is not None:
            if positions is None:
                positions = torch.arange(x.shape[1], device=x.device)
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        return q, k, self.weight(x).transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        pattern: Pattern | Tensor | None = causal,
        *,
        query_from: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Pattern:
        """The keys that every token of x may attend to, among those that `pattern` shows it."""
        q, k, w = self.project(x, query_from, positions)
        return selection.lightning(q, k, w, pattern, top_k=min(self.top_k, x.shape[1]))

    def loss(
        self,
        x: Float[Tensor, "batch length dim"],
        q: Float[Tensor, "batch main_heads length main_dim"],
        k: Float[Tensor, "batch key_heads length main_dim"],
        pattern: Pattern | Tensor | None = causal,
        *,
        score: Score | Tensor | None = None,
        scale: float | None = None,
        query_from: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """KL(main attention ‖ indexer): over `fv.causal` to warm up, then over what `forward` chose."""
        index = self.project(x, query_from, positions)
        return selection.lightning_loss(*index, q, k, pattern, score=score, scale=scale)


class Compressor(nn.Module):
    """A network from the `length` tokens of a window to one: φ(x + position inside the window).

    Yuan et al. 2025, equation 7: https://arxiv.org/abs/2502.11089
    """

    def __init__(self, dim: int, length: int, hidden: int | None = None) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(length, dim))
        wide = 4 * dim if hidden is None else hidden
        self.network = nn.Sequential(nn.Linear(length * dim, wide), nn.GELU(), nn.Linear(wide, dim))

    def forward(
        self, windows: Float[Tensor, "batch heads windows length dim"]
    ) -> Float[Tensor, "batch heads windows dim"]:
        out: Tensor = self.network((windows + self.position).flatten(-2))
        return out


class NativeSparseAttention(nn.Module):
    """NSA, causal: o_t = Σ_c g_tc · Attn_c(q_t) over three branches, each with keys and values of its own.

        compressed   one key for each window of `length` tokens, `stride` apart
        selected     the `top_k` blocks of tokens that the compressed keys say matter, chosen by a group of heads
        sliding      the last `window` tokens

    Args:
        dim, heads, key_heads, head_dim: as in `MultiHeadAttention`.
        length, stride, block, top_k, first, local: as in `fv.selection.select`; all blocks where there are fewer.
        rotary: turns q and k of every branch before anything else, called as rotary(x, positions).

    Raises:
        InvalidInput: sizes that do not divide, a top_k below first + local.

    Yuan et al. 2025: https://arxiv.org/abs/2502.11089

    >>> import torch
    >>> import foveate as fv
    >>> sizes = {"length": 4, "stride": 2, "block": 8, "top_k": 3, "window": 6}
    >>> layer = fv.nn.NativeSparseAttention(32, 4, key_heads=2, **sizes)
    >>> layer(torch.randn(2, 37, 32)).shape
    torch.Size([2, 37, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_heads: int | None = None,
        head_dim: int | None = None,
        length: int = 32,
        stride: int = 16,
        block: int = 64,
        top_k: int = 16,
        first: int = 1,
        local: int = 2,
        window: int = 512,
        rotary: Turn | None = None,
    ) -> None:
        super().__init__()
        self.heads = whole(heads, "the number of heads", 1)
        self.key_heads = whole(heads if key_heads is None else key_heads, "the number of key heads", 1)
        if heads % self.key_heads or (head_dim is None and dim % heads):
            raise InvalidInput(
                f"dim {dim}, {heads} heads and {self.key_heads} key heads: wanted heads that divide dim "
                "and are a multiple of the key heads"
            )
        self.head_dim = dim // heads if head_dim is None else whole(head_dim, "the size of a head", 1)
        self.window, self.rotary = whole(window, "the window", 1), rotary
        self.sizes: dict[str, int] = {
            "length": length, "stride": stride, "block": block, "first": first, "local": local
        }  # fmt: skip
        self.top_k = whole(top_k, "top_k", 1)
        if self.top_k < first + local:
            raise InvalidInput(f"top_k is {top_k} but {first} first and {local} local blocks are forced")
        if length % stride or block % stride:
            raise InvalidInput(f"a stride of {stride} divides not both the windows of {length} and blocks of {block}")
        self.query = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.key = nn.Linear(dim, 3 * self.key_heads * self.head_dim, bias=False)
        self.value = nn.Linear(dim, 3 * self.key_heads * self.head_dim, bias=False)
        self.compress_key, self.compress_value = (Compressor(self.head_dim, length) for _ in range(2))
        self.gate = nn.Linear(dim, 3 * heads)
        self.out = nn.Linear(heads * self.head_dim, dim, bias=False)

    def forward(
        self, x: Float[Tensor, "batch length dim"], positions: Tensor | None = None
    ) -> Float[Tensor, "batch length dim"]:
        sequence(x, self.query.in_features)
        q = self.query(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        k, v = (part(x).unflatten(-1, (3, self.key_heads, self.head_dim)) for part in (self.key, self.value))
        k, v = k.permute(2, 0, 3, 1, 4), v.permute(2, 0, 3, 1, 4)  # [branch, batch, key heads, length, dim]
        if self.rotary is not None:
            if positions is None:
                positions = torch.arange(x.shape[1], device=x.device)
            q, k = self.rotary(q, positions), torch.stack([self.rotary(one, positions) for one in k])
        windows = {"length": self.sizes["length"], "stride": self.sizes["stride"]}
        short_k = selection.compress(k[0], **windows, network=self.compress_key)
        short_v = selection.compress(v[0], **windows, network=self.compress_value)
        blocks = -(-x.shape[1] // self.sizes["block"])
        chosen = selection.select(q, short_k, keys=x.shape[1], top_k=min(self.top_k, blocks), **self.sizes)
        branches = (
            attention(q, short_k, short_v, pooled(**windows), query_start=0),
            attention(q, k[1], v[1], chosen),
            attention(q, k[2], v[2], causal & window(self.window)),
        )
        gates = self.gate(x).sigmoid().unflatten(-1, (3, self.heads)).permute(2, 0, 3, 1)[..., None]
        mixed = sum(gate * branch for gate, branch in zip(gates, branches, strict=True))
        assert isinstance(mixed, Tensor)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class MoBA(nn.Module):
    """Mixture of block attention as a mechanism: `fv.nn.MultiHeadAttention(…, attend=fv.nn.MoBA(512, 3))`.

    Args:
        block: keys in a block.
        top_k: blocks for each query, its own counted; all where there are fewer.
        shared: the query heads of a group choose together.

    Lu et al. 2025: https://arxiv.org/abs/2502.13189

    >>> import torch
    >>> import foveate as fv
    >>> q, k, v = torch.randn(3, 2, 4, 37, 8).unbind()
    >>> fv.nn.MoBA(8, 3)(q, k, v).shape
    torch.Size([2, 4, 37, 8])
    """

    def __init__(self, block: int, top_k: int, *, shared: bool = False) -> None:
        super().__init__()
        self.block, self.top_k = whole(block, "the block size", 1), whole(top_k, "top_k", 1)
        self.shared = shared

    def forward(
        self,
        q: Float[Tensor, "batch heads queries dim"],
        k: Float[Tensor, "batch key_heads keys dim"],
        v: Float[Tensor, "batch key_heads keys value_dim"],
        pattern: Pattern | Tensor | None = None,
        *,
        query_start: int | Tensor | None = None,
        **options: Any,
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        """Attention to the blocks chosen among those that `pattern` (None: causal) shows; options of `fv.attention`."""
        chosen = selection.moba(
            q, k, causal if pattern is None else pattern, block=self.block,
            top_k=min(self.top_k, -(-k.shape[2] // self.block)), query_start=query_start, shared=self.shared,
        )  # fmt: skip
        return attention(q, k, v, chosen, query_start=query_start, **options)

    def extra_repr(self) -> str:
        return f"{self.block}, {self.top_k}" + (", shared=True" if self.shared else "")
