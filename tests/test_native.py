"""Every law of the core on every instruction set here: each pattern, score, dtype, forward and backward."""

import pytest
import torch
from budget import Budget
from kernels import DTYPES, KERNELS, normal, on
from test_laws import PATTERNS, SCORES, make_problem
from torch import Tensor

import foveate as fv
from foveate.problem import Problem, problem
from foveate.softmax import native, reference


def check(call: Problem, dtype: torch.dtype = torch.float32) -> None:
    """Results and gradients of every kernel keep the budget of this call."""
    budget = Budget(call, dtype)
    for kernel in KERNELS:
        try:
            budget.check(on(kernel))
        except AssertionError as error:
            raise AssertionError(f"{kernel}: {error}") from None


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pattern_and_score(dtype: torch.dtype, pattern: str, score: str) -> None:
    check(make_problem(pattern, score), dtype)


@pytest.mark.parametrize("score", ["none", "all"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dropout_drops_what_the_reference_drops(pattern: str, score: str) -> None:
    for dtype, seed in zip(DTYPES, (2**40 + 7, -3, 0), strict=True):
        check(make_problem(pattern, score, dropout=0.3, seed=seed), dtype)


@pytest.mark.parametrize("rate", [1e-11, 0.5 / 2**32, 2.5 / 2**32, 0.03, 0.5, 0.97, 1 - 1e-11])
def test_a_rate_is_rounded_as_the_reference_rounds_it(rate: float) -> None:
    call = make_problem("causal window", "none", dropout=rate, seed=11)
    check(call)
    # What is kept is kept in the same places: with V = 1 the outputs count.
    call = problem(call.q, call.k, torch.ones_like(call.v), dropout=rate, seed=11)
    check(call)


@pytest.mark.parametrize("start", [None, 0, -40, 200, torch.tensor([5, -20])], ids=str)
@pytest.mark.parametrize("pattern", ["causal", "window", "causal window", "streaming", "bigbird", "padding"])
def test_queries_start_anywhere(pattern: str, start: int | Tensor | None) -> None:
    check(make_problem(pattern, "all", query_start=start))
    check(make_problem(pattern, "t5", query_start=start, dropout=0.2, seed=1), torch.bfloat16)


@pytest.mark.parametrize("pattern", ["everything", "causal window", "mask"])
def test_lengths_and_windows_together_are_a_reach(pattern: str) -> None:
    """Two lengths, none and all of the keys among them, and the same thing as a mask, which is summarised."""
    call = make_problem(pattern, "none")
    for lengths in ([149, 83], [0, 149], [64, 0], [65, 1]):
        limits = torch.tensor(lengths)
        limited = fv.padding(limits) if call.pattern is None else call.pattern & fv.padding(limits)
        check(problem(call.q, call.k, call.v, limited, needs_lse=True))
    held = fv.from_mask((torch.arange(149) < limits[:, None])[:, None, None])
    masked = held if call.pattern is None else call.pattern & held
    found, true = (
        on()(problem(call.q.float(), call.k.float(), call.v.float(), x, needs_lse=True)) for x in (limited, masked)
    )
    torch.testing.assert_close(found.out, true.out, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cap", [0.01, 1.0, 50.0])
def test_small_and_large_scores_are_capped_alike(cap: float) -> None:
    q, k, v = (normal(1, 2, 70, 8, seed=seed) for seed in range(3))
    for scale in (1e-4, 0.3, 3.0):
        check(problem(q, k, v, score=fv.softcap(cap), scale=scale))
    budget = Budget(problem(q, k, v, score=fv.softcap(cap), scale=30.0), torch.float32, gradients=False)
    for kernel in KERNELS:
        budget.check(on(kernel))


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, -1.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_large_negative_and_no_scale(scale: float, dtype: torch.dtype) -> None:
    call = make_problem("causal window", "none")
    check(problem(call.q, call.k, call.v, call.pattern, scale=scale, needs_lse=True), dtype)
    check(problem(call.q, call.k, call.v, call.pattern, score=fv.sinks(normal(6)), scale=scale), dtype)


@pytest.mark.parametrize("size", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_and_large_inputs(size: float, dtype: torch.dtype) -> None:
    call = make_problem("causal", "none")
    check(problem(call.q * size, call.k * size, call.v * size, fv.causal, needs_lse=True), dtype)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("queries", [1, 130])
def test_a_query_that_is_not_finite_spoils_its_own_row_alone(poison: float, queries: int) -> None:
    q, k, v = normal(1, 4, queries, 8), normal(1, 2, 300, 8, seed=1), normal(1, 2, 300, 7, seed=2)
    spoilt = q.clone()
    spoilt[0, 1, queries // 2, 3] = poison
    for dtype in DTYPES:
        for kernel in KERNELS:
            clean, found = (on(kernel)(problem(x.to(dtype), k.to(dtype), v.to(dtype))) for x in (q, spoilt))
            assert found.out[0, 1, queries // 2].isnan().all()
            same = (found.out == clean.out).all(-1)
            same[0, 1, queries // 2] = True
            assert same.all(), f"{kernel} {dtype}"


def test_what_it_does_not_have_is_refused() -> None:
    q = torch.randn(1, 2, 5, 8)
    two = fv.bias(torch.zeros(5, 5)) + fv.bias(torch.zeros(5, 5))
    assert native.refuses(problem(q, q, q, score=two)) == ["takes one bias tensor"]
    assert any("float64" in reason for reason in native.refuses(problem(q.double(), q.double(), q.double())))
    assert native.refuses(problem(q, q, q, dropout=0.1)) == []
    assert native.refuses(problem(q.requires_grad_(), q, q)) == []
    with pytest.raises(ValueError, match="no such kernel"):
        on("altivec")(problem(q.detach(), q.detach(), q.detach()))


def test_no_visible_key_is_zero_and_minus_infinity() -> None:
    for pattern in ("nothing", "causal"):
        call = make_problem(pattern, "none", query_start=-200)
        for kernel in KERNELS:
            found = on(kernel)(problem(call.q.float(), call.k.float(), call.v.float(), call.pattern, query_start=-200))
            assert (found.out == 0).all()
            assert (found.lse == -torch.inf).all()
    assert (reference.run(call).out == 0).all()
