"""Foveate's own CPU kernels for linear attention: chunks forward and backward, and single steps, in float32.

No compiler is needed at run time. q, k, v, decay and beta are read where they are, by their strides; bfloat16 and
float16 are widened as they come. What `chunked` says about exponents holds here too. `native/linear*.hpp` hold the C++.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.eager import is_eager, is_transformed
from foveate.errors import unsupported
from foveate.linear.problem import LinearProblem
from foveate.primitives import readable
from foveate.problem import without_autocast
from foveate.slicewise import slicewise

try:
    from foveate import _native
except ImportError:
    _native = None  # type: ignore[assignment]

if _native is not None:
    _native.share_threads_of("libgomp.so.1")  # as softmax does: no second pool fights for the cores

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SEGMENTS = 64, 256  # the fewest and the most steps between two states that are kept for the backward pass
_COLUMNS = 16  # of a state are the least that a piece of work takes


def refuses(problem: LinearProblem) -> list[str]:
    """Every reason for which the kernels cannot compute this."""
    reasons = []
    if _native is None:
        reasons.append("the compiled kernels are missing: install a C++ compiler and foveate again")
    if problem.q.device.type not in ("cpu", "meta"):
        reasons.append(f"q is on {problem.q.device.type} (takes cpu)")
    wrong = [x for x in (problem.q, problem.v) if x.dtype not in _DTYPES]
    if wrong:
        reasons.append(f"dtype is {str(wrong[0].dtype).removeprefix('torch.')} (takes float32, bfloat16, float16)")
    if is_transformed():
        reasons.append('it has no vmap and no forward derivative: backend="recurrence" has')
    return reasons


def run(problem: LinearProblem) -> tuple[Tensor, Tensor]:
    """(out `[B, Hq, Nq, Dv]`, the last state `[B, Hk, Dk, Dv]`): out in the caller's dtype, or float32."""
    return _run(problem)


def _run(problem: LinearProblem, kernel: str = "", threads: int = 0) -> tuple[Tensor, Tensor]:
    """On a named kernel ("" = the best one) and so many threads (0 = as torch), so that tests reach every kernel."""
    q = problem.q if problem.causal else problem.q[:, :, :0]
    trains, narrow = problem.needs_gradient, not problem.normalize and problem.v.dtype == problem.dtype
    # An operator costs more than a short call: only where something has to see it.
    tensors = q, problem.k, problem.v, problem.decay, problem.beta, problem.resets, problem.state
    run = _forward_op if trains or not is_eager(*[x for x in tensors if x is not None]) else _forward
    out, last, _ = run(
        *tensors, problem.scale, problem.delta_rule, problem.causal, narrow, trains, kernel, threads
    )  # fmt: skip
    if not problem.causal:  # every query reads the last state: a product of torch
        group = problem.q.shape[1] // max(problem.k.shape[1], 1)
        rows = (problem.q.to(last.dtype) * problem.scale).unflatten(1, (problem.k.shape[1], group))
        out = (rows.flatten(2, 3) @ last).reshape(*problem.q.shape[:3], last.shape[3])
    return out, last


