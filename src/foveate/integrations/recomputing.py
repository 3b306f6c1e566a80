"""Activation checkpointing: what is computed a second time is computed as it was the first time.

`torch.utils.checkpoint` runs its function again in the backward pass, when a change to a model that was in force may
have been undone, or another made. So every checkpoint remembers which changes were in force, and its function is run
again under those and no others.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch.utils.checkpoint as checkpoints

_IN_FORCE: list[weakref.ref[Change]] = []  # in the order in which they began


class Change(Protocol):
    """Something done to a model that can be undone and done again; either twice is as good as once."""

    def on(self) -> None:
        """Do it."""

    def off(self) -> None:
        """Undo it."""


def begin(change: Change) -> None:
    """A change is in force from now on."""
    _follow_checkpoints()
    _IN_FORCE.append(weakref.ref(change))


def end(change: Change) -> None:
    """Undo a change; what it covered of others comes out again."""
    now = in_force()
    _exchange(now, [other for other in now if other is not change])


def in_force() -> list[Change]:
    """The changes that are in force, in the order in which they began."""
    return [change for change in (held() for held in _IN_FORCE) if change is not None]


@contextmanager
def _only(then: Sequence[Change]) -> Iterator[None]:
    """Exactly these changes."""
    now = in_force()
    if now == list(then):
        yield
        return
    _exchange(now, then)
    try:
        yield
    finally:
        _exchange(then, now)


def _exchange(before: Sequence[Change], after: Sequence[Change]) -> None:
    for change in reversed(before):
        if not any(change is other for other in after):
            change.off()
    for change in after:
        change.on()
    _IN_FORCE[:] = map(weakref.ref, after)


def _as_now(function: Callable[..., Any]) -> Callable[..., Any]:
    then = in_force()

    def again(*args: Any, **kwargs: Any) -> Any:
        with _only(then):
            return function(*args, **kwargs)

    return again


@functools.cache
def _follow_checkpoints() -> None:
    """From now on both kinds of checkpoints remember what is in force; nobody else is told when one begins."""
    frame = getattr(checkpoints, "_CheckpointFrame", None)
    if frame is None:
        warnings.warn(
            "this PyTorch keeps its checkpoints where foveate cannot follow them: call backward() before a patch ends",
            stacklevel=2,
        )
        return
    start, forward = frame.__init__, checkpoints.CheckpointFunction.forward

    @functools.wraps(start)
    def keep(self: Any, recompute: Callable[..., Any], *rest: Any, **more: Any) -> None:
        start(self, _as_now(recompute), *rest, **more)

    @functools.wraps(forward)
    def run(ctx: Any, function: Callable[..., Any], *rest: Any) -> Any:
        return forward(ctx, _as_now(function), *rest)  # type: ignore[no-untyped-call]

    frame.__init__ = keep
    checkpoints.CheckpointFunction.forward = staticmethod(run)  # type: ignore[method-assign]
