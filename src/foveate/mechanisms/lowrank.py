"""Attention through fewer keys than there are: projected by a learned matrix (Linformer), or by means (Nyström).

    Linformer   softmax(q·(E·k)ᵀ)·(F·v)                  E, F: keys → size
    Nyström     softmax(q·k̃ᵀ)·Z·(softmax(q̃·kᵀ)·v)       q̃, k̃: means of segments; Z ≈ the inverse of softmax(q̃·k̃ᵀ)

Each long product is an ordinary attention call, so nothing of size queries × keys is ever held. Every landmark knows
all of the text: neither has a causal form.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.dispatch.choose import dispatch
from foveate.errors import InvalidInput
from foveate.pattern.algebra import Pattern
from foveate.pattern.packing import PaddingKeep, PaddingLengths, padding
from foveate.primitives import masked_softmax
from foveate.problem import Problem, accumulator, batched_problem, problem, without_autocast
from foveate.values import describe, floating, whole
from foveate.words import Others, lenient, refused


def _linformer(call: Problem, key_projection: Tensor, value_projection: Tensor | None) -> Tensor:
    """softmax(scale · q·(E·k)ᵀ)·(F·v), hidden keys being zeros; see `functional.linformer_attention`."""
    keep = _keep(call, "Linformer's projection mixes all keys before any query sees them")
    projections = [_projection(call, key_projection, "key_projection")]
    projections.append(
        projections[0] if value_projection is None else _projection(call, value_projection, "value_projection")
    )
    if projections[0].shape[-2] != projections[1].shape[-2]:
        sizes = describe(key_projection), describe(value_projection)
        raise InvalidInput(f"key_projection is {sizes[0]} and value_projection {sizes[1]}: wanted the same size k")
    with without_autocast(call.q.device):
        k, v = (
            projection[..., : call.shape[3]].to(x.dtype) @ _without(x, keep)
            for x, projection in zip((call.k, call.v), projections, strict=True)
        )
    return dispatch(problem(call.q, k, v, scale=call.scale)).out


def _nystrom(call: Problem, landmarks: int, iterations: int, convolution: Tensor | None) -> Tensor:
    """The three factors of Nyström attention, and the convolution of v; see `functional.nystrom_attention`."""
    keep = _keep(call, "Nyström attention's landmarks are means over the whole text")
    whole(landmarks, "the number of landmarks", 1)
    whole(iterations, "the number of iterations", 0)
    queries, keys = call.shape[2:]
    if convolution is not None:
        _check_convolution(call, convolution)
    k, v = _without(call.k, keep), _without(call.v, keep)
    if min(queries, keys) <= landmarks:
        out = dispatch(call).out  # as many landmarks as tokens: the thing itself
    else:
        with without_autocast(call.q.device):
            # In self-attention what is no key is no query either.
            asked = keep if queries == keys else None
            q_means, q_real = _means(_without(call.q, asked), asked, landmarks)
            k_means, k_real = _means(k, keep, landmarks)
            k_means = k_means.repeat_interleave(call.group, 1)
            between, _ = masked_softmax(q_means @ k_means.mT * call.scale, _both(q_real, k_real))
            inverse = _inverse(between, iterations)
            q_means, k_means = q_means.to(call.q.dtype), k_means.to(call.q.dtype)
        gathered = dispatch(problem(q_means, k, v, call.pattern, scale=call.scale, query_start=0)).out
        with without_autocast(call.q.device):
            values = (inverse @ gathered.to(inverse.dtype)).to(call.q.dtype)
        seen = None if k_real is None else padding(k_real)
        out = dispatch(problem(call.q, k_means, values, seen, scale=call.scale, query_start=0)).out
    if convolution is None:
        return out
    return out + _convolved(v, convolution).repeat_interleave(call.group, 1)


def _keep(call: Problem, why: str) -> Tensor | None:
    """Which keys are real, boolean `[batch, keys]`, or None for all of them; the pattern has to be a padding."""
    if call.pattern is None:
        return None
    if not isinstance(call.pattern, PaddingKeep | PaddingLengths):
        raise InvalidInput(f"the pattern is {call.pattern!r}: {why}, so it cannot be causal or take any pattern but "
                           "padding(…)")  # fmt: skip
    batch, _, _, keys = call.shape
    at = replace(call, query_start=0).pairs((slice(0, batch), slice(0, 1), slice(0, 1), slice(0, keys)))
    return call.pattern.visible(at).expand(batch, 1, 1, keys)[:, 0, 0]


def _without(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x.masked_fill(~keep[:, None, :, None], 0)


def _projection(call: Problem, projection: object, name: str) -> Tensor:
    """A projection `[k, n]` or `[key heads, k, n]` that fits the call."""
    found = floating(projection, name, [2, 3])
    size, length = found.shape[-2:]
    if found.dim() == 3 and found.shape[0] not in (1, call.k.shape[1]):
        raise InvalidInput(f"{name} is {describe(found)}: wanted [k, n], or [key heads, k, n] with {call.k.shape[1]} "
                           "key heads")  # fmt: skip
    if found.device != call.q.device:
        raise InvalidInput(f"{name} is on {found.device} but q is on {call.q.device}: move it")
    if size > length:
        raise InvalidInput(f"{name} is {describe(found)}, k = {size} for n = {length}: wanted k at most n")
    if call.shape[3] > length:
        raise InvalidInput(f"there are {call.shape[3]} keys but {name} is {describe(found)}: Linformer is made for at "
                           f"most n = {length} keys; shorten the text or train a longer projection")  # fmt: skip
    return found


def _means(x: Tensor, keep: Tensor | None, landmarks: int) -> tuple[Tensor, Tensor | None]:
    """Means of `landmarks` segments of the real rows of `[B, H, N, D]`, and which segments are not empty (None: all).

    Row r of n real ones is in segment r · landmarks // n: their sizes differ by one at most.
    """
    length, wide = x.shape[2], accumulator(x.dtype)
    if keep is None:
        segment = torch.arange(length, device=x.device)[None] * landmarks // length
    else:
        segment = (keep.cumsum(1) - 1) * landmarks // keep.sum(1, keepdim=True).clamp(min=1)
        segment = segment.masked_fill(~keep, -1)
    inside = segment[:, None] == torch.arange(landmarks, device=x.device)[:, None]
    count = inside.sum(-1, keepdim=True)
    means = (inside.to(wide) / count.clamp(min=1))[:, None] @ x.to(wide)
    return means, None if keep is None else count[..., 0] > 0


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Which pairs of landmarks `[B, 1, rows, columns]` are real."""
    rows = None if first is None else first[:, None, :, None]
    columns = None if second is None else second[:, None, None, :]
    return columns if rows is None else rows if columns is None else rows & columns


