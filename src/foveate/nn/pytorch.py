"""PyTorch's own modules read: the names of their weights, and masks that mean the contrary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import InvalidInput
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import from_mask, padding
from foveate.score import Score, bias
from foveate.values import describe

_PARTS = ("query", "key", "value")


def torch_masks(
    attn_mask: Tensor | None = None, key_padding_mask: Tensor | None = None, *, heads: int | None = None
) -> tuple[Pattern | None, Score | None]:
    """(pattern, score) that mean what these masks mean to `torch.nn.MultiheadAttention` and `torch.nn.Transformer`.

    There a boolean mask says True = may NOT attend, here and in `scaled_dot_product_attention` True = may attend. A
    float mask is added, there as here.

    Args:
        attn_mask: `[queries, keys]`, or `[batch · heads, queries, keys]`, which needs `heads`.
        key_padding_mask: `[batch, keys]`.

    >>> import torch
    >>> import foveate as fv
    >>> pattern, score = fv.nn.torch_masks(torch.tensor([[False, True], [False, False]]))
    >>> print(pattern.picture(2, 2))
    1 .
    1 1
    """
    pattern: Pattern | None = None
    score: Score | None = None
    if attn_mask is not None:
        if attn_mask.dim() == 3 and heads is not None and attn_mask.shape[0] % heads == 0:
            attn_mask = attn_mask.unflatten(0, (-1, heads))
        elif attn_mask.dim() != 2:
            raise InvalidInput(
                f"attn_mask is {describe(attn_mask)}: wanted [queries, keys], or "
                "[batch · heads, queries, keys] and heads="
            )
        if attn_mask.dtype == torch.bool:
            pattern = from_mask(~_by_queries(attn_mask))
        else:
            score = bias(_by_queries(attn_mask))
    if key_padding_mask is not None:
        if key_padding_mask.dim() != 2:
            raise InvalidInput(f"key_padding_mask is {describe(key_padding_mask)}: wanted [batch, keys]")
        if key_padding_mask.dtype == torch.bool:
            keep = padding(~key_padding_mask)
            pattern = keep if pattern is None else pattern & keep
        else:
            more = bias(key_padding_mask[:, None, None])
            score = more if score is None else score + more
    return pattern, score


def _by_queries(mask: Tensor) -> Tensor:
    """A mask of two dimensions says here that the first is the queries, however many texts there are."""
    return mask[None] if mask.dim() == 2 else mask


def copy_weights(made: nn.Module, module: nn.Module) -> None:
    """Give `made` the weights of PyTorch's module, whose names it knows; what is frozen there is frozen here."""
    state = module.state_dict(keep_vars=True)
    for name, part in made.named_modules():
        for rename in part._load_state_dict_pre_hooks.values():
            rename(state, f"{name}." if name else "", {}, True, [], [], [])
    made.load_state_dict(state)
    for name, weight in made.named_parameters():
        weight.requires_grad_(state[name].requires_grad)


def rename_attention(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give what a `torch.nn.MultiheadAttention` wrote into `state` our names, in place."""
    if f"{prefix}bias_k" in state:
        raise InvalidInput(f"the state dict has {prefix}bias_k, of add_bias_kv: wanted one without")
    for kind in ("weight", "bias"):
        if f"{prefix}in_proj_{kind}" in state:
            parts = state.pop(f"{prefix}in_proj_{kind}").chunk(3)
            state.update({f"{prefix}{name}.{kind}": part for name, part in zip(_PARTS, parts, strict=True)})
        if f"{prefix}out_proj.{kind}" in state:
            state[f"{prefix}out.{kind}"] = state.pop(f"{prefix}out_proj.{kind}")
    for name in _PARTS:
        if f"{prefix}{name[0]}_proj_weight" in state:
            state[f"{prefix}{name}.weight"] = state.pop(f"{prefix}{name[0]}_proj_weight")


def rename_block(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give what a `torch.nn.TransformerEncoderLayer` or `TransformerDecoderLayer` wrote our names, in place."""
    reads_context = any(key.startswith(f"{prefix}multihead_attn.") for key in state)
    names = {
        "self_attn.": "attention.part.",
        "multihead_attn.": "cross.part.",
        "linear1.": "feed_forward.part.up.",
        "linear2.": "feed_forward.part.down.",
        "norm1.": "attention.norm.",
        "norm2.": "cross.norm." if reads_context else "feed_forward.norm.",
        "norm3.": "feed_forward.norm.",
    }
    _rename(state, {f"{prefix}{theirs}": f"{prefix}{ours}" for theirs, ours in names.items()})


def rename_layers(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give what a `torch.nn.TransformerEncoder` or `TransformerDecoder` wrote our names, in place."""
    _rename(state, {f"{prefix}layers.": f"{prefix}blocks."})


def _rename(state: dict[str, Any], prefixes: dict[str, str]) -> None:
    for key in list(state):
        for theirs, ours in prefixes.items():
            if key.startswith(theirs):
                state[ours + key.removeprefix(theirs)] = state.pop(key)
