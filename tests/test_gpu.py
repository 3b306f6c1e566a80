"""The laws on a GPU, where there is one: `pytest -m gpu`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch
from budget import assert_within_budget
from budget_linear import assert_linear_within_budget
from test_laws import GROUP, KEY_HEADS, PATTERNS, make_problem
from test_linear import GATES
from test_linear import call as linear_call
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import foveate as fv
from foveate.dispatch.choose import implementation
from foveate.linear import chunked as linear_chunked
from foveate.linear import recurrence
from foveate.linear.problem import linear_problem
from foveate.pattern.catalogue import parse
from foveate.pattern.interval import is_interval
from foveate.problem import Problem, problem
from foveate.score import parse as parse_score
from foveate.softmax import flex, sdpa

pytestmark = [
    pytest.mark.gpu,
    # PyTorch's compiler asks for it and hides the warning, but not where warnings are errors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

SCORES = ("none", "alibi", "t5", "bias", "softcap", "sinks", "all")
SIZES = (16, 64, 128)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
INTERVALS = [name for name, pattern in PATTERNS.items() if pattern is None or is_interval(pattern)]


def _on_gpu(call: Problem, dtype: torch.dtype | None = None) -> Problem:
    """The same problem with every tensor on the GPU."""
    pattern, score, start = call.pattern, call.score, call.query_start
    if pattern is not None:
        words, held = pattern.spec()
        pattern = parse(words, [x.cuda() if isinstance(x, Tensor) else x for x in held])
    if score is not None:
        score_words, tensors = score.spec()
        score = parse_score(score_words, [x.cuda() for x in tensors])
    q, k, v = (x.cuda().to(dtype or x.dtype) for x in (call.q, call.k, call.v))
    return problem(
        q, k, v, pattern, score=score, query_start=start.cuda() if isinstance(start, Tensor) else start,
        needs_lse=call.needs_lse, dropout=call.dropout, seed=call.seed,
    )  # fmt: skip


@contextmanager
def _nobody_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@DTYPES
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["chunked", "flex"])
def test_every_implementation_means_the_same(name: str, pattern: str, score: str, dtype: torch.dtype) -> None:
    call = _on_gpu(make_problem(pattern, score, dim=16, value_dim=16))
    run = implementation(name)
    assert run.refuses(_on_gpu(call, dtype)) == []
    assert_within_budget(run.run, call, dtype)


@DTYPES
@pytest.mark.parametrize("dim", SIZES)
@pytest.mark.parametrize("pattern", ["causal window", "documents"])
def test_flex_takes_every_head_size(pattern: str, dim: int, dtype: torch.dtype) -> None:
    assert_within_budget(flex.run, _on_gpu(make_problem(pattern, "none", dim=dim, value_dim=dim)), dtype)


@DTYPES
@pytest.mark.parametrize("dim", SIZES)
@pytest.mark.parametrize(
    ("pattern", "score"),
    [("everything", "none"), ("causal", "none"), ("padding", "none"), ("mask", "none"), ("everything", "bias")],
)
def test_a_fused_kernel_of_pytorch_means_the_same(pattern: str, score: str, dim: int, dtype: torch.dtype) -> None:
    call = make_problem(pattern, score, dim=dim, value_dim=dim, needs_lse=False, query_start=0)
    repeated = [x.repeat_interleave(GROUP, 1) for x in (call.k, call.v)]  # grouped heads have fewer kernels
    square = call.q if pattern != "causal" else torch.cat([call.q, call.q], 2)[:, :, : call.k.shape[2]]
    call = _on_gpu(replace(call, q=square, k=repeated[0], v=repeated[1]))
    assert sdpa.refuses(_on_gpu(call, dtype)) == []
    assert_within_budget(sdpa.run, call, dtype, gradients=score == "none")  # of a bias it is refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [7, *SIZES, 256, 512])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_pytorch_runs_what_it_says_that_it_can(key_heads: int, masked: bool, dim: int, dtype: torch.dtype) -> None:
    q, k = (torch.randn(2, h, 128, dim, device="cuda", dtype=dtype) for h in (4, key_heads))
    mask = torch.ones(128, 128, dtype=torch.bool, device="cuda") if masked else None
    found = sdpa.asked(q, k, k, mask, False)
    members = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    for name, member in members.items():

        def attend(only: SDPBackend = member) -> Tensor:
            with sdpa_kernel([only]):
                return torch.nn.functional.scaled_dot_product_attention(q, k, k, mask, enable_gqa=key_heads != 4)

        if name in found:
            assert attend().shape == q.shape
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says why, in as many warnings as it has reasons
                with pytest.raises(RuntimeError, match="No available kernel"):
                    attend()


@DTYPES
@pytest.mark.parametrize("queries", [1, 2, 100, 127])
@pytest.mark.parametrize("name", ["chunked", "flex"])
def test_a_few_grouped_queries_over_a_cache(name: str, queries: int, dtype: torch.dtype) -> None:
    call = make_problem("causal window", "softcap", dim=64, value_dim=64)
    call = replace(call, q=call.q[:, :, :queries], query_start=call.k.shape[2] - queries)
    assert_within_budget(implementation(name).run, _on_gpu(call), dtype)


@DTYPES
@pytest.mark.parametrize("pattern", ["everything", "causal window", "bigbird"])
def test_dropout_drops_the_same_weights_as_on_a_cpu(pattern: str, dtype: torch.dtype) -> None:
    call = make_problem(pattern, "none", dim=16, value_dim=16, dropout=0.3, seed=7)
    there = _on_gpu(call)
    torch.testing.assert_close(
        implementation("chunked").run(there).out.cpu(), implementation("reference").run(call).out, atol=1e-9, rtol=1e-9
    )
    assert_within_budget(implementation("chunked").run, there, dtype)


@DTYPES
@pytest.mark.parametrize("run", [recurrence.run, linear_chunked.run], ids=["recurrence", "chunked"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta_rule", [False, True])
def test_linear_attention(delta_rule: bool, gate: str, run: Callable[..., object], dtype: torch.dtype) -> None:
    given = linear_call(37, gate, delta_rule=delta_rule, beta=delta_rule)
    there = linear_problem(**{name: x.cuda() if isinstance(x, Tensor) else x for name, x in given.items()})  # type: ignore[arg-type]
    assert all(x.is_cuda for x in (getattr(there, field.name) for field in fields(there)) if isinstance(x, Tensor))
    assert_linear_within_budget(run, there, dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["chunked", "flex"])
@pytest.mark.parametrize("pattern", INTERVALS)
def test_nobody_waits_for_an_interval(pattern: str, name: str) -> None:
    call = _on_gpu(make_problem(pattern, "none", dim=64, value_dim=64), torch.bfloat16)
    run = implementation(name)
    first = run.run(call).out  # compiles
    with _nobody_waits():
        again = run.run(call).out
    assert torch.equal(first, again)


@pytest.mark.parametrize("pattern", ["everything", "causal", "causal window", "padding", "packed"])
def test_a_cuda_graph_captures_an_interval(pattern: str) -> None:
    call = _on_gpu(make_problem(pattern, "none", dim=64, value_dim=64), torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        wanted = flex.run(call).out
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = flex.run(call).out
    graph.replay()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("pattern", [None, fv.causal, fv.causal & fv.window(9)], ids=repr)
def test_a_compiled_graph_means_the_same(pattern: fv.Pattern | None) -> None:
    q, k, v = (torch.randn(2, KEY_HEADS, 131, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    compiled = torch.compile(lambda *tensors: fv.attention(*tensors, pattern), fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), fv.attention(q, k, v, pattern), atol=2e-2, rtol=2e-2)


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
