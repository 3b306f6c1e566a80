"""Dilated, strided and fixed attention in the time that they promise: n · window, n · (stride + n / stride).

Their keys are spread out, so every tile of 128 × 128 pairs holds some and none can be left out. But what is spread out
in one order lies together in another:

    dilated, strided   the own residue class, i ≡ j (mod step): every class is a text of its own
    fixed              the last keys of blocks, one a block:     a text of blocks

Each is an ordinary call; what is seen strictly before is merged with the local part by log-sum-exp.
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
from foveate.pattern.packing import padding
from foveate.pattern.positional import causal, chunks, every, window
from foveate.primitives import merge_states
from foveate.problem import Problem, batched_problem, problem
from foveate.values import describe, whole
from foveate.words import Others, lenient, refused

Part = tuple[Tensor, Tensor]


def _dilated(call: Problem, step: int, pattern: Pattern | None) -> Tensor:
    """Attention with the pattern within each residue class of positions."""
    whole(step, "the step of dilated_attention", 1)
    _check(call, f"window(…, step={step})")
    length = call.shape[2]
    classes = torch.arange(step, device=call.q.device).repeat(call.shape[0])
    real = padding((length - classes + step - 1) // step)
    pattern = real if pattern is None else pattern & real
    q, k, v = (_apart(x, step) for x in (call.q, call.k, call.v))
    return _together(dispatch(problem(q, k, v, pattern, scale=call.scale)).out, call)


def run_strided(call: Problem, stride: int) -> Tensor:
    """What attention with the pattern `run_strided(stride)` gives."""
    whole(stride, "strided's stride", 1)
    _check(call, f"run_strided({stride})")
    near = replace(call, pattern=causal & window(stride), query_start=0, needs_lse=True)
    return merge_states([_run(near), _far(call, stride)])[0]


def run_fixed(call: Problem, stride: int, last: int, *, own: bool = True) -> Tensor:
    """What attention with the pattern `run_fixed(stride, last)` gives; without the own block, `causal & every(…)`."""
    whole(stride, "fixed's stride", 1)
    _check(call, f"run_fixed({stride}, {last})")
    if whole(last, "fixed's last", 1) > stride:
        raise InvalidInput(
            f"fixed was given stride {stride} and last {last}: wanted at most as many keys as the stride"
        )
    pattern = causal & chunks(stride) if own else causal & chunks(stride) & every(stride, last)
    near = replace(call, pattern=pattern, query_start=0, needs_lse=True)
    return merge_states([_run(near), *(_before(call, stride, stride - 1 - back) for back in range(last))])[0]


def _check(call: Problem, pattern: str) -> None:
    if call.shape[2] != call.shape[3]:
        raise InvalidInput(f"there are {call.shape[2]} queries and {call.shape[3]} keys: wanted self-attention with as "
                           f"many of both; to decode, give attention the pattern {pattern}")  # fmt: skip


def _run(call: Problem) -> Part:
    result = dispatch(call)
    assert result.lse is not None
    return result.out, result.lse


def _apart(x: Tensor, step: int) -> Tensor:
    """Each residue class as a text of its own: `[B, H, N, D]` → `[B · step, H, N / step, D]`."""
    blocks = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % step)).unflatten(2, (-1, step))
    apart: Tensor = blocks.permute(0, 3, 1, 2, 4).flatten(0, 1)
    return apart


def _together(x: Tensor, call: Problem) -> Tensor:
    """The inverse of `_apart`, for out and for log-sum-exps."""
    together: Tensor = x.unflatten(0, (call.shape[0], -1)).movedim(1, 3).flatten(2, 3)[:, :, : call.shape[2]]
    return together


def _far(call: Problem, stride: int) -> Part:
    """Each stride-th key strictly before."""
    q, k, v = (_apart(x, stride) for x in (call.q, call.k, call.v))
    out, lse = _run(problem(q, k, v, causal, scale=call.scale, query_start=-1, needs_lse=True))
    return _together(out, call), _together(lse, call)


def _before(call: Problem, stride: int, place: int) -> Part:
    """The key at `place` of every block, for queries of later blocks: heads that share it, `stride` to a head."""
    length = call.shape[2]
    padded = torch.nn.functional.pad(call.q, (0, 0, 0, -length % stride)).unflatten(2, (-1, stride))
    q = padded.transpose(2, 3).flatten(1, 2)  # [B, H · stride, blocks, D]
    k, v = call.k[:, :, place::stride], call.v[:, :, place::stride]
    found = _run(problem(q, k, v, causal, scale=call.scale, query_start=-1, needs_lse=True))
    out, lse = (x.unflatten(1, (-1, stride)).transpose(2, 3).flatten(2, 3)[:, :, :length] for x in found)
    return out, lse


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
    call, batched = batched_problem(q, k, v, scale=scale)
    if isinstance(pattern, Tensor):
        raise InvalidInput(f"the pattern is {describe(pattern)}: wanted one of positions, such as window(64)")
    out = _dilated(call, step, pattern)
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
    call, batched = batched_problem(q, k, v, scale=scale)
    out = run_strided(call, stride)
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
    call, batched = batched_problem(q, k, v, scale=scale)
    out = run_fixed(call, stride, last)
    return out if batched else out[0]
