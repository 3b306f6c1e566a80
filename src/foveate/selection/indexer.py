"""DeepSeek Sparse Attention's lightning indexer: a small score of every key, and how it learns to choose.

I_ts = Σ_j w_tj · ReLU(scale · q_tj · k_s)        few small heads j, one key for all of them
loss = KL(p_t ‖ softmax_s I_ts)                   p: the attention of all main heads, summed and normalised
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.pattern.algebra import And, Pattern
from foveate.pattern.selected import Selected, selected
from foveate.primitives import by_blocks, normalized, raw_scores
from foveate.problem import Problem, accumulator, problem
from foveate.score import Score
from foveate.selection.choosing import by_rows, highest, how_many, within_reach
from foveate.values import describe, static_size
from foveate.words import explained

_ENTRIES = 1 << 20  # numbers of one kind at once, of which a part of the loss holds a dozen


@explained
def lightning_scores(
    q: Float[Tensor, "batch index_heads queries dim"],
    k: Float[Tensor, "batch 1 keys dim"],
    w: Float[Tensor, "batch index_heads queries"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "batch 1 queries keys"]:
    """What the indexer gives every key, I_ts = Σ_j w_tj · ReLU(scale · q_tj·k_s): all of it, since it was asked for.

    Args:
        w: the weight of each head, any sign.
        scale: None = (index heads · dim)^-½, as the published model has it.

    DeepSeek-AI 2025, equation 1: https://arxiv.org/abs/2512.02556
    """
    call = _indexer(q, k, w, None, scale, None)

    def compute(b: slice, rows: slice, held: list[Tensor]) -> tuple[Tensor, ...]:
        return (_scores(call, *held)[:, None],)

    return by_blocks(compute, [call.q, w], [call.k], [], _cost(call), _ENTRIES)[0]


@explained
def lightning(
    q: Float[Tensor, "batch index_heads queries dim"],
    k: Float[Tensor, "batch 1 keys dim"],
    w: Float[Tensor, "batch index_heads queries"],
    pattern: Pattern | Tensor | None = None,
    *,
    top_k: int,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
) -> Pattern:
    """The `top_k` keys that the indexer gives most, for all heads of the main attention alike.

    Only keys that `pattern` lets the query see; a query that sees fewer chooses them all. Memory is that of some rows.

    Returns:
        `selected(indices)`, which lies inside `pattern`: indices int32 `[batch, 1, queries, top_k]`.

    Raises:
        InvalidInput: top_k is larger than the number of keys, or shapes do not fit.

    DeepSeek-AI 2025, section 2.1: https://arxiv.org/abs/2512.02556

    >>> import torch
    >>> import foveate as fv
    >>> q, k, w = torch.randn(2, 4, 9, 8), torch.randn(2, 1, 9, 8), torch.randn(2, 4, 9)
    >>> fv.selection.lightning(q, k, w, fv.causal, top_k=3)
    selected(<int32 2×1×9×3>)
    """
    call = _indexer(q, k, w, pattern, scale, query_start)
    heads, keys = call.shape[1], call.shape[3]
    count = how_many(top_k, keys)

    def compute(b: slice, rows: slice, held: list[Tensor]) -> Tensor:
        some_q, some_w, some_k = held
        columns = within_reach(call, rows)
        scores = _scores(call, some_q, some_w, some_k[:, :, columns])[:, None]
        if call.pattern is not None:
            at = call.pairs((b, slice(0, heads), rows, columns))
            scores = scores.masked_fill(~call.pattern.visible(at), -math.inf)
        return highest(scores, count, columns.start)

    return selected(by_rows(compute, [call.q, w], [call.k], _cost(call)))


@explained
def lightning_loss(
    q_i: Float[Tensor, "batch index_heads queries index_dim"],
    k_i: Float[Tensor, "batch 1 keys index_dim"],
    w_i: Float[Tensor, "batch index_heads queries"],
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch key_heads keys dim"],
    pattern: Pattern | Tensor | None = None,
    *,
    index_scale: float | None = None,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
) -> Float[Tensor, ""]:
    """How far the indexer is from the attention that it stands for: the mean over the queries of KL(p_t ‖ softmax I_t).

    p_t is the attention of the main heads, summed over them and normalised, and gets no gradient. Both are over the
    keys that `pattern` shows: `fv.causal` for the warm-up, when everything but the indexer is frozen, and what
    `lightning` chose afterwards. Under a selection nothing but the listed keys is touched, and the memory is linear in
    queries · k; else in the queries and keys, since some rows are worked out at a time and again backward.

    Args:
        q_i, k_i, w_i: of the indexer, with `index_scale`; the model detaches what they are made of.
        q, k: of the main attention, with `score` and `scale` as in `attention`.

    Raises:
        InvalidInput: shapes that do not fit, or a pattern that does not.

    DeepSeek-AI 2025, equations 3 and 4: https://arxiv.org/abs/2512.02556

    >>> import torch
    >>> import foveate as fv
    >>> q, k, w = torch.randn(2, 4, 9, 8, requires_grad=True), torch.randn(2, 1, 9, 8), torch.rand(2, 4, 9)
    >>> keys = fv.selection.lightning(q, k, w, fv.causal, top_k=3)
    >>> fv.selection.lightning_loss(q, k, w, torch.randn(2, 6, 9, 16), torch.randn(2, 2, 9, 16), keys).backward()
    """
    index = _indexer(q_i, k_i, w_i, None, index_scale, query_start)
    call = problem(q.detach(), k.detach(), k.detach(), pattern, score=score, scale=scale, query_start=query_start)
    if index.shape[0] != call.shape[0] or index.shape[2:] != call.shape[2:]:
        raise InvalidInput(
            f"q_i, k_i are {describe(q_i)}, {describe(k_i)} beside q, k {describe(q)}, {describe(k)}: "
            "wanted the same batch, queries and keys"
        )
    chosen, rest = _selection(call.pattern)
    wide = torch.promote_types(accumulator(q.dtype), accumulator(q_i.dtype))

    def compute(b: slice, rows: slice, held: list[Tensor]) -> tuple[Tensor, ...]:
        asks, weights, main, *more, keys, main_keys = held
        at = call.pairs((b, slice(0, call.shape[1]), rows, slice(0, call.shape[3])))
        if chosen is None:
            everyone = None if call.pattern is None else call.pattern.visible(at).any(1)
            guess = _scores(index, asks, weights, keys, everyone)
            with torch.no_grad():
                scores = raw_scores(main.to(wide), main_keys.to(wide)) * call.scale
                shares, seen, _ = normalized(call, scores, at)
        else:
            places, there = _tokens(more[0], chosen.block, call.shape[3])
            at = replace(at, key=places, box=None)
            seen = there if rest is None else there & rest.visible(at)
            listed = places[:, 0], seen.any(1)
            guess = _listed_scores(index, asks, weights, keys, *listed)
            with torch.no_grad():
                scores = _products(main.to(wide), main_keys.to(wide), *listed) * call.scale
                shares, _, _ = normalized(replace(call, pattern=None), scores.masked_fill(~seen, -math.inf), at)
        target = shares.sum(1)
        total = target.sum(-1, keepdim=True)
        target = target / total.masked_fill(total == 0, 1)
        guess = guess.to(wide)
        if seen is not None:
            guess = guess.masked_fill(~seen.expand(shares.shape).any(1), -math.inf)
        taken = guess.logsumexp(-1, keepdim=True)
        apart = torch.special.xlogy(target, target) - target * (guess - taken.masked_fill(taken == -math.inf, 0))
        apart = apart.masked_fill(target == 0, 0)
        return apart.sum(-1)[:, None], (total > 0).to(wide).mT

    lists = [] if chosen is None else [chosen.indices.expand(call.shape[0], -1, call.shape[2], -1)]
    by_row = [index.q, w_i, call.q, *lists]
    width = call.shape[3] if chosen is None else lists[0].shape[3] * chosen.block * (call.k.shape[3] + index.k.shape[3])
    apart, counted = by_blocks(
        compute, by_row, [index.k, call.k], [], (call.shape[1] + index.shape[1]) * width, _ENTRIES
    )
    return apart.sum() / counted.sum().clamp(min=1)


def _indexer(
    q: Tensor, k: Tensor, w: Tensor, pattern: Pattern | Tensor | None, scale: float | None, start: int | Tensor | None
) -> Problem:
    """The indexer's part as a checked problem."""
    if not all(isinstance(x, Tensor) for x in (q, k, w)) or q.dim() != 4 or k.dim() != 4 or k.shape[1] != 1:
        raise InvalidInput(
            f"the indexer's q and k are {describe(q)} and {describe(k)}: "
            "wanted [batch, index heads, queries, dim] and [batch, 1, keys, dim]"
        )
    if tuple(w.shape) != tuple(q.shape[:3]) or not w.dtype.is_floating_point or w.device != q.device:
        raise InvalidInput(
            f"the indexer's w is {describe(w)} beside q {describe(q)}: "
            f"wanted floats [batch, index heads, queries] = {list(q.shape[:3])} on {q.device}"
        )
    if scale is None:
        scale = (max(static_size(q.shape[1]), 1) * max(static_size(q.shape[3]), 1)) ** -0.5
    call = problem(q, k, k, None, scale=scale, query_start=start)
    if pattern is None:
        return call
    main = problem(q[:, :1], k, k, pattern, query_start=start)  # the choice is one for all heads
    return replace(call, pattern=main.pattern)


