"""Softmax attention: what everybody calls.

    attention           softmax(scale · q·kᵀ)·v with a pattern and a score
    attention_with_lse  the same and the log-sum-exp of every row
    weights             the weights themselves, for the rows and columns asked for
    explain             which implementation runs, and why every other one does not
    merge               attention over all keys from attention over parts of them

What a mechanism adds stands beside its mathematics: `linear/functional.py`, `mechanisms/`, `rotary.py`.

Shapes: q `[batch, query heads, queries, dim]`, k `[batch, key heads, keys, dim]`, v `[batch, key heads, keys, value
dim]`, all three with or without the batch; query heads are a multiple of key heads, and query head h reads key head
h // (query heads / key heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from jaxtyping import Float
from torch import Tensor

from foveate import inspection
from foveate.dispatch import call_cache
from foveate.dispatch.choose import Choice, choose, dispatch
from foveate.errors import InvalidInput
from foveate.normalizers import Normalizer
from foveate.pattern.algebra import Pattern
from foveate.primitives import merge_states
from foveate.problem import batched_problem
from foveate.score import Score
from foveate.values import dense, describe
from foveate.words import Others, explained, lenient, refused


@lenient
def attention(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
    normalizer: Normalizer | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
    **others: Unpack[Others],
) -> Float[Tensor, "*batch heads queries value_dim"]:
    """softmax(scale · q·kᵀ)·v over the keys that `pattern` lets each query see; a query that sees none gets 0.

    Args:
        pattern: who may attend to whom: a pattern, or a boolean tensor (True = may attend) that broadcasts to
            `[batch, heads, queries, keys]`. None = everyone to everyone.
        score: what changes the scores: a score, or a float tensor that is added, broadcast like the mask.
        scale: the factor before the softmax; None = dim^-½.
        query_start: the position of the first query among the keys, an int or `[batch]`; None = the last query
            stands at the last key, as in decoding with a cache.
        normalizer: how scores become weights: softmax_plus_one, sigmoid, sparsemax, entmax(α), hardmax; None = softmax.
        dropout: the probability that a weight is dropped, by Philox of (`seed`, batch, head, query, key); in [0, 1).
        seed: of the dropout; None draws one from torch's default generator.
        backend: "auto", or the name of one implementation, which then runs or raises.

    Raises:
        InvalidInput: the call is wrong; nothing was computed.
        Unsupported: a named backend cannot compute this; every reason is listed.

    Vaswani et al. 2017, equation 1: https://arxiv.org/abs/1706.03762

    >>> import torch
    >>> import foveate as fv
    >>> q = k = v = torch.eye(3)[None, None]
    >>> fv.attention(q, k, v, fv.causal, scale=100.0)[0, 0, 1].round()
    tensor([0., 1., 0.])
    """
    if others:
        raise refused(attention, others)
    key = None
    if score is None and normalizer is None and seed is None and not dropout and type(dropout) in (float, int):
        key = call_cache.signature(q, k, v, pattern, scale, query_start, backend)
        if key is not None and (out := call_cache.again(key, q, k, v)) is not None:
            return out
    call, batched = batched_problem(
        q, k, v, pattern, score, scale, query_start, normalizer, dropout, seed, needs_lse=False
    )
    out = dispatch(call, backend).out
    if key is not None:
        call_cache.remember(key, call, backend)
    return out if batched else out[0]


@lenient
def attention_with_lse(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
    normalizer: Normalizer | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
    **others: Unpack[Others],
) -> tuple[Float[Tensor, "*batch heads queries value_dim"], Float[Tensor, "*batch heads queries"]]:
    """`attention`, and the log-sum-exp of every row: natural logarithm, float32 or wider, −inf where no key is seen.

    Both are differentiable. The sum includes sinks, so in split work give those to one part only; the 1 of
    softmax_plus_one is one. Every other normalizer has no log-sum-exp and raises `InvalidInput`.
    """
    if others:
        raise refused(attention_with_lse, others)
    call, batched = batched_problem(
        q, k, v, pattern, score, scale, query_start, normalizer, dropout, seed, needs_lse=True
    )
    result = dispatch(call, backend)
    assert result.lse is not None
    return (result.out, result.lse) if batched else (result.out[0], result.lse[0])


@lenient
def weights(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
    normalizer: Normalizer | None = None,
    rows: Sequence[int] | Tensor | None = None,
    columns: Sequence[int] | Tensor | None = None,
    **others: Unpack[Others],
) -> Float[Tensor, "*batch heads rows columns"]:
    """The exact weights that `attention` gives, for some rows and columns; None means all of them.

    Normalised over all keys, then picked: a row sums to 1 over all columns (less with sinks, 0 without a visible
    key, whatever it is with sigmoid). float32 or wider. Memory follows what is asked for. Negative rows and columns
    count from the end.

    >>> import torch
    >>> import foveate as fv
    >>> q = torch.zeros(1, 1, 1000, 8)
    >>> fv.weights(q, q, q, fv.causal, rows=[3], columns=[0, 1, 4])
    tensor([[[[0.2500, 0.2500, 0.0000]]]])
    """
    if others:
        raise refused(weights, others)
    call, batched = batched_problem(q, k, v, pattern, score, scale, query_start, normalizer, 0.0, None, needs_lse=False)
    shares = inspection.weights(call, rows, columns)
    return shares if batched else shares[0]


@lenient
def explain(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
    normalizer: Normalizer | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
    with_lse: bool = False,
    **others: Unpack[Others],
) -> Choice:
    """Which implementation `attention` (or, `with_lse`, `attention_with_lse`) would run; nothing is computed.

    The answer prints as a table with every reason of every implementation that does not run, and has the fields
    `chosen` and `refusals`.
    """
    if others:
        raise refused(explain, others)
    call, _ = batched_problem(
        q, k, v, pattern, score, scale, query_start, normalizer, dropout, seed, needs_lse=with_lse
    )
    return choose(call, backend)


@explained
def merge(
    parts: Sequence[tuple[Float[Tensor, "*batch heads queries value_dim"], Float[Tensor, "*batch heads queries"]]],
) -> tuple[Float[Tensor, "*batch heads queries value_dim"], Float[Tensor, "*batch heads queries"]]:
    """(out, lse) over the union of disjoint sets of keys, from `attention_with_lse` over each of them.

    Exact and differentiable; a part in which a row sees no key has no say in that row. Keys count from 0 in every part:
    a part whose first key was at `cut` takes `query_start=-cut`, and only patterns and scores of query − key alone
    (causal, window, ALiBi) then mean the same keys. For others pass all keys, and `pattern & prefix(cut)` beside
    `pattern & ~prefix(cut)`.
    Milakov & Gimelshein 2018, "Online normalizer calculation for softmax": https://arxiv.org/abs/1805.02867
    """
    pairs = list(parts)
    if not pairs:
        raise InvalidInput("merge was given no parts: wanted at least one (out, lse) pair")
    first = pairs[0][0]
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise InvalidInput(
                f"merge was given a {type(pair).__name__} among its parts: wanted a list of (out, lse) pairs"
            )
        out, lse = (dense(x, "a part of merge") for x in pair)
        if out.shape != first.shape or out.dtype != first.dtype or out.shape[:-1] != lse.shape:
            raise InvalidInput(
                f"merge was given out {describe(out)} with lse {describe(lse)} beside out {describe(first)}: "
                "wanted outs of one shape and dtype, and for each its lse without the last dimension"
            )
    return merge_states(pairs)
