"""What was looked at: weights of a problem, worked out only for what is asked.

A problem is its q, k and v: O(n). The weights of some rows are computed again from them, a few rows at a
time, so nothing n×n exists unless all rows and columns were asked for. What every row looked at comes from the CPU
kernels in one further pass, where they can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.eager import is_eager
from foveate.errors import InvalidInput
from foveate.positions import Pairs
from foveate.primitives import normalized, raw_scores
from foveate.problem import Problem, accumulator, without_autocast
from foveate.softmax import native
from foveate.values import whole

_ENTRIES_AT_ONCE = 1 << 24  # scores held at once: 64 MiB in float32


@dataclass(frozen=True)
class Looked:
    """What each row of one call looked at.

    `indices`, `weights` `[B, H, Nq, k]`: the keys with the largest weights, largest first; weight 0 where fewer keys
    were visible. `rest` `[B, H, Nq]`: the weight that is not among them, so that weights + rest + sink = 1.
    `received` `[B, H, Nk]`: the sum of the weights that each key got.
    `watchers` `[B, H, Nk]`: how many rows may see each key.
    `lse`, `entropy` (nats) `[B, H, Nq]`; the log-sum-exp is NaN under a normalizer that has none.
    """

    indices: Tensor
    weights: Tensor
    rest: Tensor
    received: Tensor
    watchers: Tensor
    lse: Tensor
    entropy: Tensor


def weights(
    problem: Problem, rows: Sequence[int] | Tensor | None = None, columns: Sequence[int] | Tensor | None = None
) -> Tensor:
    """The exact weights `[B, Hq, rows, columns]`, normalised over all keys and then picked; None means all."""
    row = _places(rows, problem.q.shape[2], "rows", problem.q.device)
    column = None if columns is None else _places(columns, problem.k.shape[2], "columns", problem.q.device)
    parts = [part if column is None else part.index_select(3, column) for part, _, _ in _by_rows(problem, row)]
    if parts:
        return torch.cat(parts, 2)
    width = problem.k.shape[2] if column is None else column.shape[0]
    return problem.q.new_zeros(*problem.q.shape[:2], 0, width, dtype=accumulator(problem.q.dtype))


def looked(problem: Problem, k: int = 16) -> Looked:
    """The k largest weights of every row, what is left, and what every key received: O(N · k) memory."""
    k = min(whole(k, "k", 1), problem.k.shape[2])
    with torch.no_grad():
        given = replace(problem, dropout=0.0)  # what was looked at, not what training dropped of it
        if native.refuses(given) or not is_eager(*given.tensors()):
            return _by_rows_of_weights(given, k)
        return _by_kernels(given, k)


def _by_kernels(problem: Problem, k: int) -> Looked:
    indices, weights, rest, received, lse, entropy = native.looked(problem, k)
    batch, heads, queries, keys = problem.shape
    if problem.pattern is None:
        watchers = torch.full((batch, heads, keys), queries, device=problem.q.device)
    else:
        summary = problem.pattern.summary(
            queries, keys, query_start=problem.query_start, batch=batch, heads=heads, tile=native.TILE
        )
        watchers = summary.watchers().expand(batch, heads, keys)
    return Looked(_filled(indices, keys), weights, rest, received, watchers, lse, entropy)


def _filled(indices: Tensor, keys: int) -> Tensor:
    """Where fewer keys were visible than asked for (index −1), the first keys that are not listed, of weight 0."""
    missing = indices < 0
    if not bool(missing.any()):
        return indices
    few = min(2 * indices.shape[3], keys)
    listed = torch.zeros(*indices.shape[:3], few + 1, dtype=torch.int8, device=indices.device)
    listed.scatter_(3, indices.where(~missing & (indices < few), few), 1)
    free = listed[..., :few].argsort(dim=3, stable=True)
    return free.gather(3, (missing.cumsum(3) - 1).clamp(min=0)).where(missing, indices)


def _by_rows_of_weights(problem: Problem, k: int) -> Looked:
    batch, heads, queries, keys = problem.shape
    wide, device = accumulator(problem.q.dtype), problem.q.device
    received = torch.zeros(batch, heads, keys, dtype=wide, device=device)
    watchers = torch.zeros(batch, heads, keys, dtype=torch.int64, device=device)
    found: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    for part, visible, lse in _by_rows(problem, torch.arange(queries, device=device)):
        received = received + part.sum(2)  # not in place: what a subclass adds would be lost
        watchers = watchers + (part.shape[2] if visible is None else visible.sum(2))
        top = part.topk(k, -1)
        rest = (part.sum(-1) - top.values.sum(-1)).clamp(min=0)
        found.append((top.indices, top.values, rest, lse, torch.special.entr(part).sum(-1)))
    if not found:
        empty = received.new_zeros(batch, heads, 0, k)
        found.append((empty.long(), empty, empty[..., 0], empty[..., 0], empty[..., 0]))
    indices, values, rest, lse, entropy = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
    return Looked(indices, values, rest, received, watchers, lse, entropy)


def _by_rows(problem: Problem, rows: Tensor) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """(weights `[B, H, rows, Nk]`, which of them may be seen, log-sum-exp) of a few rows at a time."""
    batch, heads, _, keys = problem.shape
    wide = accumulator(problem.q.dtype)
    whole = problem.pairs()
    k = problem.k.to(wide)
    for part in rows.split(max(1, _ENTRIES_AT_ONCE // max(1, batch * heads * keys))):
        with without_autocast(problem.q.device):
            scores = raw_scores(problem.q.index_select(2, part).to(wide), k) * problem.scale
            at = Pairs(
                whole.batch, whole.head, whole.row[:, :, part], whole.query[:, :, part], whole.key, keys, heads=heads
            )
            shares, visible, lse = normalized(problem, scores, at)
        yield shares, visible, shares.new_full(shares.shape[:3], math.nan) if lse is None else lse


def _places(places: Sequence[int] | Tensor | None, count: int, what: str, device: torch.device) -> Tensor:
    if places is None:
        return torch.arange(count, device=device)
    try:
        place = torch.as_tensor(places, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{what} is {places!r}: wanted a list of whole numbers") from error
    if place.numel() == 0:
        place = place.long()
    if place.dtype.is_floating_point or place.dtype == torch.bool or place.dim() > 1:
        raise InvalidInput(f"{what} is {places!r}: wanted a list of whole numbers")
    place = place.long().reshape(-1)
    if bool(((place < -count) | (place >= count)).any()):
        raise InvalidInput(f"{what} is {place.tolist()}: wanted numbers from {-count} to {count - 1}")
    return place % count if count else place
