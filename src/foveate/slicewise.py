"""Operators under vmap: computed once for each slice.

Gradients of many outputs at once come here: `torch.autograd.grad(…, is_grads_batched=True)` and a vectorized Jacobian
run the backward pass under an older vmap than `torch.vmap`, which has a dispatch key of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

_LIBRARY = torch.library.Library("foveate", "FRAGMENT")


def slicewise(operator: CustomOpDef) -> None:
    """Let an operator that returns tensors run under `torch.vmap` and under the vmap of batched gradients."""

    def under_vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[list[Tensor], list[int]]:
        found = _stacked(operator, arguments, dims, info.batch_size)
        return found, [0] * len(found)

    def under_batched_gradients(*arguments: Any) -> list[Tensor]:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        whole = [_without_batch(x, level) for x in arguments]
        dims = [_dims(x) for x in arguments]
        size = next(size for x, dim in zip(whole, dims, strict=True) if (size := _size(x, dim)) is not None)
        return [torch._add_batch_dim(x, 0, level) for x in _stacked(operator, whole, dims, size)]

    operator.register_vmap(under_vmap)
    _LIBRARY.impl(operator._opoverload, under_batched_gradients, "Batched")


def _stacked(operator: Callable[..., Any], arguments: Sequence[Any], dims: Sequence[Any], size: int) -> list[Tensor]:
    results = [operator(*map(_part, arguments, dims, [n] * len(dims))) for n in range(size)]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def _part(x: Any, dim: Any, n: int) -> Any:
    """Slice n of an argument: `dim` is a number, None for one that all share, or a list of these for a list."""
    if isinstance(dim, list | tuple):
        return [_part(each, its, n) for each, its in zip(x, dim, strict=True)]
    return x if dim is None else x.select(dim, n)


def _is_batched(x: Any) -> bool:
    return isinstance(x, Tensor) and torch._C._dispatch_keys(x).has("Batched")


def _dims(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return [_dims(each) for each in x]
    return 0 if _is_batched(x) else None


def _without_batch(x: Any, level: int) -> Any:
    if isinstance(x, list | tuple):
        return [_without_batch(each, level) for each in x]
    return torch._remove_batch_dim(x, level, 0, 0) if _is_batched(x) else x


def _size(x: Any, dim: Any) -> int | None:
    """How many slices an argument has, None for one that all share."""
    if isinstance(dim, list):
        return next((size for each, its in zip(x, dim, strict=True) if (size := _size(each, its)) is not None), None)
    return None if dim is None else int(x.shape[dim])
