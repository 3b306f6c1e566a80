"""Keys and values of what was read already, so that decoding computes each of them once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.values import describe, whole

Kept = TypeVar("Kept", bound=tuple[Tensor, Tensor])


class KeyValueCache:
    """A growing cache for a decoder of so many layers: `cache[n]` is what the self-attention of layer n keeps.

    Room grows by half of what is there, so that n appended keys cost O(n) copies in all. Nothing is dropped or rounded:
    attention with the cache is attention over all the keys.

    >>> import torch
    >>> import foveate as fv
    >>> cache = fv.KeyValueCache(layers=2)
    >>> for n in range(3):
    ...     k, v = cache[0].append(torch.full((1, 2, 1, 4), float(n)), torch.zeros(1, 2, 1, 4))
    >>> k[0, 0, :, 0], cache.length
    (tensor([0., 1., 2.]), 3)
    """

    def __init__(self, layers: int) -> None:
        self.layers = [GrowingLayer() for _ in range(whole(layers, "the number of layers", 1))]
        self._context: dict[int, tuple[Tensor, Tensor]] = {}

    def __getitem__(self, layer: int) -> GrowingLayer:
        return self.layers[layer]

    def __len__(self) -> int:
        return len(self.layers)

    def once(self, layer: int, project: Callable[[], Kept]) -> Kept:
        """What a layer's cross-attention projects from its context, worked out in the first call alone."""
        if layer not in self._context:
            self._context[layer] = project()
        return cast(Kept, self._context[layer])

    @property
    def length(self) -> int:
        """How many keys the first layer keeps: the position of the next token."""
        return self.layers[0].length

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (self.layers, {layer: tuple(map(alone, kept)) for layer, kept in self._context.items()})

    def __repr__(self) -> str:
        return f"<KeyValueCache: {len(self)} layers, {self.length} keys>"


class GrowingLayer:
    """The keys and values of one layer's self-attention."""

    def __init__(self) -> None:
        self.length = 0
        self._room: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the keys and values `[batch, heads, new, dim]` of new tokens; gives those of all tokens."""
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
            raise InvalidInput(f"k is {describe(k)} and v {describe(v)}: wanted [batch, heads, length, dim] for both")
        if self._room is None:
            self._room = k, v  # as they are: nothing is copied before a second token comes
            self.length = k.shape[2]
            return k, v
        for new, old, name in zip((k, v), self._room, "kv", strict=True):
            fits = new.shape[:2] == old.shape[:2] and new.shape[3] == old.shape[3]
            if not fits or new.dtype != old.dtype or new.device != old.device:
                raise InvalidInput(f"{name} is {describe(new)}, but the cache holds {describe(old)} of earlier tokens")
        total = self.length + k.shape[2]
        old_k, old_v = self._room
        if self._must_not_be_written(k, v):
            old_k, old_v = (torch.cat([x[:, :, : self.length], new], 2) for x, new in ((old_k, k), (old_v, v)))
        else:
            if total > old_k.shape[2]:
                old_k, old_v = self._larger(old_k, total), self._larger(old_v, total)
            old_k[:, :, self.length : total] = k
            old_v[:, :, self.length : total] = v
        self._room, self.length = (old_k, old_v), total
        return old_k[:, :, :total], old_v[:, :, :total]

    def shorten(self, length: int) -> None:
        """Forget what came after the first tokens; their room is free again."""
        if not 0 <= length <= self.length:
            raise InvalidInput(f"length is {length}: wanted at most the {self.length} keys that are kept")
        if self._room is not None and self._room[0].shape[2] == self.length:  # the caller's own tensors, maybe
            k, v = self._room
            self._room = k[:, :, :length], v[:, :, :length]
        self.length = length

    def __reduce__(self) -> tuple[Any, ...]:
        if self._room is None:
            return GrowingLayer, ()
        return restored_layer, tuple(alone(x[:, :, : self.length]) for x in self._room)

    def _must_not_be_written(self, k: Tensor, v: Tensor) -> bool:
        """Whether a backward pass will read what is kept, or it was made where autograd does not look."""
        kept = (k, v, *(self._room or ()))
        if torch.is_grad_enabled() and any(x.requires_grad for x in kept):
            return True
        return not torch.is_inference_mode_enabled() and any(x.is_inference() for x in kept)

    def _larger(self, old: Tensor, total: int) -> Tensor:
        batch, heads, _, dim = old.shape
        room = old.new_empty(batch, heads, total + max(total // 2, 32), dim)
        room[:, :, : self.length] = old[:, :, : self.length]
        return room


def alone(x: Tensor) -> Tensor:
    """A tensor in memory of its own: a file of a view holds all that lies around it."""
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


def restored(layers: list[GrowingLayer], context: dict[int, tuple[Tensor, Tensor]]) -> KeyValueCache:
    """The cache of a file."""
    cache = KeyValueCache(len(layers))
    cache.layers, cache._context = layers, context
    return cache


def restored_layer(k: Tensor, v: Tensor) -> GrowingLayer:
    """One layer of it."""
    layer = GrowingLayer()
    layer.append(k, v)
    return layer
