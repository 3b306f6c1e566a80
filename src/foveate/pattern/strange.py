"""What is said of a thing that stands where a pattern belongs."""

from __future__ import annotations

import importlib
import numbers

import torch
from torch import Tensor

from foveate.names import meant
from foveate.values import describe, is_listed


def wanted_pattern(given: object) -> str:
    """What is said of a thing that stands where a pattern belongs: what it is, and what to write."""
    kind = type(given).__name__
    if isinstance(given, str):
        near = meant("foveate", given.strip().replace(" ", "_").replace("-", "_"))
        return f"the {kind} {given!r}: wanted a pattern{f', {near}' if near else ', such as fv.causal'}"
    if isinstance(given, bool):
        return f"{given}: wanted a pattern, {'fv.causal' if given else 'or None for everyone to everyone'}"
    if isinstance(given, Tensor) and given.dtype.is_floating_point:
        return (
            f"a {kind}, {describe(given)}: a boolean tensor (True = may attend) is a mask; give a float one as score="
        )
    if isinstance(given, Tensor) and given.dtype != torch.bool:
        return (
            f"a {kind}, {describe(given)}: fv.padding(mask) takes an attention_mask [batch, keys] of 1 and 0, "
            "mask.bool() makes a boolean mask (True = may attend)"
        )
    if isinstance(given, Tensor) or is_listed(given):
        return f"a {kind}: wanted a pattern; from_mask(mask) makes one of who may attend, padding(mask) of real keys"
    if kind == "Score":
        return "a Score: wanted a pattern; give a score as score="
    if isinstance(given, numbers.Integral):
        return f"the {kind} {given}: wanted a pattern, such as fv.window({given})"
    name = getattr(given, "__name__", "")
    if callable(given) and name in importlib.import_module("foveate").__all__:
        return f"the {kind} {name}: wanted the pattern that it makes, fv.{name}(…)"
    if callable(given):
        return f"a {kind}: wanted a pattern; fv.rule makes one of a function of (batch, head, query, key)"
    if hasattr(given, "mask_mod"):
        return f"a {kind}: wanted a pattern; fv.rule(block_mask.mask_mod) makes one"
    return f"a {kind}: wanted a pattern, or a boolean tensor (True = may attend)"
