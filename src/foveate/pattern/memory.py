"""The summary of a pattern, remembered: the layers of a model ask for the same one again and again."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from foveate.pattern.algebra import Pattern
from foveate.pattern.summary import Summary
from foveate.pattern.tiling import build
from foveate.positions import starts
from foveate.values import Held, identity


def summarise(
    pattern: Pattern, batch: int, heads: int, queries: int, keys: int, query_start: int | Tensor | None, tile: int
) -> Summary:
    """The summary of `pattern`; a repeated call with the same pattern and sizes is remembered."""
    spec, held = pattern.spec()
    if isinstance(query_start, Tensor):
        held = [*held, query_start]
    tensors = [thing for thing in held if isinstance(thing, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    start = starts(query_start, batch, queries, keys, device)
    if any(tensor.is_inference() for tensor in tensors):  # no version counter: a change could not be seen
        return build(pattern, batch, heads, queries, keys, start, tile)
    shift = None if isinstance(query_start, Tensor) else query_start
    key = (spec, *map(identity, held), batch, heads, queries, keys, shift, tile)
    return _REMEMBERED.get(key, held, lambda: build(pattern, batch, heads, queries, keys, start, tile))


class _Memory:
    """The last few summaries. Tensors and functions count by identity (tensors by version too) and are held weakly."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: OrderedDict[object, tuple[list[weakref.ref[Held]], Summary]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: tuple[object, ...], held: list[Held], build: Callable[[], Summary]) -> Summary:
        key = tuple(id(part) if callable(part) else part for part in key)
        with self.lock:
            entry = self.entries.get(key)
            # An identity may have been given to a new object after the old one died.
            if entry and all(ref() is thing for ref, thing in zip(entry[0], held, strict=True)):
                self.entries.move_to_end(key)
                return entry[1]
        summary = build()
        with self.lock:
            self.entries[key] = ([weakref.ref(thing) for thing in held], summary)
            while len(self.entries) > self.size:
                self.entries.popitem(last=False)
        return summary


_REMEMBERED = _Memory(32)
