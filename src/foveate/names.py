"""What somebody means who asks a module for a name that it does not have."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import NoReturn

# What others call a thing that has another name here.
_NAMES: dict[str, str] = {
    "scaled_dot_product_attention sdpa flash_attention flash_attn_func flash_attn flex_attention": "fv.attention",
    "memory_efficient_attention dot_product_attention": "fv.attention",
    "flash_attn_varlen_func varlen_attention": "fv.attention with fv.documents(cu_seqlens=offsets)",
    "flash_attn_with_kvcache": "fv.attention, or fv.paged_attention for a cache in pages",
    "softmax": "nothing, since softmax is what attention does without normalizer=",
    "create_block_mask create_mask BlockMask and_masks or_masks": "patterns, such as fv.causal & fv.window(128)",
    "mask attn_mask": "fv.from_mask",
    "attention_weights attn_weights get_weights": "fv.weights",
    "sliding_window local swa": "fv.causal & fv.window(w)",
    "dense full full_attention bidirectional all": "None, which is everyone to everyone",
    "full_causal causal_mask is_causal": "fv.causal",
    "alibi_bias": "fv.alibi",
    "Attention MHA": "fv.nn.SelfAttention",
    "TransformerEncoder": "fv.nn.Encoder",
    "TransformerDecoder": "fv.nn.Decoder",
    "TransformerEncoderLayer TransformerDecoderLayer TransformerLayer": "fv.nn.Block",
    "PositionalEncoding": "fv.nn.Sinusoidal",
    "RotaryEmbedding apply_rotary_emb rotary_embedding": "fv.nn.Rotary, or fv.rope",
    "Cache KVCache DynamicCache StaticCache": "fv.KeyValueCache",
    "AutoModel load load_model": "fv.from_pretrained",
    "head_view model_view show see": "fv.watch, or `foveate see` in a terminal",
}


class UnknownName(AttributeError):
    """A name that a module does not have; what is meant is looked for when somebody reads it, not for a `hasattr`."""

    def __init__(self, module: str, name: str) -> None:
        # With an obj of ours Python would look for a likeness itself, and add it to this sentence.
        super().__init__(f"module {module!r} has no attribute {name!r}", name=name, obj=None)
        self.module = module

    def __str__(self) -> str:
        near = meant(self.module, self.name or "_")
        return f"{self.args[0]}: did you mean {near}?" if near else str(self.args[0])


def meant(module: str, name: str) -> str | None:
    """The public name that somebody means who writes this one: of the same module, else of any."""
    if name.startswith("_"):
        return None
    for words, ours in _NAMES.items():
        if name in words.split():
            return ours
    rooms = [module, *(f"foveate{room}" for room in ("", ".nn", ".selection", ".rotary", ".models"))]
    for room in rooms:
        if name in _public(room):
            return f"{_short(room)}.{name}"
    for cutoff in (0.9, 0.75):  # what is nearly this name, wherever it is, before what is only like it
        for room in rooms:
            alike = {one.lower().replace("_", ""): one for one in _public(room)}
            near = difflib.get_close_matches(name.lower().replace("_", ""), alike, n=1, cutoff=cutoff)
            if near:
                return f"{_short(room)}.{alike[near[0]]}"
    return None


def _short(module: str) -> str:
    return module.replace("foveate", "fv")


def _public(module: str) -> list[str]:
    found = importlib.import_module(module)
    if module == "foveate.models":
        return sorted(set(found.FAMILIES.values()))
    own = [name for name, what in vars(found).items() if getattr(what, "__module__", None) == module]
    return getattr(found, "__all__", own)


def explained_names(module: str) -> Callable[[str], NoReturn]:
    """The `__getattr__` of a module whose names people type."""

    def missing(name: str) -> NoReturn:
        raise UnknownName(module, name)

    return missing
