"""Who computes a call of the linear family: the named implementation, or the first that does not refuse."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from foveate.errors import unknown_name, unsupported
from foveate.linear.problem import LinearProblem, LinearState
from foveate.problem import without_autocast

LINEAR_NAMES = ("native", "chunked", "recurrence")


@runtime_checkable
class LinearImplementation(Protocol):
    """What a file in `linear/` offers."""

    def refuses(self, problem: LinearProblem) -> list[str]:
        """Every reason for which it cannot; empty when it can."""

    def run(self, problem: LinearProblem) -> tuple[Tensor, Tensor]:
        """(out, the last state) of a problem that it does not refuse."""


def linear_implementation(name: str) -> LinearImplementation:
    """The module of the linear family behind a name, loaded on first use."""
    match name:
        case "native":
            from foveate.linear import native

            return native
        case "chunked":
            from foveate.linear import chunked

            return chunked
        case "recurrence":
            from foveate.linear import recurrence

            return recurrence
        case _:
            raise unknown_name("backend", name, ("auto", *LINEAR_NAMES))


def dispatch_linear(problem: LinearProblem, backend: str = "auto") -> tuple[Tensor, LinearState]:
    """Run the first implementation of the linear family that does not refuse, or the named one."""
    chosen = linear_chosen(problem, backend)
    with without_autocast(problem.q.device):
        return problem.result(*chosen.run(problem))


def linear_chosen(problem: LinearProblem, backend: str = "auto") -> LinearImplementation:
    """The named implementation, or the compiled kernels where they can; else one step needs no chunk."""
    if backend != "auto":
        named = linear_implementation(backend)
        reasons = named.refuses(problem)
        if reasons:
            raise unsupported({backend: reasons})
        return named
    native = linear_implementation("native")
    if not native.refuses(problem):
        return native
    return linear_implementation("recurrence" if problem.k.shape[2] <= 1 else "chunked")
