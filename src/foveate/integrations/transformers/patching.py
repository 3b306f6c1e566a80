"""Reaching models: `register` for all of a process, `patch` for one that is loaded."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import nn

from foveate.errors import FoveateError, InvalidInput
from foveate.installing import how_to_install
from foveate.integrations import recomputing
from foveate.integrations.transformers.attention_interface import attention
from foveate.integrations.transformers.layers import attention_layers, chosen
from foveate.integrations.transformers.masks import mask
from foveate.integrations.transformers.switching import BEFORE, NAME, POSITIONS, Plan, Switch, contradicts_causal, plans
from foveate.pattern.algebra import Pattern
from foveate.words import explained

TESTED = "5.23"  # docs/models.md says what was compared


@explained
def register() -> None:
    """Make `attn_implementation="foveate"` known to transformers, for the whole process; again does nothing more.

    Importing `foveate.integrations.transformers`, `patch` and `watch` call it.

    Raises:
        FoveateError: transformers is missing or too old; the message says what to install.
    """
    attentions, masks = _interfaces()
    attentions.register(NAME, attention)
    masks.register(NAME, mask)


@explained
def unregister() -> None:
    """Take `attn_implementation="foveate"` from transformers again.

    Raises:
        FoveateError: it is not registered, or models are patched that need it.
    """
    attentions, masks = _interfaces()
    if NAME not in attentions._global_mapping:
        raise FoveateError("foveate is not registered with transformers: nothing to undo")
    names = sorted({change.name for change in recomputing.in_force() if isinstance(change, Switch)})
    if names:
        raise FoveateError(f"foveate still computes for {', '.join(names)}: unpatch what is patched first")
    del attentions._global_mapping[NAME], masks._global_mapping[NAME]


class Patched:
    """One model that computes its attention with foveate; the end of a `with` gives it back, if `unpatch` did not.

    `layers` are the names of the attention layers that are reached, in the order of `model.named_modules()`;
    `bypassed` the classes of those that are not.
    """

    def __init__(self, switch: Switch, layers: list[str], bypassed: list[str]) -> None:
        self.layers = layers
        self.bypassed = bypassed
        self._name = switch.name
        self._switch = weakref.ref(switch)

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        switch = self._switch()
        if switch in recomputing.in_force():  # a patch that was made after this one was undone is not ours to undo
            recomputing.end(switch)

    def __repr__(self) -> str:
        beside = f", not {', '.join(self.bypassed)}" if self.bypassed else ""
        return f"<Patched {self._name}: {len(self.layers)} attention layers{beside}>"


@explained
def patch(
    model: nn.Module,
    pattern: Pattern | None = None,
    *,
    layers: Sequence[int | str] | None = None,
    weights_from: Sequence[int | str] | None = None,
) -> Patched:
    """Let one loaded Hugging Face model compute its attention with foveate, with the same results.

    Args:
        model: any model of transformers whose layers call its attention interface; those that do not are named in one
            warning and go on as before.
        pattern: narrows what the layers see: each attends to what its own mask *and* this pattern allow. Positions
            count from the first key of a row, padding included.
        layers: for which layers the pattern holds; None = all. A number counts the layers as `Patched.layers` lists
            them, a text names one of them or a module that contains some.
        weights_from: which layers return their weights under `output_attentions=True`; None = all. The others compute
            none, so that those of one layer cost no more than one layer's.

    Returns:
        What was reached; the end of a `with` gives the model back as it was, and so does `unpatch`.

    Raises:
        InvalidInput: no layer can be reached, the model is patched already, a layer does not exist, or the pattern
            contradicts the model's own mask. The model is left as it was.
    """
    reached, bypassed = attention_layers(model)
    if made := plans(model):
        raise InvalidInput(_patched_already(model, made[0]))
    if pattern is None and layers is not None:
        raise InvalidInput(f"layers is {layers!r} but no pattern was given for them: give pattern=")
    narrowed, giving = _asked(model, reached, pattern, layers, weights_from)
    register()
    before = _implementations(model)
    switch = Switch(type(model).__name__, model, [(config, name, name) for config, name in before])
    try:
        with _quiet():
            model.set_attn_implementation(NAME)  # type: ignore[operator]
        switch.switched = [(config, name, config._attn_implementation) for config, name in before]
        for name, layer in reached.items():
            switch.ask(layer, pattern if name in narrowed else None, name in giving)
        switch.on()
        if bypassed:
            own = ", ".join(bypassed)
            warnings.warn(
                f"{type(model).__name__}: {own} compute their own attention and are not reached by foveate",
                stacklevel=2,
            )
    except BaseException:
        switch.switched = [(config, name, config._attn_implementation) for config, name in before]  # as far as it came
        switch.off()
        raise
    recomputing.begin(switch)
    return Patched(switch, list(reached), bypassed)


@explained
def unpatch(model: nn.Module) -> None:
    """Give a model that `patch` changed, or a copy of one, back as it was before.

    Raises:
        FoveateError: the model is not patched.
    """
    switches = _switches(model)
    if not switches:
        raise FoveateError(f"{type(model).__name__} is not patched: nothing to undo")
    for switch in switches:
        recomputing.end(switch)


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` was called on this model, or on one that it is a copy of, and not undone."""
    return bool(_switches(model))


