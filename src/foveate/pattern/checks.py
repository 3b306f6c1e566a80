"""Why a pattern's tensor does not fit a call."""

from __future__ import annotations

from torch import Tensor

from foveate.pattern.algebra import Pattern
from foveate.positions import Extent


def batch_misfit(pattern: Pattern, tensors: list[Tensor], extent: Extent) -> list[str]:
    """Tensors with one entry a batch row."""
    return [
        f"{pattern!r} has {tensor.shape[0]} entries but the batch is {extent.batch}"
        for tensor in tensors
        if extent.batch not in (None, tensor.shape[0])
    ]


def row_misfit(
    pattern: Pattern, table: Tensor, extent: Extent, need: int, what: str, *, exact: bool = False
) -> list[str]:
    """A table `[batch or 1, positions]` that has to cover, or to match exactly, `need` positions."""
    batch, length = table.shape
    fits = length == need if exact else length >= need
    reasons = []
    if batch != 1 and extent.batch not in (None, batch):
        reasons.append(f"{pattern!r} has {batch} batch rows but the batch is {extent.batch}")
    if not fits:
        reasons.append(f"{pattern!r} covers {length} {what}: wanted {'' if exact else 'at least '}{need}")
    return reasons
