"""One graph, whole, at every length: torch.compile(fullgraph=True) and fake tensors."""

from collections.abc import Callable, Iterator

import jaxtyping
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import foveate as fv

IDS = torch.arange(64) // 9
NOT_NEAR = ~fv.window(2)  # torch's tracer has no `~` of objects: a complement is made outside the graph


@pytest.fixture(autouse=True)
def _no_shape_checks() -> Iterator[None]:
    """The tracer cannot follow the run-time checks of shapes, which only tests switch on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def _patterns() -> dict[str, Callable[[], fv.Pattern | None]]:
    return {
        "everything": lambda: None,
        "causal": lambda: fv.causal,
        "window": lambda: fv.causal & fv.window(4),
        "documents": lambda: fv.documents(IDS) & NOT_NEAR,
        "bigbird": lambda: fv.bigbird(4, random=1),
    }


@pytest.mark.parametrize("pattern", _patterns())
def test_a_compiled_call_equals_an_eager_one_at_every_length(pattern: str) -> None:
    make = _patterns()[pattern]

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return fv.attention_with_lse(q, k, v, make(), score=fv.softcap(3.0) + fv.bias(bias) + fv.sinks(sinks))

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for queries, keys in ((5, 7), (11, 13), (17, 29)):
        shapes = ((2, 4, queries, 6), (2, 2, keys, 6), (2, 2, keys, 3), (1, 4, 1, keys), (4,))
        leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
        found, true = compiled(*leaves), call(*leaves)
        gradients = [torch.autograd.grad(out.sin().sum() + lse.sin().sum(), leaves) for out, lse in (found, true)]
        for mine, theirs in zip((*found, *gradients[0]), (*true, *gradients[1]), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_sdpa_is_chosen_inside_a_graph_too() -> None:
    compiled = torch.compile(lambda q: fv.attention(q, q, q, fv.causal), fullgraph=True, backend="aot_eager")
    q = torch.randn(1, 2, 9, 4)
    torch.testing.assert_close(compiled(q), fv.attention(q, q, q, fv.causal))


def test_the_compiled_kernels_are_chosen_inside_a_graph_too() -> None:
    def call(q: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return fv.attention_with_lse(q, q, q, fv.documents(ids) & fv.causal, score=fv.sinks(torch.zeros(2)))

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for length in (9, 70):
            q, ids = torch.randn(1, 2, length, 4), torch.arange(length) // 5
            for found, true in zip(compiled(q, ids), call(q, ids), strict=True):
                assert torch.equal(found, true)


@pytest.mark.parametrize("pattern", [None, fv.causal, fv.causal & fv.window(3)], ids=repr)
def test_new_lengths_need_no_new_graph(pattern: fv.Pattern | None) -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda q: fv.attention(q, q, q, pattern), fullgraph=True, backend=counter)
    with torch.no_grad():
        for length in range(20, 35):
            q = torch.randn(1, 2, length, 4)
            torch.testing.assert_close(compiled(q), fv.attention(q, q, q, pattern))
    assert counter.frame_count <= 2  # one for the first length, one for all


def test_a_rule_inside_a_graph_is_a_clear_error() -> None:
    rule = fv.rule(lambda batch, head, query, key: query >= key)
    compiled = torch.compile(lambda q: fv.attention(q, q, q, rule, backend="chunked"), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="cannot enter a compiled graph"):
        compiled(torch.randn(1, 2, 9, 4))


def test_the_operators_keep_their_contract() -> None:
    q, k, v = (torch.randn(1, h, n, 4, requires_grad=True) for h, n in ((4, 5), (2, 7), (2, 7)))
    sinks = torch.randn(4, requires_grad=True)
    arguments = (q, k, v, [], [sinks], None, None, 2, "causal & window(3)", "sinks(t[0])", 0.5, 0.0, 0, "")
    import foveate.softmax.chunked  # noqa: F401 — registers them

    torch.library.opcheck(torch.ops.foveate.chunked_forward.default, arguments)
    other = (q, k, v, [], [], None, torch.tensor(5), 2, "causal & window(3)", "", 0.5, 0.25, 0, "entmax(1.5)")
    torch.library.opcheck(torch.ops.foveate.chunked_forward.default, other)


def test_a_whole_compiled_block_runs() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
            return fv.attention(q, k, v, fv.causal & fv.window(3)).transpose(1, 2).flatten(2)

    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (6, 10):
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(compiled(x), block(x))


TRACED = {
    "causal": lambda: fv.causal,
    "window": lambda: fv.causal & fv.window(9),
    "prefix": lambda: fv.prefix(6) | fv.causal,
    "chunks": lambda: fv.causal & fv.chunks(8),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", ["auto", "native", "chunked", "reference"])
@pytest.mark.parametrize("what", ["everything", *TRACED, "alibi", "bias of distance", "softcap", "sinks"])
def test_a_trace_of_one_length_serves_every_other(what: str, backend: str) -> None:
    """In a trace sizes are tensors, and what is made of them follows the lengths of later calls."""
    scores = {
        "alibi": fv.alibi(torch.rand(4)),
        "bias of distance": fv.relative_bias(torch.randn(7, 4)),
        "softcap": fv.softcap(3.0),
        "sinks": fv.sinks(torch.randn(4)),
    }
    pattern = None if what == "everything" else TRACED.get(what, lambda: fv.causal)()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fv.attention(q, k, v, pattern, score=scores.get(what), backend=backend)

    def draw(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(2, 4, queries, 16), torch.randn(2, 2, keys, 16), torch.randn(2, 2, keys, 16)

    traced = torch.jit.trace(call, draw(7, 20), check_trace=False)
    for sizes in ((7, 20), (20, 7), (1, 31), (70, 70), (5, 200)):
        given = draw(*sizes)
        torch.testing.assert_close(traced(*given), call(*given))
