"""What was looked at, by the kernels: the same as capture works out row by row."""

from dataclasses import replace

import pytest
import torch
from budget import cast
from kernels import DTYPES, KERNELS, normal
from test_laws import PATTERNS, SCORES, make_problem
from torch import Tensor

import foveate as fv
from foveate import inspection
from foveate.problem import Problem, problem
from foveate.softmax import native

NAMES = ("weights", "rest", "received", "lse", "entropy")


def agrees(call: Problem, dtype: torch.dtype, top: int) -> None:
    """Within the budget of float32: twice what capture loses in it, plus two roundings. Ties may be in any order."""
    rounded, _ = cast(call, dtype, gradients=False)
    wide, _ = cast(rounded, torch.float64, gradients=False)
    true, plain = inspection.looked(wide, top), inspection.looked(cast(rounded, torch.float32, gradients=False)[0], top)
    exact = inspection.weights(wide)
    top = min(top, call.k.shape[2])
    for kernel in KERNELS:
        indices, *numbers = native.looked(rounded, top, kernel)
        found, bounds = dict(zip(NAMES, numbers, strict=True)), {}
        for name in NAMES:
            mine, theirs, truth = found[name], getattr(plain, name), getattr(true, name)
            assert torch.equal(mine.isinf(), truth.isinf()), f"{kernel}: {name}"
            mine, theirs, truth = (x.masked_fill(x.isinf(), 0).double() for x in (mine, theirs, truth))
            most = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
            loss = (theirs - truth).abs().max().item() if truth.numel() else 0.0
            off = (mine - truth).abs().max().item() if truth.numel() else 0.0
            bounds[name] = 2 * loss + 2 * 2**-23 * most
            assert off <= bounds[name], f"{kernel}: {name} is off by {off:.3g}, plain {loss:.3g}"
        # The weight at an index is the weight that is said, whichever of two equal ones it is; −1 has none.
        at = exact.gather(3, indices.clamp(min=0)).masked_fill(indices < 0, 0)
        assert (at - found["weights"]).abs().max() <= 2 * bounds["weights"], kernel
        assert (indices.sort(3).values.diff(dim=3) != 0)[indices.sort(3).values[..., 1:] >= 0].all(), "a key twice"
        # −1 stands exactly where fewer keys are visible.
        assert torch.equal((indices >= 0).sum(3), _seen(wide).clamp(max=top)), kernel


def _seen(call: Problem) -> Tensor:
    """How many keys each row may see."""
    at = call.pairs()
    scores = torch.zeros(call.shape)
    if call.score is not None:
        scores = call.score.apply(scores, at)
    if call.pattern is not None:
        scores = scores.masked_fill(~call.pattern.visible(at), -torch.inf)
    return (scores > -torch.inf).sum(3)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pattern", ["everything", "causal", "mask", "nothing"])
def test_every_score(pattern: str, score: str) -> None:
    agrees(make_problem(pattern, score), torch.float32, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern(pattern: str, dtype: torch.dtype) -> None:
    agrees(make_problem(pattern, "all"), dtype, 7)


@pytest.mark.parametrize("top", [1, 2, 64, 149, 300])
def test_any_number_of_keys_is_kept(top: int) -> None:
    agrees(make_problem("causal", "sinks"), torch.float32, top)


@pytest.mark.parametrize("size", [0.1, 4.0, 20.0])
@pytest.mark.parametrize("scale", [None, -0.4])
def test_large_scores_lose_nothing(size: float, scale: float | None) -> None:
    """Shares of a row are taken from its largest score, not from its log-sum-exp, which is rounded."""
    call = make_problem("causal", "none")
    agrees(problem(call.q * size, call.k * size, call.v, fv.causal, scale=scale), torch.float32, 5)


@pytest.mark.parametrize("keys", [0, 1, 63, 64, 65, 300])
@pytest.mark.parametrize("queries", [0, 1, 64, 65])
def test_every_size(queries: int, keys: int) -> None:
    q, k = normal(2, 6, queries, 9), normal(2, 3, keys, 9, seed=1)
    if queries and keys:
        agrees(problem(q, k, k, fv.causal, query_start=11), torch.float32, 3)
    indices, weights, rest, received, lse, entropy = native.looked(problem(q, k, k, score=fv.sinks(normal(6))), 3)
    assert indices.shape == weights.shape == (2, 6, queries, 3)
    assert received.shape == (2, 6, keys)
    if not keys:
        assert (indices == -1).all()
        assert torch.equal(lse, normal(6)[:, None].expand(2, 6, queries))
        for empty in (weights, rest, received, entropy):
            assert (empty == 0).all()


@pytest.mark.parametrize("queries", [1, 65, 130])
def test_nan_reaches_only_those_who_see_it(queries: int) -> None:
    q, k = normal(1, 2, queries, 8), normal(1, 2, 200, 8, seed=1)
    clean = problem(q, k, k, fv.causal, query_start=0)
    hidden = [n for n in (70, 131, 199) if n >= queries]
    spoilt = replace(clean, k=k.index_fill(2, torch.tensor(hidden), torch.nan))
    for kernel in KERNELS:
        for mine, true in zip(native.looked(spoilt, 4, kernel), native.looked(clean, 4, kernel), strict=True):
            assert torch.equal(mine, true), kernel
        seen = replace(clean, q=q.index_fill(2, torch.tensor([queries // 2]), torch.nan))
        _, _, rest, received, lse, _ = native.looked(seen, 4, kernel)
        row = torch.arange(queries) == queries // 2
        assert torch.equal(lse.isnan(), row.expand(1, 2, queries))
        assert torch.equal(rest.isnan() | (rest >= 0), torch.ones(1, 2, queries, dtype=torch.bool))
        assert torch.equal(received.isnan(), (torch.arange(200) <= queries // 2).expand(1, 2, 200))


def test_a_row_is_shared_out_whole() -> None:
    """weights + rest + sink = 1, and what rows give is what keys receive."""
    call = make_problem("causal window", "sinks")
    call = problem(*(x.float() for x in (call.q, call.k, call.v)), call.pattern, score=call.score)
    assert call.score is not None
    assert call.score.sinks is not None
    _, weights, rest, received, lse, _ = native.looked(call, 6)
    sunk = (call.score.sinks.logits[:, None] - lse).exp()
    torch.testing.assert_close(weights.sum(3) + rest + sunk, torch.ones_like(lse))
    torch.testing.assert_close(received.sum(2), (1 - sunk).sum(2))
