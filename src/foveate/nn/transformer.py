"""The Transformer: an encoder reads the source, a decoder writes the target, each token from those before it.

    source ─ Encoder ──────────────────────────┐ context
                                               ▼
    target ─ Decoder: attention to itself ─ to the context ─ feed-forward ─ … ─ what comes next

Vaswani et al. 2017, "Attention is all you need": https://arxiv.org/abs/1706.03762
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Self, cast

from jaxtyping import Float
from torch import Tensor, nn

from foveate.errors import InvalidInput
from foveate.generation.cache import KeyValueCache
from foveate.nn.block import Block
from foveate.nn.pytorch import rename_layers
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import causal
from foveate.rotary import Angles
from foveate.score import Score, bias

Relative = Callable[[], Score]


class Encoder(nn.Module):
    """Blocks, one after the other, and a norm behind the last where one is given: norm(block_N(… block_1(x))).

    Args:
        norm: pre-norm blocks need one.
        relative: a part that gives the score of every layer: `ALiBi(heads)`, `RelativeBias(heads)`.

    >>> import torch
    >>> import foveate as fv
    >>> encoder = fv.nn.Encoder(fv.nn.Block.paper(32, 4) for _ in range(2))
    >>> encoder(torch.randn(2, 5, 32), fv.padding(torch.tensor([5, 3]))).shape
    torch.Size([2, 5, 32])
    """

    def __init__(
        self, blocks: Iterable[nn.Module], norm: nn.Module | None = None, *, relative: Relative | None = None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.relative = norm, relative
        self.register_load_state_dict_pre_hook(rename_layers)  # type: ignore[no-untyped-call]

    @classmethod
    def from_torch(cls, module: nn.TransformerEncoder | nn.TransformerDecoder) -> Self:
        """An `Encoder` or a `Decoder` with a copy of the weights of PyTorch's, whose outputs and gradients it has.

        x is `[batch, length, dim]` whatever `batch_first` was; masks mean the contrary: see `torch_masks`. In eval mode
        without gradients PyTorch may give 0 for padded positions of x; here they are what their queries see.
        """
        made = cls(map(Block.from_torch, module.layers), copy.deepcopy(module.norm))
        return made.train(module.training)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        pattern: Pattern | Tensor | None = None,
        *,
        score: Score | Tensor | None = None,
        positions: Tensor | Angles | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        score = _together(self.relative, score)
        for block in self.blocks:
            x = block(x, pattern, score=score, positions=positions)
        return x if self.norm is None else self.norm(x)


class Decoder(Encoder):
    """Blocks that see what came before and, where they have cross-attention, a context.

    Without a context it is the body of a language model.

    >>> import torch
    >>> import foveate as fv
    >>> decoder, context = fv.nn.Decoder([fv.nn.Block.paper(32, 4, reads_context=True)]), torch.randn(2, 7, 32)
    >>> decoder(torch.randn(2, 5, 32), context, context_pattern=fv.padding(torch.tensor([7, 3]))).shape
    torch.Size([2, 5, 32])
    """

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch keys context_dim"] | None = None,
        pattern: Pattern | Tensor | None = causal,
        context_pattern: Pattern | Tensor | None = None,
        *,
        score: Score | Tensor | None = None,
        context_score: Score | Tensor | None = None,
        positions: Tensor | Angles | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """What each position has become.

        Args:
            pattern: who sees whom among x and what the cache holds. One that is given stands alone: `fv.causal & …`
                for more than causal; None = everyone sees everyone.
            context_pattern: which keys of the context each position sees, `fv.padding(lengths)`.
            positions: as in `MultiHeadAttention`.
            cache: keys and values of earlier calls; those of the context are projected in the first call alone.
        """
        score = _together(self.relative, score)
        for n, block in enumerate(self.blocks):
            seen: Any = context
            if cache is not None and context is not None:
                seen = cache.once(n, lambda block=block: block.cross.part.project(context))  # type: ignore[misc]
            x = block(
                x, pattern, seen, context_pattern, score=score, context_score=context_score, positions=positions,
                cache=None if cache is None else cache[n],
            )  # fmt: skip
        return x if self.norm is None else self.norm(x)


class Transformer(nn.Module):
    """decoder(target, encoder(source)), from vectors to vectors, as `torch.nn.Transformer`.

    `Seq2Seq` has the embeddings and the scores of the next token around it.

    >>> import torch
    >>> import foveate as fv
    >>> model = fv.nn.Transformer.paper(dim=32, heads=4, layers=2)
    >>> model(torch.randn(2, 7, 32), torch.randn(2, 5, 32), fv.padding(torch.tensor([7, 3]))).shape
    torch.Size([2, 5, 32])
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    @classmethod
    def paper(
        cls,
        dim: int = 512,
        heads: int = 8,
        layers: int = 6,
        hidden: int | None = None,
        *,
        pre_norm: bool = False,
        dropout: float = 0.1,
    ) -> Self:
        """The model of the paper, section 3; its base size unless others are given. hidden None = 4 · dim."""

        def blocks(reads_context: bool) -> Iterable[Block]:
            for _ in range(layers):
                yield Block.paper(
                    dim, heads, hidden, reads_context=reads_context, pre_norm=pre_norm, dropout=dropout
                )  # fmt: skip

        def norm() -> nn.Module | None:
            return nn.LayerNorm(dim) if pre_norm else None

        made = cls(Encoder(blocks(False), norm()), Decoder(blocks(True), norm()))
        for parameter in made.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        return made

    @classmethod
    def from_torch(cls, module: nn.Transformer) -> Self:
        """A model with a copy of the weights of PyTorch's: see `Encoder.from_torch`.

        Raises:
            InvalidInput: its encoder or decoder is of another class.
        """
        for part, kind in ((module.encoder, nn.TransformerEncoder), (module.decoder, nn.TransformerDecoder)):
            if not isinstance(part, kind):
                raise InvalidInput(f"the nn.Transformer has a {type(part).__name__}: wanted a {kind.__name__}")
        made = cls(Encoder.from_torch(module.encoder), Decoder.from_torch(module.decoder))
        return made.train(module.training)

    @property
    def layers(self) -> int:
        """How many blocks the decoder has, each with a cache of its own."""
        return len(cast(nn.ModuleList, self.decoder.blocks))

    def forward(
        self,
        source: Float[Tensor, "batch keys dim"],
        target: Float[Tensor, "batch length dim"],
        source_pattern: Pattern | Tensor | None = None,
        target_pattern: Pattern | Tensor | None = causal,
        context_pattern: Pattern | Tensor | None = None,
        *,
        source_score: Score | Tensor | None = None,
        target_score: Score | Tensor | None = None,
        context_score: Score | Tensor | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """What each position of the target has become.

        Args:
            source_pattern: who sees whom in the source; `fv.padding(lengths)` where it is padded.
            target_pattern: as the pattern of `Decoder`.
            context_pattern: which positions of the source those of the target see: give `fv.padding(lengths)` here too.
        """
        context = self.encoder(source, source_pattern, score=source_score)
        out: Tensor = self.decoder(
            target, context, target_pattern, context_pattern, score=target_score, context_score=context_score
        )
        return out


def _together(relative: Relative | None, score: Score | Tensor | None) -> Score | Tensor | None:
    if relative is None or score is None:
        return score if relative is None else relative()
    return relative() + (bias(score) if isinstance(score, Tensor) else score)
