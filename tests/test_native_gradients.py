"""Gradients of the compiled kernels: what is wanted and no more, in its own shape, whatever hidden keys hold."""

import itertools
from dataclasses import replace

import pytest
import torch
from budget import Budget, Run, cast, plain_torch, results
from kernels import DTYPES, KERNELS, derived, normal, on
from test_laws import make_problem
from torch import Tensor

import foveate as fv
from foveate.problem import Problem, problem
from foveate.softmax import reference

HIDING = {
    "causal": (fv.causal, [100]),
    "mask": (fv.from_mask(torch.arange(129)[None] % 7 != 3), list(range(3, 129, 7))),
    "padding": (fv.padding(torch.tensor([90])), list(range(90, 129))),
    "bias": (fv.bias(torch.where(torch.arange(129) % 5 == 2, -torch.inf, 0.5)[None]), list(range(2, 129, 5))),
}


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("queries", [1, 3, 65], ids="{} queries".format)
def test_what_a_hidden_key_holds_never_matters(queries: int, hiding: str, poison: float) -> None:
    """K and V of keys that no row sees, forward and backward: results keep the budget of clean keys."""
    hidden, keys = HIDING[hiding]
    spoil = torch.zeros(129, 1)
    spoil[keys] = poison

    def spoilt(kernel: str) -> Run:  # a sum, so that the gradient of a hidden key is seen as it is
        return lambda call: on(kernel)(replace(call, k=call.k + spoil.to(call.k), v=call.v + spoil.to(call.v)))

    q, k, v = normal(1, 4, queries, 8), normal(1, 2, 129, 8, seed=1), normal(1, 2, 129, 9, seed=2)
    pattern, own = (None, hidden) if isinstance(hidden, fv.Score) else (hidden, None)
    for more in (None, fv.alibi(torch.tensor([0.1, 0.2, 0.3, 0.5])), fv.softcap(2.0) + fv.sinks(normal(4))):
        score = more if own is None else own if more is None else own + more
        for dtype, dropout in itertools.product(DTYPES, (0.0, 0.3)):
            call = problem(q, k, v, pattern, score=score, query_start=0, needs_lse=True, dropout=dropout, seed=4)
            budget = Budget(call, dtype)
            for kernel in KERNELS:
                budget.check(spoilt(kernel))


@pytest.mark.parametrize("queries", [1, 2, 65])
def test_a_visible_key_spoils_only_the_rows_that_see_it(queries: int) -> None:
    """Its gradient too: the rows that do not see the key keep finite gradients."""
    for kernel in KERNELS:
        for dtype in DTYPES:
            leaves = [normal(1, 2, n, 8, seed=n).to(dtype) for n in (queries, 140, 140)]
            leaves[1][:, :, 70] = leaves[2][:, :, 70] = torch.nan
            q, k, v = (x.requires_grad_() for x in leaves)
            result = on(kernel)(problem(q, k, v, fv.causal & fv.window(3), query_start=71))
            (dq,) = torch.autograd.grad(result.out.sum(), q)
            sees = torch.arange(queries) < 2  # positions 71 and 72 have key 70 in their window
            assert torch.equal(result.out.isnan().all(-1), sees.expand(1, 2, queries))
            assert torch.equal(dq.isnan().any(-1), sees.expand(1, 2, queries))


SHAPES = (2, 6, 131, 149), (1, 6, 1, 1), (2, 1, 1, 149), (1, 1, 131, 1), (131, 149), (1, 6, 131, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pattern", ["causal window", "mask"])
def test_a_bias_gets_its_gradient_in_its_own_shape(pattern: str, shape: tuple[int, ...]) -> None:
    call = make_problem(pattern, "none")
    bias = fv.bias(normal(*shape).double())
    budget = Budget(problem(call.q, call.k, call.v, call.pattern, score=bias, needs_lse=True), torch.float32)
    for kernel in KERNELS:
        budget.check(on(kernel))


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 1, 1)], ids=str)
def test_a_shared_bias_collects_what_its_pairs_would_get(shape: tuple[int, ...]) -> None:
    call = make_problem("causal window", "none")
    q, k, v = (x.float() for x in (call.q, call.k, call.v))
    shared = normal(*shape).requires_grad_()
    every = shared.detach().expand(2, 6, 131, 149).clone().requires_grad_()
    for kernel in KERNELS:
        one, each = (
            derived(on(kernel)(problem(q, k, v, call.pattern, score=fv.bias(bias), needs_lse=True)), [bias])[2].double()
            for bias in (shared, every)
        )
        rounding = torch.finfo(torch.float32).eps * each.abs().sum_to_size(shape)
        assert ((one - each.sum_to_size(shape)).abs() <= rounding).all(), kernel