def _cost(call: Problem) -> int:
    return (call.shape[1] + 1) * call.shape[3]


def _scores(call: Problem, q: Tensor, w: Tensor, k: Tensor, seen: Tensor | None = None) -> Tensor:
    """I of some rows and keys, `[b, rows, keys]`, float32 or wider; 0 for keys that are not `seen`."""
    wide = accumulator(call.q.dtype)
    products = raw_scores(q.to(wide), k.to(wide)) * call.scale
    if seen is not None:  # before the sum, so that no gradient of a hidden key is 0 · NaN
        products = products.masked_fill(~seen[:, None], 0)
    return torch.einsum("bhrk,bhr->brk", products.relu(), w.to(wide))


def _listed_scores(call: Problem, q: Tensor, w: Tensor, k: Tensor, places: Tensor, there: Tensor) -> Tensor:
    """I of some rows, and of each the keys at its places `[b, rows, k]`."""
    wide = accumulator(call.q.dtype)
    products = _products(q.to(wide), k.to(wide), places, there) * call.scale
    return torch.einsum("bhrk,bhr->brk", products.relu(), w.to(wide))


def _products(q: Tensor, k: Tensor, places: Tensor, there: Tensor) -> Tensor:
    """q `[b, H, rows, dim]` times the keys of its row: `[b, H, rows, k]`, 0 for those that are not there."""
    batch = torch.arange(k.shape[0], device=k.device).view(-1, 1, 1)
    near = k.transpose(1, 2)[batch, places]  # [b, rows, k, key heads, dim]
    near = near.masked_fill(~there[..., None, None], 0)  # so that no gradient of a hidden key is 0 · NaN
    grouped = q.unflatten(1, (k.shape[1], -1))
    return torch.einsum("bhgrd,brkhd->bhgrk", grouped, near).flatten(1, 2)


def _tokens(indices: Tensor, block: int, keys: int) -> tuple[Tensor, Tensor]:
    """The keys that a list stands for, each once, and which of them are there: `[b, 1, rows, k · block]`."""
    lists = indices.long().sort(-1).values
    there = lists >= 0
    there[..., 1:] &= lists[..., 1:] != lists[..., :-1]
    places = (lists[..., None] * block + torch.arange(block, device=lists.device)).flatten(-2)
    there = there.repeat_interleave(block, -1) & (places < keys)
    return places.where(there, 0), there


def _selection(pattern: Pattern | None) -> tuple[Selected | None, Pattern | None]:
    """The one selection that all heads share, and what else the pattern asks; None where that is not how it is."""
    parts = pattern.parts if isinstance(pattern, And) else (pattern,)
    chosen = [part for part in parts if isinstance(part, Selected) and part.indices.shape[1] == 1]
    if len(chosen) != 1:
        return None, None
    return chosen[0], pattern.without(chosen[0]) if isinstance(pattern, And) else None
