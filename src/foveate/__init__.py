"""Foveate: every attention mechanism under one meaning.

Public names are resolved on first use, so that `import foveate` alone does not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from foveate.import_hook import when_loaded
from foveate.loading import allow

__version__ = "0.1.0"

_HOME = {
    "foveate.generation.cache": ("KeyValueCache",),
    "foveate.pretrained": ("from_pretrained", "save_pretrained"),
    "foveate.errors": ("FoveateError", "InvalidInput", "Unsupported"),
    "foveate.functional": ("attention", "attention_with_lse", "explain", "merge", "weights"),
    "foveate.integrations.torch": ("accelerate", "report", "restore"),
    "foveate.integrations.transformers": ("patch", "register", "unpatch", "unregister"),
    "foveate.linear.features": ("Favor", "cosformer", "elu_plus_one", "favor", "hedgehog", "taylor"),
    "foveate.linear.forms": (
        "delta", "elu_linear", "gated_delta", "gated_linear", "kimi_delta", "performer", "retention",
    ),
    "foveate.linear.functional": ("linear_attention",),
    "foveate.linear.problem": ("LinearState",),
    "foveate.mechanisms.additive": ("additive_attention", "additive_weights", "local_attention"),
    "foveate.mechanisms.hard": (
        "Chosen", "gumbel_attention", "reinforce_loss", "sampled_attention", "straight_through",
    ),
    "foveate.mechanisms.lowrank": ("linformer_attention", "nystrom_attention"),
    "foveate.mechanisms.lsh": ("lsh_attention",),
    "foveate.mechanisms.merge": ("merge_by_gates", "merge_by_rows"),
    "foveate.mechanisms.paged": ("paged_attention",),
    "foveate.mechanisms.strided": ("dilated_attention", "fixed_attention", "strided_attention"),
    "foveate.normalizers": ("Normalizer", "entmax", "hardmax", "sigmoid", "softmax_plus_one", "sparsemax"),
    "foveate.pattern.algebra": ("Pattern",),
    "foveate.pattern.catalogue": (
        "bigbird", "blocks", "blockwise", "causal", "chunks", "documents", "every", "fixed", "from_mask",
        "global_tokens", "longformer", "neighborhood", "padding", "pooled", "prefix", "random_blocks", "rule",
        "selected", "streaming", "strided", "window",
    ),
    "foveate.rotary": ("rope",),
    "foveate.score": ("Score", "alibi", "alibi_slopes", "bias", "relative_bias", "sinks", "softcap"),
    "foveate.see.watching": ("watch",),
}  # fmt: skip

when_loaded("torch", allow)  # else torch.load would refuse a file with a cache in it

_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_ROOMS = ("models", "nn", "rotary", "selection")  # modules one reaches as an attribute: fv.nn.MultiHeadAttention

__all__ = sorted(_MODULE_OF)


def __dir__() -> list[str]:
    return [*__all__, *_ROOMS, "__version__"]


if TYPE_CHECKING:
    from foveate import models, nn, rotary, selection
    from foveate.errors import FoveateError, InvalidInput, Unsupported
    from foveate.functional import attention, attention_with_lse, explain, merge, weights
    from foveate.generation.cache import KeyValueCache
    from foveate.integrations.torch import accelerate, report, restore
    from foveate.integrations.transformers import patch, register, unpatch, unregister
    from foveate.linear.features import Favor, cosformer, elu_plus_one, favor, hedgehog, taylor
    from foveate.linear.forms import delta, elu_linear, gated_delta, gated_linear, kimi_delta, performer, retention
    from foveate.linear.functional import linear_attention
    from foveate.linear.problem import LinearState
    from foveate.mechanisms.additive import additive_attention, additive_weights, local_attention
    from foveate.mechanisms.hard import Chosen, gumbel_attention, reinforce_loss, sampled_attention, straight_through
    from foveate.mechanisms.lowrank import linformer_attention, nystrom_attention
    from foveate.mechanisms.lsh import lsh_attention
    from foveate.mechanisms.merge import merge_by_gates, merge_by_rows
    from foveate.mechanisms.paged import paged_attention
    from foveate.mechanisms.strided import dilated_attention, fixed_attention, strided_attention
    from foveate.normalizers import Normalizer, entmax, hardmax, sigmoid, softmax_plus_one, sparsemax
    from foveate.pattern.algebra import Pattern
    from foveate.pattern.catalogue import (
        bigbird,
        blocks,
        blockwise,
        causal,
        chunks,
        documents,
        every,
        fixed,
        from_mask,
        global_tokens,
        longformer,
        neighborhood,
        padding,
        pooled,
        prefix,
        random_blocks,
        rule,
        selected,
        streaming,
        strided,
        window,
    )
    from foveate.pretrained import from_pretrained, save_pretrained
    from foveate.rotary import rope
    from foveate.score import Score, alibi, alibi_slopes, bias, relative_bias, sinks, softcap
    from foveate.see.watching import watch
else:  # a type checker is to find names that do not exist

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return importlib.import_module(f"foveate.{name}")
        if name not in _MODULE_OF:
            raise importlib.import_module("foveate.names").UnknownName("foveate", name)
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