def _inverse(matrix: Tensor, iterations: int) -> Tensor:
    """The Moore–Penrose inverse of matrices `[…, m, m]` by iteration of order four (Razavi et al. 2014)."""
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # 1 / (‖A‖₁·‖A‖_∞) makes the first guess contract; the rows of a softmax sum to 1 or, without a key, to 0.
    largest = matrix.sum(-2).amax(-1)
    guess = matrix.mT / largest.masked_fill(largest == 0, 1)[..., None, None]
    for _ in range(iterations):
        product = matrix @ guess
        guess = guess @ (13 * one - product @ (15 * one - product @ (7 * one - product))) / 4
    return guess


def _check_convolution(call: Problem, convolution: object) -> None:
    weight, heads = floating(convolution, "the convolution", [2]), call.k.shape[1]
    if weight.shape[0] != heads or weight.shape[1] % 2 == 0:
        raise InvalidInput(f"the convolution is {describe(weight)}: wanted [key heads, an odd size] with {heads} heads")
    if call.shape[2] != call.shape[3]:
        raise InvalidInput(f"there are {call.shape[2]} queries and {call.shape[3]} keys: the convolution adds v's "
                           "neighborhood to each query and wants as many of both")  # fmt: skip


def _convolved(v: Tensor, weight: Tensor) -> Tensor:
    """Every head of v along the text by its own weights, zeros beyond the ends."""
    kernel = weight.to(v.dtype)[:, None, :, None]
    return torch.nn.functional.conv2d(v, kernel, padding=(weight.shape[1] // 2, 0), groups=v.shape[1])


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
    call, batched = batched_problem(q, k, v, pattern, None, scale, 0, None, 0.0, None, needs_lse=False)
    out = _linformer(call, key_projection, value_projection)
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
    call, batched = batched_problem(q, k, v, pattern, None, scale, 0, None, 0.0, None, needs_lse=False)
    out = _nystrom(call, landmarks, iterations, convolution)
    return out if batched else out[0]
