"""Rotary positions in more than one direction, for images and videos: each pair of entries follows one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.nn.position import Rotary
from foveate.rotary import Angles, Scaling, angles
from foveate.values import describe, integers, whole


class AxialRotary(Rotary):
    """Rotary positions by axis: the first pairs turn by the row, the next by the column, each from fast to slow.

    Args:
        dim: how many entries of a head are turned; each axis gets an equal share of them.
        axes: 2 for images, 3 for videos.
        base, interleaved: as in `Rotary`.

    Positions are `[axes, length]` or `[axes, batch, length]`; `fv.rotary.grid(rows, columns)` are those of an image.

    Raises:
        InvalidInput: a dim that does not divide into pairs for every axis; positions of another number of axes.

    Qwen2-VL, 2-D RoPE: https://arxiv.org/abs/2409.12191

    >>> import torch
    >>> import foveate as fv
    >>> rotary = fv.nn.AxialRotary(8)
    >>> layer = fv.nn.SelfAttention(32, 4, rotary=rotary)
    >>> layer(torch.randn(1, 6, 32), positions=rotary.angles(fv.rotary.grid(2, 3))).shape
    torch.Size([1, 6, 32])
    """

    def __init__(self, dim: int, axes: int = 2, *, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__(dim, base=base, interleaved=interleaved)
        self.axes = whole(axes, "the number of axes", 1)
        if dim % (2 * axes):
            raise InvalidInput(f"the rotary dim {dim} does not divide into pairs for {axes} axes: change one of them")

    def angles(
        self,
        positions: Int[Tensor, "axes length"] | Int[Tensor, "axes batch length"],
        dtype: torch.dtype = torch.float32,
    ) -> Angles:
        """cos and sin for these positions, to be worked out once and handed to every layer."""
        positions = _by_axis(positions, self.axes)
        each = [angles(row, self.dim // self.axes, self.base, None, dtype) for row in positions]
        cos, sin = (torch.cat(parts, -1) for parts in zip(*each, strict=True))
        return Angles(cos, sin)

    def extra_repr(self) -> str:
        return f"{self.dim}, axes={self.axes}, base={self.base}, interleaved={self.interleaved}"


class MultimodalRotary(Rotary):
    """M-RoPE: pair i turns by θ_i · the time, the row or the column; text, where all three are equal, as in `Rotary`.

    Args:
        sections: how many pairs follow each axis: time, row, column; they add up to dim / 2.
        alternating: the axes take pairs in turn, as Qwen3-VL; else a run of pairs each, as Qwen2-VL.
        base, interleaved, scaling: as in `Rotary`.

    Positions are `[3, length]` or `[3, batch, length]`, and `[length]` of text alone.

    Raises:
        InvalidInput: sections that do not add up; positions of another number of axes.

    Wang et al. 2024, "Qwen2-VL", section 2.1: https://arxiv.org/abs/2409.12191; alternating: Bai et al. 2025,
    https://arxiv.org/abs/2511.21631

    >>> import torch
    >>> import foveate as fv
    >>> rotary = fv.nn.MultimodalRotary(128, (16, 24, 24))
    >>> text, image = torch.arange(4).expand(3, -1), 4 + torch.cat([torch.zeros(1, 6).long(), fv.rotary.grid(2, 3)])
    >>> rotary(torch.randn(1, 8, 10, 128), torch.cat([text, image], 1)).shape
    torch.Size([1, 8, 10, 128])
    """

    def __init__(
        self,
        dim: int,
        sections: Sequence[int] = (16, 24, 24),
        *,
        alternating: bool = False,
        base: float = 10000.0,
        interleaved: bool = False,
        scaling: Scaling | None = None,
    ) -> None:
        super().__init__(dim, base=base, interleaved=interleaved, scaling=scaling)
        self.sections, self.alternating = tuple(sections), alternating
        if sum(self.sections) != dim // 2 or min(self.sections, default=0) < 0:
            raise InvalidInput(f"the sections are {self.sections}: wanted numbers of pairs that add up to {dim // 2}")
        if alternating:
            turns = [[n, axis] for axis, count in enumerate(self.sections[1:], 1) for n in range(count)]
            taken = {n * len(self.sections) + axis: axis for n, axis in turns}
            if max(taken, default=0) >= dim // 2:
                raise InvalidInput(f"the sections {self.sections} do not alternate: none may be larger than the first")
            self.axis = [taken.get(pair, 0) for pair in range(dim // 2)]
        else:
            self.axis = [axis for axis, count in enumerate(self.sections) for _ in range(count)]

    def angles(
        self,
        positions: Int[Tensor, " length"] | Int[Tensor, "axes length"] | Int[Tensor, "axes batch length"],
        dtype: torch.dtype = torch.float32,
    ) -> Angles:
        """cos and sin for these positions, to be worked out once and handed to every layer."""
        if isinstance(positions, Tensor) and positions.dim() == 1:
            return super().angles(positions, dtype)
        positions = _by_axis(positions, len(self.sections))
        axis = torch.tensor(self.axis, device=positions.device)
        return angles(positions, self.dim, self.base, self.scaling, dtype, axis)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sections={self.sections}, alternating={self.alternating}"


def _by_axis(positions: Tensor, axes: int) -> Tensor:
    positions = integers(positions, "positions", (2, 3))
    if positions.shape[0] != axes:
        raise InvalidInput(f"positions are {describe(positions)}: wanted [{axes}, length] or [{axes}, batch, length]")
    return positions
