"""The table of linear attention, as data: forms, shapes, who computes them, and what has to come out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from foveate.bench.rows import Claim, Work

Form = Literal["linear", "gated delta", "kimi delta"]

_F32, _BF16 = torch.float32, torch.bfloat16
_SHRINK = 32  # how much shorter everything is in the quick table


@dataclass(frozen=True)
class LinearRow:
    """q, k, v `[batch, heads, steps, dim]`, 8 heads of 64; keys of length 1; a decode step has one step and a state.

    `sweep`: the axis of the curve that the row is a point of, or nothing.
    """

    section: str
    name: str
    form: Form
    steps: int
    contestants: tuple[str, ...]
    claims: tuple[Claim, ...] = ()
    work: Work = "forward"
    dtype: torch.dtype = _F32
    batch: int = 1
    heads: int = 8
    dim: int = 64
    sweep: str = ""

    @property
    def gradients(self) -> bool:
        return self.work == "forward + backward"

    @property
    def operations(self) -> float:
        """Of the recurrence: writing and reading are a product and a sum for each number of the state.

        The delta rule reads once more; the backward pass is twice that.
        """
        each = 2 * (2 if self.form == "linear" else 3) * self.dim * self.dim
        return float(each * self.batch * self.heads * self.steps * (3 if self.gradients else 1))


def table(*, quick: bool = False) -> list[LinearRow]:
    """Chunks forward and backward, decode steps, and the same length by softmax; how the cost grows."""
    shrink = _SHRINK if quick else 1
    return [*_chunks(shrink), *_decode(), *_softmax(shrink), *_sweep(shrink)]


def _chunks(shrink: int) -> Iterator[LinearRow]:
    n = 4096 // shrink
    works: tuple[tuple[Work, float], ...] = (("forward", 3), ("forward + backward", 2))
    forms: tuple[tuple[Form, tuple[str, ...]], ...] = (
        ("linear", ("native", "chunked", "plain")),
        ("gated delta", ("native", "chunked", "transformers")),
        ("kimi delta", ("native", "chunked")),
    )
    for work, target in works:
        for form, who in forms:
            yield LinearRow(
                "chunks", f"fp32 {form} T={n}, {work}", form, n, who, (Claim("native", who[-1], target),), work
            )
        yield LinearRow(
            "chunks", f"bf16 gated delta T={n}, {work}", "gated delta", n,
            ("native", "chunked", "transformers"), (Claim("native", "transformers", target),), work, _BF16,
        )  # fmt: skip


def _decode() -> Iterator[LinearRow]:
    forms: tuple[tuple[Form, str], ...] = (("gated delta", "transformers"), ("linear", "plain"))
    for form, peer in forms:
        for batch in (1, 8):
            claim = Claim("native", peer, 5) if batch == 8 and form == "gated delta" else Claim("native", peer, aim=5)
            yield LinearRow(
                "decode", f"fp32 {form}, one step, batch {batch}", form, 1, ("native", "recurrence", peer),
                (claim,), "decode", batch=batch,
            )  # fmt: skip


def _softmax(shrink: int) -> Iterator[LinearRow]:
    n = 16384 // shrink
    yield LinearRow(
        "beside dense causal softmax", f"fp32 linear T={n}", "linear", n, ("native", "softmax"),
        (Claim("native", "softmax", 4),),
    )  # fmt: skip


def _sweep(shrink: int) -> Iterator[LinearRow]:
    for length in (1024, 2048, 4096, 8192, 16384, 32768):
        n = length // shrink
        who = ("native", "softmax") if length <= 16384 else ("native",)
        yield LinearRow("the cost of a length", f"fp32 linear, {n} steps", "linear", n, who, sweep="steps")
