"""`accelerate()`: every CPU call of PyTorch's scaled_dot_product_attention in this process, on Foveate's kernels."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

from foveate.errors import FoveateError, InvalidInput
from foveate.integrations.aten import Entries
from foveate.integrations.fused import missing
from foveate.locks import Lock
from foveate.words import explained


@dataclass(frozen=True)
class Report:
    """How many calls went where: `foveate` and `pytorch` count them by (direction, reason); prints as a table.

    The direction is "forward" or "backward"; the reason says why PyTorch computes it, and is empty for Foveate. Calls
    that are traced into a graph are not counted, those that the graph makes later are.
    """

    foveate: Mapping[tuple[str, str], int]
    pytorch: Mapping[tuple[str, str], int]

    def __str__(self) -> str:
        if not self.foveate and not self.pytorch:
            return "no call of scaled_dot_product_attention on the CPU"
        lines = []
        for name, counts in (("foveate", self.foveate), ("pytorch", self.pytorch)):
            for (direction, why), count in sorted(counts.items(), key=lambda item: (item[0][0] != "forward", -item[1])):
                lines.append(f"{name}  {count:>7} × {direction}{': ' if why else ''}{why}")
        return "\n".join(lines)

    __repr__ = __str__


class Acceleration:
    """What `accelerate()` returns: a context manager that ends it, and its report."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def report(self) -> Report:
        """How many calls went where, from `accelerate()` on, and why."""
        with _STATE.lock:
            counts = dict(self._counts)
        ours = {key: count for key, count in counts.items() if not key[1]}
        return Report(ours, {key: count for key, count in counts.items() if key[1]})

    def __enter__(self) -> Acceleration:
        if self not in _STATE.active:
            raise InvalidInput("this acceleration has ended: call accelerate() again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _STATE.end(self)


class _State:
    """The accelerations that are on, the kernels that are in while one is, and what to put back after the last."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.active: list[Acceleration] = []
        self.last: Acceleration | None = None
        self.entries: Entries | None = None

    def begin(self) -> Acceleration:
        with self.lock:
            if not self.active:
                self.entries = self.entries or Entries(self.tell)
                self.entries.on = True
            self.active.append(Acceleration())
            return self.active[-1]

    def end(self, one: Acceleration) -> None:
        """Once: an acceleration that `restore()` has ended already is left alone."""
        with self.lock:
            if one not in self.active:
                return
            self.active.remove(one)
            self.last = one
            if not self.active and self.entries is not None:
                self.entries.on = False
                if threading.active_count() == 1:  # else a thread may be on its way in: they stay, and pass calls on
                    self.entries.leave()
                    self.entries = None

    def tell(self, direction: str, why: str) -> None:
        with self.lock:
            for one in self.active:
                one._counts[direction, why] += 1


_STATE = _State()


@explained
def accelerate() -> Acceleration:
    """Run every CPU call of `torch.nn.functional.scaled_dot_product_attention` in this process on Foveate's kernels.

    Whoever makes it: your code, nn.MultiheadAttention, nn.Transformer, Hugging Face ("sdpa"), timm, diffusers, compiled
    graphs, in inference and in training, in every thread. Each call keeps PyTorch's meaning: a causal mask that is
    aligned top-left, its masks, its errors, its gradients. What the kernels do not take (dropout, float64, a mask that
    needs a gradient) or compute no faster stays with PyTorch; `report()` counts and says why. The fast path of
    nn.MultiheadAttention and nn.TransformerEncoder in eval, nested tensors among it, stays on and runs on them too.

    As a context manager it ends with its block, an exception included; as a function, with `restore()`. It may be
    nested: the last one out puts everything back.

    Raises:
        FoveateError: the compiled kernels are missing.

    >>> import torch
    >>> import foveate as fv
    >>> q = torch.randn(1, 8, 1024, 64)
    >>> with fv.accelerate() as acceleration:
    ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    >>> sum(acceleration.report().foveate.values())
    1
    """
    if missing():
        raise FoveateError("accelerate needs the compiled kernels: install a C++ compiler and foveate again")
    return _STATE.begin()


@explained
def restore() -> None:
    """End the newest `accelerate()` that is still on; after the last one PyTorch is as it was.

    Raises:
        InvalidInput: nothing is accelerated.
    """
    with _STATE.lock:
        if not _STATE.active:
            raise InvalidInput("restore was called, but nothing is accelerated: every accelerate() has ended already")
        _STATE.end(_STATE.active[-1])


@explained
def report() -> Report:
    """How many calls went where, and why, since the outermost `accelerate()`; after its end, what it had counted.

    Raises:
        InvalidInput: nothing was accelerated yet.
    """
    with _STATE.lock:
        one = _STATE.active[0] if _STATE.active else _STATE.last
    if one is None:
        raise InvalidInput("there is nothing to report: accelerate() was not called")
    return one.report()
