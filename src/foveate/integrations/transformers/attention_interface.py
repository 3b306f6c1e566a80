"""One layer's attention, as transformers calls it: its mask, cap, bias and sinks become a pattern and a score."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from foveate import inspection
from foveate.dispatch import call_cache
from foveate.dispatch.choose import dispatch, seeded, tell
from foveate.eager import is_known
from foveate.errors import FoveateError, InvalidInput
from foveate.integrations.transformers.masks import NoWindow
from foveate.integrations.transformers.standing import Described, Mask, standing
from foveate.integrations.transformers.switching import PLAN, Plan, contradicts_causal
from foveate.pattern.algebra import And, Pattern
from foveate.pattern.catalogue import causal, documents, from_mask, window
from foveate.pattern.packing import Documents
from foveate.pattern.positional import Causal, Window
from foveate.primitives import dropout_mask, group, ungroup, weigh
from foveate.problem import Problem, problem, without_autocast
from foveate.score import bias, sinks
from foveate.score import softcap as softcap_score
from foveate.values import static_size

_PLAIN = Plan(None, gives_weights=True)
_REFUSED = {"cache": "a paged cache", "block_indices": "blocks of keys that an indexer chose"}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Described | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """One layer's attention: q, k, v `[B, H, N, D]` → out `[B, N, H, Dv]` and the weights `[B, H, Nq, Nk]`.

    The weights are None unless `output_attentions=True` asks for them; then they are exact, n×n, worked out a few rows
    at a time, and those before dropout.

    Raises:
        FoveateError: the cache or the mask is of a kind that this cannot take; the message says what to use.
        InvalidInput: a tensor does not fit; the message says which.
    """
    for name, what in _REFUSED.items():
        if more.get(name) is not None:
            raise FoveateError(
                f"{type(module).__name__} uses {what}, which foveate does not take: use another attention for it"
            )
    plan: Plan = getattr(module, PLAN, None) or _PLAIN  # None is what a plan is saved as
    scores = [] if softcap is None else [softcap_score(softcap)]
    if position_bias is not None:
        scores.append(bias(position_bias))
    if s_aux is not None:
        scores.append(sinks(s_aux))
    queries, keys = static_size(query.shape[2]), static_size(key.shape[2])
    pattern: Pattern | None = None
    start: int | Tensor = key.shape[2] - query.shape[2]
    mask = None if attention_mask is None else standing(attention_mask)
    if isinstance(mask, Described):
        _check_mask(mask, module, queries, keys, plan)
        pattern, start = _apart(mask, more.get("position_ids"), queries, keys), mask.query_start
    elif mask is not None:
        prepared = mask[..., :keys]
        if prepared.dtype == torch.bool:
            pattern = from_mask(prepared)
        else:
            scores.append(bias(_hide_the_least(prepared)))
    elif queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        # No mask was made: the layer relies on being causal, from the first position on.
        if sliding_window is not None and sliding_window < 1:
            raise _shows_nothing(type(module).__name__, sliding_window)
        pattern, start = causal if sliding_window is None else causal & window(sliding_window), 0
    packed = _packed(more.get("cu_seq_lens_q"), more.get("cu_seq_lens_k"), query, key, pattern)
    for part in (packed, _selected(more.get("indices"), key), plan.pattern):
        if part is not None:
            pattern = part if pattern is None else pattern & part
    if query.shape[0] == 1 != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)  # learned queries, the same for every row
    score = reduce(add, scores) if scores else None
    query_sinks = more.get("sinks")
    wanted = plan.gives_weights and (more.get("output_attentions") or _weights_are_collected())
    known = None
    if score is None and query_sinks is None and not dropout and not wanted:
        known = call_cache.signature(query, key, value, pattern, scaling, start, "auto")
        if known is not None and (out := call_cache.again(known, query, key, value)) is not None:
            return out.transpose(1, 2).contiguous(), None
    call = problem(
        query, key, value, pattern, score=score, scale=scaling, query_start=start, dropout=dropout,
        needs_lse=query_sinks is not None,
    )  # fmt: skip
    if wanted and call.needs_gradient:
        out, given = _through_weights(call, query_sinks, query.dtype)
        return out.transpose(1, 2).contiguous(), given
    result = dispatch(call)
    if known is not None:
        call_cache.remember(known, call, "auto")
    out = result.out
    share = None if result.lse is None else _share(result.lse, query_sinks)
    out = out if share is None else (out * share).to(out.dtype)
    weights = _weights(call, share).to(query.dtype) if wanted else None
    return out.transpose(1, 2).contiguous(), weights


def _share(lse: Tensor, query_sinks: Tensor | None) -> Tensor | None:
    """What a sink for every query `[B, H, Nq, 1]` leaves to the keys, when all else is summed."""
    return None if query_sinks is None else torch.sigmoid(lse[..., None] - query_sinks)


def _weights(call: Problem, share: Tensor | None) -> Tensor:
    weights = inspection.weights(call)
    return weights if share is None else weights * share


def _through_weights(call: Problem, query_sinks: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, weights), where out is made of the weights: whoever asks for its gradient by them gets it."""
    share = None
    if query_sinks is None:
        tell(call)
    else:
        lse = dispatch(call).lse
        assert lse is not None
        share = _share(lse, query_sinks)
    call, weights = seeded(call), _weights(call, share)
    given = weights.to(dtype)
    wide = given.to(weights.dtype)
    shares = wide + (weights - wide).detach()  # of no less digits than without the rounding
    if call.dropout:
        assert call.seed is not None
        at = call.pairs()
        kept = dropout_mask(call.seed, call.dropout, at.batch, at.head, at.query, at.key)
        shares = shares * kept / (1 - call.dropout)
    with without_autocast(call.q.device):
        out = ungroup(weigh(group(shares, call.k), call.v.to(shares.dtype)), call.q)
    return out.to(call.q.dtype), given


