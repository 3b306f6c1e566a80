"""Multi-head attention as a module: projections around a mechanism that is handed in.

    x       ─ query ─ heads ─ norm ─ turn ─┐
    context ─ key   ─ heads ─ norm ─ turn ─┼─ attend(q, k, v, pattern) ─ joined ─ out
    context ─ value ─ heads ───────────────┘

The context is x itself in self-attention; norm and turn are there where they were handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.errors import InvalidInput
from foveate.functional import attention
from foveate.nn.position import Rotary
from foveate.nn.pytorch import copy_weights, rename_attention
from foveate.pattern.algebra import Pattern
from foveate.rotary import Angles
from foveate.score import Score
from foveate.values import dropout_of, sequence, whole

Attend = Callable[..., Tensor]


class LayerCache(Protocol):
    """The keys and values that one layer has seen so far."""

    length: int

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v `[batch, key heads, length, dim]`, and give back all that is kept."""


class KeysValues(NamedTuple):
    """What `MultiHeadAttention.project` makes of a context: heads that any number of calls may read."""

    k: Float[Tensor, "batch key_heads keys dim"]
    v: Float[Tensor, "batch key_heads keys dim"]


class MultiHeadAttention(nn.Module):
    """out(concat_h attend(x·Q_h, context·K_h, context·V_h)), attend = softmax(q·kᵀ/√d)·v unless another is given.

    Args:
        dim: the size of x and of the output.
        heads: how many queries look at once.
        key_heads: fewer heads of keys and values than of queries: 1 is multi-query, others grouped-query attention.
        head_dim: the size of a head; None = dim / heads.
        context_dim: the size of the context, or (of what keys are made of, of what values are made of); None = dim.
        bias: whether query, key and value have one.
        out_bias: whether out has one; None = as `bias`.
        rotary: turns q and k, for self-attention.
        query_norm, key_norm: act on `[batch, length, heads, head_dim]` before the turn.
        attend: the mechanism, called as attend(q, k, v, pattern) with the keywords `score` and `dropout` only where
            there is one. `functools.partial(fv.attention, normalizer=fv.sparsemax)`, a function, or a module.
        dropout: the probability that a weight is dropped, in training.

    Raises:
        InvalidInput: heads that do not divide, x or context of another size.

    Vaswani et al. 2017, section 3.2.2: https://arxiv.org/abs/1706.03762; key_heads: Shazeer 2019,
    https://arxiv.org/abs/1911.02150, Ainslie et al. 2023, https://arxiv.org/abs/2305.13245

    >>> import torch
    >>> import foveate as fv
    >>> layer = fv.nn.MultiHeadAttention(32, 4, key_heads=2, rotary=fv.nn.Rotary(8))
    >>> layer(torch.randn(2, 5, 32), pattern=fv.causal).shape
    torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | tuple[int, int] | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        rotary: Rotary | None = None,
        query_norm: nn.Module | None = None,
        key_norm: nn.Module | None = None,
        attend: Attend = attention,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.heads = whole(dim, "dim", 1), whole(heads, "the number of heads", 1)
        self.key_heads = whole(heads if key_heads is None else key_heads, "the number of key heads", 1)
        if head_dim is None and dim % heads:
            raise InvalidInput(f"dim {dim} does not divide into {heads} heads: change one, or give head_dim")
        if self.heads % self.key_heads:
            raise InvalidInput(f"{heads} heads are no multiple of {key_heads} key heads: change one of them")
        self.head_dim = whole(dim // heads if head_dim is None else head_dim, "the size of a head", 1)
        if rotary is not None and rotary.dim > self.head_dim:
            raise InvalidInput(f"rotary positions turn {rotary.dim} entries but a head has {self.head_dim}")
        key_from, value_from = context_dim if isinstance(context_dim, tuple) else (context_dim or dim,) * 2
        self.query = nn.Linear(dim, heads * self.head_dim, bias)
        self.key = nn.Linear(key_from, self.key_heads * self.head_dim, bias)
        self.value = nn.Linear(value_from, self.key_heads * self.head_dim, bias)
        self.out = nn.Linear(heads * self.head_dim, dim, bias if out_bias is None else out_bias)
        self.rotary, self.query_norm, self.key_norm = rotary, query_norm, key_norm
        self.attend, self.dropout = attend, dropout_of(dropout)
        self.register_load_state_dict_pre_hook(rename_attention)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights as Glorot & Bengio (2010) draw them, biases 0."""
        for part in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)

    def project(self, context: Tensor | tuple[Tensor, Tensor]) -> KeysValues:
        """The heads of keys and values of a context, or of (what keys are made of, what values are made of)."""
        for_keys, for_values = context if isinstance(context, tuple) else (context, context)
        sequence(for_keys, self.key.in_features, "the context of the keys is")
        sequence(for_values, self.value.in_features, "the context of the values is")
        k = self.key(for_keys).unflatten(-1, (self.key_heads, self.head_dim))
        v = self.value(for_values).unflatten(-1, (self.key_heads, self.head_dim))
        if self.key_norm is not None:
            k = self.key_norm(k)
        return KeysValues(k.transpose(1, 2), v.transpose(1, 2))

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | tuple[Tensor, Tensor] | KeysValues | None = None,
        pattern: Pattern | Tensor | None = None,
        *,
        score: Score | Tensor | None = None,
        positions: Tensor | Angles | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attention of x to the context, or to itself where there is none.

        Args:
            context: what is attended to, `[batch, keys, context dim]`; two of them, for keys and for values; or what
                `project` made of it, so that it is projected once for many calls.
            pattern, score: as in `fv.attention`.
            positions: of x, for `rotary`: `[length]`, `[batch, length]`, or `rotary.angles(positions)` worked out
                once for all layers. None = 0, 1, 2…, after those in the cache.
            cache: keys and values of earlier calls, which those of x are appended to.
        """
        sequence(x, self.dim)
        q = self.query(x).unflatten(-1, (self.heads, self.head_dim))
        if self.query_norm is not None:
            q = self.query_norm(q)
        q = q.transpose(1, 2)
        if context is not None and (self.rotary is not None or cache is not None):
            what = "rotary positions are" if self.rotary is not None else "a cache is"
            raise InvalidInput(f"{what} of self-attention, and a context was given: project(context) keeps its keys")
        k, v = context if isinstance(context, KeysValues) else self.project(x if context is None else context)
        if self.rotary is not None:
            if positions is None:
                start = 0 if cache is None else cache.length
                positions = torch.arange(start, start + x.shape[1], device=x.device)
            if not isinstance(positions, Angles):
                positions = self.rotary.angles(positions, q.dtype)
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        if cache is not None:
            k, v = cache.append(k, v)
        options: dict[str, Any] = {}
        if score is not None:
            if "score" in getattr(self.attend, "keywords", ()):
                raise InvalidInput("attend has a score of its own, and another was given: add the two, and give one")
            options["score"] = score
        if self.dropout and self.training:
            options["dropout"] = self.dropout
        out: Tensor = self.out(self.attend(q, k, v, pattern, **options).transpose(1, 2).flatten(2))
        return out

    def extra_repr(self) -> str:
        groups = "" if self.key_heads == self.heads else f", key_heads={self.key_heads}"
        return f"{self.dim}, heads={self.heads}{groups}, head_dim={self.head_dim}"

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> Self:
        """A layer with a copy of the weights of PyTorch's, whose outputs and gradients it has.

        x is `[batch, length, dim]` whatever `batch_first` was, and masks mean the contrary: see `torch_masks`.
        A row that may attend to nothing gives 0 before `out`, where PyTorch gives NaN.

        Raises:
            InvalidInput: the module has add_bias_kv or add_zero_attn, which have no counterpart here.
        """
        if module.bias_k is not None or module.add_zero_attn:
            what = "add_bias_kv" if module.bias_k is not None else "add_zero_attn"
            raise InvalidInput(f"the nn.MultiheadAttention has {what}: wanted one without")
        weight = module.out_proj.weight
        with torch.device(weight.device):
            made = cls(
                module.embed_dim, module.num_heads, context_dim=(module.kdim, module.vdim),
                bias=module.in_proj_bias is not None, dropout=module.dropout,
            ).to(weight.dtype)  # fmt: skip
        copy_weights(made, module)
        return made.train(module.training)


class SelfAttention(MultiHeadAttention):
    """`MultiHeadAttention` of x to itself: layer(x, pattern).

    >>> import torch
    >>> import foveate as fv
    >>> fv.nn.SelfAttention(32, 4)(torch.randn(2, 5, 32), fv.causal).shape
    torch.Size([2, 5, 32])
    """

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch length dim"],
        pattern: Pattern | Tensor | None = None,
        *,
        score: Score | Tensor | None = None,
        positions: Tensor | Angles | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        return super().forward(x, None, pattern, score=score, positions=positions, cache=cache)


class CrossAttention(MultiHeadAttention):
    """`MultiHeadAttention` of x to a context: layer(x, context, pattern).

    >>> import torch
    >>> import foveate as fv
    >>> layer, image = fv.nn.CrossAttention(32, 4, context_dim=48), torch.randn(2, 7, 48)
    >>> layer(torch.randn(2, 5, 32), image, fv.padding(torch.tensor([7, 3]))).shape
    torch.Size([2, 5, 32])
    """

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | tuple[Tensor, Tensor] | KeysValues,
        pattern: Pattern | Tensor | None = None,
        *,
        score: Score | Tensor | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        return super().forward(x, context, pattern, score=score)
