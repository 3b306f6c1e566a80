"""FlexAttention as it is compiled: seldom, and never past PyTorch's limits, where an n × n matrix would be computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention

import foveate as fv
from foveate import Pattern
from foveate.problem import Problem, problem
from foveate.softmax import chunked, flex

MOST = 3
LENGTHS = [*range(2, 400, 41), *range(130, 139), 1000]


@pytest.fixture(autouse=True)
def _from_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flex, "_KERNELS", {})
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _attend(queries: int, keys: int, pattern: Pattern | None, score: fv.Score | None = None) -> None:
    torch.manual_seed(queries * 1000 + keys)
    q, k, v = (torch.randn(1, heads, n, 16) for heads, n in ((4, queries), (2, keys), (2, keys)))
    found, wanted = (fv.attention(q, k, v, pattern, score=score, backend=name) for name in ("flex", "chunked"))
    torch.testing.assert_close(found, wanted)


def _compiled() -> int:
    return counters["stats"]["unique_graphs"]


def _ids(seed: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 + seed, (1, length), generator=generator).sort(1).values


CALLS: dict[str, Callable[[int], None]] = {
    "lengths": lambda n: _attend(LENGTHS[n], LENGTHS[n], fv.causal & fv.window(50)),
    "prompts": lambda n: _attend(LENGTHS[n], LENGTHS[n] + 7, fv.causal & fv.streaming(3, 60)),
    "decoding": lambda n: _attend(1, 300 + n, fv.causal & fv.window(50), fv.softcap(9.0)),
    "packings": lambda n: _attend(300, 300, fv.causal & fv.documents(_ids(n, 300))),
    "packings end to end": lambda n: _attend(
        300, 300, fv.causal & fv.documents(cu_seqlens=torch.tensor([*range(0, 300, 10 + n), 300]))
    ),
    "windows": lambda n: _attend(300, 300, fv.causal & fv.window(1 + 9 * n)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CALLS)
def test_twenty_calls_of_a_kind_are_compiled_three_times_at_most(kind: str) -> None:
    for n in range(20):
        CALLS[kind](n)
    assert 1 <= _compiled() <= MOST
    assert sum(kernel.count for kernel in flex._KERNELS.values()) == _compiled()


@pytest.mark.slow
def test_what_is_used_up_is_refused_and_said() -> None:
    call = _problem(2, 300)
    with torch._dynamo.config.patch(recompile_limit=1):
        assert flex.refuses(call) == []
        flex.run(call)
        (reason,) = flex.refuses(call)
        assert "PyTorch compiled it 1 times for calls of this kind" in reason
        assert "torch._dynamo.config.recompile_limit is 1" in reason
        with pytest.raises(fv.Unsupported, match="recompile_limit is 1"):
            fv.attention(call.q, call.k, call.v, call.pattern, backend="flex")


def test_no_kernel_of_another_kind_is_begun_past_the_limit_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_KERNELS", {"another kind": SimpleNamespace(count=5)})
    call = _problem(2, 300)
    assert flex.refuses(call) == []
    with torch._dynamo.config.patch(accumulated_recompile_limit=5):
        (reason,) = flex.refuses(call)
    assert "PyTorch compiled it 5 times in this process" in reason


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_what_is_compiled_has_gradients_at_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no kernel for the backward pass: its graph is run as it is."""

    def compile_nothing(kernel: flex._Kernel, graph: Any, inputs: list[Any]) -> Any:
        kernel.count += 1
        return aot_eager(graph, inputs)

    monkeypatch.setattr(flex._Kernel, "_compile", compile_nothing)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # it would say no
    for length in (40, 130, 260, 300, 301):
        call = _problem(4, length)
        leaves = [x.requires_grad_() for x in (call.q, call.k, call.v)]
        given = torch.randn_like(call.q)
        found, wanted = (torch.autograd.grad(way.run(call).out, leaves, given) for way in (flex, chunked))
        torch.testing.assert_close(found, wanted)
    assert _compiled() <= MOST


def _problem(heads: int, length: int, dim: int = 16) -> Problem:
    q, k, v = (torch.randn(1, n, length, dim) for n in (heads, 1, 1))
    return problem(q, k, v, fv.causal & fv.window(50))


@pytest.mark.parametrize("dims", [(8, 8), (8, 64), (64, 8)], ids=str)
def test_narrow_heads_are_refused_on_cuda(dims: tuple[int, int]) -> None:
    with fake_cuda():
        for dim, value_dim in (dims, (16, 16)):
            shapes = [(1, 2, 300, dim)] * 2 + [(1, 2, 300, value_dim)]
            call = problem(*(torch.empty(shape, device=CUDA) for shape in shapes))
            said = [reason for reason in flex.refuses(call) if "head size" in reason]
            assert said == ([] if dim == 16 == value_dim else ["head size 8 has no kernel on cuda (takes 16 and more)"])


@pytest.mark.parametrize(
    ("heads", "queries", "general"), [(2, 100, True), (1, 100, True), (2, 1, False), (256, 1, True), (2, 300, True)]
)
def test_short_grouped_queries_do_not_take_the_kernel_that_they_crash(heads: int, queries: int, general: bool) -> None:
    with fake_cuda():
        q, k, v = (torch.empty(1, h, n, 64, device=CUDA) for h, n in ((heads, queries), (1, 400), (1, 400)))
        options = flex._options(problem(q, k, v))
    assert options in ([{"BACKEND": "TRITON"}, {"FORCE_USE_FLEX_ATTENTION": True}] if general else [None])
