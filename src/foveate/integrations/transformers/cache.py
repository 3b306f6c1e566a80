"""A cache for `generate()` that does not copy all keys and values for every new token."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicIndexedLayer, DynamicLayer

from foveate.errors import InvalidInput
from foveate.generation.cache import GrowingLayer, alone


class GrowingCache(DynamicCache):  # type: ignore[misc]
    """transformers' `DynamicCache` with room at its end: new keys and values are written there.

    `DynamicCache` joins old and new by `torch.cat`, which reads and writes all that is kept, in every layer, for every
    token; with long texts that takes as long as attention itself. Layers with a window keep few keys and stay as they
    are, and so do states, which do not grow. It takes the arguments of `DynamicCache` and goes where that goes:

        model.generate(**inputs, past_key_values=GrowingCache(config=model.config))

    What `keys` and `values` of a layer were before `crop` is written over by the tokens that follow. A file of it holds
    what is kept and no room, and `torch.load` reads it back.
    """

    layers: list[Any]
    layer_class_to_replicate: type | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._make_room()

    def _make_room(self) -> None:
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = _with_room(DynamicLayer)
        self.layers = [_roomy(layer) for layer in self.layers]

    def __reduce__(self) -> tuple[Any, ...]:
        kept = [_described(layer) for layer in self.layers]
        ways = self.layer_class_to_replicate is not None, self.offloading, getattr(self, "only_non_sliding", True)
        return restored, (kept, *ways)


class _Room:
    """`keys` and `values` are what DynamicLayer has; as long as they are what `update` gave, they have room behind."""

    keys: Tensor
    values: Tensor
    indexer_keys: Tensor
    is_initialized: bool
    is_indexer_initialized: bool
    _kept: GrowingLayer
    _given: Tensor | None = None
    _kept_of_indexer: GrowingLayer
    _given_of_indexer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)  # type: ignore[attr-defined]
        if self.keys is not self._given:  # reordered, moved, or nothing yet
            self._kept = GrowingLayer()
            if self.keys.numel():
                self._kept.append(self.keys, self.values)
        self.keys, self.values = self._kept.append(key_states, value_states)
        self._given = self.keys
        return self.keys, self.values

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """The keys `[batch, length, dim]` by which an indexer chooses among the others (DeepSeek-V3.2)."""
        if not self.is_indexer_initialized:
            self.lazy_initialization_indexer(indexer_key_states)  # type: ignore[attr-defined]
        if self.indexer_keys is not self._given_of_indexer:
            self._kept_of_indexer = GrowingLayer()
            if self.indexer_keys.numel():
                self._kept_of_indexer.append(*_one_head(self.indexer_keys))
        kept, _ = self._kept_of_indexer.append(*_one_head(indexer_key_states))
        self.indexer_keys = self._given_of_indexer = kept[:, 0]
        return self.indexer_keys

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their room is free again."""
        whole = self.is_initialized and self.keys is self._given
        whole_of_indexer = self._given_of_indexer is not None and self.indexer_keys is self._given_of_indexer
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if whole:
            self._kept.shorten(self.keys.shape[2])
            self._given = self.keys
        if whole_of_indexer:
            self._kept_of_indexer.shorten(self.indexer_keys.shape[1])
            self._given_of_indexer = self.indexer_keys

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored_layer, _described(self)


_ROOM = {name for name in _Room.__annotations__ if name.startswith("_")}


@functools.cache
def _with_room(kind: type) -> type:
    """A kind of layer that appends, with room at its end."""
    parts = {} if issubclass(kind, DynamicIndexedLayer) else {"update_indexer": None}
    return type(kind.__name__, (_Room, kind), parts)


def _roomy(layer: Any) -> Any:
    """A layer with room, if it updates as a plain one does, and so keeps all that came, one after the other."""
    kind: Any = type(layer)
    return _made(_with_room(kind), vars(layer)) if getattr(kind, "update", None) is DynamicLayer.update else layer


def _made(kind: Any, held: dict[str, Any]) -> Any:
    layer = kind.__new__(kind)
    vars(layer).update(held)
    return layer


def _one_head(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys `[batch, length, dim]` as those of one head, beside values that are nothing."""
    return keys[:, None], keys[:, None, :, :0]


def _described(layer: Any) -> tuple[str, str, dict[str, Any]]:
    """The kind of transformers that a layer is, by module and name, and what it holds."""
    kind = type(layer).__mro__[2] if isinstance(layer, _Room) else type(layer)
    held = {name: alone(x) if isinstance(x, Tensor) else x for name, x in vars(layer).items() if name not in _ROOM}
    return kind.__module__, kind.__qualname__, held


def _restored_layer(module: str, name: str, held: dict[str, Any]) -> Any:
    kinds = (cache_utils.CacheLayerMixin, cache_utils.LinearAttentionCacheLayerMixin, cache_utils.DummyLayer)
    kind = getattr(importlib.import_module(module), name, None) if module.startswith("transformers.") else None
    if not isinstance(kind, type) or not issubclass(kind, kinds):
        raise InvalidInput(f"the file holds a layer of a cache that is a {module}.{name}: wanted one of transformers")
    layer = _made(kind, held)
    if isinstance(held.get("keys"), Tensor):  # a file may be loaded onto another device
        layer.device = layer.keys.device
    return layer


def restored(kept: list[tuple[str, str, dict[str, Any]]], grows: bool, offloading: bool, only: bool) -> GrowingCache:
    """The cache of a file."""
    cache = GrowingCache(offloading=offloading, offload_only_non_sliding=only)
    cache.layers = [_restored_layer(*layer) for layer in kept]
    if not grows:
        cache.layer_class_to_replicate = None
    cache._make_room()
    return cache
