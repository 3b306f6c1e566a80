"""Linformer and Nyström attention with their parameters, for `attend=` of multi-head attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import InvalidInput
from foveate.mechanisms.lowrank import linformer_attention, nystrom_attention
from foveate.pattern.algebra import Pattern
from foveate.values import whole


class Linformer(nn.Module):
    """attend(q, k, v): attention to `size` learned mixtures of at most `length` keys.

    Args:
        length: the longest text.
        size: of what it is mixed down to.
        key_heads: projections for so many heads of keys; None = one for all.
        share: one projection for keys and values.

    Wang et al. 2020: https://arxiv.org/abs/2006.04768

    >>> import torch
    >>> import foveate as fv
    >>> layer = fv.nn.SelfAttention(32, 4, attend=fv.nn.Linformer(512, 16))
    >>> layer(torch.randn(2, 100, 32), fv.padding(torch.tensor([100, 31]))).shape
    torch.Size([2, 100, 32])
    """

    def __init__(self, length: int, size: int = 256, *, key_heads: int | None = None, share: bool = False) -> None:
        super().__init__()
        whole(length, "Linformer's length", 1)
        if whole(size, "Linformer's size", 1) > length:
            raise InvalidInput(f"Linformer was given size {size} for length {length}: wanted at most the length")
        shape = (size, length) if key_heads is None else (whole(key_heads, "key_heads", 1), size, length)
        self.key_projection = nn.Parameter(torch.empty(shape))
        self.value_projection = None if share else nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normally distributed with variance 1 / size, as the random projections of the paper's proof."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=weight.shape[-2] ** -0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | None = None, **options: Any) -> Tensor:
        _refuse("Linformer", options)
        return linformer_attention(q, k, v, self.key_projection, self.value_projection, pattern)

    def extra_repr(self) -> str:
        return ", ".join(f"{size}" for size in self.key_projection.shape)


class Nystrom(nn.Module):
    """attend(q, k, v): softmax attention by way of `landmarks`, and a depthwise convolution of v.

    Args:
        key_heads: how many heads of values there are to convolve.
        landmarks, iterations: as in `fv.nystrom_attention`.
        kernel: the width of the convolution, an odd number; None = no convolution, as cross-attention wants.

    Xiong et al. 2021: https://arxiv.org/abs/2102.03902

    >>> import torch
    >>> import foveate as fv
    >>> layer = fv.nn.SelfAttention(32, 4, attend=fv.nn.Nystrom(4, 16))
    >>> layer(torch.randn(2, 100, 32), fv.padding(torch.tensor([100, 31]))).shape
    torch.Size([2, 100, 32])
    """

    def __init__(self, key_heads: int, landmarks: int = 64, *, iterations: int = 6, kernel: int | None = 33) -> None:
        super().__init__()
        self.landmarks = whole(landmarks, "the number of landmarks", 1)
        self.iterations = whole(iterations, "the number of iterations", 0)
        if kernel is not None and whole(kernel, "the width of the convolution", 1) % 2 == 0:
            raise InvalidInput(
                f"the width of the convolution is {kernel}: wanted an odd number, the query in the middle"
            )
        shape = whole(key_heads, "key_heads", 1), kernel
        self.convolution = None if kernel is None else nn.Parameter(torch.empty(*shape))  # type: ignore[arg-type]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within ± width^-½, as PyTorch draws convolutions."""
        if self.convolution is not None:
            bound = self.convolution.shape[1] ** -0.5
            nn.init.uniform_(self.convolution, -bound, bound)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | None = None, **options: Any) -> Tensor:
        _refuse("Nyström attention", options)
        return nystrom_attention(
            q, k, v, pattern, landmarks=self.landmarks, iterations=self.iterations, convolution=self.convolution
        )

    def extra_repr(self) -> str:
        return f"landmarks={self.landmarks}, iterations={self.iterations}"


def _refuse(what: str, options: dict[str, Any]) -> None:
    if options:
        raise InvalidInput(
            f"{what} has no weights of queries × keys, so it takes no {' or '.join(options)}: leave it out"
        )
