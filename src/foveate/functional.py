"""Every public function on tensors, on one page.

    attention           softmax(scale · q·kᵀ)·v with a pattern and a score
    attention_with_lse  the same and the log-sum-exp of every row
    weights             the weights themselves, for the rows and columns asked for
    explain             which implementation runs, and why every other one does not
    merge               attention over all keys from attention over parts of them
    paged_attention     the same over keys and values that lie in pages, as a cache keeps them
    linear_attention    one recurrence instead of the matrix: decays, the delta rule, feature maps, state in and out
    straight_through, gumbel_attention, sampled_attention, reinforce_loss
                        hard attention: one key for each query
    additive_attention, additive_weights, local_attention
                        scores from tanh(q + k); a window around a position that is learned
    linformer_attention, nystrom_attention
                        through a fixed number of keys: projected by a learned matrix, or means of segments
    lsh_attention       among the tokens that a hash puts side by side
    dilated_attention, strided_attention, fixed_attention
                        spread-out patterns in the time that they promise
    merge_by_gates, merge_by_rows
                        several attentions as one, weighted, or each for some rows
    rope                q or k turned by angles that grow with their positions

Shapes: q `[batch, query heads, queries, dim]`, k `[batch, key heads, keys, dim]`, v `[batch, key heads, keys, value
dim]`, all three with or without the batch; query heads are a multiple of key heads, and query head h reads key head
h // (query heads / key heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate import additive, capture, factorized, hard, hashing, linear_steps, lowrank, merging, shortcut
from foveate.dispatch import Choice, choose, dispatch, dispatch_linear
from foveate.errors import InvalidInput
from foveate.hard import Chosen
from foveate.linear_problem import Feature, LinearState, linear_problem
from foveate.normalizers import Normalizer
from foveate.paging import paged
from foveate.pattern.algebra import Pattern
from foveate.primitives import merge_states
from foveate.problem import Problem, problem
from foveate.rotary import Scaling, angles, check_size, turn
from foveate.score import Score
from foveate.values import dense, describe, integers
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
        key = shortcut.signature(q, k, v, pattern, scale, query_start, backend)
        if key is not None and (out := shortcut.again(key, q, k, v)) is not None:
            return out
    call, batched = _problem(q, k, v, pattern, score, scale, query_start, normalizer, dropout, seed, needs_lse=False)
    out = dispatch(call, backend).out
    if key is not None:
        shortcut.remember(key, call, backend)
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
    call, batched = _problem(q, k, v, pattern, score, scale, query_start, normalizer, dropout, seed, needs_lse=True)
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
    call, batched = _problem(q, k, v, pattern, score, scale, query_start, normalizer, 0.0, None, needs_lse=False)
    shares = capture.weights(call, rows, columns)
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
    call, _ = _problem(q, k, v, pattern, score, scale, query_start, normalizer, dropout, seed, needs_lse=with_lse)
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


@explained
def merge_by_gates(
    outs: Sequence[Float[Tensor, "*batch heads queries value_dim"]], gates: Tensor
) -> Float[Tensor, "*batch heads queries value_dim"]:
    """Σ gates[…, c] · outs[c]: several attentions, weighted for each row as the model likes.

    gates are floats `[*batch, heads, queries, parts]`, an axis may be 1: sigmoids of x, say. They are not normalised,
    and a gate of exactly 0 lets nothing through.

    Yuan et al. 2025, "Native Sparse Attention", equation 5: https://arxiv.org/abs/2502.11089

    >>> import torch
    >>> import foveate as fv
    >>> near, far = torch.ones(1, 2, 3), 10 * torch.ones(1, 2, 3)  # [heads, queries, value dim]
    >>> fv.merge_by_gates([near, far], torch.tensor([[[0.5, 0.0], [0.0, 0.5]]]))[0]
    tensor([[0.5000, 0.5000, 0.5000],
            [5.0000, 5.0000, 5.0000]])
    """
    return merging.by_gates(outs, gates)


@explained
def merge_by_rows(
    out: Float[Tensor, "*batch heads queries value_dim"],
    part: Float[Tensor, "*batch heads rows value_dim"],
    rows: Int[Tensor, " rows"] | Int[Tensor, "batch_or_one rows"],
) -> Float[Tensor, "*batch heads queries value_dim"]:
    """`out`, with row rows[i] of every head taken from row i of `part`: another attention for some of the queries.

    rows are different integers, one list for all or one for each of the batch; −1 is none, so that lists may differ in
    length. What is replaced gets no gradient.

    Beltagy et al. 2020, Longformer's global tokens: https://arxiv.org/abs/2004.05150

    >>> import torch
    >>> import foveate as fv
    >>> fv.merge_by_rows(torch.zeros(1, 4, 2), torch.ones(1, 2, 2), torch.tensor([3, -1]))[0, :, 0]
    tensor([0., 0., 0., 1.])
    """
    return merging.by_rows(out, part, rows)


@lenient
def linear_attention(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    feature: Feature | tuple[Feature, Feature] | None = None,
    normalize: bool = False,
    delta_rule: bool = False,
    causal: bool = True,
    scale: float | None = None,
    documents: Pattern | Tensor | None = None,
    state: LinearState | None = None,
    backend: str = "auto",
    **others: Unpack[Others],
) -> tuple[Float[Tensor, "*batch heads queries value_dim"], LinearState]:
    """Attention with a state of fixed size instead of a matrix of weights: (out, the state to hand on).

        S_t = (I − δ·β_t·φ(k_t)·φ(k_t)ᵀ)·A_t·S_{t−1} + β_t·φ(k_t)·v_tᵀ      A_t = diag(exp(decay_t))
        o_t = scale · S_tᵀ·φ(q_t),  divided by scale · z_tᵀ·φ(q_t) if `normalize`, z being the state of a value 1

    Time and memory grow linearly with the length. Query head h reads the state of key head h // group.

    Args:
        decay: natural logarithms ≤ 0: `[key heads]`, or by step `[*batch, key heads, keys]`, or by step and channel
            `[*batch, key heads, keys, feature dim]`; an axis may be 1. None = 0, nothing is forgotten.
        beta: how much a step writes, `[key heads]` or `[*batch, key heads, keys]`; 0 to 2 with `delta_rule`. None = 1.
        feature: φ, a function of q and k, or a pair (of q, of k). None = as they are.
        normalize: divide by z_tᵀ·φ(q_t); a row without any weight gives 0.
        delta_rule: δ = 1: a key first takes away what is stored under it. Keys should have length 1.
        causal: False: every query reads the state after the last step; any number of queries.
        scale: a factor of the output; None = dim^-½.
        documents: packed texts, as `fv.documents` takes them: ids `[batch, keys]` or `[keys]`, or
            `fv.documents(cu_seqlens=)`. The state is emptied where the id changes; `state` belongs to the first
            document and the one returned to the last. A negative id is passed over: it gives 0 and leaves the state.
        state: what an earlier call returned: split + state = whole.
        backend: "auto", "native" (compiled, on a CPU), "chunked" (plain PyTorch) or "recurrence" (step by step: the
            definition).

    Raises:
        InvalidInput: the call is wrong: shapes, a decay above 0, beta out of range, a negative normaliser.
        Unsupported: the named implementation cannot compute this call; it lists every reason.

    Katharopoulos et al. 2020: https://arxiv.org/abs/2006.16236; delta rule and decays: Yang et al. 2024,
    https://arxiv.org/abs/2412.06464

    >>> import torch
    >>> import foveate as fv
    >>> q = k = v = torch.ones(1, 1, 4, 1)
    >>> out, state = fv.linear_attention(q, k, v, decay=torch.tensor([0.5]).log())
    >>> out.flatten(), state.s.shape
    (tensor([1.0000, 1.5000, 1.7500, 1.8750]), torch.Size([1, 1, 1, 1]))
    """
    if others:
        raise refused(linear_attention, others)
    key = None
    if causal and not normalize and feature is None and documents is None and state is not None:
        key = linear_steps.signature(q, k, v, decay, beta, state, (delta_rule, scale, backend))
        if key is not None and (found := linear_steps.again(key, q, k, v, decay, beta, state.s)) is not None:
            return found
    batched = not all(isinstance(x, Tensor) and x.dim() == 3 for x in (q, k, v))
    if not batched:
        q, k, v = q[None], k[None], v[None]
        decay, beta = (x[None] if isinstance(x, Tensor) and x.dim() > 1 else x for x in (decay, beta))
        if isinstance(state, LinearState):
            state = LinearState(state.s[None], None if state.z is None else state.z[None])
    call = linear_problem(
        q, k, v, decay=decay, beta=beta, feature=feature, normalize=normalize, delta_rule=delta_rule, causal=causal,
        scale=scale, documents=documents, state=state,
    )  # fmt: skip
    out, last = dispatch_linear(call, backend)
    if key is not None and state is not None:
        linear_steps.remember(key, call, decay, beta, state.s, backend)
    if batched:
        return out, last
    return out[0], LinearState(last.s[0], None if last.z is None else last.z[0])


@lenient
def paged_attention(
    q: Float[Tensor, "batch heads queries dim"],
    key_pages: Float[Tensor, "pages key_heads page_size dim"],
    value_pages: Float[Tensor, "pages key_heads page_size value_dim"],
    table: Int[Tensor, "batch pages_each"],
    lengths: Int[Tensor, " batch"],
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    **others: Unpack[Others],
) -> Float[Tensor, "batch heads queries value_dim"]:
    """`attention` over keys and values in pages: key n of batch row b is in page table[b, n // page_size].

    Batch row b has `lengths[b]` keys, and its last query stands at the last of them; what a page holds beyond, and the
    table's entries for pages that no key needs, never matter. Pages are read where they are by `backend="native"`, with
    any strides; where that cannot run, they are brought together first, and `attention` does the rest. No gradients.

    Raises:
        InvalidInput: shapes or dtypes do not fit, a length is past the table, or the table points outside the pages.
        Unsupported: a named backend cannot compute this.

    Kwon et al. 2023, "Efficient memory management for large language model serving with PagedAttention":
    https://arxiv.org/abs/2309.06180

    >>> import torch
    >>> import foveate as fv
    >>> q, pages = torch.randn(1, 4, 1, 8), torch.randn(3, 2, 16, 8)
    >>> out = fv.paged_attention(q, pages, pages, torch.tensor([[2, 0]]), torch.tensor([20]))
    >>> k = torch.cat([pages[2], pages[0]], 1)[None, :, :20]
    >>> torch.allclose(out, fv.attention(q, k, k), atol=1e-6)
    True
    """
    if others:
        raise refused(paged_attention, others)
    return paged(q, key_pages, value_pages, table, lengths, pattern, score, scale, backend)


@lenient
def straight_through(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
    temperature: float = 1.0,
    **others: Unpack[Others],
) -> Chosen:
    """Hard attention with a gradient: forward the value of the best key, backward softmax(scores / temperature)·v.

    The output is exactly `attention(…, normalizer=hardmax)`; its gradient is biased. Sinks are refused.
    Bengio et al. 2013, section 4: https://arxiv.org/abs/1308.3432

    >>> import torch
    >>> import foveate as fv
    >>> k = torch.eye(3)[None].requires_grad_()
    >>> taken = fv.straight_through(torch.tensor([[[0.0, 2.0, 1.0]]]), k, k)
    >>> taken.choices, taken.out.tolist()
    (tensor([[1]]), [[[0.0, 1.0, 0.0]]])
    """
    if others:
        raise refused(straight_through, others)
    call, batched = _problem(q, k, v, pattern, score, scale, query_start, None, 0.0, None, needs_lse=False)
    hard.check(call, temperature)
    return _chosen(hard.straight_through(call, temperature, None), batched)


@lenient
def gumbel_attention(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    **others: Unpack[Others],
) -> Chosen:
    """`straight_through` with Gumbel noise on the scores, so that the key is a draw from the softmax weights.

    Forward v at argmax(s + g), g = −log(−log u); backward softmax((s + g) / temperature)·v. The noise comes from
    Philox by (a seed of the generator, batch, head, query, key), so it takes no memory.
    Jang et al. 2016, https://arxiv.org/abs/1611.01144; Maddison et al. 2016, https://arxiv.org/abs/1611.00712

    >>> import torch
    >>> import foveate as fv
    >>> q = torch.zeros(1, 1000, 4)
    >>> taken = fv.gumbel_attention(q, q[:, :2], q[:, :2], generator=torch.Generator().manual_seed(0))
    >>> 400 < taken.choices.sum() < 600
    tensor(True)
    """
    if others:
        raise refused(gumbel_attention, others)
    call, batched = _problem(q, k, v, pattern, score, scale, query_start, None, 0.0, None, needs_lse=False)
    hard.check(call, temperature)
    return _chosen(hard.straight_through(call, temperature, hard.seed_of(generator)), batched)


@lenient
def sampled_attention(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
    choices: Tensor | None = None,
    soft_share: float = 0.0,
    generator: torch.Generator | None = None,
    **others: Unpack[Others],
) -> Chosen:
    """The value of one key for each query, drawn with the softmax weights as probabilities; train by `reinforce_loss`.

    `choices` `[batch, heads, queries]` are taken instead of drawn ones, −1 for none: what would these have cost?
    `soft_share` of the batch, at random, takes the mean of all values instead, as attention does (choice −1), which
    steadies the gradient. Memory is linear in the length.
    Xu et al. 2015, section 4.1: https://arxiv.org/abs/1502.03044

    >>> import torch
    >>> import foveate as fv
    >>> q = torch.zeros(1, 1000, 4)
    >>> taken = fv.sampled_attention(q, q[:, :2], q[:, :2], generator=torch.Generator().manual_seed(0))
    >>> 400 < taken.choices.sum() < 600, taken.log_prob[0, 0].exp()
    (tensor(True), tensor(0.5000))
    """
    if others:
        raise refused(sampled_attention, others)
    call, batched = _problem(q, k, v, pattern, score, scale, query_start, None, 0.0, None, needs_lse=False)
    hard.check(call)
    if choices is not None:
        choices = integers(choices, "choices=", [2 + batched])
        choices = choices if batched else choices[None]
    return _chosen(hard.sampled(call, generator, choices, soft_share), batched)


@explained
def reinforce_loss(
    reward: Tensor,
    drawn: Chosen | Sequence[Chosen],
    *,
    baseline: Tensor | float = 0.0,
    weight: float = 1.0,
    entropy_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """The loss whose gradient is REINFORCE's: −mean[r + weight · (r − b) · Σ log p(choices) + entropy_weight · Σ H].

    Args:
        reward: what is to become large, `[batch]`, `[batch, heads]` or `[batch, heads, queries]`. If it is log p(y)
            and depends on the output, its own gradient is part of the estimate, as in equation 11.
        drawn: what `sampled_attention` gave, or the list of all draws that the reward depends on.
        baseline: subtracted from the reward, no more; a tensor that needs a gradient is fitted to it by a square.
        weight: λ_r of the paper. With 1 the expected gradient is that of the expected reward, whatever the baseline.
        entropy_weight: λ_e of the paper, 0.002 there; the terms of rows are summed, those of the batch averaged.

    Raises:
        InvalidInput: the reward does not have the first dimensions of `log_prob`.

    Xu et al. 2015, equations 10 to 12: https://arxiv.org/abs/1502.03044; Williams 1992

    >>> import torch
    >>> import foveate as fv
    >>> q = torch.randn(5, 1, 3, 4, requires_grad=True)
    >>> drawn = fv.sampled_attention(q, q, q, soft_share=0.5)
    >>> fv.reinforce_loss(-drawn.out.square().mean((1, 2, 3)), drawn, entropy_weight=0.002).backward()
    """
    parts = [drawn] if isinstance(drawn, Chosen) else list(drawn)
    return hard.reinforce(reward, parts, baseline=baseline, weight=weight, entropy_weight=entropy_weight)


@lenient
def additive_attention(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    vector: Tensor,
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    query_start: int | Tensor | None = None,
    normalizer: Normalizer | None = None,
    **others: Unpack[Others],
) -> Float[Tensor, "*batch heads queries value_dim"]:
    """Attention whose score is a small network: softmax_j(vector · tanh(q_i + k_j))·v, with q and k already projected.

    Bahdanau's W·s and U·h are the q and k, so that U·h is worked out once for a whole decoder; Luong's concat is the
    same with the two halves of W_a. `vector` is `[dim]` or `[heads, dim]`. There is no scale. Memory is linear in the
    length; a second derivative exists for calls that fit one block.

    Raises:
        InvalidInput: the call is wrong, as in `attention`, or the vector does not fit.

    Bahdanau et al. 2014, appendix A.1.2: https://arxiv.org/abs/1409.0473

    >>> import torch
    >>> import foveate as fv
    >>> states, memory = torch.randn(2, 1, 3, 8), torch.randn(2, 1, 5, 6)
    >>> ask, key, vector = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(6, 4), torch.randn(4)
    >>> fv.additive_attention(ask(states), key(memory), memory, vector).shape
    torch.Size([2, 1, 3, 6])
    """
    if others:
        raise refused(additive_attention, others)
    call, batched = _problem(q, k, v, pattern, score, 1.0, query_start, normalizer, 0.0, None, needs_lse=False)
    additive.check_vector(call, vector)
    out = additive.additive(call, vector)
    return out if batched else out[0]


@lenient
def additive_weights(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    vector: Tensor,
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    query_start: int | Tensor | None = None,
    normalizer: Normalizer | None = None,
    **others: Unpack[Others],
) -> Float[Tensor, "*batch heads queries keys"]:
    """The weights that `additive_attention` gives: the alignment of every query, float32 or wider.

    >>> import torch
    >>> import foveate as fv
    >>> fv.additive_weights(torch.zeros(1, 1, 2), torch.tensor([[[9.0, 0.0], [0.0, 0.0]]]), torch.tensor([2.0, 0.0]))
    tensor([[[0.8808, 0.1192]]])
    """
    if others:
        raise refused(additive_weights, others)
    call, batched = _problem(q, k, k, pattern, score, 1.0, query_start, normalizer, 0.0, None, needs_lse=False)
    additive.check_vector(call, vector)
    shares = additive.additive_weights(call, vector)
    return shares if batched else shares[0]


@lenient
def local_attention(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    center: Tensor,
    pattern: Pattern | Tensor | None = None,
    *,
    width: int,
    sigma: float | None = None,
    vector: Tensor | None = None,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
    **others: Unpack[Others],
) -> Float[Tensor, "*batch heads queries value_dim"]:
    """Attention to the keys around a position of each query's own, which may be learned: Luong's local-p and local-m.

    Σ_j softmax_j(score) · exp(−(j − center)² / 2σ²) · v_j over the keys with |j − center| ≤ width. As in the paper the
    product is not normalised again, and the Gaussian is what gives `center` a gradient. Cost and memory follow
    queries · width.

    Args:
        center: positions among the keys, `[batch, heads or 1, queries]`, any numbers; no key near gives 0.
        width: D of the paper.
        sigma: of the Gaussian; None = width / 2, as in the paper; math.inf = none at all (local-m).
        vector: None for q·k times `scale`; else the score is vector · tanh(q + k), as in `additive_attention`.

    Luong et al. 2015, section 3.2: https://arxiv.org/abs/1508.04025

    >>> import torch
    >>> import foveate as fv
    >>> q, k, v = torch.zeros(1, 1, 4), torch.zeros(1, 9, 4), torch.eye(9)[None]
    >>> fv.local_attention(q, k, v, torch.tensor([[3.5]]), width=2).mul(100).round()[0, 0].tolist()
    [0.0, 0.0, 8.0, 22.0, 22.0, 8.0, 0.0, 0.0, 0.0]
    """
    if others:
        raise refused(local_attention, others)
    call, batched = _problem(q, k, v, pattern, score, scale, query_start, None, 0.0, None, needs_lse=False)
    if vector is not None:
        additive.check_vector(call, vector)
    if isinstance(center, Tensor) and not batched:
        center = center[None]
    out = additive.local(call, center, width, sigma, vector)
    return out if batched else out[0]


@lenient
def linformer_attention(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    key_projection: Tensor,
    value_projection: Tensor | None = None,
    pattern: Pattern | Tensor | None = None,
    *,
    scale: float | None = None,
    **others: Unpack[Others],
) -> Float[Tensor, "*batch heads queries value_dim"]:
    """Attention to `size` learned mixtures of the keys: softmax(scale · q·(E·k)ᵀ)·(F·v), in time queries · size.

    Args:
        key_projection: E, `[size, n]` or `[key heads, size, n]`; a text shorter than n reads its first columns.
        value_projection: F, of the same size; None = E.
        pattern: None, or `padding(…)`: hidden keys count as zeros. A mixture knows the whole text: nothing causal.
        scale: the factor before the softmax; None = dim^-½.

    Raises:
        InvalidInput: the call is wrong, as in `attention`; there are more than n keys; size is larger than n.

    Wang et al. 2020, equation 7: https://arxiv.org/abs/2006.04768

    >>> import torch
    >>> import foveate as fv
    >>> q = k = v = torch.randn(1, 2, 100, 8)
    >>> fv.linformer_attention(q, k, v, torch.randn(16, 128)).shape
    torch.Size([1, 2, 100, 8])
    """
    if others:
        raise refused(linformer_attention, others)
    call, batched = _problem(q, k, v, pattern, None, scale, 0, None, 0.0, None, needs_lse=False)
    out = lowrank.linformer(call, key_projection, value_projection)
    return out if batched else out[0]


@lenient
def nystrom_attention(
    q: Float[Tensor, "*batch heads queries dim"],
    k: Float[Tensor, "*batch key_heads keys dim"],
    v: Float[Tensor, "*batch key_heads keys value_dim"],
    pattern: Pattern | Tensor | None = None,
    *,
    landmarks: int = 64,
    iterations: int = 6,
    convolution: Tensor | None = None,
    scale: float | None = None,
    **others: Unpack[Others],
) -> Float[Tensor, "*batch heads queries value_dim"]:
    """Softmax attention by Nyström's method, in time (queries + keys) · landmarks.

        softmax(q·k̃ᵀ)·Z·(softmax(q̃·kᵀ)·v) + convolution(v),    Z ≈ the inverse of softmax(q̃·k̃ᵀ)

    q̃ and k̃ are the means of `landmarks` segments of nearly equal length; Z comes from `iterations` of a method of order
    four. With as many landmarks as queries or keys the result is softmax attention itself.

    Args:
        pattern: None, or `padding(…)`, in self-attention of keys and queries alike. A mean knows the whole text:
            nothing causal.
        convolution: the weights of a depthwise convolution of v along the text, `[key heads, odd size]`.
        scale: the factor before the softmax; None = dim^-½.

    Raises:
        InvalidInput: the call is wrong, as in `attention`, or the convolution does not fit.

    Xiong et al. 2021, equation 14 and section 3.3: https://arxiv.org/abs/2102.03902

    >>> import torch
    >>> import foveate as fv
    >>> q = k = v = torch.randn(1, 2, 100, 8)
    >>> fv.nystrom_attention(q, k, v, landmarks=16, convolution=torch.randn(2, 33)).shape
    torch.Size([1, 2, 100, 8])
    """
    if others:
        raise refused(nystrom_attention, others)
    call, batched = _problem(q, k, v, pattern, None, scale, 0, None, 0.0, None, needs_lse=False)
    out = lowrank.nystrom(call, landmarks, iterations, convolution)
    return out if batched else out[0]


@lenient
def lsh_attention(
    qk: Float[Tensor, "*batch heads length dim"],
    v: Float[Tensor, "*batch heads length value_dim"],
    pattern: Pattern | Tensor | None = None,
    *,
    chunk: int = 64,
    buckets: int | tuple[int, ...] | None = None,
    rounds: int = 1,
    rotations: Tensor | None = None,
    generator: torch.Generator | None = None,
    scale: float = 1.0,
    **others: Unpack[Others],
) -> Float[Tensor, "*batch heads length value_dim"]:
    """Reformer's attention: softmax(scale · x_i·x_j/‖x_j‖)·v over the tokens that a hash puts near each other.

    A round hashes by argmax([x·R; −x·R]), sorts the tokens by bucket, cuts the order into chunks, and lets a token see
    its own chunk and the one before; a token sees itself only where it meets no other. Rounds are merged by their
    log-sum-exp, so a key that is met twice counts twice. A text of one chunk is plain attention. Time and memory grow
    with length · chunk · rounds.

    Args:
        qk: queries and keys in one, and one head of v for each of its heads.
        pattern: any pattern, by the positions in the text; tokens hidden from themselves (padding) are sorted last.
        chunk: tokens in a chunk.
        buckets: an even number, or several whose product counts; None = about 2 · length / chunk.
        rounds: hashes, each with its own R; more of them miss fewer pairs.
        rotations: the R's, `[heads, dim, rounds, Σ buckets / 2]`; None draws them, normally distributed.
        generator: what draws them; None = torch's default one.

    Raises:
        InvalidInput: the call is wrong, as in `attention`; odd buckets; rotations of another shape.

    Kitaev et al. 2020: https://arxiv.org/abs/2001.04451

    >>> import torch
    >>> import foveate as fv
    >>> x, v = torch.randn(2, 1, 2, 1000, 16).unbind()
    >>> fv.lsh_attention(x, v, fv.causal, chunk=32, rounds=2).shape
    torch.Size([1, 2, 1000, 16])
    """
    if others:
        raise refused(lsh_attention, others)
    call, batched = _problem(qk, qk, v, pattern, None, scale, 0, None, 0.0, None, needs_lse=False)
    out = hashing.lsh(call, chunk, hashing.hash_of(call, chunk, buckets, rounds, rotations, generator))
    return out if batched else out[0]


@lenient
def dilated_attention(
    q: Float[Tensor, "*batch heads length dim"],
    k: Float[Tensor, "*batch key_heads length dim"],
    v: Float[Tensor, "*batch key_heads length value_dim"],
    step: int,
    pattern: Pattern | Tensor | None = None,
    *,
    scale: float | None = None,
    **others: Unpack[Others],
) -> Float[Tensor, "*batch heads length value_dim"]:
    """Attention among the positions i, i ± step, i ± 2·step, …, and of these those that `pattern` names.

    The pattern counts within a residue class: `dilated_attention(q, k, v, 4, causal & window(64))` is
    `attention(q, k, v, causal & window(64, step=4))` in a quarter of the time.

    Raises:
        InvalidInput: the call is wrong, as in `attention`; there are more or fewer queries than keys.

    Beltagy et al. 2020, section 3.1: https://arxiv.org/abs/2004.05150

    >>> import torch
    >>> import foveate as fv
    >>> q, k, v = torch.randn(3, 1, 2, 11, 8).unbind()
    >>> same = fv.attention(q, k, v, fv.window(2, step=4))
    >>> torch.allclose(fv.dilated_attention(q, k, v, 4, fv.window(2)), same, atol=1e-6)
    True
    """
    if others:
        raise refused(dilated_attention, others)
    call, batched = _self_problem(q, k, v, scale)
    if isinstance(pattern, Tensor):
        raise InvalidInput(f"the pattern is {describe(pattern)}: wanted one of positions, such as window(64)")
    out = factorized.dilated(call, step, pattern)
    return out if batched else out[0]


@lenient
def strided_attention(
    q: Float[Tensor, "*batch heads length dim"],
    k: Float[Tensor, "*batch key_heads length dim"],
    v: Float[Tensor, "*batch key_heads length value_dim"],
    stride: int,
    *,
    scale: float | None = None,
    **others: Unpack[Others],
) -> Float[Tensor, "*batch heads length value_dim"]:
    """`attention(q, k, v, strided(stride))` in time length · (stride + length / stride): least at √length.

    Raises:
        InvalidInput: the call is wrong, as in `attention`; there are more or fewer queries than keys.

    Child et al. 2019, section 4.3: https://arxiv.org/abs/1904.10509

    >>> import torch
    >>> import foveate as fv
    >>> q, k, v = torch.randn(3, 1, 2, 100, 8).unbind()
    >>> same = fv.attention(q, k, v, fv.strided(10))
    >>> torch.allclose(fv.strided_attention(q, k, v, 10), same, atol=1e-6)
    True
    """
    if others:
        raise refused(strided_attention, others)
    call, batched = _self_problem(q, k, v, scale)
    out = factorized.strided(call, stride)
    return out if batched else out[0]


@lenient
def fixed_attention(
    q: Float[Tensor, "*batch heads length dim"],
    k: Float[Tensor, "*batch key_heads length dim"],
    v: Float[Tensor, "*batch key_heads length value_dim"],
    stride: int,
    last: int = 1,
    *,
    scale: float | None = None,
    **others: Unpack[Others],
) -> Float[Tensor, "*batch heads length value_dim"]:
    """`attention(q, k, v, fixed(stride, last))` in time length · (stride + last · length / stride).

    Raises:
        InvalidInput: the call is wrong, as in `attention`; there are more or fewer queries than keys.

    Child et al. 2019, section 4.3: https://arxiv.org/abs/1904.10509

    >>> import torch
    >>> import foveate as fv
    >>> q, k, v = torch.randn(3, 1, 2, 100, 8).unbind()
    >>> same = fv.attention(q, k, v, fv.fixed(10, 2))
    >>> torch.allclose(fv.fixed_attention(q, k, v, 10, 2), same, atol=1e-6)
    True
    """
    if others:
        raise refused(fixed_attention, others)
    call, batched = _self_problem(q, k, v, scale)
    out = factorized.fixed(call, stride, last)
    return out if batched else out[0]


@explained
def rope(
    x: Float[Tensor, "*batch heads length size"],
    positions: Int[Tensor, " length"] | Int[Tensor, "batch_or_one length"],
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    dim: int | None = None,
    scaling: Scaling | None = None,
) -> Float[Tensor, "*batch heads length size"]:
    """q or k with rotary positions: pair i turned by position · base^(−2i / dim).

    Angles are in float32 or wider, and so is the product. `fv.nn.Rotary` is the same as a part of a model.

    Args:
        positions: integers, one row for all or one for each of the batch.
        interleaved: pairs (2i, 2i + 1), as the paper; else (i, i + dim/2), as Llama and most others.
        dim: how many of the first entries are turned; None = all.
        scaling: a law for longer texts than the training's, such as `fv.rotary.YaRN(4.0, 4096)`.

    Raises:
        InvalidInput: an odd dim, or positions that do not fit.

    Su et al. 2021: https://arxiv.org/abs/2104.09864

    >>> import torch
    >>> import foveate as fv
    >>> q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)  # dot products depend on the distance alone
    >>> near, far = (fv.rope(q, torch.tensor([n + 3])) @ fv.rope(k, torch.tensor([n])).mT for n in (0, 5000))
    >>> torch.allclose(near, far)
    True
    """
    dim = dense(x, "x").shape[-1] if dim is None else dim
    check_size(dim, base)
    return turn(x, angles(positions, dim, base, scaling, x.dtype), interleaved)


def _chosen(chosen: Chosen, batched: bool) -> Chosen:
    return chosen if batched else Chosen(*(part[0] for part in chosen))


def _self_problem(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Problem, bool]:
    """The checked problem of a mechanism that makes its own pattern."""
    return _problem(q, k, v, None, None, scale, None, None, 0.0, None, needs_lse=False)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Tensor | None,
    score: Score | Tensor | None,
    scale: float | None,
    query_start: int | Tensor | None,
    normalizer: Normalizer | None,
    dropout: float,
    seed: int | None,
    *,
    needs_lse: bool,
) -> tuple[Problem, bool]:
    """The checked problem, and whether the call had a batch dimension."""
    batched = not all(isinstance(x, Tensor) and x.dim() == 3 for x in (q, k, v))
    if not batched:
        q, k, v = q[None], k[None], v[None]
    call = problem(
        q, k, v, pattern, score=score, scale=scale, query_start=query_start, normalizer=normalizer,
        dropout=dropout, seed=seed, needs_lse=needs_lse,
    )  # fmt: skip
    return call, batched
