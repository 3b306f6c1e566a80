"""The peak memory of one call, or of one turn of a model, in a process of its own.

Of a call it is the peak beyond its inputs, outputs and gradients; of a model that beyond the model itself.

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
from typing import Any

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
    answer = _asked(job, contestant)
    return answer["megabytes"], answer["complaint"]


def megabytes_of_model(name: str, contestant: str) -> float:
    """The 10⁶ bytes by which one turn of a contestant let the peak grow, in the row of the table of models so named.

    Raises `Unsupported` where its process failed.
    """
    return float(_asked({"model": name}, contestant)["megabytes"])


def _asked(job: dict[str, Any], contestant: str) -> dict[str, Any]:
    """What a process of its own answers."""
    job |= {"contestant": contestant, "threads": torch.get_num_threads()}
    child = subprocess.run(
        [sys.executable, "-m", "foveate.bench.memory", json.dumps(job)], capture_output=True, text=True, check=False
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise unsupported({contestant: [f"its process failed: {last}"]})
    answer: dict[str, Any] = json.loads(child.stdout)
    if answer["refused"]:
        raise unsupported(answer["refused"])
    return answer


def _main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    if "model" in job:
        print(json.dumps({"megabytes": _measure_model(job["model"], job["contestant"]), "refused": None}))
        return
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


def _measure_model(name: str, contestant: str) -> float:
    from foveate.bench.modelling import turn_alone
    from foveate.bench.models import table
    from foveate.integrations.transformers import register

    register()
    rows = [row for quick in (False, True) for row in table(quick=quick)]
    with torch.no_grad():
        turn = turn_alone(next(row for row in rows if row.name == name), contestant)
        before = start()
        turn()
        return (peak() - before) / 1e6


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