@pytest.mark.parametrize("which", ["bias", "alibi", "relative_bias", "sinks"])
def test_only_a_score_that_wants_a_gradient_gets_one(which: str) -> None:
    """And it is the one that it gets when everything wants one."""
    tensors = {
        "bias": normal(1, 6, 1, 149), "alibi": normal(6, seed=1).abs(), "relative_bias": normal(9, 6, seed=2),
        "sinks": normal(6, seed=3),
    }  # fmt: skip
    call = make_problem("causal", "none")
    grads: list[Tensor] = []
    for everything in (True, False):
        leaves = {name: x.clone().requires_grad_(everything or name == which) for name, x in tensors.items()}
        score = fv.bias(leaves["bias"]) + fv.alibi(leaves["alibi"]) + fv.relative_bias(leaves["relative_bias"])
        q, k, v = (x.float().requires_grad_(everything) for x in (call.q, call.k, call.v))
        result = on()(problem(q, k, v, call.pattern, score=score + fv.sinks(leaves["sinks"]), needs_lse=True))
        grads.append(torch.autograd.grad(result.out.sum() + result.lse.sum(), leaves[which])[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("start", [None, 5000])
@pytest.mark.parametrize("score", ["alibi", "relative_bias", "bias"])
def test_what_collects_from_many_keys_of_a_row_collects_no_common_error(score: str, start: int | None) -> None:
    """The gradients of a row's scores sum to 0, and a slope multiplies them by distances: an error of δ, which is the
    same for every key of the row, would add up, by the distance of a query that stands far behind. In half precision
    that would be the rounding of the output, which is not in the gradient otherwise. A few numbers tell little of an
    error: it is that of five draws.
    """
    made = {
        "alibi": fv.alibi(normal(6).abs() / 50), "relative_bias": fv.relative_bias(normal(3, 6)),
        "bias": fv.bias(normal(1, 6, 1, 149)),
    }  # fmt: skip
    first = make_problem("everything", "none")
    draws = [
        problem(first.q.roll(n, 2), first.k.roll(-n, 2), first.v.roll(2 * n, 2), score=made[score], query_start=start)
        for n in range(5)
    ]

    def gradients(run: Run, dtype: torch.dtype, of: torch.dtype) -> Tensor:
        found = [results(run, cast(call, dtype, gradients=False)[0], of)[-1] for call in draws]
        return torch.stack([x for x in found if x is not None])

    for dtype in DTYPES:
        truth, plain = gradients(reference.run, dtype, torch.float64), gradients(plain_torch, dtype, dtype)
        for kernel in KERNELS:
            off, loss = ((x - truth).square().mean().sqrt() for x in (gradients(on(kernel), dtype, dtype), plain))
            assert off <= (1.5 if dtype == torch.float32 else 0.02) * loss, kernel


@pytest.mark.parametrize("expanded", ["sum", "by row", "by head"])
def test_the_gradient_of_the_output_may_have_any_strides(expanded: str) -> None:
    shapes = {"sum": (1, 1, 1, 1), "by row": (1, 1, 131, 1), "by head": (2, 6, 1, 1)}
    call = make_problem("causal", "none")
    for dtype in DTYPES:
        for kernel in KERNELS:
            found = []
            for dense in (False, True):
                leaves = [x.to(dtype).requires_grad_() for x in (call.q, call.k, call.v)]
                out = on(kernel)(problem(*leaves, call.pattern)).out
                d_out = normal(*shapes[expanded]).to(dtype).expand(out.shape)
                found.append(torch.autograd.grad(out, leaves, d_out.contiguous() if dense else d_out))
            assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


NOTHING = {  # queries, keys, head size, value size
    "no values": (5, 7, 4, 0), "no head": (5, 7, 0, 3), "no keys": (5, 0, 4, 3), "no queries": (0, 7, 4, 3),
    "neither": (5, 7, 0, 0), "nothing": (0, 0, 0, 0), "a long row without a head": (3, 300, 0, 3),
}  # fmt: skip


@pytest.mark.parametrize("score", ["none", "every"])
@pytest.mark.parametrize("sizes", NOTHING.values(), ids=NOTHING)
def test_sizes_of_zero_keep_the_gradients_that_are_left(sizes: tuple[int, int, int, int], score: str) -> None:
    queries, keys, dim, value_dim = sizes
    q, k, v = normal(2, 6, queries, dim), normal(2, 3, keys, dim, seed=1), normal(2, 3, keys, value_dim, seed=2)
    terms = fv.sinks(normal(6)) + fv.alibi(normal(6).abs()) + fv.bias(normal(1, 6, 1, 1)) if score == "every" else None
    for dtype in DTYPES:
        budget = Budget(problem(q, k, v, score=terms, needs_lse=True), dtype)
        for kernel in KERNELS:
            budget.check(on(kernel))


def test_the_gradient_of_the_log_sum_exp_counts() -> None:
    """Merging two halves is attention over the whole, gradients too."""
    call = make_problem("everything", "none")
    whole = [x.float().requires_grad_() for x in (call.q, call.k, call.v)]
    q, k, v = whole
    halves = [
        on()(problem(q, k[:, :, part], v[:, :, part], needs_lse=True)) for part in (slice(None, 70), slice(70, None))
    ]
    merged = fv.merge([(half.out, half.lse) for half in halves])[0]
    found = torch.autograd.grad(merged.square().sum(), whole)
    true = torch.autograd.grad(on()(problem(q, k, v)).out.square().sum(), whole)
    for mine, theirs in zip(found, true, strict=True):
        torch.testing.assert_close(mine, theirs, atol=3e-6, rtol=1e-5)


def test_rows_that_see_nothing_have_no_gradient() -> None:
    for kernel in KERNELS:
        leaves = [normal(1, 2, n, 8, seed=n).requires_grad_() for n in (70, 90, 90)]
        call = problem(*leaves, fv.causal, query_start=-40, needs_lse=True)
        for mine, true in zip(derived(on(kernel)(call), leaves), _exact(call, -40), strict=True):
            torch.testing.assert_close(mine.double(), true, atol=3e-6, rtol=1e-5)
        assert (derived(on(kernel)(call), leaves)[2][:, :, :40] == 0).all()


def _exact(call: Problem, start: int) -> list[Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in (call.q, call.k, call.v)]
    return derived(reference.run(problem(*leaves, call.pattern, query_start=start, needs_lse=True)), leaves)
