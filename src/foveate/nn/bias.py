"""Positions that act on the scores: a bias by distance, given to every layer as its `score`."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from foveate.score import Score, alibi, alibi_slopes, relative_bias
from foveate.values import whole


class ALiBi(nn.Module):
    """−slope_h · |query − key|: farther keys score lower, in each head at its own rate; nothing is learned.

    Calling it gives the score.

    Press et al. 2021, "Train short, test long": https://arxiv.org/abs/2108.12409

    >>> import torch
    >>> import foveate as fv
    >>> alibi = fv.nn.ALiBi(8)
    >>> fv.nn.SelfAttention(32, 8)(torch.randn(2, 5, 32), fv.causal, score=alibi()).shape
    torch.Size([2, 5, 32])
    """

    slopes: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = whole(heads, "the number of heads", 1)
        self.register_buffer("slopes", alibi_slopes(heads), persistent=False)

    def _apply(self, *given: Any, **named: Any) -> Self:
        super()._apply(*given, **named)  # type: ignore[no-untyped-call]
        # Moved but never rounded: bfloat16 has no 2^-½, and distances make the error large.
        self.slopes = alibi_slopes(self.heads).to(self.slopes.device)
        return self

    def forward(self) -> Score:
        return alibi(self.slopes)

    def extra_repr(self) -> str:
        return f"{self.heads}"


class RelativeBias(nn.Module):
    """A learned number for each bucket of distances and each head, added to the score; T5 gives one to all its layers.

    Calling it gives the score.

    Args:
        buckets: half of them for near distances, one each; the others for logarithmically growing ranges.
        max_distance: all that is farther falls into the last bucket; None = 2m + 1 buckets for the distances −m … m,
            those beyond at the ends (Shaw et al. 2018, https://arxiv.org/abs/1803.02155).
        bidirectional: buckets for both sides, for encoders; else for keys before the query, for decoders.

    Raffel et al. 2019, section 2.1: https://arxiv.org/abs/1910.10683

    >>> import torch
    >>> import foveate as fv
    >>> encoder = fv.nn.Encoder([fv.nn.Block.paper(32, 4)], relative=fv.nn.RelativeBias(4))
    >>> encoder(torch.randn(2, 5, 32)).shape
    torch.Size([2, 5, 32])
    """

    def __init__(
        self, heads: int, buckets: int = 32, max_distance: int | None = 128, *, bidirectional: bool = True
    ) -> None:
        super().__init__()
        self.max_distance, self.bidirectional = max_distance, bidirectional
        shape = whole(buckets, "the number of buckets", 1), whole(heads, "the number of heads", 1)
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.normal_(self.weight, std=0.02)
        self()  # says at once what does not fit

    def forward(self) -> Score:
        return relative_bias(self.weight, self.max_distance, bidirectional=self.bidirectional)

    def extra_repr(self) -> str:
        buckets, heads = self.weight.shape
        return f"{heads}, {buckets}, {self.max_distance}, bidirectional={self.bidirectional}"
