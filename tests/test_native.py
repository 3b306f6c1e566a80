"""The compiled kernels: every law on every instruction set here, and what only compiled code can do wrong."""

import multiprocessing
import threading

import pytest
import torch
from budget import assert_within_budget
from test_laws import PATTERNS, SCORES, make_problem
from torch import Tensor

import foveate as fv
from foveate.problem import Problem, Result, problem
from foveate.softmax import native, reference

KERNELS = native._native.kernels()


def _on(kernel: str, threads: int = 1) -> object:
    def run(call: Problem) -> Result:
        return Result(*native._run(call, kernel, threads))

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_pattern_on_every_kernel(kernel: str, pattern: str, dtype: torch.dtype) -> None:
    for score in ("none", "all"):
        assert_within_budget(_on(kernel), make_problem(pattern, score), dtype, gradients=False)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pattern", ["everything", "causal window"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_score_on_every_kernel(kernel: str, pattern: str, score: str) -> None:
    for start in (None, torch.tensor([5, -20])):
        call = make_problem(pattern, score, query_start=start)
        assert_within_budget(_on(kernel), call, torch.float32, gradients=False)


@pytest.mark.parametrize("cap", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("kernel", KERNELS)
def test_small_and_large_scores_are_capped_alike(kernel: str, cap: float) -> None:
    generator = torch.Generator().manual_seed(11)
    q, k, v = (torch.randn(1, 2, 70, 8, generator=generator) for _ in range(3))
    for scale in (1e-4, 0.3, 30.0):
        call = problem(q, k, v, score=fv.softcap(cap), scale=scale)
        assert_within_budget(_on(kernel), call, torch.float32, gradients=False)


@pytest.mark.parametrize("start", [0, -40, 200, torch.tensor([5, -20])], ids=str)
@pytest.mark.parametrize("pattern", ["causal", "causal window", "streaming", "bigbird"])
def test_queries_start_anywhere(pattern: str, start: int | Tensor) -> None:
    assert_within_budget(_on(""), make_problem(pattern, "all", query_start=start), torch.float32, gradients=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sweep_of_sizes(kernel: str) -> None:
    """Sizes around the edges of tiles and register tiles, odd heads and groups, strides, every dtype."""
    draw = torch.Generator().manual_seed(17)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    for _ in range(150):
        batch, key_heads, group = pick(1, 2), pick(1, 2, 3), pick(1, 2, 4)
        queries, keys = pick(1, 2, 63, 64, 65, 130), pick(1, 5, 6, 7, 63, 64, 65, 129)
        dim, value_dim = pick(1, 3, 6, 16, 59, 64, 111), pick(1, 2, 5, 6, 7, 12, 64, 65)
        q, k, v = (
            torch.randn(batch, heads, length, size + 3, generator=draw)[..., 1 : size + 1]
            for heads, length, size in (
                (key_heads * group, queries, dim), (key_heads, keys, dim), (key_heads, keys, value_dim)
            )
        )  # fmt: skip
        dtype = (torch.float32, torch.bfloat16, torch.float16)[pick(0, 1, 2)]
        pattern = (None, fv.causal, fv.causal & fv.window(9), fv.window(5, step=3))[pick(0, 1, 2, 3)]
        call = problem(q.to(dtype), k.to(dtype), v.to(dtype), pattern, needs_lse=True, scale=(-1) ** pick(1, 2) * 0.3)
        assert_within_budget(_on(kernel, pick(1, 2)), call, dtype, gradients=False)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_hidden_keys_never_matter(kernel: str, poison: float) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 130, 8, generator=generator) for _ in range(3))
    clean = _on(kernel)(problem(q, k, v, fv.causal))  # type: ignore[operator]
    k[:, :, 70], v[:, :, 70] = poison, poison
    found = _on(kernel)(problem(q, k, v, fv.causal))  # type: ignore[operator]
    torch.testing.assert_close(found.out[:, :, :70], clean.out[:, :, :70], atol=1e-6, rtol=1e-6)
    assert torch.equal(found.lse[:, :, :70], clean.lse[:, :, :70])
    if poison != poison:
        assert found.out[:, :, 70:].isnan().all()


