"""A cache for `generate()` that does not copy all keys and values for every new token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from foveate.cache import GrowingLayer


class GrowingCache(DynamicCache):  # type: ignore[misc]
    """transformers' `DynamicCache` with room at its end: new keys and values are written there.

    `DynamicCache` joins old and new by `torch.cat`, which reads and writes all that is kept, in every layer, for every
    token; with long texts that takes as long as attention itself. Layers with a window keep few keys and stay as they
    are. It takes the arguments of `DynamicCache` and goes where that goes:

        model.generate(**inputs, past_key_values=GrowingCache(config=model.config))

    What `keys` and `values` of a layer were before `crop` is written over by the tokens that follow.
    """

    layers: list[DynamicLayer]
    layer_class_to_replicate: type[DynamicLayer] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = _Layer
        self.layers = [_with_room(layer) for layer in self.layers]


class _Layer(DynamicLayer):  # type: ignore[misc]
    """`keys` and `values` are what DynamicLayer has; as long as they are what `update` gave, they have room behind."""

    keys: Tensor
    values: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._kept = GrowingLayer()
        self._given: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys is not self._given:  # reordered, moved, or nothing yet
            self._kept = GrowingLayer()
            if self.keys.numel():
                self._kept.append(self.keys, self.values)
        self.keys, self.values = self._kept.append(key_states, value_states)
        self._given = self.keys
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their room is free again."""
        whole = self.is_initialized and self.keys is self._given
        super().crop(tokens_to_remove)
        if whole:
            self._kept.shorten(self.keys.shape[2])
            self._given = self.keys


def _with_room(layer: DynamicLayer) -> DynamicLayer:
    if type(layer) is not DynamicLayer:
        return layer
    made = _Layer()
    if layer.is_initialized:
        made.update(layer.keys, layer.values)
    return made
