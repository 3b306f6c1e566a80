"""The laws on a GPU, where there is one: `pytest -m gpu`."""

import time

import pytest
import torch
from budget import assert_within_budget
from test_laws import PATTERNS, make_problem

import foveate as fv
from foveate.dispatch import implementation
from foveate.pattern.catalogue import parse
from foveate.problem import Problem, problem
from foveate.score import parse as parse_score

pytestmark = pytest.mark.gpu

SCORES = ("none", "alibi", "t5", "bias", "softcap", "sinks", "all")


def _on_gpu(call: Problem) -> Problem:
    """The same problem with every tensor on the GPU."""
    pattern, score = call.pattern, call.score
    if pattern is not None:
        words, held = pattern.spec()
        pattern = parse(words, [x.cuda() if isinstance(x, torch.Tensor) else x for x in held])
    if score is not None:
        score_words, tensors = score.spec()
        score = parse_score(score_words, [x.cuda() for x in tensors])
    q, k, v = (x.cuda() for x in (call.q, call.k, call.v))
    return problem(
        q, k, v, pattern, score=score, scale=call.scale, query_start=call.query_start, needs_lse=call.needs_lse
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["chunked", "flex", "sdpa"])
def test_every_implementation_means_the_same(name: str, pattern: str, score: str, dtype: torch.dtype) -> None:
    call = _on_gpu(make_problem(pattern, score, value_dim=7, needs_lse=name != "sdpa"))
    run = implementation(name)
    low = problem(
        *(x.to(dtype) for x in (call.q, call.k, call.v)), call.pattern, score=call.score, needs_lse=call.needs_lse
    )
    if name == "sdpa" and run.refuses(low):
        with pytest.raises(fv.Unsupported):
            fv.attention(low.q, low.k, low.v, low.pattern, score=low.score, backend="sdpa")
        return
    assert run.refuses(low) == []
    assert_within_budget(run.run, call, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_window_beats_the_full_matrix(dtype: torch.dtype) -> None:
    """Window 256 at N = 65,536: less memory and less time than SDPA without the window; the figures are printed."""
    q, k, v = (torch.randn(1, 8, 65_536, 64, device="cuda", dtype=dtype) for _ in range(3))
    pattern = fv.causal & fv.window(256)
    found: dict[str, tuple[float, float]] = {}
    for name in ("window", "full"):
        for _ in range(2):  # the first compiles
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            fv.attention(q, k, v, pattern if name == "window" else fv.causal)
            torch.cuda.synchronize()
            found[name] = time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**20
    print({name: f"{seconds * 1e3:.2f} ms, {megabytes:.0f} MiB" for name, (seconds, megabytes) in found.items()})
    assert found["window"][0] < found["full"][0]
    assert found["window"][1] < 2 * found["full"][1]
    other = fv.attention(q, k, v, pattern, backend="chunked")
    torch.testing.assert_close(fv.attention(q, k, v, pattern), other, atol=2e-2, rtol=2e-2)
