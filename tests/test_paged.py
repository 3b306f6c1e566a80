"""Keys and values in pages mean what the same keys mean in one tensor, and nothing else is ever read."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from budget import Budget
from kernels import DTYPES, KERNELS, normal
from torch import Tensor

import foveate as fv
from foveate.errors import InvalidInput, Unsupported
from foveate.mechanisms.paged import _paged as paged
from foveate.problem import Problem, Result, problem
from foveate.softmax import native

LENGTHS = torch.tensor([0, 1, 130, 211])
SPARE = 3  # pages that belong to nobody


def laid(k: Tensor, v: Tensor, lengths: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(key pages, value pages, table): NaN where nothing is kept, nonsense in the table where nothing is needed."""
    batch, heads, keys, _ = k.shape
    each = keys // size
    places = torch.randperm(batch * each + SPARE, generator=torch.Generator().manual_seed(11))
    table = places[: batch * each].view(batch, each)
    kept = torch.arange(keys) < lengths[:, None]
    pages = []
    for x in (k, v):
        room = x.new_full((batch * each + SPARE, heads, size, x.shape[3]), torch.nan)
        told = x.masked_fill(~kept[:, None, :, None], torch.nan)
        room[table.flatten()] = told.unflatten(2, (each, size)).transpose(1, 2).flatten(0, 1)
        pages.append(room)
    needed = torch.arange(each) * size < lengths[:, None]
    return pages[0], pages[1], table.where(needed, 10**6)


def in_pages(size: int, kernel: str) -> Callable[[Problem], Result]:
    def run(call: Problem) -> Result:
        k, v, table = laid(call.k, call.v, LENGTHS, size)
        return native.run_paged(call, native.Pages(k, v, table), LENGTHS, kernel)

    return run


