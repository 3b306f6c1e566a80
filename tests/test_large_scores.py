"""Scores of any size: a float32 softmax loses nothing by what a row has in common, and no implementation does."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from budget import Budget, Run
from kernels import DTYPES, KERNELS, normal, on
from sdpa_calls import SDPA
from test_native_looked import agrees
from torch import Tensor

import foveate as fv
from foveate.problem import Problem, Result, problem
from foveate.softmax import chunked, reference

RUNS: dict[str, Run] = {**{kernel: on(kernel) for kernel in KERNELS}, "chunked": chunked.run}
QUERIES = 1, 5, 131  # the first two are decoded, and differentiated by tiles
CHOSEN = fv.selected(torch.randint(0, 30, (1, 1, 131, 11), generator=torch.Generator().manual_seed(1)), block=5)


def grid(*shape: int, seed: int = 0) -> Tensor:
    """Quarters, so that every product, sum and scale of them is exact, with 10⁵ added too."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)) / 4


def check(call: Problem, *dtypes: torch.dtype, through: Callable[[Run], Run] = lambda run: run) -> None:
    for dtype in dtypes:
        budget = Budget(call, dtype)
        for name, run in RUNS.items():
            try:
                budget.check(through(run))
            except AssertionError as error:
                raise AssertionError(f"{name} in {dtype}: {error}") from None


@pytest.mark.parametrize("offset", [-1e5, 98304.0, -3e4])
@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("added", ["bias", "relative_bias", "chosen"])
def test_what_a_row_has_in_common_changes_nothing(added: str, queries: int, offset: float) -> None:
    """softmax(s + c) = softmax(s): the budget is that of the call without."""
    q, k, v = grid(1, 6, queries, 16), grid(1, 2, 149, 16, seed=1), normal(1, 2, 149, 17, seed=2)
    term = fv.bias(grid(queries, 149, seed=3)) if added == "bias" else fv.relative_bias(grid(7, 6, seed=4))
    pattern = CHOSEN & fv.causal if added == "chosen" and queries == 131 else fv.causal

    def shifted(run: Run) -> Run:
        def shifted_run(call: Problem) -> Result:
            assert call.score is not None
            first, logits = call.score.tensors()
            if added == "chosen":  # or tiles would collect its gradient
                first = first.detach()
            moved = fv.bias(first + offset) if added == "bias" else fv.relative_bias(first + offset)
            found = run(replace(call, score=moved + fv.sinks(logits + offset)))
            (true, exact), eps = (run(call), reference.run(call)), torch.finfo(torch.float32).eps
            assert found.lse is not None
            assert true.lse is not None
            assert exact.lse is not None
            off = (found.lse.double() - exact.lse - offset).abs().max()
            assert off <= (true.lse - exact.lse).abs().max() + eps * abs(offset)
            return Result(found.out, None)

        return shifted_run

    call = problem(q, k, v, pattern, score=term + fv.sinks(grid(6, seed=5)))
    check(call, *DTYPES, through=shifted)


@pytest.mark.parametrize(
    ("size", "dtype"), [*((size, torch.float32) for size in (300.0, 3e4, 1e15)), (3e4, torch.bfloat16)]
)
@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("pattern", ["everything", "causal", "chosen"])
def test_large_products_choose_their_keys(pattern: str, queries: int, size: float, dtype: torch.dtype) -> None:
    """The backward pass too, whose scores are those of the forward pass or weights would be infinite, or none."""
    shown = {"everything": None, "causal": fv.causal, "chosen": CHOSEN if queries == 131 else fv.causal & fv.window(64)}
    q, k, v = normal(1, 6, queries, 16), normal(1, 2, 149, 16, seed=1), normal(1, 2, 149, 17, seed=2)
    for scale in (None, -0.25):
        check(problem(size * q, size * k, v, shown[pattern], scale=scale), dtype)
    bias = fv.bias(normal(queries, 149, seed=3))
    check(problem(size * q, size * k, v, shown[pattern], score=bias, needs_lse=True), dtype)


