"""What may be done with a tensor now: read where it lies, and decided on by its numbers."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._C import _TorchDispatchModeKey as _Mode
from torch.nn import Parameter

_DEVICES = ("CPU", "CUDA", "XPU", "MPS")
_PLAIN = ("ADInplaceOrView", *(kind + device for kind in ("", "Autograd", "Autocast") for device in _DEVICES))


def _all_but(names: Iterable[str]) -> int:
    keys = (DispatchKeySet(getattr(DispatchKey, name)).raw_repr() for name in names)
    return ~functools.reduce(operator.or_, keys)


_ODD = _all_but(_PLAIN)
_UNREADABLE = _all_but((*_PLAIN, "Negative", "ZeroTensor"))


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp…) or forward-mode differentiation is at work, which sees no operator."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def is_plain(x: Tensor) -> bool:
    """Whether x is what lies at its address.

    Not so: subclasses, tensors on meta, sparse and nested ones, those that vmap has batched, and those whose sign or
    whose zeros are still to be written. Their dispatch keys tell.
    """
    return (type(x) is Tensor or type(x) is Parameter) and not torch._C._dispatch_keys(x).raw_repr() & _ODD


def is_eager(*tensors: Tensor) -> bool:
    """Whether kernels may read these tensors at their addresses, without an operator.

    All of them are plain, and no graph, trace, transform or mode is at work that has to see operators. Every tensor of
    a call belongs here, not q, k and v alone: what a kernel gets is an address, and that of a subclass is 0.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._dispatch_tls_is_dispatch_key_included(DispatchKey.PreDispatch)  # make_fx keeps a mode there
        or is_transformed()
    ):
        return False
    return all(map(is_plain, tensors))  # no generator, which takes as long as what it asks


def is_known(x: Tensor) -> bool:
    """Whether the numbers of x can be looked at now: not inside a graph, a trace or a transform, nor without data."""
    return (
        x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._dispatch_keys(x).raw_repr() & _UNREADABLE
        and torch._C._get_tracing_state() is None
        and torch._C._get_dispatch_mode(_Mode.FAKE) is None
        and torch._C._get_dispatch_mode(_Mode.PROXY) is None
        and not torch._C._dispatch_tls_is_dispatch_key_included(DispatchKey.PreDispatch)
        and not is_transformed()
    )
