"""Chosen keys are gathered: right on every kernel, nothing else is read, and no tile of the plane is ever made."""

from collections.abc import Iterator
from dataclasses import replace

import jaxtyping
import pytest
import torch
from budget import Budget
from kernels import DTYPES, KERNELS, derived, normal, on, same_bits
from torch import Tensor

import foveate as fv
from foveate.errors import InvalidInput
from foveate.problem import Problem, problem
from foveate.softmax import native


@pytest.fixture(autouse=True)
def _nothing_is_summarized(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Where a test does not say otherwise, the kernel that gathers is the one that runs."""

    def summary(*_: object) -> None:
        raise AssertionError("a summary was made")

    if "_tiles_are_made" not in request.fixturenames:
        monkeypatch.setattr(native, "tiles", summary)


@pytest.fixture
def _tiles_are_made() -> None:
    """For a test of what the kernel that gathers leaves to others."""


def listed(*shape: int, of: int, seed: int = 0) -> Tensor:
    """Random lists, some of it none, some of it twice."""
    return torch.randint(-1, of, shape, generator=torch.Generator().manual_seed(seed))


def make(pattern: fv.Pattern, *, heads: int = 6, queries: int = 71, keys: int = 149, **more: object) -> Problem:
    q, k, v = normal(2, heads, queries, 13), normal(2, 2, keys, 13, seed=1), normal(2, 2, keys, 17, seed=2)
    return problem(q, k, v, pattern, needs_lse=True, **more)  # type: ignore[arg-type]


def check(call: Problem, *dtypes: torch.dtype) -> None:
    for dtype in dtypes or (torch.float32,):
        budget = Budget(call, dtype)
        for kernel in KERNELS:
            budget.check(on(kernel))


TABLES = {
    "shared": (1, 1, 71, 9), "by key head": (2, 2, 71, 9), "by query head": (1, 6, 71, 9), "by pairs": (2, 3, 71, 5),
    "a row for all": (2, 2, 1, 9), "none": (1, 1, 71, 0), "many": (1, 2, 71, 200),
}  # fmt: skip


@pytest.mark.parametrize("block", [1, 5, 64, 100])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_table_beside_a_reach(table: tuple[int, ...], block: int) -> None:
    lists = listed(*table, of=-(-149 // block))
    check(make(fv.causal & fv.selected(lists, block=block)))
    near = fv.window(left=90, right=3) & fv.padding(torch.tensor([140, 33]))
    check(make(fv.selected(lists.int(), block=block) & near, query_start=torch.tensor([11, 70])))


@pytest.mark.parametrize("heads", [2, 4, 8, 14])
def test_any_number_of_heads_shares_a_list(heads: int) -> None:
    check(make(fv.selected(listed(2, 2, 71, 70, of=149)), heads=heads), *DTYPES)
    check(make(fv.selected(listed(1, heads, 71, 3, of=10), block=16), heads=heads), torch.bfloat16)


@pytest.mark.parametrize("scale", [-0.4, 0.0, 3.0])
def test_any_scale(scale: float) -> None:
    check(make(fv.causal & fv.selected(listed(1, 2, 71, 9, of=149)), scale=scale), *DTYPES)


RESTS = {
    "documents": lambda: fv.documents(torch.arange(149) // 40),
    "left padding": lambda: fv.padding(torch.arange(149) >= torch.tensor([[5], [80]])),
    "chunks": lambda: fv.causal & fv.chunks(37),
    "heads of their own": lambda: fv.random_blocks(2, block=16),
    "dilated": lambda: fv.window(60, step=3),
}


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("rest", RESTS)
def test_whatever_else_hides_keys_is_asked_of_the_listed_ones(rest: str, block: int) -> None:
    lists = listed(1, 2, 71, 9, of=-(-149 // block))
    check(make(RESTS[rest]() & fv.selected(lists, block=block), query_start=torch.tensor([60, 78])))


def test_long_lists_and_rows_take_many_turns() -> None:
    """Several tiles of queries, stretches of keys, and chunks of lists."""
    q, k, v = normal(1, 4, 300, 128), normal(1, 1, 1500, 128, seed=1), normal(1, 1, 1500, 128, seed=2)
    check(problem(q, k, v, fv.causal & fv.selected(listed(1, 1, 300, 400, of=1500)), needs_lse=True))
    check(problem(q, k, v, fv.causal & fv.selected(listed(1, 4, 300, 3, of=24), block=64), needs_lse=True))


@pytest.mark.parametrize("score", ["cap", "sinks", "distances"])
def test_scores(score: str) -> None:
    made = {"cap": fv.softcap(1.5), "sinks": fv.sinks(normal(6)), "distances": fv.alibi(normal(6).abs() / 9)}
    for pattern in (fv.causal & fv.selected(listed(1, 2, 71, 9, of=149)), fv.selected(listed(1, 1, 71, 1, of=3))):
        q, k, v = normal(2, 6, 71, 13), normal(2, 2, 149, 13, seed=1), normal(2, 2, 149, 17, seed=2)
        call = problem(q, k, v, pattern, score=made[score], needs_lse=True)
        for dtype in DTYPES:
            budget = Budget(call, dtype, gradients=False)
            for kernel in KERNELS:
                budget.check(on(kernel))


@pytest.mark.usefixtures("_tiles_are_made")
@pytest.mark.parametrize("more", ["dropout", "bias", "a slope that learns", "blocks that are long"])
def test_what_it_does_not_do_is_done_by_tiles(more: str) -> None:
    lists = fv.causal & fv.selected(listed(1, 2, 71, 9, of=149))
    kinds = {
        "dropout": lambda: make(lists, dropout=0.3, seed=5), "bias": lambda: make(lists, score=fv.bias(normal(149))),
        "a slope that learns": lambda: make(lists, score=fv.alibi(normal(6).abs() / 9)),
        "blocks that are long": lambda: make(fv.selected(listed(1, 2, 71, 1, of=1), block=5000)),
    }  # fmt: skip
    check(kinds[more]())


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_what_nobody_chose_never_matters(poison: float) -> None:
    lists = listed(1, 2, 71, 9, of=149)
    lists[lists % 5 == 2] = -1
    spoil = torch.where(torch.arange(149) % 5 == 2, poison, 0.0)[:, None]
    call = make(fv.selected(lists))
    for dtype in DTYPES:
        budget = Budget(call, dtype)
        for kernel in KERNELS:
            budget.check(
                lambda of, kernel=kernel: on(kernel)(replace(of, k=of.k + spoil.to(of.k), v=of.v + spoil.to(of.v)))
            )


def test_results_are_equal_to_the_bit_on_any_number_of_threads() -> None:
    for table, block in (((1, 2, 300, 40), 1), ((2, 6, 300, 5), 16)):
        pattern = fv.causal & fv.selected(listed(*table, of=-(-700 // block)), block=block)
        leaves = [normal(2, h, n, 64, seed=n).requires_grad_() for h, n in ((6, 300), (2, 700), (2, 700))]
        call = problem(*leaves, pattern, needs_lse=True)
        for kernel in KERNELS:
            alone = derived(on(kernel, 1)(call), leaves)
            assert same_bits(derived(on(kernel, 3)(call), leaves), alone), kernel


def test_the_order_of_a_list_and_what_it_repeats_count_for_nothing() -> None:
    lists = listed(1, 2, 71, 9, of=149)
    again = torch.cat([lists, lists, torch.full_like(lists, -1)], -1)[..., torch.randperm(27)]
    for kernel in KERNELS:
        one, other = (on(kernel)(make(fv.selected(x))) for x in (lists, again))
        assert torch.equal(one.out, other.out)
        assert torch.equal(one.lse, other.lse)


def test_a_row_that_chose_nothing_has_no_output_and_no_gradient() -> None:
    lists = listed(1, 1, 71, 9, of=149).masked_fill(torch.arange(71)[:, None] % 3 == 0, -1)
    leaves = [normal(1, 2, n, 8, seed=n).requires_grad_() for n in (71, 149, 149)]
    for kernel in KERNELS:
        out, lse, dq, _, _ = derived(on(kernel)(problem(*leaves, fv.selected(lists), needs_lse=True)), leaves)
        assert (out[:, :, ::3] == 0).all()
        assert (lse[:, :, ::3] == -torch.inf).all()
        assert (dq[:, :, ::3] == 0).all()
        assert (lse[:, :, 1::3] > -torch.inf).all()


def test_a_number_that_is_no_keys_is_refused_also_where_nobody_looked_before() -> None:
    """In a graph the numbers are known only when it runs."""
    q, k, v = (normal(1, 2, n, 8) for n in (7, 11, 11))
    for wrong in (11, -2, 1 << 40, -(1 << 40)):
        given = native._arguments(problem(q, k, v, fv.selected(torch.zeros(1, 1, 7, 3, dtype=torch.int64))), "", 1)
        given.held[0][0, 0, 3, 1] = wrong
        with pytest.raises(InvalidInput, match="lists what is not there"):
            native._forward(q, k, v, given)


@pytest.fixture
def _no_shape_checks() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


@pytest.mark.usefixtures("_no_shape_checks")
def test_one_graph_with_gradients_and_the_contract_of_the_operators() -> None:
    lists = listed(1, 2, 71, 9, of=149)

    def attend(q: Tensor, k: Tensor, v: Tensor, lists: Tensor) -> Tensor:
        return fv.attention(q, k, v, fv.causal & fv.selected(lists), backend="native")

    leaves = [normal(2, h, n, 8, seed=h).requires_grad_() for h, n in ((4, 71), (2, 149), (2, 149))]
    eager = torch.autograd.grad(attend(*leaves, lists).square().sum(), leaves)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*leaves, lists).square().sum(), leaves)
    assert all(torch.equal(*pair) for pair in zip(found, eager, strict=True))
    given = native._arguments(problem(*leaves, fv.causal & fv.selected(lists)), "", 0)
    torch.library.opcheck(torch.ops.foveate.native_forward.default, (*leaves, *given))


def test_it_is_chosen_by_itself() -> None:
    q, k, v = (normal(1, h, 2100, 64) for h in (4, 2, 2))
    pattern = fv.causal & fv.selected(listed(1, 2, 2100, 5, of=2100))
    for dtype in DTYPES:
        assert "→ native" in str(fv.explain(q.to(dtype), k.to(dtype), v.to(dtype), pattern))
        fv.attention(q.to(dtype), k.to(dtype), v.to(dtype), pattern)  # and makes no summary