def _check_mask(mask: Described, module: nn.Module, queries: int, keys: int, plan: Plan) -> None:
    """Refuse a mask that was made for other queries and keys, or whose positions the plan's pattern cannot count."""
    layer = type(module).__name__
    parts = mask.pattern.parts if isinstance(mask.pattern, And) else (mask.pattern,)
    if plan.pattern is not None and causal in parts and not getattr(module, "is_causal", True):
        _check_causal(plan.pattern, layer)  # `patch` took the layer at its word
    for part in parts:
        if isinstance(part, NoWindow):
            raise _shows_nothing(layer, part.size)
    made_for = static_size(mask.shape[2]), static_size(mask.shape[3])
    if made_for != (queries, keys):
        raise FoveateError(
            f"{layer} attends from {queries} queries to {keys} keys under a mask made for {made_for[0]} and "
            f"{made_for[1]}: use another attention for it"
        )
    if mask.key_start and not _depends_on_distance(plan.pattern):
        raise FoveateError(
            f"the pattern {plan.pattern!r} counts positions from the first key, but the cache of {layer} has let go of "
            f"the first {mask.key_start}: use another cache"
        )


def _shows_nothing(layer: str, size: int) -> FoveateError:
    return FoveateError(
        f"{layer} has a sliding window of {size}, through which no query sees a key: give the model's configuration a "
        "sliding_window of at least 1, or none"
    )


def _check_causal(pattern: Pattern, layer: str) -> None:
    if not torch.compiler.is_compiling() and not pattern.tensors() and contradicts_causal(pattern):
        raise FoveateError(
            f"{layer} says that it is not causal, but its mask is, which the pattern {pattern!r} contradicts: make its "
            "configuration say so (is_causal=False)"
        )


def _apart(mask: Described, positions: Tensor | None, queries: int, keys: int) -> Pattern | None:
    """The mask's pattern, and texts apart from each other whose positions start anew.

    transformers itself looks for them only without a cache. Here the first call that fills one is known as well; what
    comes after it is not, for a cache keeps no positions.
    """
    if not mask.is_whole or positions is None or mask.texts is not None or queries < 2 or mask.key_start:
        return mask.texts if mask.texts is not None else mask.pattern
    start, pattern = mask.query_start, mask.pattern
    at_first = is_known(positions) and bool((start == 0).all() if isinstance(start, Tensor) else start == 0)
    if not at_first or positions.dim() != 2 or positions.shape[1] != queries:
        return pattern
    steps = torch.diff(positions, prepend=positions[:, :1] - 1)
    parts = pattern.parts if isinstance(pattern, And) else (pattern,)
    is_known_already = any(isinstance(part, Documents) for part in parts)
    if pattern is not None and causal in parts and not is_known_already and bool((steps <= 0).any()):
        ids = torch.nn.functional.pad((steps != 1).cumsum(1), (0, keys - queries), value=-1)
        pattern = pattern & documents(ids)
    mask.texts = pattern
    return pattern


def _weights_are_collected() -> bool:
    """Whether the model was called with `output_attentions=True`, which some layers (GPT-2, OPT) don't hand on."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # older ones hand it on to every layer
        return False
    collected = _active_collector.get()
    return collected is not None and any("attentions" in name for name in collected)


def _packed(
    query_ends: Tensor | None, key_ends: Tensor | None, query: Tensor, key: Tensor, pattern: Pattern | None
) -> Pattern | None:
    """The pattern of texts laid end to end in one row, given as flash-attn's offsets (`cu_seq_lens`)."""
    if query_ends is None or key_ends is None:
        return None
    same = query_ends is key_ends
    if not same and query_ends.shape == key_ends.shape and static_size(query.shape[2]) == static_size(key.shape[2]):
        # Where they cannot be compared, a mask says that they are the same: it counts positions of both in one row.
        same = torch.equal(query_ends, key_ends) if is_known(query_ends) else pattern is not None
    if same:
        return documents(cu_seqlens=key_ends)
    if pattern is not None:
        raise FoveateError(
            f"cu_seq_lens differ for queries and keys under the mask {pattern!r}: wanted the same, or no mask"
        )

    def numbers(ends: Tensor, length: int) -> Tensor:
        at = torch.arange(length, device=ends.device)
        number = torch.searchsorted(ends.long(), at, right=True) - 1
        return torch.where(number < ends.shape[0] - 1, number, -1)

    return documents(numbers(query_ends, query.shape[2]), numbers(key_ends, key.shape[2]))


def _selected(indices: Tensor | None, key: Tensor) -> Pattern | None:
    """The pattern of the keys `[B, Nq, count]` that an indexer chose for each query (DeepSeek-V3.2, 2512.02556)."""
    if indices is None:
        return None
    batch, queries, _ = indices.shape
    none = torch.zeros(batch, queries, key.shape[2], dtype=torch.bool, device=indices.device)
    return from_mask(none.scatter(-1, indices.long(), value=True)[:, None])


def _depends_on_distance(pattern: Pattern | None) -> bool:
    """Whether a pattern is the same wherever its positions start to count."""
    if isinstance(pattern, And):
        return all(map(_depends_on_distance, pattern.parts))
    return pattern is None or isinstance(pattern, Causal | Window)


def _hide_the_least(mask: Tensor) -> Tensor:
    """An additive mask whose lowest finite value, which stands for −inf in transformers, is −inf."""
    if not mask.dtype.is_floating_point:
        raise InvalidInput(f"the attention mask has dtype {mask.dtype}: wanted boolean or floating-point")
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf"))
