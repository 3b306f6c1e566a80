"""What a Transformer is made of: a part whose output is added to its input, and blocks of such parts.

    pre-norm     x + part(norm(x))      nothing stands in the way of x: deep models train without warm-up
    post-norm    norm(x + part(x))      the first Transformer, BERT

A block is attention, then (in decoders that read a context) cross-attention, then a feed-forward, each inside one of
the two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from foveate.errors import InvalidInput
from foveate.nn.attention import CrossAttention, KeysValues, LayerCache, SelfAttention
from foveate.nn.pytorch import copy_weights, rename_block
from foveate.pattern.algebra import Pattern
from foveate.rotary import Angles
from foveate.score import Score
from foveate.values import whole

Activation = Callable[[Tensor], Tensor]


class FeedForward(nn.Module):
    """down(activation(up(x))), at each position by itself.

    Args:
        hidden: the size between; None = 4 · dim.
        activation: a function or a module.
        dropout: the probability that an entry between is dropped, in training.

    Vaswani et al. 2017, section 3.3: https://arxiv.org/abs/1706.03762

    >>> import torch
    >>> import foveate as fv
    >>> fv.nn.FeedForward(32, activation=torch.nn.GELU())(torch.randn(2, 5, 32)).shape
    torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        activation: Activation = functional.relu,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = 4 * whole(dim, "dim", 1) if hidden is None else whole(hidden, "the hidden size", 1)
        self.up = nn.Linear(dim, hidden, bias)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, dim, bias)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        out: Tensor = self.down(self.dropout(self.activation(self.up(x))))
        return out


