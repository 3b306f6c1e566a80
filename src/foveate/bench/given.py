"""What the contestants of the table of models are given: the same for all."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from foveate.bench.models import ModelRow


def drawn() -> torch.Generator:
    """Random numbers that are the same every time."""
    return torch.Generator().manual_seed(7)


def words(row: ModelRow, length: int) -> Tensor:
    """Token ids `[batch, length]`."""
    vocabulary = row.config.get("vocab_size", 30522)
    return torch.randint(0, vocabulary, (row.sizes[0], length), generator=drawn())


def padded(row: ModelRow) -> tuple[Tensor, Tensor]:
    """Token ids, and which of them are no padding."""
    (batch, _, _, length, *_), (shortest, longest) = row.sizes, row.lengths
    lengths = torch.linspace(shortest * length, longest * length, batch).round().clamp(min=1)
    return words(row, length), torch.arange(length) < lengths[:, None]


def images(row: ModelRow) -> Tensor:
    """Pixels `[batch, 3, side, side]`."""
    side = row.config["image_size"]
    return torch.randn(row.sizes[0], 3, side, side, generator=drawn())


def remembered(row: ModelRow, layers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For every layer random keys and values `[batch, key heads, keys − queries, dim]` of what was read already."""
    (batch, _, heads, tokens, keys, dim), draw = row.sizes, drawn()
    for _ in range(layers):
        k, v = (torch.randn(batch, heads, keys - tokens, dim, generator=draw).to(row.dtype) for _ in range(2))
        yield k, v
