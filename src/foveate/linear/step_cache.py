"""A step of linear attention like one before it: what was checked and decided then holds again.

A step of decoding takes some microseconds, and checking it ten times as long. Shapes, dtypes, strides and options are a
signature; of what is left, decays above 0 and betas out of range, the kernel itself looks at the numbers. Only single
steps that go on from a state, without features, normaliser, documents or gradients, on the compiled kernels of a CPU.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.eager import is_eager_on_cpu
from foveate.linear import native
from foveate.linear.choose import linear_chosen
from foveate.linear.problem import LinearProblem, LinearState

try:
    from foveate import _native
except ImportError:
    _native = None  # type: ignore[assignment]

Signature = tuple[Hashable, ...]


class _Plan(NamedTuple):
    """What the kernel is told of every such step, beside addresses and threads."""

    out: tuple[torch.Size, torch.dtype] | None  # None where it is as v
    rows: tuple[tuple[int, ...], ...]  # strides and dtypes of q, k, v and out
    sizes: tuple[int, ...]
    scale: float
    kinds: tuple[bool, bool, bool]
    gates: tuple[tuple[int, ...], tuple[int, ...]]  # strides of decay and beta
    segment: int


_MOST = 4096
_plans: dict[Signature, _Plan] = {}
_NONE = (0, 0, 0, 0)


def signature(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: LinearState | None,
    options: tuple[Hashable, ...],
) -> Signature | None:
    """All that checks and choices of this step depend on, the kernel's own aside, or None where they depend on more."""
    if not (isinstance(k, Tensor) and k.dim() == 4 and k.shape[2] == 1) or type(state) is not LinearState:
        return None
    tensors = [q, k, v, state.s]
    if decay is not None:
        tensors.append(decay)
    if beta is not None:
        tensors.append(beta)
    if state.z is not None or not is_eager_on_cpu(tensors, trains=torch.is_grad_enabled()):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    found: list[Hashable] = [options, decay is None, beta is None]
    for x in tensors:
        found += x.shape, x.stride(), x.dtype
    return tuple(found)


def again(
    key: Signature,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, LinearState] | None:
    """(out, the state to hand on), if a step with this signature ran before and nothing is wrong with its numbers."""
    plan = _plans.get(key)
    if plan is None:
        return None
    # What is like a contiguous tensor is contiguous, and is made in half the time.
    out = torch.empty_like(v) if plan.out is None else q.new_empty(plan.out[0], dtype=plan.out[1])
    last = torch.empty_like(state)
    rows, gates = plan.rows, plan.gates
    fine = _native.linear_checked(
        (
            (q.data_ptr(), *rows[0]), (k.data_ptr(), *rows[1]), (v.data_ptr(), *rows[2]), (out.data_ptr(), *rows[3]),
        ),
        plan.sizes, plan.scale, plan.kinds,
        (
            _NONE if decay is None else (decay.data_ptr(), *gates[0]),
            _NONE if beta is None else (beta.data_ptr(), *gates[1]),
        ),
        (0, 0), (state.data_ptr(), last.data_ptr(), 0, plan.segment), "", torch.get_num_threads(),
    )  # fmt: skip
    return (out, LinearState(last, None)) if fine else None


def remember(
    key: Signature, call: LinearProblem, decay: Tensor | None, beta: Tensor | None, state: Tensor, backend: str
) -> None:
    """From now on steps with this signature are computed as this one was, if its tensors are read in place."""
    if linear_chosen(call, backend) is not native or not (call.k.numel() and call.v.numel()):
        return
    held = native._Held(call.q, call.k, call.v, call.decay, call.beta, None, call.state)
    pairs: list[tuple[Tensor, Tensor | None]] = [
        (held.q, call.q),
        (held.k, call.k),
        (held.v, call.v),
        (held.state, state),
    ]
    pairs += [(mine, given) for mine, given in ((held.decay, decay), (held.beta, beta)) if mine is not None]
    if any(given is None or mine.data_ptr() != given.data_ptr() for mine, given in pairs):
        return
    out = call.q.new_empty(*call.q.shape[:3], call.v.shape[3], dtype=call.dtype)
    arguments = held.arguments(out, out, None, call.scale, call.delta_rule, True, "", 1)
    tensors, sizes, scale, kinds, gates, _, (_, _, _, segment) = arguments[:7]
    if len(_plans) >= _MOST:
        _plans.clear()
    like = call.v.is_contiguous() and call.v.shape == out.shape and call.v.dtype == out.dtype
    _plans[key] = _Plan(
        None if like else (out.shape, out.dtype), tuple(row[1:] for row in tensors), sizes, scale, kinds,
        (gates[0][1:], gates[1][1:]), segment,
    )  # fmt: skip


def forget() -> None:
    """Decide anew from now on: for tests that change what the machine can run."""
    _plans.clear()
