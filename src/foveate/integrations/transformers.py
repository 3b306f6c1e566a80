"""Hugging Face transformers: `register()`, then `attn_implementation="foveate"`.

Two functions are registered under one name: the attention, and the mask, without which a decoder would see its own
future. A mask here is a pattern and where its queries start, never an n×n tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate import capture
from foveate.dispatch import dispatch
from foveate.errors import FoveateError, InvalidInput
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import causal, padding, rule, window
from foveate.problem import problem
from foveate.score import Score, bias, sinks
from foveate.score import softcap as softcap_score

NAME = "foveate"

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Mask:
    """What travels through the model as `attention_mask`: who may attend to whom, and the first query's position."""

    pattern: Pattern | None
    query_start: int | Tensor
    ndim: int = 4  # transformers takes what has four dimensions for a mask that was made before, and hands it on

    def contiguous(self) -> Mask:
        """What transformers calls on a mask that it keeps."""
        return self


def register() -> None:
    """Make `attn_implementation="foveate"` known to transformers, for the whole process; again does nothing more."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise FoveateError('transformers is missing: pip install "foveate[hf]"') from error
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """One layer's attention as transformers calls it: q, k, v `[B, H, N, D]` → out `[B, N, H, Dv]`, weights.

    The weights are None unless `output_attentions=True` asks for them; then they are exact, and n×n.
    """
    if more.get("cache") is not None:
        raise FoveateError(f"{type(module).__name__} uses a paged cache, which foveate does not take: use another one")
    scores = [term for term in (
        softcap_score(softcap) if softcap is not None else None,
        bias(position_bias) if position_bias is not None else None,
        sinks(s_aux) if s_aux is not None else None,
    ) if term is not None]  # fmt: skip
    pattern, start = None, 0
    if isinstance(attention_mask, Mask):
        pattern, start = attention_mask.pattern, attention_mask.query_start  # type: ignore[assignment]
    elif isinstance(attention_mask, Tensor):
        prepared = attention_mask[..., : key.shape[2]]
        if prepared.dtype == torch.bool:
            pattern = prepared  # type: ignore[assignment]
        else:
            scores.append(bias(_hide_the_least(prepared)))
    elif query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        # No mask was made: the layer relies on being causal, from the first position on.
        pattern = causal if sliding_window is None else causal & window(sliding_window)
    call = problem(query, key, value, pattern, score=_total(scores), scale=scaling, query_start=start, dropout=dropout)
    out = dispatch(call).out.transpose(1, 2).contiguous()
    return out, capture.weights(call).to(query.dtype) if more.get("output_attentions") else None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | Mask | None = None,
    **more: Any,
) -> Mask:
    """The pattern that transformers describes by a function of absolute positions and a padding mask."""
    if isinstance(attention_mask, Mask):
        return attention_mask  # made before the model was called, as for a static cache
    pattern = causal if mask_function is None else _pattern(mask_function, kv_offset)
    if attention_mask is not None and not bool(attention_mask.all()):
        from transformers.masking_utils import prepare_padding_mask

        kept = prepare_padding_mask(attention_mask.bool(), kv_length, kv_offset)
        kept = padding(kept[:, kv_offset : kv_offset + kv_length])
        pattern = kept if pattern is None else pattern & kept
    # Our key positions count from the first key that is there; a rolling cache has let go of those before it.
    start = q_offset - kv_offset
    return Mask(pattern, start.reshape(1) if isinstance(start, Tensor) else start)


def _pattern(function: MaskFunction, kv_offset: int) -> Pattern | None:
    """The pattern behind a mask function of transformers; one that it does not know becomes a rule. None = all."""
    from transformers import masking_utils as known

    if function is known.causal_mask_function:
        return causal
    if function is known.bidirectional_mask_function:
        return None
    inside = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    match getattr(function, "__qualname__", "").split(".")[0], inside:
        case "and_masks", {"mask_functions": parts}:
            patterns = [part for part in (_pattern(each, kv_offset) for each in parts) if part is not None]
            return _all_of(patterns)
        case "sliding_window_overlay", {"sliding_window": int(size)}:
            return window(left=size - 1)
        case "sliding_window_bidirectional_overlay", {"sliding_window": int(size)}:
            return window(left=size, right=size)

    def shifted(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return function(batch, head, query + kv_offset, key + kv_offset)

    return rule(shifted if kv_offset else function)


def _all_of(patterns: Sequence[Pattern]) -> Pattern | None:
    result: Pattern | None = None
    for pattern in patterns:
        result = pattern if result is None else result & pattern
    return result


def _total(scores: Sequence[Score]) -> Score | None:
    result: Score | None = None
    for score in scores:
        result = score if result is None else result + score
    return result


def _hide_the_least(mask: Tensor) -> Tensor:
    """An additive mask whose lowest finite value, which stands for −inf in transformers, is −inf."""
    if not mask.dtype.is_floating_point:
        raise InvalidInput(f"the attention mask has dtype {mask.dtype}: wanted boolean or floating-point")
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf"))
