"""Few queries and many keys: the way of the next token, which has code of its own."""

import itertools

import pytest
import torch
from budget import Budget
from kernels import DTYPES, KERNELS, normal, on

import foveate as fv
from foveate.problem import Problem, problem
from foveate.softmax import reference

KEYS, DIM, VALUE_DIM = 587, 11, 13


WHOLE = (64, 96)  # head sizes of whole vectors, of which bfloat16 is read as it lies


def few(
    queries: int, key_heads: int = 2, group: int = 3, sizes: tuple[int, int] = (DIM, VALUE_DIM), **more: object
) -> Problem:
    """Two batch rows of a few queries against several hundred keys."""
    size, value_size = sizes
    heads = key_heads * group
    q, k, v = (
        normal(2, h, length, dim, seed=seed)
        for seed, (h, length, dim) in enumerate(
            ((heads, queries, size), (key_heads, KEYS, size), (key_heads, KEYS, value_size))
        )
    )
    return problem(q, k, v, needs_lse=True, **more)  # type: ignore[arg-type]


PATTERNS = {
    "everything": None,
    "causal": fv.causal,
    "window": fv.causal & fv.window(101),
    "lengths": fv.padding(torch.tensor([587, 67])),
    "no key": fv.padding(torch.tensor([0, 448])),
    "left padding": fv.padding(torch.arange(KEYS) >= torch.tensor([[0], [71]])),
    "dilated": fv.window(left=60, right=0, step=7),
    "streaming": fv.streaming(3, 130),
    "mask": fv.from_mask(torch.rand(2, 6, 1, KEYS, generator=torch.Generator().manual_seed(3)) > 0.6),
    "rule": fv.rule(lambda batch, head, query, key: (query + key * (head + 1)) % 3 == batch % 2),
}


def _scores(heads: int) -> dict[str, fv.Score | None]:
    hiding = normal(1, heads, 1, KEYS)
    hiding[..., 100:300:3] = -torch.inf
    every: dict[str, fv.Score] = {
        "alibi": fv.alibi(normal(heads).abs() / 80),
        "t5": fv.relative_bias(normal(32, heads), 128),
        "bias": fv.bias(hiding),
        "softcap": fv.softcap(1.7),
        "sinks": fv.sinks(normal(heads)),
    }
    together = every["alibi"] + every["t5"] + every["bias"] + every["softcap"] + every["sinks"]
    return {"none": None, **every, "together": together}


@pytest.mark.parametrize("score", ["none", "alibi", "t5", "bias", "softcap", "sinks", "together"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_and_score(pattern: str, score: str) -> None:
    for queries, dtype in itertools.product((1, 3), DTYPES):
        budget = Budget(few(queries, pattern=PATTERNS[pattern], score=_scores(6)[score]), dtype, gradients=queries == 1)
        for kernel in KERNELS:
            budget.check(on(kernel))


@pytest.mark.parametrize("group", [1, 2, 3, 7])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bfloat16_in_whole_vectors(pattern: str, group: int) -> None:
    mask = fv.from_mask(torch.rand(2, 2 * group, 1, KEYS, generator=torch.Generator().manual_seed(3)) > 0.6)
    chosen = mask if pattern == "mask" else PATTERNS[pattern]
    for score in (None, _scores(2 * group)["bias"]):
        call = few(1, 2, group, WHOLE, pattern=chosen, score=score)
        budget = Budget(call, torch.bfloat16, gradients=False)
        for kernel in KERNELS:
            budget.check(on(kernel))


@pytest.mark.parametrize(("queries", "group"), [(1, 1), (1, 4), (1, 64), (1, 65), (16, 4), (16, 5), (17, 1), (4, 7)])
def test_both_ways_mean_the_same_where_they_meet(queries: int, group: int) -> None:
    """Up to 16 queries and 64 rows of a group go one way, more the other."""
    for dtype, scale in itertools.product(DTYPES, (0.3, -0.3)):
        call = few(queries, 1, group, pattern=fv.causal & fv.window(300), score=fv.sinks(normal(group)), scale=scale)
        budget = Budget(call, dtype, gradients=False)
        for kernel in KERNELS:
            budget.check(on(kernel))


@pytest.mark.parametrize("keys", [1, 2, 63, 64, 65, 255, 256, 257, 511, 512, 513, 4097])
@pytest.mark.parametrize("dim", [1, 3, 16, 64, 129])
def test_every_length_and_head_size(keys: int, dim: int) -> None:
    q, k, v = normal(1, 3, 1, dim), normal(1, 1, keys, dim, seed=1), normal(1, 1, keys, dim + 2, seed=2)
    for dtype in DTYPES:
        budget = Budget(problem(q, k, v, needs_lse=True), dtype, gradients=False)
        for kernel in KERNELS:
            budget.check(on(kernel))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("length", [1, 300, 448, 586])
def test_nothing_past_the_length_is_read(length: int, poison: float) -> None:
    """A cache is longer than what it holds: what lies behind never matters, nor does what a bias hides."""
    hiding = torch.zeros(1, 1, 1, KEYS)
    hiding[..., length:] = -torch.inf
    for dtype, sizes, (pattern, score) in itertools.product(
        DTYPES, ((DIM, VALUE_DIM), WHOLE), ((fv.padding(torch.tensor([length] * 2)), None), (None, fv.bias(hiding)))
    ):
        call = few(1, sizes=sizes, pattern=pattern, score=score)
        for kernel in KERNELS:
            found = []
            for filler in (0.0, poison):
                k, v = call.k.clone(), call.v.clone()
                k[:, :, length:], v[:, :, length:] = filler, filler
                found.append(on(kernel)(problem(*(x.to(dtype) for x in (call.q, k, v)), pattern, score=score)))
            # A tile that holds NaN is summed key by key.
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(found[1].out, found[0].out, atol=4 * eps, rtol=4 * eps)
            assert torch.equal(found[1].lse, found[0].lse)


@pytest.mark.parametrize("batch", [1, 64])
def test_long_rows_stay_exact(batch: int) -> None:
    """65,537 keys, one row and so many that each is one piece of work: no sum is rounded once for every tile."""
    q, k, v = normal(batch, 1, 1, 16), normal(1, 1, 65_537, 16, seed=1), normal(1, 1, 65_537, 4, seed=2).abs()
    truth = reference.run(problem(q.transpose(0, 2).double(), k.double(), v.double(), needs_lse=True))
    for kernel in KERNELS:
        found = on(kernel)(problem(q, k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)))
        assert ((found.out.double().transpose(0, 2) - truth.out) / truth.out).abs().max() < 1e-6
        assert (found.lse.double().transpose(0, 2) - truth.lse).abs().max() < 1e-6 * truth.lse.abs().max()