class GatedFeedForward(nn.Module):
    """down(activation(gate(x)) · up(x)): SwiGLU with SiLU, GEGLU with GELU; Llama, Gemma, T5 1.1 and most since.

    Args:
        hidden: the size between; None = 8 · dim / 3, which has as many weights as a plain one of 4 · dim.

    Shazeer 2020, "GLU variants improve Transformer": https://arxiv.org/abs/2002.05202

    >>> import torch
    >>> import foveate as fv
    >>> fv.nn.GatedFeedForward(32)(torch.randn(2, 5, 32)).shape
    torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        activation: Activation = functional.silu,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = 8 * whole(dim, "dim", 1) // 3 if hidden is None else whole(hidden, "the hidden size", 1)
        self.gate = nn.Linear(dim, hidden, bias)
        self.up = nn.Linear(dim, hidden, bias)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, dim, bias)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        out: Tensor = self.down(self.dropout(self.activation(self.gate(x)) * self.up(x)))
        return out


class PreNorm(nn.Module):
    """x + dropout(after(part(norm(x), …))).

    Args:
        part: called with what the call gives beside x.
        norm: `torch.nn.LayerNorm(dim)`, `torch.nn.RMSNorm(dim)`, or any module.
        after: acts on what the part gives: a second norm as in Gemma 2, a learned scale as in DINOv2.

    Xiong et al. 2020, "On layer normalization in the Transformer architecture": https://arxiv.org/abs/2002.04745

    >>> import torch
    >>> import foveate as fv
    >>> fv.nn.PreNorm(fv.nn.FeedForward(32), torch.nn.RMSNorm(32))(torch.randn(2, 5, 32)).shape
    torch.Size([2, 5, 32])
    """

    def __init__(
        self, part: nn.Module, norm: nn.Module, *, after: nn.Module | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm, self.part, self.after = norm, part, after
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch length dim"], *given: Any, **named: Any) -> Tensor:
        change = self.part(self.norm(x), *given, **named)
        out: Tensor = x + self.dropout(change if self.after is None else self.after(change))
        return out


class PostNorm(nn.Module):
    """norm(x + dropout(part(x, …))): section 5.4 of https://arxiv.org/abs/1706.03762.

    >>> import torch
    >>> import foveate as fv
    >>> fv.nn.PostNorm(fv.nn.FeedForward(32), torch.nn.LayerNorm(32), dropout=0.1)(torch.randn(2, 5, 32)).shape
    torch.Size([2, 5, 32])
    """

    def __init__(self, part: nn.Module, norm: nn.Module, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.part, self.norm = part, norm
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch length dim"], *given: Any, **named: Any) -> Tensor:
        out: Tensor = self.norm(x + self.dropout(self.part(x, *given, **named)))
        return out


class Block(nn.Module):
    """One layer: attention, cross-attention where there is one, feed-forward; each of them in a PreNorm or a PostNorm.

    Args:
        attention: called as attention(x, pattern), with the keywords `score`, `positions` and `cache` where given.
        feed_forward: called as feed_forward(x).
        cross: called as cross(x, context, pattern).

    >>> import torch
    >>> from torch import nn
    >>> import foveate as fv
    >>> block = fv.nn.Block(
    ...     fv.nn.PreNorm(fv.nn.SelfAttention(32, 4, rotary=fv.nn.Rotary(8)), nn.RMSNorm(32)),
    ...     fv.nn.PreNorm(fv.nn.GatedFeedForward(32), nn.RMSNorm(32)),
    ... )
    >>> block(torch.randn(2, 5, 32), fv.causal).shape
    torch.Size([2, 5, 32])
    """

    def __init__(self, attention: nn.Module, feed_forward: nn.Module, cross: nn.Module | None = None) -> None:
        super().__init__()
        self.attention, self.cross, self.feed_forward = attention, cross, feed_forward
        self.register_load_state_dict_pre_hook(rename_block)  # type: ignore[no-untyped-call]

    @classmethod
    def paper(
        cls,
        dim: int = 512,
        heads: int = 8,
        hidden: int | None = None,
        *,
        reads_context: bool = False,
        pre_norm: bool = False,
        activation: Activation = functional.relu,
        epsilon: float = 1e-5,
        bias: bool = True,
        dropout: float = 0.1,
    ) -> Self:
        """A layer of the first Transformer's encoder or, with `reads_context`, of its decoder.

        dropout acts where the paper has it and on the weights and inside the feed-forward, as in `torch.nn`.
        """

        def added(part: nn.Module) -> nn.Module:
            norm = nn.LayerNorm(dim, epsilon, bias=bias)
            return PreNorm(part, norm, dropout=dropout) if pre_norm else PostNorm(part, norm, dropout=dropout)

        return cls(
            added(SelfAttention(dim, heads, bias=bias, dropout=dropout)),
            added(FeedForward(dim, hidden, activation=activation, bias=bias, dropout=dropout)),
            added(CrossAttention(dim, heads, bias=bias, dropout=dropout)) if reads_context else None,
        )

    @classmethod
    def from_torch(cls, layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> Self:
        """A block with a copy of the weights of PyTorch's layer, whose outputs and gradients it has.

        x is `[batch, length, dim]` whatever `batch_first` was; masks mean the contrary: see `torch_masks`.
        """
        attention, weight = layer.self_attn, layer.linear1.weight
        made = cls.paper(
            attention.embed_dim, attention.num_heads, layer.linear1.out_features,
            reads_context=isinstance(layer, nn.TransformerDecoderLayer), pre_norm=layer.norm_first,
            activation=copy.deepcopy(layer.activation), epsilon=layer.norm1.eps,
            bias=layer.linear1.bias is not None, dropout=layer.dropout.p,
        ).to(weight)  # fmt: skip
        copy_weights(made, layer)
        return made.train(layer.training)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        pattern: Pattern | Tensor | None = None,
        context: Tensor | KeysValues | None = None,
        context_pattern: Pattern | Tensor | None = None,
        *,
        score: Score | Tensor | None = None,
        context_score: Score | Tensor | None = None,
        positions: Tensor | Angles | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """What each position has become.

        Args:
            pattern, score: who sees whom among x, and what changes the scores.
            context: what the cross-attention reads, `[batch, keys, dim]`, or what its `project` made of it.
            context_pattern, context_score: which keys of the context each position of x sees.
            positions, cache: as in `MultiHeadAttention`.

        Raises:
            InvalidInput: a context without cross-attention, or the other way round.
        """
        if (self.cross is None) != (context is None):
            what = ("a context was given to a block without", "no context was given to a block with")
            raise InvalidInput(f"{what[context is None]} cross-attention: give both or neither")
        given = {"score": score, "positions": positions, "cache": cache}
        x = self.attention(x, pattern, **{name: value for name, value in given.items() if value is not None})
        if self.cross is not None:
            more = {} if context_score is None else {"score": context_score}
            x = self.cross(x, context, context_pattern, **more)
        out: Tensor = self.feed_forward(x)
        return out
