"""What `patch` changes in a model, kept where copies of the model take it along.

Configurations name foveate and layers hold a plan. Both are copied with the model, so that a copy is patched as well
and can be undone by itself; and both are saved as what stood there before, so that no file asks for foveate.
"""

from __future__ import annotations

import copy
import functools
import operator
import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn

from foveate.integrations import recomputing
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import causal

NAME = "foveate"
PLAN = "foveate_plan"
POSITIONS = 64  # on so many a pattern is tried against a layer's own mask


BEFORE: dict[int, str | None] = {}  # what each configuration that patch switched attended by, by its id


@dataclass(frozen=True, eq=False)
class Plan:
    """What `patch` asks of one layer: a pattern that narrows its own, and whether it may return its weights."""

    pattern: Pattern | None
    gives_weights: bool
    switch: Switch | None = None

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        undone = () if self.switch is None else self.switch.undone
        return operator.not_, ((None, *undone),)  # is read as False, when all these have been

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self if self.switch is None else self.switch.planned_again(self, memo)


@dataclass(frozen=True)
class Undone:
    """A configuration in a file, where it says again what it said before."""

    config: Any
    before: str | None

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (self.config, "_attn_implementation_internal", self.before)


class Switch:
    """The configurations that `patch` switched in one model, and the plans of its layers; a change that is in force.

    `root` is the model that was patched, None for a copy of it.
    """

    def __init__(self, name: str, root: nn.Module | None, switched: list[tuple[Any, Any, Any]]) -> None:
        self.name = name
        self.root = None if root is None else weakref.ref(root)
        self.switched = switched  # (configuration, what it attended by, what it attends by), outer ones first
        self.undone = tuple(Undone(config, before) for config, before, _ in switched)
        self._asked: list[tuple[weakref.ref[nn.Module], Pattern | None, bool]] = []

    def ask(self, layer: nn.Module, pattern: Pattern | None, gives_weights: bool) -> None:
        """What a layer is asked for while this is on."""
        self._asked.append((weakref.ref(layer), pattern, gives_weights))

    def on(self) -> None:
        """Let the configurations name foveate, and give the layers their plans."""
        for config, before, after in self.switched:  # each sets what is inside of it, which comes later
            config._attn_implementation = after
            if after == NAME:
                if id(config) not in BEFORE:
                    weakref.finalize(config, BEFORE.pop, id(config), None)
                BEFORE[id(config)] = before
        for held, pattern, gives_weights in self._asked:
            if (layer := held()) is not None:
                setattr(layer, PLAN, Plan(pattern, gives_weights, self))

    def off(self) -> None:
        """Put back what was there before, where nobody has chosen another attention meanwhile."""
        now = [config._attn_implementation for config, _, _ in self.switched]
        for (config, before, after), found in zip(self.switched, now, strict=True):
            config._attn_implementation = before if found == after else found
            BEFORE.pop(id(config), None)
        for held, _, _ in self._asked:
            if (layer := held()) is not None:
                vars(layer).pop(PLAN, None)

    def planned_again(self, plan: Plan, memo: dict[int, Any]) -> Plan:
        """The plan of a copy of a layer, of a switch of the copy's own."""
        twin: Switch | None = memo.get(id(self))
        if twin is None:
            twin = memo[id(self)] = Switch(self.name, None, copy.deepcopy(self.switched, memo))
            twin.on()
            recomputing.begin(twin)
        for held, pattern, gives_weights in self._asked:
            layer = held()
            if layer is not None and vars(layer).get(PLAN) is plan:
                twin.ask(memo[id(layer)], pattern, gives_weights)
        return Plan(plan.pattern, plan.gives_weights, twin)


@functools.lru_cache(64)
def contradicts_causal(pattern: Pattern) -> bool:
    """Whether a pattern takes from some query every key that a causal mask leaves it; it holds no tensors."""
    return not bool((causal & pattern).dense(POSITIONS, POSITIONS).any(-1).all())


def plans(model: nn.Module) -> list[Plan]:
    """The plans of the layers in a model."""
    found = (vars(module).get(PLAN) for module in model.modules())
    return [plan for plan in found if isinstance(plan, Plan)]
