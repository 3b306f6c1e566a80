"""Check, then time in turn.

All contestants of a row live in one process. Each computes the row once and is compared with the truth; who is wrong
or refuses gets no figure. Then they take turns, A B C A B C …, so that whatever else the machine does falls on all. A
turn is as many calls as fill two milliseconds, at least one. A run is the median of at least five turns; of several
runs the worst ratio counts.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping

import torch

from foveate.bench.contestants import OURS, PEERS, Turn, prepare
from foveate.bench.memory import megabytes
from foveate.bench.results import Figure, Measured, Verdict
from foveate.bench.rows import Claim, Row
from foveate.bench.truth import truth, truth_of_looked
from foveate.errors import Unsupported

_TURN = 0.002  # seconds: long beside the clock, and beside threads that still spin for whoever ran before
_FEWEST, _MOST = 5, 100  # turns of a run
_LONG = 1.0  # seconds: a turn that takes longer is no matter of luck, and is taken once a run
_NOISE = 0.05  # "never behind" forgives what the A/A shows, and no more than this
AGAIN = "again"  # the first peer once more


def measure(
    row: Row,
    *,
    runs: int,
    ceilings: Mapping[str, float],
    seconds: float = 0.5,
    left_out: Mapping[str, str] | None = None,
) -> Measured:
    """Everything about one row.

    Args:
        runs: how many times it is measured; the worst counts.
        ceilings: GFLOP/s by dtype and GB/s of "read", 0 where unknown.
        seconds: that one run gives the slowest contestant, beyond its first five turns.
        left_out: contestants that do not take part, with the reason.
    """
    density = row.density()
    if row.weighs_memory:
        figures, again = {name: _memory(row, name, runs) for name in row.contestants}, None
    else:
        figures, again = _figures(row, runs, ceilings, seconds, density, left_out or {})
    return Measured(
        row.section, row.name, row.work, str(row.dtype).removeprefix("torch."), row.batch, row.heads, row.key_heads,
        row.queries, row.keys, row.dim, None if row.pattern is None else repr(row.pattern), density, row.sweep,
        figures, [verdict(claim, figures, again) for claim in row.claims], again,
    )  # fmt: skip


def _figures(
    row: Row, runs: int, ceilings: Mapping[str, float], seconds: float, density: float, left_out: Mapping[str, str]
) -> tuple[dict[str, Figure], float | None]:
    q, k, v, upstream = row.inputs()
    true = truth(row, q, k, v, upstream)
    true_looks = truth_of_looked(row, q, k) if row.work == "looked" else true
    for leaf in (q, k, v):
        leaf.requires_grad_(row.gradients)
    figures: dict[str, Figure] = {}
    turns: dict[str, Turn] = {}
    with torch.set_grad_enabled(row.gradients):
        for name in row.contestants:
            if name in left_out:
                figures[name] = Figure(refused=left_out[name])
                continue
            try:
                turn = prepare(name, row, q, k, v, upstream)
                complaint = (true_looks if name == "looked" else true).complaint(turn())
            except Unsupported as refusal:
                figures[name] = Figure(refused=str(refusal))
                continue
            except Exception as error:  # a peer's compiler may fail in any way, after minutes of other rows
                first = (str(error).strip().splitlines() or [""])[0]
                figures[name] = Figure(refused=f"failed: {type(error).__name__}: {first}", wrong=name in OURS)
                continue
            if complaint:
                figures[name] = Figure(refused=f"wrong: {complaint}", wrong=name in OURS)
                continue
            turns[name] = turn
        if not turns:
            return figures, None
        found, again = repeated(turns, runs, seconds)
    for name, times in found.items():
        figures[name] = _figure(row, name, times, ceilings, density)
    return {name: figures[name] for name in row.contestants}, again


def first_peer(turns: Mapping[str, Turn], peers: tuple[str, ...] = PEERS) -> str:
    """Who is timed twice: the first peer, or whoever is there."""
    return next((name for name in peers if name in turns), next(iter(turns)))


def repeated(
    turns: Mapping[str, Turn], runs: int, seconds: float, peers: tuple[str, ...] = PEERS
) -> tuple[dict[str, list[float]], float]:
    """(the median seconds of each run, the A/A ratio)."""
    peer = first_peer(turns, peers)
    found = [medians({**turns, AGAIN: turns[peer]}, seconds) for _ in range(runs)]
    again = max(max(run[peer] / run[AGAIN], run[AGAIN] / run[peer]) for run in found)
    return {name: [run[name] for run in found] for name in turns}, rounded(again)


def medians(turns: Mapping[str, Turn], seconds: float) -> dict[str, float]:
    """The median seconds of one call of each contestant."""
    calls, slowest = {}, 0.0
    for name, turn in turns.items():
        turn()  # the first one after another row finds cold caches and sleeping threads
        once = _seconds(turn, 1)
        calls[name] = max(1, min(200, round(_TURN / once)))
        slowest = max(slowest, once * calls[name])
    rounds = max(_FEWEST if slowest < _LONG else 1, min(_MOST, int(seconds / slowest)))
    times: dict[str, list[float]] = {name: [] for name in turns}
    collected = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, turn in turns.items():
                times[name].append(_seconds(turn, calls[name]))
    finally:
        if collected:
            gc.enable()
    return {name: statistics.median(found) for name, found in times.items()}


def _seconds(turn: Turn, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        turn()
    return (time.perf_counter() - start) / calls


def _figure(row: Row, name: str, found: list[float], ceilings: Mapping[str, float], density: float) -> Figure:
    middle = statistics.median(found)
    gflops = gbytes = percent = None
    if row.work == "decode":
        gbytes = rounded(row.key_value_bytes() / middle / 1e9)
    elif name != "looked":  # which does more than these operations
        gflops = rounded(row.operations(density) / middle / 1e9)
    reached, top = gbytes or gflops, ceilings.get(row.ceiling)
    if reached and top:
        percent = rounded(100 * reached / top)
    return Figure("ms", [rounded(1e3 * run) for run in found], rounded(1e3 * middle), gflops, gbytes, percent)


def _memory(row: Row, name: str, runs: int) -> Figure:
    found = []
    for _ in range(runs):
        try:
            grown, complaint = megabytes(row, name)
        except Unsupported as refusal:
            return Figure("MB", refused=str(refusal))
        if complaint:
            return Figure("MB", refused=f"wrong: {complaint}", wrong=True)
        found.append(rounded(grown))
    return Figure("MB", found, rounded(statistics.median(found)))


def verdict(claim: Claim, figures: Mapping[str, Figure], again: float | None) -> Verdict:
    """The claim beside what came out: missed if ours has no figure, unknown if the peer has none."""
    mine, peer = figures[claim.contestant], figures.get(claim.against)
    runs: list[float] = []
    if claim.against == "memory":
        runs = mine.runs
    elif claim.against == "ceiling" and mine.percent is not None and mine.middle:
        runs = [rounded(mine.percent * mine.middle / run) for run in mine.runs]
    elif peer is not None:
        runs = [rounded(theirs / ours) for theirs, ours in zip(peer.runs, mine.runs, strict=False)]
    worst = None if not runs else max(runs) if claim.bound == "at most" else min(runs)
    slack = min(again, 1 + _NOISE) if claim.never_behind and again is not None else 1.0

    def reached(wanted: float | None) -> bool | None:
        if wanted is None:
            return None
        if worst is None:
            return False if mine.refused else None
        return worst <= wanted if claim.bound == "at most" else worst * slack >= wanted

    target = None if claim.target is None else rounded(claim.target)
    return Verdict(
        claim.contestant, claim.against, claim.unit, claim.bound, target, claim.aim, runs, worst,
        reached(claim.target), reached(claim.aim),
    )  # fmt: skip


def rounded(value: float) -> float:
    """Four digits: more than the noise leaves."""
    return float(f"{value:.4g}")