def is_on(model: nn.Module) -> bool:
    """Whether every layer that can be reached computes with foveate by `patch`, of this model or one around it."""
    layers = attention_layers(model)[0].values()
    return len(plans(model)) == len(layers)


def _patched_already(model: nn.Module, plan: Plan) -> str:
    """Which model it is, this one, a part of it or one around it, whose patch is in the way."""
    name = type(model).__name__
    root = None if plan.switch is None or plan.switch.root is None else plan.switch.root()
    if root is None or root is model:
        return f"{name} is patched already: unpatch it first"
    if any(root is part for part in model.modules()):
        return f"{type(root).__name__}, a part of {name}, is patched already: unpatch that first"
    return f"{type(root).__name__}, which {name} is a part of, is patched already: unpatch that first"


def _switches(model: nn.Module) -> list[Switch]:
    """What has been done to a model by `patch`; not what was done to a part of it, or to what it is a part of."""
    found = {plan.switch: None for plan in plans(model) if plan.switch is not None}
    return [switch for switch in found if switch.root is None or switch.root() is model]


def _interfaces() -> tuple[Any, Any]:
    """transformers' two registries, of attention functions and of mask functions."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise FoveateError(f"transformers is missing: {how_to_install('hf')}") from error
    version = transformers.__version__
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise FoveateError(
            f"transformers {version} has no attention interface: wanted {TESTED}; {how_to_install('hf')}"
        ) from error
    if version.split(".")[:2] != TESTED.split(".") and NAME not in AttentionInterface._global_mapping:
        warnings.warn(
            f"transformers is {version} and foveate was tested with {TESTED}: compare a model's output with that of "
            'attn_implementation="eager" before you rely on it',
            stacklevel=3,
        )
    return AttentionInterface, AttentionMaskInterface


def _asked(
    model: nn.Module,
    reached: dict[str, nn.Module],
    pattern: Pattern | None,
    layers: Sequence[int | str] | None,
    weights_from: Sequence[int | str] | None,
) -> tuple[set[str], set[str]]:
    """The layers that the pattern narrows, and those that may return their weights."""
    if pattern is not None and not isinstance(pattern, Pattern):
        raise InvalidInput(f"the pattern is a {type(pattern).__name__}: wanted a pattern, such as fv.window(128)")
    names = list(reached)
    narrowed = chosen(names, layers, "layers") if pattern is not None else set()
    if pattern is not None and layers is None:
        kinds = sorted({type(module).__name__ for module in reached.values()})
        if len(kinds) > 1 or getattr(model.config, "is_encoder_decoder", False):
            raise InvalidInput(
                f"{type(model).__name__} has attention of several kinds ({', '.join(kinds)}): say by layers= to which "
                "the pattern applies, for example layers=['decoder']"
            )
    giving = chosen(names, weights_from, "weights_from")
    for name in names:
        if name in narrowed:
            _check_against(pattern, name, reached[name])
    return narrowed, giving


def _check_against(pattern: Pattern | None, name: str, module: nn.Module) -> None:
    """Refuse a pattern that takes from some query every key that a causal mask leaves it, or from all every key."""
    if pattern is None or pattern.tensors():  # what depends on a batch is known only when the batch is
        return
    config = getattr(module, "config", None)  # which makes a decoder look both ways, whatever its layers say
    is_causal = bool(getattr(module, "is_causal", False)) and getattr(config, "is_causal", True) is not False
    if is_causal and contradicts_causal(pattern):
        raise InvalidInput(
            f"the pattern {pattern!r} contradicts the causal mask of {name}: some queries would see no key at all"
        )
    if not bool(pattern.dense(POSITIONS, POSITIONS).any()):
        raise InvalidInput(f"the pattern {pattern!r} leaves no query of {name} any key")


def _implementations(model: nn.Module) -> list[tuple[Any, Any]]:
    """Every configuration in the model with what it attends by now, outer ones first."""
    found: list[tuple[Any, Any]] = []

    def collect(config: Any) -> None:
        if any(config is each for each, _ in found):
            return
        found.append((config, BEFORE.get(id(config), config._attn_implementation)))
        for name in getattr(config, "sub_configs", {}):
            part = getattr(config, name, None)
            if part is not None:
                collect(part)

    for module in model.modules():
        if hasattr(module, "set_attn_implementation"):
            collect(module.config)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own lines about each part that cannot be switched: `patch` says it once."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
