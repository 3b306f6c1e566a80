"""Layers that narrow their attention whenever they are called, whatever computes it: by a class of their own."""

from __future__ import annotations

import copy
import copyreg
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from foveate.integrations.calling import Narrowing, Order, Wish


@dataclass(frozen=True, eq=False)
class Following:
    """What a module follows: its orders, and whom it tells of its forwards. `last` holds those of its last forward."""

    own: Any
    orders: tuple[Order, ...] = ()
    wishes: tuple[Wish, ...] = ()
    last: list[tuple[Order, ...]] = field(default_factory=lambda: [()])


def followed(module: nn.Module) -> Following:
    """What a module follows by now."""
    kind = type(module)
    return getattr(kind, "_foveate_follows", None) or Following(kind)


def follow(module: nn.Module, orders: tuple[Order, ...], wishes: tuple[Wish, ...]) -> None:
    """Give a module a class that follows these orders and tells these wishes; its own, where there are none.

    A class, since whoever calls a module, a compiled graph as well, looks at that. Processors may be changed
    meanwhile, and hooks that come after a graph was compiled are not called.
    """
    now = followed(module)
    if now.orders != orders or now.wishes != wishes:
        needed = orders or wishes or now.last[0]  # a forward that followed some may be recomputed in its backward
        module.__class__ = _class_of(Following(now.own, orders, wishes, now.last)) if needed else now.own


def _class_of(follows: Following) -> Any:
    own = follows.own

    class Follower(own):  # type: ignore[misc, valid-type]
        _foveate_follows = follows
        _foveate_names = tuple(inspect.signature(own.forward).parameters)[1:]
        __call__ = _call

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            twin = memo[id(self)] = own.__new__(own)
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
            twin.__class__ = type(self)
            return twin

        def __reduce_ex__(self, protocol: Any) -> Any:  # saved as what it is without us
            return copyreg._reconstructor, (own, object, None), self.__dict__  # type: ignore[attr-defined]

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Follower, name, getattr(own, name))
    return Follower


def _call(self: Any, *given: Any, **named: Any) -> Any:
    """A module's call. It asks what holds now: whoever holds this method, a compiled graph say, may outlive that."""
    now = followed(self)
    orders = now.orders
    if not torch.compiler.is_compiling():
        if torch._C._current_graph_task_id() != -1:  # activation checkpointing, in a backward: as in the forward
            orders = now.last[0]
        elif torch.is_grad_enabled() or any(order.wish.trains for order in orders) or (self.training and not orders):
            now.last[0] = orders
            if not orders and not now.wishes:
                self.__class__ = now.own
    for wish in now.wishes:
        wish.begin()
    if orders:
        names = type(self)._foveate_names
        arguments = {**dict(zip(names, given, strict=False)), **named}
        own_tokens = arguments.pop(names[0], None)
        during = Narrowing(self, orders, own_tokens, arguments.values())
        with during:
            out = self._wrapped_call_impl(*given, **named)  # what nn.Module calls `__call__`
        during.check()
    else:
        out = self._wrapped_call_impl(*given, **named)
    for wish in now.wishes:
        wish.end()
    return out
