"""What others call what is called something else here: one table, asked when a call has a word that we do not know."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypedDict, TypeVar

from foveate.errors import InvalidInput

_Named = TypeVar("_Named", bound=Callable[..., Any])
_Class = TypeVar("_Class", bound=type)


class Others(TypedDict):
    """No keyword at all: what `**others` holds of a right call, so that a type checker still refuses the rest."""


class UnknownWord(InvalidInput, TypeError):
    """A keyword that a function does not have; a TypeError too, as Python's own, for programs that try one."""


# Words of others, and what to write where a function takes these parameters of ours; "" is any function.
_OUT = "leave it out"
_TABLE: dict[str, dict[str, str]] = {
    "query queries": {"q": "write q=", "context": "layer(x) attends to itself, layer(x, context) to something else"},
    "key keys": {"k": "write k=", "context": "layer(x) attends to itself, layer(x, context) to something else"},
    "value values": {"v": "write v=", "context": "layer(x) attends to itself, layer(x, context) to something else"},
    "is_causal causal": {
        "causal": "write causal=",
        "query_start": "write pattern=fv.causal, and query_start=0 if the first query is to stand at the first key",
        "pattern": "write pattern=fv.causal",
    },
    "attn_mask": {
        "q pattern": "write pattern= for a boolean mask (True = may attend), score= for a float one",
        "pattern": "fv.nn.torch_masks(attn_mask) gives the pattern= and the score= to write",
        "documents": f"{_OUT}: a state knows no mask but causal= and documents=",
    },
    "mask": {
        "pattern": "write pattern= for a boolean mask (True = may attend), score= for a float one",
        "keep": "write keep=, True for what is real",
        "real": "write fv.padding(mask)",
        "documents": f"{_OUT}: a state knows no mask but causal= and documents=",
    },
    "attention_mask": {
        "pattern": "write pattern=fv.padding(attention_mask)",
        "documents": "write documents=attention_mask - 1: a negative number is passed over",
        "real": "write fv.padding(attention_mask)",
    },
    "key_padding_mask src_key_padding_mask": {
        "pattern": "write pattern=fv.padding(~mask), since there True is padding and here it is a real key",
        "source_pattern": "write source_pattern=fv.padding(~mask), since there True is padding",
        "keep": "write keep=~mask, since there True is padding and here it is a real key",
    },
    "src_mask": {
        "source_pattern": "fv.nn.torch_masks(src_mask) gives the source_pattern= and the source_score= to write",
        "pattern": "fv.nn.torch_masks(src_mask) gives the pattern= and the score= to write",
    },
    "tgt_mask": {
        "target_pattern": "fv.nn.torch_masks(tgt_mask) gives the target_pattern= and the target_score= to write",
        "pattern": "fv.nn.torch_masks(tgt_mask) gives the pattern= and the score= to write",
    },
    "memory_mask": {"context_pattern": "fv.nn.torch_masks(memory_mask) gives the context_pattern= to write"},
    "attn_bias bias position_bias": {"score": "write score=, floats that broadcast to [batch, heads, queries, keys]"},
    "dropout_p attn_dropout attention_dropout dropout_rate attn_pdrop p": {"dropout": "write dropout=", "": _OUT},
    "enable_gqa": {"": f"{_OUT}: query heads may be any multiple of the key heads"},
    "window_size sliding_window window local_window_size": {
        "window": "write window=",
        "size left": "write fv.window(w), or fv.window(left=l, right=r)",
        "pattern": "write pattern=fv.window(w), fv.window(left=l, right=r) or fv.causal & fv.window(w)",
    },
    "softmax_scale sm_scale scaling scale_factor": {"scale": "write scale="},
    "alibi_slopes slopes": {"score": "write score=fv.alibi(slopes)", "slopes": "write slopes="},
    "softcap logit_softcap logits_soft_cap attn_logit_softcapping": {
        "score": "write score=fv.softcap(cap)",
        "cap": "write cap=",
    },
    "sinks sink s_aux learnable_sink": {"score": "write score=fv.sinks(logits)", "logits": "write logits="},
    "block_mask mask_mod": {
        "pattern": "write pattern=, such as fv.causal & fv.window(w); fv.rule(function) takes a mask_mod",
        "function": "write fv.rule(mask_mod)",
    },
    "score_mod": {"score": "write score=, a sum of fv.alibi, fv.relative_bias, fv.bias, fv.softcap and fv.sinks"},
    "cu_seqlens cu_seqlens_q cu_seqlens_k cu_seq_lens cu_seq_lens_q cu_seq_lens_k": {
        "cu_seqlens": "write cu_seqlens=",
        "documents": "write documents=fv.documents(cu_seqlens=offsets)",
        "pattern": "write pattern=fv.documents(cu_seqlens=offsets)",
    },
    "max_seqlen max_seqlen_q max_seqlen_k max_length_q max_length_k": {"": f"{_OUT}: tensors say how long they are"},
    "document_ids doc_ids segment_ids seq_idx sequence_ids": {
        "ids": "write ids=",
        "documents": "write documents=",
        "pattern": "write pattern=fv.documents(ids)",
    },
    "lengths seqlens seq_lens seq_lengths cache_seqlens context_lens valid_lens": {
        "lengths": "write lengths=",
        "pattern": "write pattern=fv.padding(lengths)",
        "real": "write fv.padding(lengths)",
    },
    "position_ids cache_position input_pos": {
        "positions": "write positions=",
        "query_start": "write query_start=, the position of the first query",
    },
    "start_pos q_offset offset": {"query_start": "write query_start="},
    "return_lse return_softmax_lse need_lse": {
        "with_lse": "write with_lse=True",
        "q pattern": "call fv.attention_with_lse",
    },
    "need_weights average_attn_weights output_attentions return_attn_probs return_attention return_weights": {
        "q pattern": "call fv.weights",
        "": "fv.weights gives weights, and `with fv.watch() as seen` those of a whole model",
    },
    "implementation impl attn_implementation attention_backend": {"backend": "write backend=", "": _OUT},
    "deterministic": {"": f"{_OUT}: what was computed once on a CPU comes out the same again"},
    "training": {"dropout": "write dropout=p if training else 0.0", "": _OUT},
    "dropout_seed philox_seed rng generator": {"generator": "write generator=", "seed": "write seed="},
    "embed_dim d_model hidden_size n_embd embedding_dim": {"dim": "write dim="},
    "num_heads n_heads nhead n_head num_attention_heads": {
        "heads": "write heads=",
        "slopes": "write fv.alibi(fv.alibi_slopes(heads))",
    },
    "num_key_value_heads num_kv_heads n_kv_heads kv_heads": {"key_heads": "write key_heads=", "q": _OUT},
    "dim_head head_size d_head": {"head_dim": "write head_dim="},
    "kdim vdim cross_attention_dim": {"context_dim": "write context_dim="},
    "dim_feedforward d_ff intermediate_size ffn_dim hidden_dim": {"hidden": "write hidden="},
    "batch_first": {"": f"{_OUT}: tensors are [batch, length, dim]"},
    "layout tensor_layout qkv_format head_first": {"q": f"{_OUT}: tensors are [batch, heads, length, dim]"},
    "torch_dtype": {"dtype": "write dtype="},
    "device_map": {"device": "write device="},
    "device dtype": {"": f"{_OUT}: .to(device, dtype) moves tensors and modules"},
    "encoder_hidden_states memory": {"context": "write context=", "memory": "write memory="},
    "src": {"source": "write source="},
    "tgt": {"target": "write target="},
    "past_key_values past_key_value kv_cache layer_past use_cache": {"cache": "write cache=, see fv.KeyValueCache"},
    "k_cache key_cache": {"key_pages": "write key_pages="},
    "v_cache value_cache": {"value_pages": "write value_pages="},
    "block_table block_tables page_table": {"table": "write table="},
    "g gk gate gates log_decay": {"decay": "write decay=, natural logarithms of at most 0"},
    "initial_state recurrent_state": {"state": "write state="},
    "output_final_state": {"state": f"{_OUT}: the state is always returned"},
    "use_qk_l2norm_in_kernel": {"q": f"{_OUT}, and normalise k first: torch.nn.functional.normalize(k, dim=-1)"},
}
FOREIGN = {word: advice for words, advice in _TABLE.items() for word in words.split()}


