"""Which layers of a model attend, which of them foveate can reach, and which of those somebody means."""

from __future__ import annotations

import inspect
import numbers
import sys
from collections.abc import Sequence

from torch import nn

from foveate.errors import InvalidInput

_OWN = {"softmax", "Softmax", "logsumexp", "scaled_dot_product_attention"}  # what a layer calls that attends itself


def attention_layers(model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    """The layers that call transformers' attention interface, by name, and the classes of those that do not."""
    if not hasattr(model, "set_attn_implementation"):
        raise InvalidInput(f"patch was given a {type(model).__name__}: wanted a model of Hugging Face transformers")
    reached, bypassed = {}, set()
    kinds = {kind: kind_of(kind) for kind in {type(module) for module in model.modules()}}
    for name, module in model.named_modules():
        if kinds[type(module)] == "reached":
            reached[name] = module
        elif kinds[type(module)] == "bypassed":
            bypassed.add(type(module).__name__)
    if not reached:
        raise InvalidInput(_why_none(model))
    return reached, sorted(bypassed)


def _why_none(model: nn.Module) -> str:
    """Why no layer of a model can be reached, and what to do."""
    name = type(model).__name__
    kinds = {type(module) for module in model.modules()}
    own = [kind for kind in kinds if kind_of(kind) == "bypassed"] or list(filter(_is_called_attention, kinds))
    if own:
        names = ", ".join(sorted(kind.__name__ for kind in own))
        return (
            f"{name} has no layer that calls transformers' attention interface, so foveate cannot reach it; "
            f"{names} compute their own: use a model whose documentation lists attn_implementation="
        )
    there = vars(sys.modules[type(model).__module__]).values()
    known = sorted(kind.__name__ for kind in there if isinstance(kind, type) and kind_of(kind) == "reached")
    if known:
        return (
            f"{name} has no attention layer, for its configuration makes none: there is nothing to patch; "
            f"patch reaches {', '.join(known)} where a configuration asks for it"
        )
    return f"{name} has no attention layer: there is nothing to patch"


def kind_of(kind: type) -> str:
    """Whether layers of this class call the interface ("reached"), or compute attention themselves ("bypassed")."""
    if kind is nn.MultiheadAttention:
        return "bypassed"
    if not issubclass(kind, nn.Module):
        return ""
    called: set[str] = set()
    for each in kind.__mro__:  # what a class inherits counts as its own, down to where forward is written
        if each is nn.Module:
            break
        functions = (inspect.unwrap(part) for part in vars(each).values() if inspect.isfunction(part))
        called.update(name for function in functions for name in function.__code__.co_names)
        if "forward" in vars(each):
            break
    if {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= called:
        return "reached"
    return "bypassed" if _is_called_attention(kind) and called & _OWN else ""


def is_layer(module: nn.Module) -> bool:
    """Whether a module calls transformers' attention interface itself."""
    return kind_of(type(module)) == "reached"


def _is_called_attention(kind: type) -> bool:
    return "Attention" in kind.__name__ or "Attn" in kind.__name__


def chosen(names: list[str], wanted: Sequence[int | str] | None, what: str) -> set[str]:
    """The names that numbers and parts of names stand for; None means all."""
    if wanted is None:
        return set(names)
    if isinstance(wanted, str) or not isinstance(wanted, Sequence):
        raise InvalidInput(f"{what} is {wanted!r}: wanted a list of numbers or names")
    found_all: set[str] = set()
    for one in wanted:
        if isinstance(one, str):
            found = [name for name in names if f".{one}." in f".{name}."]
        else:
            found = [names[one]] if isinstance(one, numbers.Integral) and -len(names) <= one < len(names) else []
        if not found:
            raise InvalidInput(
                f"{what} names {one!r}, which is no attention layer: wanted 0 to {len(names) - 1}, or a name such as "
                f"{names[0]!r}"
            )
        found_all.update(found)
    return found_all
