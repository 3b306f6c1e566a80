"""The operators of the compiled kernels inside torch: graphs, export, autocast, checkpoints, modes, transforms."""

from collections.abc import Callable, Iterator

import jaxtyping
import pytest
import torch
from kernels import normal
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import foveate as fv
from foveate.errors import FoveateError
from foveate.problem import problem
from foveate.softmax import native


@pytest.fixture(autouse=True)
def _no_shape_checks() -> Iterator[None]:
    """The tracer cannot follow the run-time checks of shapes, which only tests switch on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def attend(*tensors: Tensor, **more: object) -> Tensor:
    return fv.attention(*tensors, backend="native", **more)  # type: ignore[arg-type]


KINDS: dict[str, Callable[[], tuple[fv.Pattern | None, fv.Score | None, object]]] = {
    "everything": lambda: (None, None, None),
    "reach": lambda: (fv.causal & fv.window(5), None, None),
    "lengths": lambda: (fv.causal & fv.padding(torch.tensor([11, 4])), None, None),
    "starts": lambda: (fv.causal, None, torch.tensor([3, -1])),
    "string": lambda: (fv.causal & fv.documents(torch.arange(17) // 5), None, None),
    "summary": lambda: (fv.rule(lambda batch, head, query, key: (query + key) % 2 == 0), None, None),
    "scores": lambda: (fv.causal, _score(True), None),
    "frozen scores": lambda: (fv.from_mask(torch.rand(7, 11) > 0.5), _score(False), torch.tensor([4, 2])),
}


def _score(wanted: bool) -> fv.Score:
    made = (normal(1, 4, 1, 11), normal(4), normal(9, 4), normal(4).abs())
    bias, sinks, table, slopes = (x.requires_grad_(wanted) for x in made)
    return fv.bias(bias) + fv.sinks(sinks) + fv.relative_bias(table) + fv.alibi(slopes) + fv.softcap(3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_operators_keep_their_contract(kind: str, dtype: torch.dtype) -> None:
    pattern, score, start = KINDS[kind]()
    q, k, v = (normal(2, h, n, d, dtype=dtype).requires_grad_() for h, n, d in ((4, 7, 5), (2, 11, 5), (2, 11, 3)))
    call = problem(q, k, v, pattern, score=score, query_start=start, dropout=0.2, seed=3)  # type: ignore[arg-type]
    given = native._arguments(call, "", 0)
    torch.library.opcheck(torch.ops.foveate.native_forward.default, (q, k, v, *given))
    with torch.no_grad():
        out, lse, residue = native._forward_op(q, k, v, *given)
    wanted = [x.requires_grad for x in given.tensors]
    clean = [x.detach() for x in (q, k, v)]
    held, tensors, *rest = given
    torch.library.opcheck(
        torch.ops.foveate.native_backward.default,
        (normal(*out.shape, dtype=dtype), normal(*lse.shape), out, lse, residue, wanted, *clean, held,
         [x.detach() for x in tensors], *rest),
    )  # fmt: skip


GRAPHS: dict[str, Callable[[], fv.Pattern | None]] = {
    "everything": lambda: None,
    "reach": lambda: fv.causal & fv.window(5),
    "documents": lambda: fv.causal & fv.documents(torch.arange(64) // 9),
}


@pytest.mark.parametrize("pattern", GRAPHS)
def test_one_graph_at_every_length_with_gradients(pattern: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        score = fv.softcap(3.0) + fv.bias(bias) + fv.sinks(sinks)
        return fv.attention_with_lse(q, k, v, GRAPHS[pattern](), score=score, backend="native")

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for queries, keys in ((5, 7), (11, 13), (17, 29)):
        shapes = ((2, 4, queries, 6), (2, 2, keys, 6), (2, 2, keys, 3), (1, 4, 1, keys), (4,))
        leaves = [normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
        results = compiled(*leaves), call(*leaves)
        found, true = ((*x, *torch.autograd.grad(x[0].sin().sum() + x[1].sin().sum(), leaves)) for x in results)
        for mine, theirs in zip(found, true, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_it_can_be_exported() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return attend(q, k, k, fv.causal & fv.window(4))

    q, k = normal(1, 4, 7, 8), normal(1, 2, 11, 8, seed=1)
    exported = torch.export.export(Attend(), (q, k))
    assert "native_forward" in str(exported.graph)
    assert torch.equal(exported.module()(q, k), Attend()(q, k))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("trains", [False, True])
def test_a_trace_sees_the_operators(trains: bool) -> None:
    def call(q: Tensor, k: Tensor) -> Tensor:
        out, _ = fv.linear_attention(k, k, fv.attention(q, k, k, fv.causal, backend="native"), backend="native")
        return out

    first, other = ([normal(1, 2, 200, 8, seed=seed + n).requires_grad_(trains) for n in (0, 1)] for seed in (0, 2))
    traced = torch.jit.trace(call, first, check_trace=False)
    assert {"foveate::native_forward", "foveate::linear_forward"} <= {node.kind() for node in traced.graph.nodes()}
    torch.testing.assert_close(traced(*other), call(*other))


def test_autocast_casts_q_k_v_and_nothing_else() -> None:
    q, k = normal(1, 4, 7, 8).requires_grad_(), normal(1, 2, 11, 8, seed=1).requires_grad_()
    bias = normal(1, 4, 7, 11).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, k, score=fv.bias(bias))
    true = attend(q.bfloat16(), k.bfloat16(), k.bfloat16(), score=fv.bias(bias))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, true)
    grads = [torch.autograd.grad(x.float().square().sum(), (q, k, bias)) for x in (out, true)]
    for mine, theirs in zip(*grads, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)


def test_modes_without_gradients_give_the_same_bits() -> None:
    for queries in (1, 70):
        q, k = normal(1, 4, queries, 8).requires_grad_(), normal(1, 2, 300, 8, seed=1)
        true = attend(q, k, k, fv.causal)
        assert true.requires_grad
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = attend(q, k, k, fv.causal)
            assert torch.equal(found, true)
            assert not found.requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_computes_again_and_alike(reentrant: bool) -> None:
    leaves = [normal(1, 4, 70, 8, seed=seed).requires_grad_() for seed in range(3)]

    def layer(*tensors: Tensor) -> Tensor:
        return attend(*tensors, fv.causal, dropout=0.3, seed=5)

    found = checkpoint(layer, *leaves, use_reentrant=reentrant)
    found.square().sum().backward()
    grads = [leaf.grad for leaf in leaves]
    true = torch.autograd.grad(layer(*leaves).square().sum(), leaves)
    assert all(torch.equal(*pair) for pair in zip(grads, true, strict=True))  # type: ignore[arg-type]


def test_a_second_derivative_is_refused_in_one_sentence() -> None:
    q = normal(1, 2, 5, 8).requires_grad_()
    (first,) = torch.autograd.grad(attend(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(FoveateError, match='native: has no second derivative: use backend="reference", which has'):
        torch.autograd.grad(first.sum(), q)


def test_transforms_are_refused() -> None:
    q = normal(3, 1, 2, 5, 8)
    for transformed in (
        lambda: torch.func.vmap(lambda x: attend(x, x, x))(q),
        lambda: torch.func.grad(lambda x: attend(x, x, x).sum())(q[0]),
        lambda: torch.func.jvp(lambda x: attend(x, x, x), (q[0],), (q[0],)),
    ):
        with pytest.raises(FoveateError, match="has no vmap and no forward derivative"):
            transformed()