def refused(
    function: Callable[..., Any], others: Iterable[str], of: type | None = None, *, surplus: int = 0
) -> UnknownWord:
    """What to write instead of each keyword that `function`, a method of the class `of`, does not have."""
    name, takes, later = function.__name__, _parameters(function), []
    if of is not None and name == "__init__":
        name, later = of.__name__, _parameters(getattr(of, "forward", None))
    elif of is not None:
        name = f"a call of {of.__name__}"
    said = [f"{word}=: {_advice(word, takes, later)}" for word in others]
    if surplus > 0:
        said.append(f"{surplus} more by position than it has: {_all_of(takes)}")
    return UnknownWord(f"{name} was given {'; '.join(said)}")


def _advice(word: str, takes: list[str], later: list[str]) -> str:
    """What to write for `word` where a function takes these parameters, and the layer that it makes those later."""
    known = FOREIGN.get(word, {})
    for place, parameters in (("", takes), ("in the call of the layer, ", later)):
        for needed, advice in known.items():
            if needed and all(one in parameters for one in needed.split()):
                return place + advice
    if "" in known:
        return known[""]
    near = difflib.get_close_matches(word, takes, n=1) or [one for one in takes if one in word.split("_")]
    hint = f"did you mean {near[0]}=? " if near else ""
    return hint + _all_of(takes)


