"""One call of PyTorch's attention, narrowed by a pattern: what the integrations of libraries that make it share."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.functional import attention, attention_with_lse, merge
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import causal, from_mask
from foveate.score import Score, bias


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
    if is_causal:
        pattern = causal if pattern is None else pattern & causal
    pattern, score = _masked(pattern, attn_mask)
    return attention(query, key, value, pattern, score=score, scale=scale, query_start=0, dropout=dropout_p)


def narrowed_among(
    tokens: range,
    pattern: Pattern,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The same where the pattern is about some tokens among the keys; all others see, and are seen, as without it.

    As many queries as `tokens` are these tokens; else the queries are the same tokens as the keys.

    Raises:
        InvalidInput: as `narrowed`; or the call is causal.
    """
    if is_causal:
        raise InvalidInput("a causal call cannot be narrowed among some of its tokens: give a pattern over all of them")
    queries, keys = query.shape[-2], key.shape[-2]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-2], queries, keys)

    def part(rows: slice, columns: slice, pattern: Pattern | None) -> tuple[Tensor, Tensor]:
        seen, score = _masked(pattern, None if attn_mask is None else attn_mask[..., rows, columns])
        return attention_with_lse(
            query[..., rows, :], key[..., columns, :], value[..., columns, :], seen, score=score, scale=scale,
            query_start=0, dropout=dropout_p,
        )  # fmt: skip

    before, these, behind = slice(0, tokens.start), slice(tokens.start, tokens.stop), slice(tokens.stop, keys)
    rows = slice(0, queries) if queries == len(tokens) else these
    beside = [part(rows, columns, None) for columns in (before, behind) if columns.start < columns.stop]
    narrow = merge([part(rows, these, pattern), *beside])[0]
    if rows.start == 0 and rows.stop == queries:
        return narrow
    everything = slice(0, keys)
    return torch.cat([part(before, everything, None)[0], narrow, part(behind, everything, None)[0]], -2)


def _masked(pattern: Pattern | None, mask: Tensor | None) -> tuple[Pattern | None, Score | None]:
    """The pattern within PyTorch's mask, or beside what that adds to the scores."""
    if mask is None:
        return pattern, None
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype != torch.bool:
        return pattern, bias(mask)
    return (from_mask(mask) if pattern is None else pattern & from_mask(mask)), None
