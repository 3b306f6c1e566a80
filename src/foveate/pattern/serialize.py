"""How a pattern crosses into an operator of torch, which takes tensors and strings: as its expression.

A function has no expression, so a pattern with a rule crosses as its summary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.pattern.algebra import Pattern
from foveate.pattern.block_mask import Summary
from foveate.pattern.block_mask_cache import summarise
from foveate.pattern.catalogue import parse
from foveate.pattern.gather import Lists, is_listed, lists

SUMMARY = "summary"


def cannot_cross(pattern: Pattern | None, q: Tensor) -> list[str]:
    """Why a pattern cannot enter an operator beside this q: a rule where there is no data to summarise."""
    recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    without_data = recorded or q.is_meta or isinstance(q, torch._subclasses.FakeTensor)
    if pattern is None or not without_data or all(isinstance(thing, Tensor) for thing in pattern.spec()[1]):
        return []
    return ["rule(fn) cannot enter a compiled graph or a trace, or be known without data: compose named patterns"]


def written(
    pattern: Pattern | None,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    query_start: int | Tensor,
    tile: int,
) -> tuple[str, list[Tensor]]:
    """A string and tensors from which `tiles` makes the summary; an empty string for no pattern at all."""
    if pattern is None:
        return "", []
    spec, held = pattern.spec()
    tensors = [thing for thing in held if isinstance(thing, Tensor)]
    if len(tensors) < len(held):
        summary = summarise(pattern, batch, heads, queries, keys, query_start, tile)
        return SUMMARY, [summary.offsets, summary.columns, summary.partial, summary.bits]
    return spec, tensors


def tiles(
    spec: str,
    held: Sequence[Tensor],
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    query_start: int | Tensor,
    tile: int,
) -> Summary | None:
    """The summary of what `written` wrote, None for no pattern."""
    if not spec:
        return None
    if spec == SUMMARY:
        return Summary(queries, keys, tile, *held)
    return summarise(parse(spec, held), batch, heads, queries, keys, query_start, tile)


def listed(
    spec: str, held: Sequence[Tensor], batch: int, heads: int, queries: int, keys: int, query_start: int | Tensor
) -> Lists | None:
    """The lists of what `written` wrote; None for a pattern that is more than a selection, or none."""
    if not spec or spec == SUMMARY or "selected(" not in spec:
        return None
    pattern = parse(spec, held)
    return lists(pattern, batch, heads, queries, keys, query_start) if is_listed(pattern) else None
