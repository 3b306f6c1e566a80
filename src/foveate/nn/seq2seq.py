"""The whole model of "Attention is all you need": from tokens to scores of the next token, and how it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.errors import InvalidInput
from foveate.generation.cache import KeyValueCache
from foveate.generation.greedy import greedy
from foveate.nn.position import Sinusoidal
from foveate.nn.transformer import Transformer
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import causal, padding
from foveate.values import describe, integers, whole


class Seq2Seq(nn.Module):
    """A Transformer between tokens: word(token) · √dim + position at both ends, and scores decoder(…) · wordᵀ.

    One table serves the source, the target and the scores, as in section 3.4 of the paper.

    Args:
        vocabulary: how many tokens there are; or (of the source, of the target), which then have a table each.
        transformer: None = the paper's, with `dim`.
        position: added to the words; None = `Sinusoidal(dim)`.
        dropout: of the sums of words and positions, in training.
        pad: the token that fills up shorter texts, on the right: nobody sees it in the source, and it has no loss.

    Vaswani et al. 2017: https://arxiv.org/abs/1706.03762

    >>> import torch
    >>> import foveate as fv
    >>> model = fv.nn.Seq2Seq(97, 32, transformer=fv.nn.Transformer.paper(32, heads=4, layers=2), pad=0).eval()
    >>> source = torch.tensor([[5, 7, 2, 0], [3, 1, 4, 1]])
    >>> model(source, torch.tensor([[1, 8], [1, 9]])).shape
    torch.Size([2, 2, 97])
    >>> model.generate(source, new=6, begin=1).shape
    torch.Size([2, 7])
    """

    def __init__(
        self,
        vocabulary: int | tuple[int, int],
        dim: int = 512,
        *,
        transformer: Transformer | None = None,
        position: nn.Module | None = None,
        dropout: float = 0.1,
        pad: int | None = None,
    ) -> None:
        super().__init__()
        source, target = vocabulary if isinstance(vocabulary, tuple) else (vocabulary, vocabulary)
        self.dim, self.pad = whole(dim, "dim", 1), pad
        self.word = nn.Embedding(whole(target, "the vocabulary", 1), dim)
        self.source_word = nn.Embedding(source, dim) if isinstance(vocabulary, tuple) else self.word
        for table in (self.word, self.source_word):
            nn.init.normal_(table.weight, std=dim**-0.5)
        self.position = Sinusoidal(dim) if position is None else position
        self.dropout = nn.Dropout(dropout)
        self.transformer = Transformer.paper(dim, dropout=dropout) if transformer is None else transformer

    def encode(self, source: Int[Tensor, "batch keys"]) -> tuple[Tensor, Pattern | None]:
        """The context of these tokens, `[batch, keys, dim]`, and who may be seen in it."""
        source = integers(source, "the source", (2,))
        seen = None if self.pad is None else padding(source != self.pad)
        x = self.dropout(self.position(self.source_word(source) * math.sqrt(self.dim)))
        return self.transformer.encoder(x, seen), seen

    def decode(
        self,
        target: Int[Tensor, "batch length"],
        context: Tensor,
        context_pattern: Pattern | None = None,
        *,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """What each token of the target has become; `scores` says what comes next."""
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + target.shape[1], device=target.device)
        x = self.dropout(self.position(self.word(target) * math.sqrt(self.dim), positions))
        out: Tensor = self.transformer.decoder(x, context, causal, context_pattern, cache=cache)
        return out

    def scores(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length vocabulary"]:
        """The scores of every token of the vocabulary for what comes next."""
        return functional.linear(x, self.word.weight)

    def forward(
        self, source: Int[Tensor, "batch keys"], target: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """The scores of what comes after each token of the target."""
        return self.scores(self.decode(integers(target, "the target", (2,)), *self.encode(source)))

    def loss(
        self, source: Int[Tensor, "batch keys"], target: Int[Tensor, "batch length"], *, smoothing: float = 0.1
    ) -> Float[Tensor, ""]:
        """−Σ_w p(w)·ln softmax(scores)_w, mean over tokens; p = 1 − ε for the true one, and ε shared by all.

        The target begins with the token that `generate` begins with; each token but the first is predicted.
        Label smoothing: Szegedy et al. 2015, https://arxiv.org/abs/1512.00567
        """
        target = integers(target, "the target", (2,))
        if target.shape[1] < 2:
            raise InvalidInput(f"the target is {describe(target)}: wanted at least a beginning and one more token")
        scores = self(source, target[:, :-1])
        wanted = target[:, 1:].long()
        none = -100 if self.pad is None else self.pad
        return functional.cross_entropy(
            scores.flatten(0, 1), wanted.flatten(), ignore_index=none, label_smoothing=smoothing
        )

    def generate(
        self, source: Int[Tensor, "batch keys"], *, new: int, begin: int, end: int | None = None
    ) -> Int[Tensor, "batch longer"]:
        """`begin` and up to `new` tokens, each the likeliest after those before it; after `end` a row is `pad`."""
        with torch.no_grad():
            context, seen = self.encode(source)

        def decoder(target: Tensor, pattern: None, positions: None, cache: KeyValueCache) -> Tensor:
            return self.decode(target, context, seen, cache=cache)

        first = torch.full_like(source[:, :1], begin)
        cache = KeyValueCache(self.transformer.layers)
        return greedy(decoder, self.scores, first, cache, new=new, end=end, pad=self.pad)


def inverse_sqrt_rate(dim: int, warmup: int = 4000) -> Callable[[int], float]:
    """The paper's learning rate, dim^-½ · min(step^-½, step · warmup^-1½), for `torch.optim.lr_scheduler.LambdaLR`.

    It grows for `warmup` steps and then falls with 1/√step; steps count from 0. Give the optimizer a rate of 1.

    >>> import foveate as fv
    >>> rate = fv.nn.inverse_sqrt_rate(512)
    >>> [round(rate(step), 6) for step in (0, 3999, 15999)]
    [0.0, 0.000699, 0.000349]
    """
    whole(dim, "dim", 1), whole(warmup, "warmup", 1)
    return lambda step: dim**-0.5 * min((step + 1) ** -0.5, (step + 1) * warmup**-1.5)