def few(size: int, queries: int, group: int, dim: int, pattern: fv.Pattern | None, score: fv.Score | None) -> Problem:
    """As many keys as some pages hold; of those, each row has its length."""
    keys = -(-int(LENGTHS.max()) // size) * size
    q, k = normal(4, 2 * group, queries, dim), normal(4, 2, keys, dim, seed=1)
    v = normal(4, 2, keys, dim + dim % 2, seed=2)
    real = fv.padding(LENGTHS) if pattern is None else fv.padding(LENGTHS) & pattern
    return problem(q, k, v, real, score=score, query_start=LENGTHS - queries, needs_lse=True)


KINDS: dict[str, tuple[fv.Pattern | None, fv.Score | None]] = {
    "everything": (None, None),
    "causal": (fv.causal, None),
    "window, sinks": (fv.causal & fv.window(50), fv.sinks(normal(6))),
    "streaming": (fv.streaming(3, 40), None),
    "capped, by distance": (None, fv.softcap(1.5) + fv.alibi(normal(6).abs() / 50)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, 16, 64, 100])
def test_pages_are_one_tensor(size: int, kind: str) -> None:
    for queries, dim, dtype in itertools.product((1, 3), (11, 64), DTYPES):
        budget = Budget(few(size, queries, 3, dim, *KINDS[kind]), dtype, gradients=False)
        for kernel in KERNELS:
            budget.check(in_pages(size, kernel))


@pytest.mark.parametrize("backend", ["auto", "native", "chunked", "reference"])
def test_what_a_user_calls_gives_the_same(backend: str) -> None:
    call = few(16, 2, 3, 11, None, None)
    k, v, table = laid(call.k, call.v, LENGTHS, 16)
    wide_k = (
        torch.stack([k, k], 1).transpose(2, 3).contiguous().transpose(2, 3)[:, 0]
    )  # pages with strides of their own
    whole = fv.attention(call.q, call.k, call.v, fv.padding(LENGTHS) & fv.causal, query_start=LENGTHS - 2)
    for keys, numbers in ((k, table), (wide_k, table.int())):
        found = fv.paged_attention(call.q, keys, v, numbers, LENGTHS, fv.causal, backend=backend)
        torch.testing.assert_close(found, whole)
    assert not found[0].any()  # a row without a key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    q, pages = normal(2, 8, 1, 64, dtype=dtype), normal(600, 2, 16, 64, seed=1, dtype=dtype)
    table, lengths = (
        torch.randperm(600, generator=torch.Generator().manual_seed(2)).view(2, 300),
        torch.tensor([4800, 3001]),
    )
    found = []
    for threads in (1, 2, 3, 8, 1):
        torch.set_num_threads(threads)
        try:
            found.append(fv.paged_attention(q, pages, pages, table, lengths, backend="native"))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_that_begin_anywhere_and_lie_anyhow(dtype: torch.dtype) -> None:
    """Odd addresses, a last stride that is not 1, one page for all: copied or read, never misread."""
    q, k, v = normal(2, 4, 1, 64, dtype=dtype), *(normal(5, 2, 16, 64, seed=n, dtype=dtype) for n in (1, 2))
    table, lengths = torch.tensor([[4, 0], [2, 3]]), torch.tensor([20, 32])
    truth = fv.paged_attention(q, k, v, table, lengths, backend="native")

    def odd(x: Tensor) -> Tensor:
        raw = bytearray(1) + bytearray(x.contiguous().view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(raw, dtype=x.dtype, offset=1).view(x.shape)

    changes: tuple[Callable[[Tensor], Tensor], ...] = (
        odd,
        lambda x: x.mT.contiguous().mT,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    )
    for change in changes:
        wide = torch.stack([table, table], -1)[..., 0]
        found = fv.paged_attention(change(q), change(k), change(v), wide, odd(lengths), backend="native")
        assert torch.equal(found, truth)
    shared = fv.paged_attention(
        q, k[:1].expand(5, -1, -1, -1), v[:1].expand(5, -1, -1, -1), table, lengths, backend="native"
    )
    assert torch.equal(shared, fv.paged_attention(q, k, v, torch.zeros_like(table), lengths, backend="native"))


def test_other_dtypes_are_brought_together() -> None:
    q, pages = normal(1, 4, 1, 8).double(), normal(3, 2, 16, 8).double()
    table, lengths = torch.tensor([[2, 0]]), torch.tensor([20])
    k = torch.cat([pages[2], pages[0]], 1)[None, :, :20]
    torch.testing.assert_close(fv.paged_attention(q, pages, pages, table, lengths), fv.attention(q, k, k))
    with pytest.raises(Unsupported, match="float64"):
        fv.paged_attention(q, pages, pages, table, lengths, backend="native")


def test_a_graph_reads_pages_and_still_checks_their_numbers() -> None:
    q, pages = normal(2, 4, 1, 8), normal(5, 2, 16, 8, seed=1)
    table, lengths = torch.tensor([[4, 0], [2, 1]]), torch.tensor([20, 31])

    def call(q: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        return paged(q, pages, pages, table, lengths, None, None, None, "native")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for these in (lengths, torch.tensor([0, 7])):
        assert torch.equal(compiled(q, table, these), call(q, table, these))
    with pytest.raises(InvalidInput, match=r"table\[0, 0\] is 5: wanted a page from 0 to 4"):
        compiled(q, table + 1, lengths)
    pattern, start = fv.padding(lengths), lengths - 1
    k = pages.new_empty(1).expand(2, 2, 32, 8)
    given = native._arguments(problem(q, k, k, pattern, query_start=start), "", 0)._replace(lengths=lengths)
    torch.library.opcheck(torch.ops.foveate.native_paged.default, (q, pages, pages, table, *given))


Q, PAGES = torch.zeros(2, 4, 1, 8), torch.zeros(5, 2, 16, 8)
TABLE, GOOD = torch.tensor([[0, 1], [2, 3]]), torch.tensor([20, 32])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"lengths": torch.tensor([20, 33])}, r"lengths is \[20, 33\]: wanted 0 to 32, as many keys as 2 pages of 16"),
        ({"lengths": torch.tensor([-1, 3])}, r"lengths is \[-1, 3\]: wanted 0 to 32"),
        ({"lengths": torch.tensor([3])}, "a row and a length for each of 2 batch rows"),
        ({"lengths": torch.tensor([3.0, 3.0])}, "lengths"),
        ({"table": torch.tensor([[0, 1], [2, 5]])}, r"table\[1, 1\] is 5: wanted a page from 0 to 4, for the"),
        ({"table": torch.tensor([[-1, 1], [2, 3]])}, r"table\[0, 0\] is -1"),
        ({"table": torch.tensor([[0, 2**40], [2, 3]])}, r"table\[0, 1\] is 1099511627776"),
        ({"table": torch.tensor([0, 1])}, "the table"),
        ({"value_pages": torch.zeros(5, 2, 15, 8)}, "as many pages, heads and keys in both"),
        ({"value_pages": PAGES.double()}, "one dtype and one device"),
        ({"key_pages": torch.zeros(5, 2, 0, 8), "value_pages": torch.zeros(5, 2, 0, 8)}, "pages of at least one key"),
        ({"q": torch.zeros(2, 3, 1, 8)}, "heads"),
        ({"q": torch.zeros(4, 1, 8)}, r"wanted q \[batch, heads, queries, dim\]"),
        ({"backend": "fast"}, "fast"),
        ({"pattern": torch.ones(1, 32, dtype=torch.bool)}, r"foveate.from_mask\(mask\) makes one"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(wrong: dict[str, object], says: str) -> None:
    given = {"q": Q, "key_pages": PAGES, "value_pages": PAGES, "table": TABLE, "lengths": GOOD, "backend": "auto"}
    with pytest.raises(InvalidInput, match=says):
        paged(**{"pattern": None, "score": None, "scale": None, **given, **wrong})  # type: ignore[arg-type]
