"""What a row of a table is: one piece of work, who computes it, and what has to come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from foveate.pattern.algebra import Pattern
from foveate.problem import Problem, problem

Work = Literal["forward", "forward + backward", "decode", "looked"]


@dataclass(frozen=True)
class Claim:
    """How a contestant has to stand against another one, against the machine's ceiling, or in memory.

    `against` is a contestant: the time of that one over the time of ours, at least `target`. Or "ceiling": percent of
    it, at least. Or "memory": megabytes (10⁶) beside inputs, outputs and gradients, at most. `aim` is what is hoped
    for. `never_behind`: as fast as the peer, or behind it by no more than the peer was behind itself.
    """

    contestant: str
    against: str
    target: float | None = None
    aim: float | None = None
    never_behind: bool = False

    @property
    def unit(self) -> str:
        """× for a ratio of times, % of the ceiling, MB."""
        return {"ceiling": "%", "memory": "MB"}.get(self.against, "×")

    @property
    def bound(self) -> str:
        return "at most" if self.against == "memory" else "at least"


@dataclass(frozen=True)
class Row:
    """q `[batch, heads, queries, dim]`, k and v `[batch, key heads, keys, dim]`; the first peer is timed twice (A/A).

    `block`: the pattern is the same for all pairs of a block of so many positions (0: it is not made of blocks).
    `reach`: a query sees so many keys, the last one its own (0: nobody said).
    `sweep`: the axis of the curve that the row is a point of, or nothing.
    """

    section: str
    name: str
    dtype: torch.dtype
    queries: int
    keys: int
    dim: int
    contestants: tuple[str, ...]
    claims: tuple[Claim, ...] = ()
    batch: int = 1
    heads: int = 8
    key_heads: int = 8
    pattern: Pattern | None = None
    work: Work = "forward"
    block: int = 0
    reach: int = 0
    sweep: str = ""

    @property
    def gradients(self) -> bool:
        return self.work == "forward + backward"

    @property
    def weighs_memory(self) -> bool:
        """Whether it is about the peak memory of one call, not about time."""
        return any(claim.against == "memory" for claim in self.claims)

    @property
    def ceiling(self) -> str:
        """Which ceiling of the machine bounds it: reading memory, or multiplying in this dtype."""
        return "read" if self.work == "decode" else str(self.dtype).removeprefix("torch.")

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v and the gradient that arrives at the output; the same numbers each time."""
        draw = torch.Generator().manual_seed(7)
        q, k, v, upstream = (
            torch.randn(self.batch, heads, length, self.dim, generator=draw).to(self.dtype)
            for heads, length in (
                (self.heads, self.queries),
                (self.key_heads, self.keys),
                (self.key_heads, self.keys),
                (self.heads, self.queries),
            )
        )
        return q, k, v, upstream

    def problem(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, needs_lse: bool = False) -> Problem:
        """The checked call."""
        return problem(q, k, v, self.pattern, needs_lse=needs_lse)

    def density(self) -> float:
        """The share of all pairs that may attend."""
        return 1.0 if self.pattern is None else self.pattern.density(self.queries, self.keys, heads=self.heads)

    def operations(self, density: float) -> float:
        """Floating-point operations of the visible pairs.

        Forward is two products of matrices, 4 · pairs · dim; backward is five more (the scores once again, and one
        for each of d weights, dQ, dK, dV), so both together are 3.5 times that.
        """
        pairs = self.batch * self.heads * self.queries * self.keys * density
        return 4 * pairs * self.dim * (3.5 if self.gradients else 1)

    def key_value_bytes(self) -> float:
        """The bytes of k and v, each read once: what decoding cannot do without."""
        return 2.0 * self.batch * self.key_heads * self.keys * self.dim * self.dtype.itemsize
