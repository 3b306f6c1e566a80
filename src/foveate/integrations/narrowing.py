"""One call of PyTorch's attention, narrowed by a pattern: what the integrations of libraries that make it share."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.functional import attention
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import causal, from_mask
from foveate.score import bias


def narrowed(
    pattern: Pattern | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention `[B, H, N, D]` where the pattern allows it as well; positions count from the first.

    Grouped heads need no `enable_gqa`, so that is not looked at.

    Raises:
        InvalidInput: a shape does not fit, of the pattern or of the call; the message says which.
    """
    score = None
    if is_causal:
        pattern = causal if pattern is None else pattern & causal
    if attn_mask is not None:
        mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        if mask.dtype == torch.bool:
            pattern = from_mask(mask) if pattern is None else pattern & from_mask(mask)
        else:
            score = bias(mask)
    return attention(query, key, value, pattern, score=score, scale=scale, query_start=0, dropout=dropout_p)
