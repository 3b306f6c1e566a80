"""What may be done with a tensor now: read where it lies, and decided on by its numbers."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._C import _TorchDispatchModeKey as _Mode
from torch.autograd import forward_ad
from torch.nn import Parameter

_DEVICES = ("CPU", "CUDA", "XPU", "MPS")
_PLAIN = ("ADInplaceOrView", *(kind + device for kind in ("", "Autograd", "Autocast") for device in _DEVICES))


def _all_but(names: Iterable[str]) -> int:
    keys = (DispatchKeySet(getattr(DispatchKey, name)).raw_repr() for name in names)
    return ~functools.reduce(operator.or_, keys)


# What a short call asks every time has names of its own here: a walk through torch._C costs as much as the question.
_keys, _stack, _tracer, _included = (
    torch._C._dispatch_keys,
    torch._C._len_torch_dispatch_stack,
    torch._C._get_tracing_state,
    torch._C._dispatch_tls_is_dispatch_key_included,
)
_interpreters = torch._C._functorch.peek_interpreter_stack
_PRE_DISPATCH = DispatchKey.PreDispatch  # make_fx keeps a mode there
_TYPES = (Tensor, Parameter)
_ODD = _all_but(_PLAIN)
_ODD_ON_CPU = _all_but(("ADInplaceOrView", "CPU", "AutogradCPU", "AutocastCPU"))
_UNREADABLE = _all_but((*_PLAIN, "Negative", "ZeroTensor"))


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp…) or forward-mode differentiation is at work, which sees no operator."""
    if torch.compiler.is_compiling():
        return False
    return _interpreters() is not None or forward_ad._current_level >= 0


def is_plain(x: Tensor) -> bool:
    """Whether x is what lies at its address.

    Not so: subclasses, tensors on meta, sparse and nested ones, those that vmap has batched, and those whose sign or
    whose zeros are still to be written. Their dispatch keys tell.
    """
    return type(x) in _TYPES and not _keys(x).raw_repr() & _ODD


def is_eager(*tensors: Tensor) -> bool:
    """Whether kernels may read these tensors at their addresses, without an operator.

    All of them are plain, and no graph, trace, transform or mode is at work that has to see operators. Every tensor of
    a call belongs here, not q, k and v alone: what a kernel gets is an address, and that of a subclass is 0.
    """
    if is_intercepted():
        return False
    for x in tensors:  # noqa: SIM110 — `is_plain`, written out: a generator takes as long as what it asks
        if type(x) not in _TYPES or _keys(x).raw_repr() & _ODD:
            return False
    return True


def is_eager_on_cpu(tensors: Iterable[Tensor], *, trains: bool) -> bool:
    """`is_eager`, of tensors that lie on the CPU; where a call `trains`, of such as need no gradient."""
    if is_intercepted():
        return False
    for x in tensors:
        if type(x) not in _TYPES or _keys(x).raw_repr() & _ODD_ON_CPU or (trains and x.requires_grad):
            return False
    return True


def is_intercepted() -> bool:
    """Whether a graph, a trace, a transform or a mode is at work that has to see operators."""
    return (
        torch.compiler.is_compiling()
        or _stack() > 0
        or _tracer() is not None
        or _included(_PRE_DISPATCH)
        or _interpreters() is not None
        or forward_ad._current_level >= 0
    )


def is_known(x: Tensor) -> bool:
    """Whether the numbers of x can be looked at now: not inside a graph, a trace or a transform, nor without data."""
    return (
        x.numel() > 0
        and not torch.compiler.is_compiling()
        and not _keys(x).raw_repr() & _UNREADABLE
        and _tracer() is None
        and torch._C._get_dispatch_mode(_Mode.FAKE) is None
        and torch._C._get_dispatch_mode(_Mode.PROXY) is None
        and not _included(_PRE_DISPATCH)
        and not is_transformed()
    )