def masks(queries: int, keys: int) -> dict[str, Tensor]:
    """Finite numbers that people add to hide or to show, in every second key or so, and in all keys of a row."""
    shown = torch.rand(queries, keys, generator=torch.Generator().manual_seed(7)) < 0.5
    shown[queries // 2] = False
    lowest, highest = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    pairs = {
        "0 and 1e10": (1e10, 0.0), "-1e10 and -2e10": (-1e10, -2e10), "0 and -10000": (0.0, -1e4),
        "0 and the lowest": (0.0, lowest), "the ends of float32": (highest, lowest), "1e38 and less": (1e38, 9e37),
    }  # fmt: skip
    made = {name: torch.where(shown, *map(torch.tensor, pair)) for name, pair in pairs.items()}
    falling = -3e4 - torch.arange(float(keys)).expand(queries, keys)
    return {**made, "gates": falling, "rising": falling.flip(1)}


@pytest.mark.parametrize("mask", masks(1, 1))
@pytest.mark.parametrize("queries", QUERIES)
def test_masks_of_large_numbers(queries: int, mask: str) -> None:
    """Beside 10¹⁰ no product is seen in float32, so there is none here."""
    q, k, v = torch.zeros(1, 4, queries, 16), normal(1, 2, 149, 16, seed=1), normal(1, 2, 149, 17, seed=2)
    call = problem(q, k, v, score=fv.bias(masks(queries, 149)[mask]))

    def unwanted(run: Run) -> Run:
        return lambda call: run(replace(call, score=fv.bias(call.score.tensors()[0].detach())))  # type: ignore[union-attr]

    check(call, *DTYPES, through=unwanted)
    for dtype in DTYPES:
        agrees(call, dtype, 3)


@pytest.mark.parametrize("queries", [4, 131])
@pytest.mark.usefixtures("_nothing_stays")
def test_pytorchs_own_calls(queries: int) -> None:
    """PyTorch's backward pass has a rounded log-sum-exp; ours, in its place, finds out what that has lost."""
    q, k, v = (normal(1, 8, n, 64, seed=n) for n in (queries, 512, 513))
    v = v[:, :, :512]

    def called(call: Problem) -> Result:
        bias = None if call.score is None else call.score.tensors()[0].detach()[None, None]
        return Result(SDPA(call.q, call.k, call.v, bias), None)

    calls = [problem(q * 0, k, v, score=fv.bias(mask)) for mask in masks(queries, 512).values()]
    with fv.accelerate() as acceleration:
        for call in (*calls, *(problem(size * q, size * k, v) for size in (300.0, 3e4))):
            Budget(call, torch.float32).check(called)
    report = acceleration.report()
    assert report.foveate
    assert not report.pytorch


@pytest.mark.parametrize("offset", [-1e5, 98304.0])
def test_long_rows_are_summed_in_parts_of_other_bases(offset: float) -> None:
    q, k, v = (grid(1, 1, 67, 16), grid(1, 1, 4337, 16, seed=1), normal(1, 1, 4337, 7, seed=2))
    bias = torch.linspace(-6, 6, 4337).mul(4).round().div(4)  # what comes later weighs more
    for dtype in DTYPES:
        budget = Budget(problem(q, k, v, score=fv.bias(bias[None])), dtype, gradients=False)
        for run in RUNS.values():
            budget.check(lambda call, run=run: Result(run(replace(call, score=fv.bias(bias[None] + offset))).out, None))


@pytest.mark.parametrize("size", [300.0, 3e4, 1e15])
def test_what_was_looked_at(size: float) -> None:
    q, k, v = normal(1, 6, 131, 16), normal(1, 2, 149, 16, seed=1), normal(1, 2, 149, 17, seed=2)
    logits = torch.tensor([1e5, -1e5, 40.0, -40.0, 0.0, -torch.inf])
    for scale in (None, -0.25):
        agrees(problem(size * q, size * k, v, fv.causal, scale=scale), torch.float32, 3)
    agrees(problem(size * q, size * k, v, fv.causal, query_start=-9, score=fv.sinks(logits)), torch.float32, 3)


@pytest.mark.parametrize("logits", [(1e5, 3e5, 1e6, -1e6, 40.0, -40.0), (1e30, 88.0, 120.0, -120.0, -1e30, -torch.inf)])
@pytest.mark.parametrize("queries", QUERIES)
def test_large_sinks(queries: int, logits: tuple[float, ...]) -> None:
    """With no key to see, the log-sum-exp is the sink itself."""
    q, k, v = normal(1, 6, queries, 16), normal(1, 2, 149, 16, seed=1), normal(1, 2, 149, 17, seed=2)
    for size in (1.0, 300.0):
        call = problem(size * q, size * k, v, fv.causal, score=fv.sinks(torch.tensor(logits)), query_start=-2)
        check(call, *DTYPES[: 3 if size == 1 else 2])


@pytest.mark.parametrize("queries", QUERIES)
def test_scores_far_below_a_sink(queries: int) -> None:
    """The log-sum-exp is the sink's, to all of its digits, however far away the scores are."""
    q, k, v = normal(1, 6, queries, 16), normal(1, 2, 149, 16, seed=1), normal(1, 2, 149, 17, seed=2)
    sinks = fv.sinks(torch.tensor([0.3, -1.2, 0.0, 2.7, 1e-3, -9.1]))
    for far in (-30.0, -1e4, -3e7):
        check(problem(q, k, v, fv.causal, score=fv.bias(normal(1, 1, 1, 149, seed=3) + far) + sinks), *DTYPES)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("pattern", ["first row", "chosen", "window"])
def test_of_one_key_only_the_log_sum_exp_has_a_gradient(pattern: str, dropout: float) -> None:
    """Its weight is 1, whatever q and k are: they have no gradient from the output."""
    shown = {
        "first row": fv.causal & fv.window(1), "window": fv.window(1),
        "chosen": fv.selected(torch.arange(131)[None, None, :, None]),
    }[pattern]  # fmt: skip
    for dtype in DTYPES:
        q, k, v = (normal(1, 4, 131, n, seed=n).to(dtype).requires_grad_() for n in (16, 16, 17))
        for name, run in RUNS.items():
            found = run(problem(q, k, v, shown, dropout=dropout, seed=3, needs_lse=True))
            assert found.lse is not None
            of_out = torch.autograd.grad(found.out, (q, k), normal(*found.out.shape).to(dtype), retain_graph=True)
            assert not any(x.any() for x in of_out), name
            of_lse = torch.autograd.grad(found.lse.sum(), (q, k))
            for mine, other in zip(of_lse, (k, q), strict=True):
                assert torch.equal(mine, (other.float() / 4).to(dtype)), name


@pytest.mark.parametrize("queries", QUERIES)
def test_products_beyond_float32_are_as_in_the_definition(queries: int) -> None:
    """One that is infinite spoils its row, and one that is −∞ hides its key. No scale does, be it 1e36 or 1e-37."""
    q, k, v = torch.ones(1, 2, queries, 16), torch.zeros(1, 2, 149, 16), normal(1, 2, 149, 17)
    k[:, 0, 7], k[:, 1, 7] = 1.0, -1.0
    true = reference.run(problem(1e20 * q, 1e20 * k, v))
    assert true.out[:, 0].isnan().all()
    assert true.out[:, 1].isfinite().all()
    for name, run in RUNS.items():
        found = run(problem(1e20 * q, 1e20 * k, v, needs_lse=True))
        assert found.lse is not None
        assert torch.equal(found.out.isnan(), true.out.isnan()), name
        assert torch.equal(found.lse.isnan(), true.out[..., 0].isnan()), name
    q, k = normal(1, 2, queries, 16), normal(1, 2, 149, 16, seed=1)
    for small, scale in ((1e-18, 1e35), (1e17, 1e-35), (1e-18, 1e36), (1e18, 1e-37)):
        check(problem(small * q, small * k, v, scale=scale), torch.float32)
