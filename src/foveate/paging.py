"""Attention over keys and values in pages, which a cache hands out as texts grow.

The kernels for CPUs read the pages where they are. Everywhere else they are brought together first: the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.dispatch import NAMES, dispatch
from foveate.errors import InvalidInput, unknown_name, unsupported
from foveate.pattern.algebra import Pattern
from foveate.pattern.packing import padding
from foveate.problem import Problem, problem
from foveate.score import Score
from foveate.softmax import native
from foveate.values import at_hand, dense, describe, integers


def paged(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    table: Tensor,
    lengths: Tensor,
    pattern: Pattern | Tensor | None,
    score: Score | Tensor | None,
    scale: float | None,
    backend: str,
) -> Tensor:
    """`foveate.paged_attention`, which says what it means."""
    table, lengths = integers(table, "the table", [2]), integers(lengths, "lengths", [1])
    _check(q, key_pages, value_pages, table, lengths)
    if backend not in ("auto", *NAMES):
        raise unknown_name("backend", backend, ("auto", *NAMES))
    pages = native.Pages(key_pages, value_pages, table.long())
    batch, key_heads, dims = q.shape[0], key_pages.shape[1], (key_pages.shape[3], value_pages.shape[3])
    if at_hand(lengths):
        pages.check_lengths(lengths)
    # Tensors that only have the right shapes: nothing of that size is allocated.
    k, v = (q.new_empty(1).expand(batch, key_heads, pages.capacity, dim) for dim in dims)
    with torch.no_grad():
        call = problem(
            q, k, v, _real(lengths, pattern), score=score, scale=scale, query_start=lengths.long() - q.shape[2]
        )
        reasons = native.refuses(call)
        if backend == "native" and reasons:
            raise unsupported({"native": reasons})
        if backend in ("auto", "native") and not reasons:
            return native.run_paged(call, pages, lengths).out
        pages.check(lengths)
        return dispatch(_together(call, pages), backend).out


def _real(lengths: Tensor, pattern: Pattern | Tensor | None) -> Pattern:
    real = padding(lengths)
    if pattern is None:
        return real
    if isinstance(pattern, Tensor):
        raise InvalidInput(f"the pattern is {describe(pattern)}: give a pattern; foveate.from_mask(mask) makes one")
    return pattern & real


def _together(call: Problem, pages: native.Pages) -> Problem:
    """The same problem with k and v as tensors: a copy of every page that the table names."""
    places = pages.table.clamp(0, pages.key_pages.shape[0] - 1)
    k, v = (x[places].transpose(1, 2).flatten(2, 3) for x in (pages.key_pages, pages.value_pages))
    return problem(call.q, k, v, call.pattern, score=call.score, scale=call.scale, query_start=call.query_start)


def _check(q: Tensor, key_pages: Tensor, value_pages: Tensor, table: Tensor, lengths: Tensor) -> None:
    """One sentence for what is wrong, before anything is read."""
    for name, x in (("q", q), ("key_pages", key_pages), ("value_pages", value_pages)):
        if isinstance(x, Tensor):
            dense(x, name)
    given = f"q is {describe(q)}, key_pages {describe(key_pages)}, value_pages {describe(value_pages)}"
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in (q, key_pages, value_pages)):
        raise InvalidInput(
            f"{given}: wanted q [batch, heads, queries, dim] and pages [pages, key heads, page size, dim]"
        )
    if key_pages.shape[:3] != value_pages.shape[:3]:
        raise InvalidInput(f"{given}: wanted as many pages, heads and keys in both")
    if key_pages.shape[2] < 1:
        raise InvalidInput(f"{given}: wanted pages of at least one key")
    if not q.dtype == key_pages.dtype == value_pages.dtype or not q.device == key_pages.device == value_pages.device:
        raise InvalidInput(f"{given}: wanted one dtype and one device for all three")
    if table.shape[0] != q.shape[0] or lengths.shape[0] != q.shape[0]:
        raise InvalidInput(
            f"the table is {describe(table)} and lengths {describe(lengths)}: wanted a row and a length for each of "
            f"{q.shape[0]} batch rows"
        )
