"""`linear_attention`: a checked call of the linear family, and a step like one before it."""

from __future__ import annotations

from typing import Unpack

from jaxtyping import Float
from torch import Tensor

from foveate.linear import step_cache
from foveate.linear.choose import dispatch_linear
from foveate.linear.problem import Feature, LinearState, linear_problem
from foveate.pattern.algebra import Pattern
from foveate.words import Others, lenient, refused


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
        key = step_cache.signature(q, k, v, decay, beta, state, (delta_rule, scale, backend))
        if key is not None and (found := step_cache.again(key, q, k, v, decay, beta, state.s)) is not None:
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
        step_cache.remember(key, call, decay, beta, state.s, backend)
    if batched:
        return out, last
    return out[0], LinearState(last.s[0], None if last.z is None else last.z[0])
