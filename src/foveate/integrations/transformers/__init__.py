"""Hugging Face transformers: `attn_implementation="foveate"`, and `patch` for a model that is loaded.

Two functions are registered under one name: the attention, and the mask, without which a decoder would see its own
future. Importing this registers them.
"""

from foveate.integrations.transformers.attention_interface import attention
from foveate.integrations.transformers.cache import GrowingCache
from foveate.integrations.transformers.layers import is_layer
from foveate.integrations.transformers.masks import mask
from foveate.integrations.transformers.patching import (
    Patched,
    is_on,
    is_patched,
    patch,
    register,
    unpatch,
    unregister,
)
from foveate.integrations.transformers.standing import Mask
from foveate.integrations.transformers.switching import NAME

__all__ = [
    "NAME",
    "GrowingCache",
    "Mask",
    "Patched",
    "attention",
    "is_layer",
    "is_on",
    "is_patched",
    "mask",
    "patch",
    "register",
    "unpatch",
    "unregister",
]

register()
