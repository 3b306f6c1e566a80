"""Attention over keys and values in pages, which a cache hands out as texts grow.

The kernels for CPUs read the pages where they are. Everywhere else they are brought together first: the definition.
"""

from __future__ import annotations

from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.dispatch.choose import NAMES, dispatch
from foveate.errors import InvalidInput, unknown_name, unsupported
from foveate.pattern.algebra import Pattern
from foveate.pattern.packing import padding
from foveate.problem import Problem, problem
from foveate.score import Score
from foveate.softmax import native
from foveate.values import at_hand, dense, describe, integers
from foveate.words import Others, lenient, refused


def _paged(
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


@lenient
def paged_attention(
    q: Float[Tensor, "batch heads queries dim"],
    key_pages: Float[Tensor, "pages key_heads page_size dim"],
    value_pages: Float[Tensor, "pages key_heads page_size value_dim"],
    table: Int[Tensor, "batch pages_each"],
    lengths: Int[Tensor, " batch"],
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    **others: Unpack[Others],
) -> Float[Tensor, "batch heads queries value_dim"]:
    """`attention` over keys and values in pages: key n of batch row b is in page table[b, n // page_size].

    Batch row b has `lengths[b]` keys, and its last query stands at the last of them; what a page holds beyond, and the
    table's entries for pages that no key needs, never matter. Pages are read where they are by `backend="native"`, with
    any strides; where that cannot run, they are brought together first, and `attention` does the rest. No gradients.

    Raises:
        InvalidInput: shapes or dtypes do not fit, a length is past the table, or the table points outside the pages.
        Unsupported: a named backend cannot compute this.

    Kwon et al. 2023, "Efficient memory management for large language model serving with PagedAttention":
    https://arxiv.org/abs/2309.06180

    >>> import torch
    >>> import foveate as fv
    >>> q, pages = torch.randn(1, 4, 1, 8), torch.randn(3, 2, 16, 8)
    >>> out = fv.paged_attention(q, pages, pages, torch.tensor([[2, 0]]), torch.tensor([20]))
    >>> k = torch.cat([pages[2], pages[0]], 1)[None, :, :20]
    >>> torch.allclose(out, fv.attention(q, k, k), atol=1e-6)
    True
    """
    if others:
        raise refused(paged_attention, others)
    return _paged(q, key_pages, value_pages, table, lengths, pattern, score, scale, backend)
