"""The strided and the fixed attention of sparse Transformers, for `attend=` of multi-head attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import InvalidInput
from foveate.functional import attention
from foveate.mechanisms.strided import dilated_attention, fixed_attention, run_fixed, strided_attention
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import fixed, strided
from foveate.pattern.positional import causal, chunks, every, window
from foveate.problem import problem
from foveate.values import whole


class Strided(nn.Module):
    """attend(q, k, v): the last `stride` keys and every stride-th before, in time length · (stride + length / stride).

    Args:
        stride: least work at √length.
        split: the first half of the heads takes the last keys, the second half every stride-th.

    With a pattern, a score or dropout, and for fewer queries than keys, it is attention with the pattern
    `strided(stride)`: the same numbers in more time.

    Child et al. 2019, section 4: https://arxiv.org/abs/1904.10509

    >>> import torch
    >>> import foveate as fv
    >>> layer = fv.nn.SelfAttention(32, 4, attend=fv.nn.Strided(8))
    >>> layer(torch.randn(2, 50, 32)).shape
    torch.Size([2, 50, 32])
    """

    def __init__(self, stride: int, *, split: bool = False) -> None:
        super().__init__()
        self.stride, self.split = whole(stride, "the stride", 1), split

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | None = None, **options: Any) -> Tensor:
        if self.split:
            near, far = _halves(q, k, v)
            last, spread = causal & window(self.stride), causal & window(right=0, step=self.stride)
            beside = attention(*near, _both(last, pattern), **options)
            if _plain(q, k, pattern, options):
                return torch.cat([beside, dilated_attention(*far, self.stride, causal)], 1)
            return torch.cat([beside, attention(*far, _both(spread, pattern), **options)], 1)
        if _plain(q, k, pattern, options):
            return strided_attention(q, k, v, self.stride)
        return attention(q, k, v, _both(strided(self.stride), pattern), **options)

    def extra_repr(self) -> str:
        return f"{self.stride}" + (", split=True" if self.split else "")


class Fixed(nn.Module):
    """attend(q, k, v): the own block, and the last keys of every block before.

    Args:
        stride: the length of a block.
        last: keys of each block that everybody after it sees.
        split: the first half of the heads takes the own block, the second half the last keys of blocks, which in the
            first block may be none: those rows are 0.

    As for `Strided`, with anything more it is attention with the pattern `fixed(stride, last)`.

    Child et al. 2019, section 4: https://arxiv.org/abs/1904.10509

    >>> import torch
    >>> import foveate as fv
    >>> layer = fv.nn.SelfAttention(32, 4, attend=fv.nn.Fixed(8, 2, split=True))
    >>> layer(torch.randn(2, 50, 32)).shape
    torch.Size([2, 50, 32])
    """

    def __init__(self, stride: int, last: int = 1, *, split: bool = False) -> None:
        super().__init__()
        self.stride, self.last, self.split = stride, last, split
        fixed(stride, last)  # complains of what does not fit

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | None = None, **options: Any) -> Tensor:
        if self.split:
            near, far = _halves(q, k, v)
            own, summaries = causal & chunks(self.stride), causal & every(self.stride, self.last)
            inside = attention(*near, _both(own, pattern), **options)
            if _plain(q, k, pattern, options):
                return torch.cat([inside, run_fixed(problem(*far), self.stride, self.last, own=False)], 1)
            return torch.cat([inside, attention(*far, _both(summaries, pattern), **options)], 1)
        if _plain(q, k, pattern, options):
            return fixed_attention(q, k, v, self.stride, self.last)
        return attention(q, k, v, _both(fixed(self.stride, self.last), pattern), **options)

    def extra_repr(self) -> str:
        return f"{self.stride}, {self.last}" + (", split=True" if self.split else "")


def _plain(q: Tensor, k: Tensor, pattern: Pattern | None, options: dict[str, Any]) -> bool:
    return pattern is None and not options and q.shape[-2] == k.shape[-2]


def _both(own: Pattern, pattern: Pattern | None) -> Pattern:
    return own if pattern is None else own & pattern


def _halves(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The first and the second half of the heads of each."""
    if q.shape[1] % 2 or k.shape[1] % 2:
        raise InvalidInput(f"split gives half of the heads to each part, and q has {q.shape[1]} and k {k.shape[1]}: "
                           "wanted even numbers")  # fmt: skip
    (q1, q2), (k1, k2), (v1, v2) = (x.chunk(2, 1) for x in (q, k, v))
    return [(q1, k1, v1), (q2, k2, v2)]
