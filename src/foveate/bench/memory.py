"""The peak memory of one call beyond its inputs, outputs and gradients, in a process of its own.

A process that has measured other rows holds memory that a call could take unseen; a fresh one does not. A small call
comes first, so that what is loaded and started once does not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from foveate.bench.contestants import prepare
from foveate.bench.rows import Row
from foveate.bench.truth import truth
from foveate.errors import Unsupported, unsupported
from foveate.pattern.catalogue import parse

_SIZES = ("queries", "keys", "dim", "batch", "heads", "key_heads", "work", "reach")
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def megabytes(row: Row, contestant: str) -> tuple[float, str]:
    """(10⁶ bytes by which the peak grew beside what the call had to hold, what is wrong with its result if anything).

    Raises `Unsupported` where the contestant cannot compute the row.
    """
    assert row.pattern is not None
    job = {size: getattr(row, size) for size in _SIZES}
    job |= {"dtype": str(row.dtype).removeprefix("torch."), "pattern": row.pattern.spec()[0]}
    job |= {"contestant": contestant, "threads": torch.get_num_threads()}
    child = subprocess.run(
        [sys.executable, "-m", "foveate.bench.memory", json.dumps(job)], capture_output=True, text=True, check=False
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise unsupported({contestant: [f"its process failed: {last}"]})
    answer = json.loads(child.stdout)
    if answer["refused"]:
        raise unsupported(answer["refused"])
    return answer["megabytes"], answer["complaint"]


def _main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    sizes = {size: job[size] for size in _SIZES}
    dtype, pattern = getattr(torch, job["dtype"]), parse(job["pattern"], [])
    row = Row("", "", dtype=dtype, pattern=pattern, contestants=(job["contestant"],), **sizes)
    try:
        grown, complaint = _measure(row, job["contestant"])
        answer = {"megabytes": grown, "complaint": complaint, "refused": None}
    except Unsupported as refusal:
        answer = {"megabytes": None, "complaint": "", "refused": refusal.reasons}
    print(json.dumps(answer))


def _measure(row: Row, contestant: str) -> tuple[float, str]:
    small = replace(row, queries=min(row.queries, 256), keys=min(row.keys, 256))
    with torch.set_grad_enabled(row.gradients):
        _turn(small, contestant, *small.inputs())
        inputs = row.inputs()
        before = start()
        found = _turn(row, contestant, *inputs)
        grown = peak() - before - sum(part.nbytes for part in found)
    return grown / 1e6, _complaint(row, inputs, found)


def _turn(row: Row, contestant: str, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    for leaf in (q, k, v):
        leaf.requires_grad_(row.gradients)
    return prepare(contestant, row, q, k, v, upstream)()


def start() -> int:
    """The bytes held now; from here on the peak is counted anew."""
    with suppress(OSError):  # elsewhere than on Linux, or where it is forbidden, the peak so far stands
        _RESET.write_text("5")
    return peak()


def peak() -> int:
    """The most bytes held so far. Not `ru_maxrss` on Linux: there a child begins with the peak of its parent."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _complaint(row: Row, inputs: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> str:
    """The last rows against the truth: a query sees `reach` keys, so the end can be computed without the rest."""
    names = ("out", "dQ", "dK", "dV")
    for name, part in zip(names, found, strict=False):
        if not bool(part.isfinite().all()):
            return f"{name} is not finite"
    rows, keys = row.reach, min(row.keys, 2 * row.reach - 1)
    lengths = (rows, keys, keys, rows)
    end = replace(row, queries=rows, keys=keys)
    true = truth(end, *(x[:, :, -length:].detach() for x, length in zip(inputs, lengths, strict=True)))
    parts = [part[:, :, -length:].detach().clone() for part, length in zip(found, (rows, *lengths), strict=False)]
    for part, wanted in zip(parts[2:], true.wanted[2:], strict=True):
        part[:, :, :-rows] = wanted[:, :, :-rows]  # gradients of keys that queries before the end see as well
    return true.complaint(tuple(parts))


if __name__ == "__main__":
    _main()
