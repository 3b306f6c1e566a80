"""Bahdanau's scores beside what one writes by hand: a tensor of queries × keys × dim, its tanh, and their gradients.

- broadcast: softmax(w · tanh(q[:, :, :, None] + k[:, :, None]))·v in one line of PyTorch
- additive: `fv.additive_attention`

The second row is about memory: the peak of one forward and backward pass beside its inputs and outputs, in a process of
its own, and the ratio is that of the megabytes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.bench.contestants import Turn
from foveate.bench.measuring import rounded
from foveate.bench.memory import peak, start
from foveate.bench.results import Figure
from foveate.bench.rows import Claim, Row
from foveate.bench.truth import Truth, rounding
from foveate.mechanisms.additive import additive_attention

_Align = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AdditiveRow(Row):
    """q and k projected already; `weighs`: about the memory of a call, not about its time."""

    weighs: bool = False


def table(shrink: int) -> Iterator[AdditiveRow]:
    """Time and memory of the same work."""
    n, dim = 512 // shrink, 256 // shrink
    for weighs, target in ((False, 1.0), (True, 10.0)):
        yield AdditiveRow(
            "additive scores",
            f"fp32 Bahdanau {n} × {n} d={dim}, forward + backward{', memory' if weighs else ''}",
            torch.float32, n, n, dim, ("broadcast", "additive"), (Claim("additive", "broadcast", target),),
            heads=1, key_heads=1, work="forward + backward", weighs=weighs,
        )  # fmt: skip


def _broadcast(q: Tensor, k: Tensor, v: Tensor, vector: Tensor) -> Tensor:
    return ((q[:, :, :, None] + k[:, :, None]).tanh() @ vector).softmax(-1) @ v


_ALIGN: dict[str, _Align] = {"broadcast": _broadcast, "additive": additive_attention}


def _inputs(row: AdditiveRow) -> tuple[list[Tensor], Tensor]:
    """(q, k, v and the vector of weights, the gradient that arrives)."""
    q, k, v, upstream = row.inputs()
    return [q, k, v, torch.randn(row.dim, generator=torch.Generator().manual_seed(17)) / row.dim**0.5], upstream


def _turn(name: str, leaves: list[Tensor], upstream: Tensor) -> Turn:
    align = _ALIGN[name]

    def turn() -> tuple[Tensor, ...]:
        out = align(*leaves)
        return (out, *torch.autograd.grad(out, leaves, upstream))

    return turn


def contestants(row: Row) -> dict[str, tuple[Turn, Truth]]:
    """Every contestant with the truth, which is the broadcast in float64."""
    assert isinstance(row, AdditiveRow)
    plain, upstream = _inputs(row)
    wide = [x.double().requires_grad_() for x in plain]
    leaves = [x.requires_grad_() for x in plain]
    wanted = tuple(x.detach() for x in _turn("broadcast", wide, upstream.double())())
    rough = tuple(x.detach() for x in _turn("broadcast", leaves, upstream)())
    allowed = [
        (2 if place == 0 else 3) * float((mine.double() - true).abs().max()) + rounding(row.dtype, true)
        for place, (mine, true) in enumerate(zip(rough, wanted, strict=True))
    ]
    true = Truth(("out", "dQ", "dK", "dV", "dw"), torch.arange(row.queries), wanted, tuple(allowed))
    return {name: (_turn(name, leaves, upstream), true) for name in row.contestants}


def weigh(row: AdditiveRow, runs: int) -> dict[str, Figure]:
    """The megabytes (10⁶) of every contestant."""
    return {name: _figure(row, name, runs) for name in row.contestants}


def _figure(row: AdditiveRow, name: str, runs: int) -> Figure:
    job = {"contestant": name, "length": row.queries, "dim": row.dim, "threads": torch.get_num_threads()}
    found = []
    for _ in range(runs):
        child = subprocess.run(
            [sys.executable, "-m", "foveate.bench.alignment", json.dumps(job)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if child.returncode:
            last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
            return Figure("MB", refused=f"its process failed: {last}")
        found.append(rounded(json.loads(child.stdout)))
    return Figure("MB", found, rounded(statistics.median(found)))


def _main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    (row, _) = table(1)
    for length in (16, job["length"]):  # a small call first, so that what is loaded once does not count
        sizes = AdditiveRow(
            row.section, row.name, row.dtype, length, length, job["dim"], row.contestants, heads=1, key_heads=1,
            work=row.work,
        )  # fmt: skip
        leaves, upstream = _inputs(sizes)
        turn = _turn(job["contestant"], [x.requires_grad_() for x in leaves], upstream)
        before = start()
        found = turn()
        grown = peak() - before - sum(part.nbytes for part in found)
    print(json.dumps(max(grown, 1) / 1e6))


if __name__ == "__main__":
    _main()
