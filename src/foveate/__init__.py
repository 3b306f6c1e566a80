"""Foveate: every attention mechanism under one meaning.

Public names are resolved on first use, so that `import foveate` alone does not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from foveate.arrival import when_loaded
from foveate.loading import allow

__version__ = "0.1.0"

_HOME = {
    "foveate.cache": ("KeyValueCache",),
    "foveate.checkpoints": ("from_pretrained", "save_pretrained"),
    "foveate.errors": ("FoveateError", "InvalidInput", "Unsupported"),
    "foveate.functional": (
        "additive_attention", "additive_weights", "attention", "attention_with_lse", "dilated_attention", "explain",
        "fixed_attention", "gumbel_attention", "linear_attention", "linformer_attention", "local_attention",
        "lsh_attention", "merge", "merge_by_gates", "merge_by_rows", "nystrom_attention", "paged_attention",
        "reinforce_loss", "rope", "sampled_attention", "straight_through", "strided_attention", "weights",
    ),
    "foveate.hard": ("Chosen",),
    "foveate.integrations.torch": ("accelerate", "report", "restore"),
    "foveate.integrations.transformers": ("patch", "register", "unpatch", "unregister"),
    "foveate.linear.features": ("Favor", "cosformer", "elu_plus_one", "favor", "hedgehog", "taylor"),
    "foveate.linear_forms": (
        "delta", "elu_linear", "gated_delta", "gated_linear", "kimi_delta", "performer", "retention",
    ),
    "foveate.linear_problem": ("LinearState",),
    "foveate.normalizers": ("Normalizer", "entmax", "hardmax", "sigmoid", "softmax_plus_one", "sparsemax"),
    "foveate.pattern.algebra": ("Pattern",),
    "foveate.pattern.catalogue": (
        "bigbird", "blocks", "blockwise", "causal", "chunks", "documents", "every", "fixed", "from_mask",
        "global_tokens", "longformer", "neighborhood", "padding", "pooled", "prefix", "random_blocks", "rule",
        "selected", "streaming", "strided", "window",
    ),
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
    from foveate.cache import KeyValueCache
    from foveate.checkpoints import from_pretrained, save_pretrained
    from foveate.errors import FoveateError, InvalidInput, Unsupported
    from foveate.functional import (
        additive_attention,
        additive_weights,
        attention,
        attention_with_lse,
        dilated_attention,
        explain,
        fixed_attention,
        gumbel_attention,
        linear_attention,
        linformer_attention,
        local_attention,
        lsh_attention,
        merge,
        merge_by_gates,
        merge_by_rows,
        nystrom_attention,
        paged_attention,
        reinforce_loss,
        rope,
        sampled_attention,
        straight_through,
        strided_attention,
        weights,
    )
    from foveate.hard import Chosen
    from foveate.integrations.torch import accelerate, report, restore
    from foveate.integrations.transformers import patch, register, unpatch, unregister
    from foveate.linear.features import Favor, cosformer, elu_plus_one, favor, hedgehog, taylor
    from foveate.linear_forms import delta, elu_linear, gated_delta, gated_linear, kimi_delta, performer, retention
    from foveate.linear_problem import LinearState
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
