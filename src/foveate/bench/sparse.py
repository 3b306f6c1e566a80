"""The table of selections and additive scores: attention to chosen keys beside attention to all that came before.

- dense: `fv.attention(q, k, v, fv.causal, backend="native")`: the peer, timed twice (A/A)
- blocks: MoBA's blocks are chosen (means of the keys, scores, the highest) and attended to
- tokens: the same number of tokens, spread over all that came before at random, is attended to; somebody chose them
- broadcast, additive: see `alignment`
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.bench import alignment
from foveate.bench.contestants import Turn
from foveate.bench.measuring import repeated, rounded, verdict
from foveate.bench.results import Figure, Measured
from foveate.bench.rows import Claim, Row, Work
from foveate.bench.truth import Truth, truth
from foveate.errors import unknown_name
from foveate.functional import attention
from foveate.pattern.algebra import Pattern
from foveate.pattern.positional import causal
from foveate.pattern.selected import Selected, selected
from foveate.selection import moba

_SHRINK = 32  # of lengths in the quick table


@dataclass(frozen=True)
class SelectionRow(Row):
    """Each query attends to `chosen` keys, which the heads of a group share: `chosen` / `size` blocks, or tokens."""

    chosen: int = 0
    size: int = 0


def table(*, quick: bool = False) -> list[Row]:
    """Selections forward, in two dtypes, and with gradients; additive scores, their time and their memory."""
    return [*_selections(_SHRINK if quick else 1), *alignment.table(8 if quick else 1)]


def _selections(shrink: int) -> Iterator[SelectionRow]:
    wanted: list[tuple[torch.dtype, int, int, int, int, Work, tuple[float, float] | None]] = [
        (torch.float32, 16384, 512, 32, 8, "forward", (4.0, 3.0)),
        (torch.bfloat16, 16384, 512, 32, 8, "forward", None),
        (torch.float32, 4096, 256, 4, 1, "forward + backward", None),
    ]
    for dtype, length, chosen, heads, key_heads, work, targets in wanted:
        n, some, size = length // shrink, chosen // shrink, max(8, 64 // shrink)
        some = max(some, size)
        kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        more = ", forward + backward" if work != "forward" else ""
        yield SelectionRow(
            "selections", f"{kind} {some} of {n} keys, {heads}/{key_heads} heads D=128{more}", dtype, n, n, 128,
            ("dense", "blocks", "tokens"),
            tuple(
                Claim(name, "dense", target=targets[place] if targets else None, aim=None if targets else 1.0)
                for place, name in enumerate(("blocks", "tokens"))
            ),
            heads=heads, key_heads=key_heads, pattern=causal, work=work, chosen=some, size=size,
        )  # fmt: skip


def measure_sparse(row: Row, *, runs: int, seconds: float) -> Measured:
    """Everything about one row; the arguments are those of `measuring.measure`."""
    if isinstance(row, alignment.AdditiveRow) and row.weighs:
        figures, again = alignment.weigh(row, runs), None
    else:
        figures, again = _figures(row, runs, seconds)
    return Measured(
        row.section, row.name, row.work, str(row.dtype).removeprefix("torch."), row.batch, row.heads, row.key_heads,
        row.queries, row.keys, row.dim, None if row.pattern is None else repr(row.pattern), row.density(), "", figures,
        [verdict(claim, figures, again) for claim in row.claims], again,
    )  # fmt: skip


def _figures(row: Row, runs: int, seconds: float) -> tuple[dict[str, Figure], float | None]:
    figures: dict[str, Figure] = {}
    turns: dict[str, Turn] = {}
    prepare = alignment.contestants if isinstance(row, alignment.AdditiveRow) else _contestants
    with torch.set_grad_enabled(row.gradients):
        for name, (turn, true) in prepare(row).items():
            complaint = true.complaint(turn())
            if complaint:
                figures[name] = Figure(refused=f"wrong: {complaint}", wrong=name not in ("dense", "broadcast"))
            else:
                turns[name] = turn
        if not turns:
            return figures, None
        found, again = repeated(turns, runs, seconds, ("dense", "broadcast"))
    for name, each in found.items():
        figures[name] = Figure("ms", [rounded(1e3 * run) for run in each], rounded(1e3 * statistics.median(each)))
    return {name: figures[name] for name in row.contestants}, again


def _contestants(row: Row) -> dict[str, tuple[Turn, Truth]]:
    """Every contestant with what it has to compute."""
    assert isinstance(row, SelectionRow)
    q, k, v, upstream = row.inputs()
    patterns = {"dense": lambda: causal, "blocks": lambda: _blocks(row, q, k), "tokens": _once(_tokens(row))}
    found = {}
    for name in row.contestants:
        if name not in patterns:
            raise unknown_name("contestant", name, tuple(patterns))
        choose = patterns[name]
        true = truth(row, q, k, v, upstream, visible=None if name == "dense" else _seen(row, choose()))
        found[name] = _turn(row, choose, q, k, v, upstream), true
    for leaf in (q, k, v):
        leaf.requires_grad_(row.gradients)
    return found


def _turn(
    row: Row, choose: Callable[[], Pattern], q: Tensor, k: Tensor, v: Tensor, upstream: Tensor
) -> Turn:  # fmt: skip
    def turn() -> tuple[Tensor, ...]:
        out = attention(q, k, v, choose(), backend="native")
        return (out, *torch.autograd.grad(out, (q, k, v), upstream)) if row.gradients else (out,)

    return turn


def _blocks(row: SelectionRow, q: Tensor, k: Tensor) -> Pattern:
    """MoBA: the own block of each query, and those whose mean key its group likes most."""
    with torch.no_grad():
        return moba(q, k, block=row.size, top_k=row.chosen // row.size, shared=True)


def _once(pattern: Pattern) -> Callable[[], Pattern]:
    return lambda: pattern


def _tokens(row: SelectionRow) -> Pattern:
    """As many tokens for every query: one at random from each of as many equal parts of what came before."""
    draw = torch.Generator().manual_seed(13)
    count = (torch.arange(row.queries) + 1).view(-1, 1)
    part = torch.arange(row.chosen)[torch.randperm(row.chosen, generator=draw)]  # in no order
    table = torch.empty(1, row.key_heads, row.queries, row.chosen, dtype=torch.int32)
    for head in range(row.key_heads):
        drawn = torch.rand(row.queries, row.chosen, generator=draw)
        first, end = part * count // row.chosen, (part + 1) * count // row.chosen
        key = first + torch.minimum((drawn * (end - first)).long(), end - first - 1)
        few = torch.where(part < count, part, -1)  # all there are
        table[0, head] = torch.where(count > row.chosen, key, few)
    return causal & selected(table)


def _seen(row: SelectionRow, pattern: Pattern) -> Callable[[Tensor], Tensor]:
    """What some rows see, as booleans `[1, heads, rows, keys]`, from the lists and causality."""
    (own,) = (part for part in getattr(pattern, "parts", ()) if isinstance(part, Selected))

    def visible(rows: Tensor) -> Tensor:
        listed = own.indices[:, :, rows].long()
        blocks = -(-row.keys // own.block)
        seen = torch.zeros(*listed.shape[:3], blocks + 1, dtype=torch.bool)
        seen.scatter_(3, torch.where(listed < 0, blocks, listed), True)
        seen = seen[..., :blocks].repeat_interleave(own.block, 3)[..., : row.keys]
        seen &= torch.arange(row.keys) <= rows[:, None]
        return seen.repeat_interleave(row.heads // seen.shape[1], 1)

    return visible
