"""`_native_multi_head_attention`, the "fast path" of nn.MultiheadAttention and nn.TransformerEncoderLayer in eval.

It projects, attends and projects back in one operator. Between the same projections ours calls PyTorch's attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from foveate.integrations.fused import EMPTY

# How masks are laid out, by their type: [queries, keys], [batch, keys], [batch, heads, queries, keys].
_LAID_OUT: dict[int, Callable[[Tensor], Tensor]] = {0: lambda x: x, 1: lambda x: x[:, None, None], 2: lambda x: x}

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]  # of q, k, v, mask, whether it is causal


def refusal(
    query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, weights: tuple[Tensor, Tensor, Tensor, Tensor],
    mask: Tensor | None, need_weights: bool, mask_type: int | None,
) -> str:  # fmt: skip
    """Why a call is left to PyTorch, of whatever it will say about it; empty if `computed` takes it."""
    if need_weights:
        return "the weights are asked for"
    if not query.numel():
        return EMPTY
    sizes = [tuple(x.shape) for x in weights]
    fits = sizes == [(3 * width, width), (3 * width,), (width, width), (width,)] and heads > 0 and width % heads == 0
    fits = fits and query is key is value and query.dim() == 3 and all(x.dtype == query.dtype for x in weights)
    if not fits or query.size(2) != width or (query.is_nested and not query.is_contiguous()):
        return "shapes that are broadcast or wrong"
    if mask is None:
        return ""
    if query.is_nested:
        return "nested tensors beside a mask"
    batch, length, _ = query.shape
    wanted = {0: (length, length), 1: (batch, length), 2: (batch, heads, length, length)}
    return "" if wanted.get(-1 if mask_type is None else mask_type) == mask.shape else "a mask of unusual shape or dtype"


def computed(
    attend: Attend, query: Tensor, heads: int, weights: tuple[Tensor, Tensor, Tensor, Tensor], mask: Tensor | None,
    mask_type: int | None,
) -> Tensor:  # fmt: skip
    """The output `[batch, length, width]`, or a nested tensor of one for each sequence."""
    in_weight, in_bias, out_weight, out_bias = weights

    def projected(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = linear(x, in_weight, in_bias).unflatten(-1, (3, heads, -1)).movedim(-3, 0).transpose(-2, -3)
        return q, k, v

    def joined(x: Tensor) -> Tensor:
        return linear(x.transpose(-2, -3).flatten(-2), out_weight, out_bias)

    if query.is_nested:
        lengths = [x.shape[0] for x in query.unbind()]
        parts = zip(*(x.split(lengths, -2) for x in projected(query.values().view(-1, in_weight.shape[1]))), strict=True)
        out = torch.cat([attend(q[None], k[None], v[None], None, False)[0] for q, k, v in parts], -2)
        return torch.nested.as_nested_tensor(list(joined(out).split(lengths)))
    if mask is None or mask_type is None:
        return joined(attend(*projected(query), None, False))
    mask = _LAID_OUT[mask_type](mask)
    mask = mask[tuple(slice(0, 1 if step == 0 else None) for step in mask.stride()[:-2])]  # what was only expanded
    # True hides here; and a float mask is added, where PyTorch's own hides all that is not 0.
    mask = mask.logical_not() if mask.dtype == torch.bool else mask.to(query.dtype)
    causal = mask.shape[:-2].numel() == 1 and mask.shape[-2] == mask.shape[-1] and _is_causal(mask.flatten(0, -2))
    return joined(attend(*projected(query), None if causal else mask, causal))


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask `[n, n]` is the causal one: that hint does not come down to here."""
    hides = mask.dtype != torch.bool
    if bool(mask[0, -1] != (-math.inf if hides else 0)):  # its corner gives away most others
        return False
    return torch.equal(mask, torch.full_like(mask, -math.inf).triu(1) if hides else torch.ones_like(mask).tril())
