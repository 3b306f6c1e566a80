"""`_native_multi_head_attention`, the "fast path" of nn.MultiheadAttention and nn.TransformerEncoderLayer in eval.

It projects, attends and projects back in one operator. Between the same projections ours calls PyTorch's attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence

from foveate.integrations.fused import EMPTY, SLOWER

# How masks are laid out, by their type: [queries, keys], [batch, keys], [batch, heads, queries, keys].
_LAID_OUT: dict[int, Callable[[Tensor], Tensor]] = {0: lambda x: x, 1: lambda x: x[:, None, None], 2: lambda x: x}

_FEW = 1 << 14  # numbers in a nested tensor, below which PyTorch takes less time than what we do around our kernels
_SHORT = 128  # texts of a nested tensor that are shorter are padded: a call for each would take longer

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
    fits = fits and all(x.dtype == query.dtype and _alike(query, x) for x in (key, value))
    fits = fits and all(x.dtype == query.dtype for x in weights)
    if not fits or query.dim() != 3 or query.size(2) != width:
        return "shapes that are broadcast or wrong"
    if query.is_nested:
        return "nested tensors beside a mask" if mask is not None else SLOWER if query.numel() < _FEW else ""
    if mask is None:
        return ""
    batch, length, _ = query.shape
    wanted = {0: (length, length), 1: (batch, length), 2: (batch, heads, length, length)}
    return (
        "" if wanted.get(-1 if mask_type is None else mask_type) == mask.shape else "a mask of unusual shape or dtype"
    )


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two are the same tensor, as here they are meant to be, or as long: autocast makes a copy of each."""
    if one.is_nested != other.is_nested or one.dim() != other.dim():
        return False
    if not one.is_nested:
        return one is other or one.shape == other.shape
    if not (one.is_contiguous() and other.is_contiguous()):
        return False
    return one is other or [x.shape for x in one.unbind()] == [x.shape for x in other.unbind()]


def computed(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, heads: int,
    weights: tuple[Tensor, Tensor, Tensor, Tensor], mask: Tensor | None, mask_type: int | None,
) -> Tensor:  # fmt: skip
    """The output `[batch, length, width]`, or a nested tensor of one for each sequence."""
    in_weight, in_bias, out_weight, out_bias = weights

    def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = x.unflatten(-1, (3, heads, -1)).movedim(-3, 0).transpose(-2, -3)
        return q, k, v

    def joined(x: Tensor) -> Tensor:
        return x.transpose(-2, -3).flatten(-2)

    def projected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q is k is v:
            return linear(q, in_weight, in_bias)
        return torch.cat([linear(*x) for x in zip((q, k, v), in_weight.chunk(3), in_bias.chunk(3), strict=True)], -1)

    if query.is_nested:
        lengths = [x.shape[0] for x in query.unbind()]
        rows = query.values().view(-1, in_weight.shape[1])
        others = () if query is key is value else (key.values().view_as(rows), value.values().view_as(rows))
        rows = projected(rows, *(others or (rows, rows)))
        if max(lengths) < _SHORT:
            at = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            padded = pad_sequence(rows.split(lengths), batch_first=True)
            out = joined(attend(*split(padded), at[:, None, None], False))[at]
        else:
            each = (attend(*split(text), None, False)[0] for text in rows[None].split(lengths, 1))
            out = joined(torch.cat(list(each), -2))
        return torch.nested.as_nested_tensor(list(linear(out, out_weight, out_bias).split(lengths)))
    q, k, v = split(projected(query, key, value))
    if mask is None or mask_type is None:
        return linear(joined(attend(q, k, v, None, False)), out_weight, out_bias)
    mask = _LAID_OUT[mask_type](mask)
    mask = mask[tuple(slice(0, 1 if step == 0 else None) for step in mask.stride()[:-2])]  # what was only expanded
    # True hides here; and a float mask is added, where PyTorch's own hides all that is not 0.
    mask = mask.logical_not() if mask.dtype == torch.bool else mask.to(query.dtype)
    causal = mask.shape[:-2].numel() == 1 and mask.shape[-2] == mask.shape[-1] and _is_causal(mask.flatten(0, -2))
    return linear(joined(attend(q, k, v, None if causal else mask, causal)), out_weight, out_bias)


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask `[n, n]` is the causal one: that hint does not come down to here."""
    hides = mask.dtype != torch.bool
    if bool(mask[0, -1] != (-math.inf if hides else 0)):  # its corner gives away most others
        return False
    return torch.equal(mask, torch.full_like(mask, -math.inf).triu(1) if hides else torch.ones_like(mask).tril())