def _segment(width: int) -> int:
    """Steps between two kept states: then these take no more room than the keys do, where that can be."""
    return min(max((width + 31) // 32 * 32, _SEGMENTS[0]), _SEGMENTS[1])


def _saved_shape(k: Tensor, v: Tensor, saves: bool) -> tuple[int, ...]:
    segments = (k.shape[2] + (segment := _segment(v.shape[3])) - 1) // segment
    return (*k.shape[:2], segments if saves else 0, k.shape[3], v.shape[3])


def _forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, resets: Tensor | None, state: Tensor,
    scale: float, delta_rule: bool, reads: bool, narrow: bool, saves: bool, kernel: str, threads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, the last state, the states that the backward pass begins from)."""
    out = _empty(q, (*q.shape[:3], v.shape[3]), v.dtype if narrow else torch.float32)
    if not (k.numel() and v.numel()):
        return out.zero_(), state.clone(memory_format=torch.contiguous_format), _empty(q, _saved_shape(k, v, False))
    last = torch.empty_like(state, memory_format=torch.contiguous_format)  # in half the time of new_empty
    saved = _empty(q, _saved_shape(k, v, saves))
    held = _Held(q, k, v, decay, beta, resets, state)  # named, so that it lives until the kernel is done
    _native.linear(*held.arguments(out, last, saved if saves else None, scale, delta_rule, reads, kernel, threads))
    return out, last, saved


class _Held:
    """The tensors behind the addresses of one call, which have to live as long as it."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, resets: Tensor | None,
        state: Tensor,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v = readable(q), readable(k), readable(v)
        self.decay = decay if decay is None or decay.shape[3] == 1 else readable(decay)
        self.beta, self.state = beta, state.contiguous()
        self.resets = None if resets is None else resets.contiguous()

    def arguments(
        self, out: Tensor, last: Tensor, saved: Tensor | None, scale: float, delta_rule: bool, reads: bool,
        kernel: str, threads: int,
    ) -> tuple[Any, ...]:  # fmt: skip
        """What `_native.linear` and its gradient take first."""
        batch, heads, steps, dim = self.k.shape
        width = self.v.shape[3]
        resets = (0, 0) if self.resets is None else (self.resets.data_ptr(), _strides(self.resets)[0])
        return (
            (_numbers(self.q), _numbers(self.k), _numbers(self.v), _numbers(out)),
            (batch, self.q.shape[1], heads, steps, dim, width), scale,
            (delta_rule, reads, self.decay is not None and self.decay.shape[3] > 1),
            (_gate(self.decay), _gate(self.beta)), resets,
            (self.state.data_ptr(), last.data_ptr(), 0 if saved is None else saved.data_ptr(), _segment(width)),
            kernel, threads or torch.get_num_threads(),
        )  # fmt: skip


def _backward(
    d_out: Tensor | None, d_last: Tensor | None, saved: Tensor,
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, resets: Tensor | None, state: Tensor,
    scale: float, delta_rule: bool, reads: bool, narrow: bool, saves: bool, kernel: str, threads: int,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k, v, state, and of decay and beta where there are any."""
    gates = [x for x in (decay, beta) if x is not None]
    batch, heads, steps, _ = k.shape
    width = v.shape[3]
    if not (k.numel() and v.numel()):
        zeros = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, state, *gates)]
        return zeros if d_last is None else [*zeros[:3], d_last.clone(), *zeros[4:]]
    reads = reads and d_out is not None
    held = _Held(q, k, v, decay, beta, resets, state)
    last = _empty(q, state.shape)
    if not saved.numel():
        saved = _empty(q, _saved_shape(k, v, True))
        _native.linear(*held.arguments(q, last, saved, scale, delta_rule, False, kernel, threads))
    # Where heads are few, columns of their states are shared out too, and what each share has is summed.
    slices = _slices(batch * heads, width)
    dq = _empty(q, (slices, *q.shape)) if reads else _empty(q, (1, *q.shape)).zero_()
    dk, dv, d_state = _empty(q, (slices, *k.shape)), _empty(q, v.shape), _empty(q, state.shape)
    d_decay = None if decay is None else _empty(q, (slices, batch, heads, steps, decay.shape[3]))
    d_beta = None if beta is None else _empty(q, (slices, batch, heads, steps, 1))
    d_out = readable(d_out) if d_out is not None else q
    d_last = None if d_last is None else d_last.float().contiguous()
    _native.linear_backward(
        *held.arguments(q, last, saved, scale, delta_rule, reads, kernel, threads), _numbers(d_out),
        0 if d_last is None else d_last.data_ptr(),
        (
            dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), 0 if d_decay is None else d_decay.data_ptr(),
            0 if d_beta is None else d_beta.data_ptr(), d_state.data_ptr(),
        ),
        slices,
    )  # fmt: skip
    d_gates = [
        x.sum(0).sum_to_size(gate.shape) for x, gate in zip((d_decay, d_beta), (decay, beta), strict=True)
        if x is not None and gate is not None
    ]  # fmt: skip
    return [_joined(dq).to(q.dtype), _joined(dk).to(k.dtype), dv.to(v.dtype), d_state, *d_gates]


def _slices(heads: int, width: int) -> int:
    """How many shares the columns of a state are cut into, by the call alone: results are the same on any threads."""
    wanted = min(max(1, 8 // heads), max(1, width // (2 * _COLUMNS)))
    units = (width + _COLUMNS - 1) // _COLUMNS
    return -(-units // -(-units // wanted))


def _joined(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


@torch.library.custom_op("foveate::linear_forward", mutates_args=(), device_types="cpu")
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, resets: Tensor | None, state: Tensor,
    scale: float, delta_rule: bool, reads: bool, narrow: bool, saves: bool, kernel: str, threads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward(
        q, k, v, decay, beta, resets, state, scale, delta_rule, reads, narrow, saves, kernel, threads
    )  # fmt: skip


@_forward_op.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, resets: Tensor | None, state: Tensor,
    scale: float, delta_rule: bool, reads: bool, narrow: bool, saves: bool, kernel: str, threads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.float32
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=v.dtype if narrow else wide)
    return out, state.new_empty(state.shape), state.new_empty(_saved_shape(k, v, saves))


@torch.library.custom_op("foveate::linear_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    d_out: Tensor | None, d_last: Tensor | None, saved: Tensor,
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, resets: Tensor | None, state: Tensor,
    scale: float, delta_rule: bool, reads: bool, narrow: bool, saves: bool, kernel: str, threads: int,
) -> list[Tensor]:  # fmt: skip
    return _backward(
        d_out, d_last, saved, q, k, v, decay, beta, resets, state, scale, delta_rule, reads, narrow, saves, kernel,
        threads,
    )  # fmt: skip


@_backward_op.register_fake
def _backward_fake(
    d_out: Tensor | None, d_last: Tensor | None, saved: Tensor,
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, resets: Tensor | None, state: Tensor,
    *options: Any,
) -> list[Tensor]:  # fmt: skip
    tensors = [q, k, v, state, *(x for x in (decay, beta) if x is not None)]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[:7], inputs[7:]
    ctx.present = [x is not None for x in tensors]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], *(x for x in tensors if x is not None))


def _differentiate(ctx: Any, d_out: Tensor | None, d_last: Tensor | None, d_saved: Tensor | None) -> tuple[Any, ...]:
    saved, *rest = ctx.saved_tensors
    tensors = [rest.pop(0) if present else None for present in ctx.present]
    with without_autocast(saved.device):
        dq, dk, dv, d_state, *d_gates = _backward_op(d_out, d_last, saved, *tensors, *ctx.options)
    d_decay, d_beta = (d_gates.pop(0) if ctx.present[n] else None for n in (3, 4))
    return dq, dk, dv, d_decay, d_beta, None, d_state, *[None] * len(ctx.options)


def _no_second_derivative(ctx: Any, *gradients: object) -> None:
    raise unsupported({"native": ['has no second derivative: use backend="chunked", which has']})


_forward_op.register_autograd(_differentiate, setup_context=_remember)
_backward_op.register_autograd(_no_second_derivative, setup_context=lambda ctx, inputs, output: None)
slicewise(_backward_op)


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Where `like` is, whatever device torch has been told to take by default."""
    return like.new_empty(shape, dtype=dtype)


def _strides(x: Tensor) -> list[int]:
    """The strides, 0 where one entry stands for all."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]


def _gate(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else (x.data_ptr(), *_strides(x)[:3])


def _numbers(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), *x.stride()[:3], _DTYPES[x.dtype]