def _all_of(takes: list[str]) -> str:
    return f"it takes {', '.join(takes)}" if takes else "it takes nothing, so leave it out"


def _parameters(function: Callable[..., Any] | None) -> list[str]:
    if function is None:
        return []
    return [name for name in inspect.signature(function).parameters if name not in ("self", "others")]


class _Nothing:
    """What a parameter holds that nobody gave."""

    def __repr__(self) -> str:
        return "nothing"


_Nothing.__name__ = "nothing"  # checks name what they were given by its type
NOTHING: Any = _Nothing()


def lenient(function: _Named) -> _Named:
    """The same function, which finds `NOTHING` where an argument is missing and says itself what it wants.

    Nothing is wrapped around it, and `inspect` shows what it showed before, without `**others`.
    """
    parameters = [one for one in inspect.signature(function).parameters.values() if one.name != "others"]
    function.__signature__ = inspect.signature(function).replace(parameters=parameters)  # type: ignore[attr-defined]
    given = {one.name: NOTHING if one.default is one.empty else one.default for one in parameters}
    by_place = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD and one.name != "self"]
    function.__defaults__ = tuple(given[name] for name in by_place)
    function.__kwdefaults__ = {one.name: given[one.name] for one in parameters if one.kind is one.KEYWORD_ONLY}
    return function


def explained(function: _Named) -> _Named:
    """The same function, or method, which says of an argument that it does not take what to write instead."""
    parameters = inspect.signature(function).parameters
    kinds = [one.kind for one in parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return function
    known, is_method = frozenset(parameters), "self" in parameters
    any_number = inspect.Parameter.VAR_POSITIONAL in kinds
    most = sys.maxsize if any_number else sum(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)

    @functools.wraps(function)
    def checked(*arguments: Any, **words: Any) -> Any:
        if len(arguments) > most or (words and not known.issuperset(words)):
            strange = [word for word in words if word not in known]
            raise refused(function, strange, type(arguments[0]) if is_method else None, surplus=len(arguments) - most)
        return function(*arguments, **words)

    return checked  # type: ignore[return-value]


def explained_class(layer: _Class) -> _Class:
    """A class whose making, and whose calls if it is a module, are `explained`."""
    for name in ("__init__", "forward"):
        if name in vars(layer):
            setattr(layer, name, explained(vars(layer)[name]))
    return layer
