"""Which implementation runs, and why every other one does not."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from foveate.dispatch.thresholds import leads
from foveate.eager import is_eager
from foveate.errors import unknown_name, unsupported
from foveate.problem import Problem, Result, without_autocast

# The order of preference. `reference` holds n×n weights and flex compiles at run time: see `_automatic`.
NAMES = ("sdpa", "native", "flex", "chunked", "reference")

Observer = Callable[[Problem], None]


class Observation:
    """Someone who is told of problems, in those contexts (threads, tasks) where `begin` was called, until `close`.

    `begin` may be called again before `end`; each problem is told once.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.on = True

    def begin(self) -> None:
        """Listen in this context."""
        _OBSERVATIONS.set((*(one for one in _OBSERVATIONS.get() if one.on), self))

    def end(self) -> None:
        """Listen no more in this context, whoever began after this; undoes one `begin`."""
        now = list(_OBSERVATIONS.get())
        if self in now:
            now.reverse()
            now.remove(self)
            _OBSERVATIONS.set(tuple(reversed(now)))

    def close(self) -> None:
        """Listen nowhere any more: other contexts, which cannot be reached from here, hold it until they end."""
        self.on = False
        self.end()


_OBSERVATIONS: ContextVar[tuple[Observation, ...]] = ContextVar("foveate_observations", default=())


@runtime_checkable
class Implementation(Protocol):
    """What a file in `softmax/` offers."""

    def refuses(self, problem: Problem) -> list[str]:
        """Every reason for which it cannot; empty when it can."""

    def run(self, problem: Problem) -> Result:
        """Compute a problem that it does not refuse."""


@dataclass(frozen=True)
class Choice:
    """Which implementation runs a problem; prints as a table with every refusal of every other one."""

    chosen: str
    refusals: dict[str, list[str]]
    note: str = ""

    def __str__(self) -> str:
        width = max(map(len, self.refusals))
        lines = []
        for name, reasons in self.refusals.items():
            word = "runs" if name == self.chosen else "could run" if not reasons else "; ".join(reasons)
            lines.append(f"{'→' if name == self.chosen else ' '} {name:<{width}}  {word}")
            if name == self.chosen and name in _NOTES:
                lines.append(f"  {'':<{width}}  note: {_NOTES[name]}")
        return "\n".join([*lines, *([f"note: {self.note}"] if self.note else [])])

    __repr__ = __str__


_NOTES = dict.fromkeys(
    ("sdpa", "flex"), "NaN or inf in a key that is hidden from one row but visible to another does reach that row"
)


def implementation(name: str) -> Implementation:
    """The module behind a name, loaded on first use."""
    match name:
        case "sdpa":
            from foveate.softmax import sdpa

            return sdpa
        case "native":
            from foveate.softmax import native

            return native
        case "flex":
            from foveate.softmax import flex

            return flex
        case "chunked":
            from foveate.softmax import chunked

            return chunked
        case "reference":
            from foveate.softmax import reference

            return reference
        case _:
            raise unknown_name("backend", name, ("auto", *NAMES))


def choose(problem: Problem, backend: str = "auto") -> Choice:
    """The choice for `backend="auto"` or a named backend, with every reason of every one that does not run."""
    refusals = {name: implementation(name).refuses(problem) for name in NAMES}
    if backend != "auto":
        implementation(backend)  # an unknown name is an error of its own
        if refusals[backend]:
            raise unsupported({backend: refusals[backend]})
        return Choice(backend, refusals, _looks_odd(problem))
    for name in NAMES:
        if not refusals[name]:
            refusals[name] = _automatic(name, problem)
    for name in NAMES:
        if not refusals[name]:
            return Choice(name, refusals, _looks_odd(problem))
    raise unsupported(refusals)


def _looks_odd(problem: Problem) -> str:
    """What is right, and yet is seldom meant: more heads than tokens are rather tokens where heads belong."""
    _, heads, queries, keys = problem.shape
    if not heads == problem.k.shape[1] > queries >= keys > 1:
        return ""
    return f"q has {heads} heads and {queries} queries; if it is [batch, length, heads, dim], give q.transpose(1, 2)"


def dispatch(problem: Problem, backend: str = "auto") -> Result:
    """Tell the observers, then run the first implementation that does not refuse, or the named one."""
    tell(problem)
    chosen = decide(problem, backend)
    problem = seeded(problem)  # drawn only now that the call will run
    with without_autocast(problem.q.device):
        return chosen.run(problem)


def tell(problem: Problem) -> None:
    """Tell the observers of a problem that will be computed; a graph has no one to tell."""
    if not torch.compiler.is_compiling():
        for one in dict.fromkeys(_OBSERVATIONS.get()):
            if one.on:
                one.observer(problem)


def seeded(problem: Problem) -> Problem:
    """The problem with a seed, if it needs one and has none."""
    if not problem.dropout or problem.seed is not None:
        return problem
    drawn = torch.randint(-(2**63), 2**63 - 1, (), device="cpu")
    # As a tensor where a graph, a trace or a transform has to see it drawn.
    return replace(problem, seed=int(drawn) if is_eager(problem.q, problem.k, problem.v) else drawn)


def decide(problem: Problem, backend: str = "auto") -> Implementation:
    """The first implementation that does not refuse, or the named one, which raises `Unsupported` if it does."""
    return _first(problem) if backend == "auto" else _named(problem, backend)


def _named(problem: Problem, name: str) -> Implementation:
    candidate = implementation(name)
    reasons = candidate.refuses(problem)
    if reasons:
        raise unsupported({name: reasons})
    return candidate


def _first(problem: Problem) -> Implementation:
    for name in NAMES:
        candidate = implementation(name)
        if not _automatic(name, problem) and not candidate.refuses(problem):
            return candidate
    return implementation(choose(problem).chosen)  # raises with every reason


def _automatic(name: str, problem: Problem) -> list[str]:
    """Why `auto` passes over an implementation that could run."""
    if torch.onnx.is_in_onnx_export():
        return [] if name in ("sdpa", "reference") else ["a file of ONNX holds no operator but PyTorch's"]
    if name == "reference":
        return ["holds n×n weights, so it runs only by name"]
    on_cpu = problem.q.device.type == "cpu"
    if name == "sdpa" and on_cpu and leads(problem) and not implementation("native").refuses(problem):
        return ["native is at least as fast here"]
    if name == "flex" and on_cpu:
        return ["compiles at run time, so on a CPU it runs only by name"]
    return []


def observe(observer: Observer) -> Callable[[], None]:
    """Tell `observer` of every problem in this context from now on; the returned function ends it."""
    observation = Observation(observer)
    observation.begin()
    return observation.close


def is_observed() -> bool:
    """Whether anyone in this context is told of problems."""
    return any(one.on for one in _OBSERVATIONS.get())