def test_nothing_is_read_or_written_outside() -> None:
    """Keys, values and results lie inside memory full of NaN; the NaN stays where it is and reaches nothing."""
    for queries, keys in ((65, 63), (64, 65), (1, 129)):
        held = [torch.full((2, 3, length + 2, 9), torch.nan) for length in (queries, keys, keys)]
        inner = [x[:, :, 1:-1, 1:-1] for x in held]
        for x in inner:
            x.copy_(torch.randn(x.shape))
        q, k, v = inner
        found = native.run(problem(q, k, v))
        assert found.out.isfinite().all()
        truth = reference.run(problem(q.double(), k.double(), v.double()))
        torch.testing.assert_close(found.out.double(), truth.out, atol=1e-5, rtol=1e-5)


def test_long_rows_stay_exact() -> None:
    """65,537 keys: a running sum rounded once for every key would lose five digits."""
    generator = torch.Generator().manual_seed(5)
    q, k = torch.randn(1, 1, 3, 16, generator=generator), torch.randn(1, 1, 65_537, 16, generator=generator)
    v = torch.rand(1, 1, 65_537, 4, generator=generator)
    found = native.run(problem(q, k, v))
    truth = reference.run(problem(q.double(), k.double(), v.double()))
    assert ((found.out.double() - truth.out).abs() / truth.out.abs()).max() < 1e-6


def test_reruns_are_equal_to_the_bit_on_any_number_of_threads() -> None:
    call = make_problem("causal window", "sinks")
    call = problem(*(x.float() for x in (call.q, call.k, call.v)), call.pattern)
    first = _on("", 1)(call)  # type: ignore[operator]
    for threads in (1, 2, 3, 8):
        again = _on("", threads)(call)  # type: ignore[operator]
        assert torch.equal(first.out, again.out)
        assert torch.equal(first.lse, again.lse)


def _big() -> Problem:
    generator = torch.Generator().manual_seed(7)
    return problem(*(torch.randn(2, 8, 300, 32, generator=generator) for _ in range(3)), fv.causal)


def _child(truth: Tensor) -> None:
    result = Result(*native._run(_big(), "", 4))
    raise SystemExit(0 if torch.equal(result.out, truth) else 1)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_child_process_computes_too(method: str) -> None:
    truth = Result(*native._run(_big(), "", 4)).out  # the threads are running when the child is made
    child = multiprocessing.get_context(method).Process(target=_child, args=(truth,))
    child.start()
    child.join(120)
    assert child.exitcode == 0


def test_eight_threads_at_once() -> None:
    truth = Result(*native._run(_big(), "", 2)).out
    wrong: list[int] = []

    def work(number: int) -> None:
        found = [Result(*native._run(_big(), "", 2)).out for _ in range(10)]
        if not all(torch.equal(out, truth) for out in found):
            wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_what_it_does_not_have_is_refused() -> None:
    q = torch.randn(1, 2, 5, 8)
    for more, words in (
        ({"score": fv.bias(torch.zeros(5, 5)) + fv.bias(torch.zeros(5, 5))}, "takes one bias tensor"),
        ({"dropout": 0.1}, "takes no dropout yet"),
    ):
        assert any(words in reason for reason in native.refuses(problem(q, q, q, **more)))  # type: ignore[arg-type]
    assert any("float64" in reason for reason in native.refuses(problem(q.double(), q.double(), q.double())))
    assert any("gradient" in reason for reason in native.refuses(problem(q.requires_grad_(), q, q)))
    with pytest.raises(ValueError, match="no such kernel"):
        native._run(problem(q.detach(), q.detach(), q.detach()), "altivec", 1)
