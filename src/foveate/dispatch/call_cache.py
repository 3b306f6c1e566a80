"""A call like one before it: what was checked and decided then holds again.

Checking a call and choosing who computes it takes longer than a short call itself. Without score terms, normalizer and
dropout, all of it follows from a signature: shapes, dtypes, devices, strides, what needs a gradient, a pattern that
holds no tensor. Every other call takes the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from foveate.dispatch.choose import Implementation, decide, is_observed
from foveate.eager import is_eager
from foveate.pattern.algebra import Pattern
from foveate.problem import Problem

Signature = tuple[Hashable, ...]
Call = Callable[[Tensor, Tensor, Tensor], Tensor]

_MOST = 4096
_STARTS, _SCALES = (type(None), int), (type(None), int, float)
_decided: dict[Signature, Call] = {}


def signature(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Tensor | None,
    scale: float | None,
    query_start: int | Tensor | None,
    backend: str,
) -> Signature | None:
    """All that checks and choices of this call depend on, or None where they depend on more."""
    if not is_eager(q, k, v) or q.dim() != 4:
        return None
    if not (pattern is None or isinstance(pattern, Pattern)) or is_observed():
        return None
    # Of these very types: 0.0 and False, which are no positions, are equal to a 0 that was looked up before.
    if type(query_start) not in _STARTS or type(scale) not in _SCALES or type(backend) is not str:
        return None
    device = q.device
    kind = "cpu" if q.is_cpu else device.type  # a device's type takes long to say
    # On CUDA PyTorch is asked each time: its answer depends on its switches, too.
    if kind == "cuda" or torch.is_autocast_enabled(kind):
        return None
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return (
        q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, device, k.device, v.device,
        q.stride(3), k.stride()[-1:], v.stride()[-1:], trains, pattern, scale, query_start, backend,
    )  # fmt: skip


def again(key: Signature, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """The output, if a call with this signature ran before."""
    known = _decided.get(key)
    return None if known is None else known(q, k, v)


def remember(key: Signature, call: Problem, backend: str) -> None:
    """From now on, calls with this signature are computed as this one, which ran, was."""
    if call.pattern is not None and call.pattern.spec()[1]:
        return
    if len(_decided) >= _MOST:
        _decided.clear()
    chosen = decide(call, backend)
    direct: Callable[[Problem], Call | None] = getattr(chosen, "direct", lambda _: None)
    _decided[key] = direct(call) or _the_long_way(chosen, call)


def _the_long_way(chosen: Implementation, call: Problem) -> Call:
    pattern, scale, start = call.pattern, call.scale, call.query_start
    return lambda q, k, v: chosen.run(Problem(q, k, v, pattern, None, scale, start, 0.0, None, False)).out


def forget() -> None:
    """Decide anew from now on: for tests that change what the machine can run."""
    _decided.clear()
