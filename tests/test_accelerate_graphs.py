"""Derivatives, transforms, traces and compiled graphs are under `accelerate()` what they are without it."""

from __future__ import annotations

import warnings

import pytest
import torch
from sdpa_calls import CALLS, SDPA, hidden, made, prefer, qkv
from torch import Tensor, nn

import foveate as fv

pytestmark = pytest.mark.usefixtures("_nothing_stays")


def test_a_gradient_may_cross_the_end_of_an_acceleration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward on our kernel, backward on PyTorch's, and the other way round: what is saved means the same to both."""
    prefer(monkeypatch, ours=True)
    for name in ("causal", "bool, every dimension", "float, every dimension", "grouped mask"):
        arguments, options = CALLS[name]()
        found = []
        for ours in ("neither", "forward", "backward"):
            leaves = [x.detach().requires_grad_() for x in arguments[:3]]
            if ours == "forward":
                with fv.accelerate():
                    out = SDPA(*leaves, *arguments[3:], **options)  # type: ignore[arg-type]
            else:
                out = SDPA(*leaves, *arguments[3:], **options)  # type: ignore[arg-type]
            if ours == "backward":
                with fv.accelerate():
                    out.square().sum().backward()
            else:
                out.square().sum().backward()
            found.append([x.grad for x in leaves])
        for mixed in found[1:]:
            for mine, theirs in zip(mixed, found[0], strict=True):
                assert mine is not None
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_second_derivative_is_what_it_was() -> None:
    """PyTorch's fused kernel has none and says so; its formula, which shapes of its own lead to, has one."""
    for arguments in (qkv(), tuple(x[0] for x in qkv())):
        said = []
        for on in (False, True):
            q, k, v = (x.clone().requires_grad_() for x in arguments)
            with fv.accelerate() if on else warnings.catch_warnings():
                (dq,) = torch.autograd.grad(SDPA(q, k, v).square().sum(), q, create_graph=True)
                try:
                    said.append(torch.autograd.grad(dq.square().sum(), k)[0])
                except RuntimeError as error:
                    said.append(str(error))
        assert type(said[0]) is type(said[1])
        assert torch.equal(said[0], said[1]) if isinstance(said[0], Tensor) else said[0] == said[1]


@pytest.mark.usefixtures("_ours")
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_transforms_of_torch_func_are_what_they_were() -> None:
    x = made(3, 2, 5, 8, seed=1)

    def total(x: Tensor) -> Tensor:
        return SDPA(x, x, x, is_causal=True).square().sum()

    def short(x: Tensor) -> Tensor:  # three dimensions: PyTorch's formula, which has forward derivatives
        return SDPA(x, x, x)

    def everything() -> list[Tensor]:
        return [
            torch.func.grad(total)(x[None]),
            torch.func.vmap(short)(x[None]),
            torch.func.vmap(torch.func.grad(lambda x: short(x).square().sum()))(x[None]),
            torch.func.jvp(short, (x[0],), (x[0],))[1],
            torch.func.hessian(lambda x: short(x).square().sum())(x[0, :, :3]),
            dual(),
        ]

    def dual() -> Tensor:
        forward = torch.autograd.forward_ad
        with forward.dual_level(), torch.no_grad():
            tangent = forward.unpack_dual(short(forward.make_dual(x[0], x[0]))).tangent
        assert tangent is not None
        return tangent

    before = everything()
    with fv.accelerate():
        during = everything()
    for one, other in zip(before, during, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("_ours")
def test_compiled_graphs(backend: str) -> None:
    """Compiled before or during, run during or after: the graph holds PyTorch's operator, and dispatch decides."""
    q, k, v = qkv()
    mask = hidden(2, 1, 67, 131)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        once = SDPA(q, k, v, is_causal=True)
        return SDPA(once * 2, k, v, mask).transpose(1, 2).reshape(2, 67, -1)

    torch.compiler.reset()
    leaf = q.clone().requires_grad_()
    want = block(leaf, k, v)
    (slope,) = torch.autograd.grad(want.square().sum(), leaf)
    before = torch.compile(block, fullgraph=True, backend=backend)
    before(leaf, k, v)
    with fv.accelerate() as acceleration:
        during = torch.compile(lambda *x: block(*x), fullgraph=True, backend=backend)
        for graph in (before, during):
            leaf = q.clone().requires_grad_()
            found = graph(leaf, k, v)
            torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
            found.square().sum().backward()
            torch.testing.assert_close(leaf.grad, slope, atol=1e-4, rtol=1e-4)
            with torch.inference_mode():
                torch.testing.assert_close(graph(q, k, v), want, atol=1e-5, rtol=1e-5)
    counts = acceleration.report().foveate
    assert counts == {("forward", ""): 8, ("backward", ""): 4}
    for graph in (before, during):
        torch.testing.assert_close(graph(q, k, v), want, atol=1e-5, rtol=1e-5)
    assert acceleration.report().foveate == counts
    torch.compiler.reset()


@pytest.mark.usefixtures("_ours")
def test_one_graph_for_every_length() -> None:
    torch.compiler.reset()
    graph = torch.compile(_Calls(), fullgraph=True, dynamic=True, backend="aot_eager")
    with fv.accelerate() as acceleration:
        for queries in (67, 71, 131):
            q, k, v = (x.requires_grad_() for x in qkv(queries=queries))
            torch.testing.assert_close(graph(q, k, v), _Calls()(q, k, v), atol=1e-5, rtol=1e-5)
    assert acceleration.report().foveate == {("forward", ""): 6}
    torch.compiler.reset()


@pytest.mark.usefixtures("_ours")
def test_traces_and_modes_see_the_call_that_they_saw() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Heard(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    q, k, v = qkv()
    heard = []
    graphs = []
    for on in (False, True):
        with fv.accelerate() if on else warnings.catch_warnings():
            with Heard() as mode, torch.no_grad():
                SDPA(q, k, v, hidden(67, 131))
            heard.append(mode.names)
            graphs.append(str(torch.export.export(_Calls(), (q, k, v)).graph))
            graphs[-1] += str(torch.jit.trace(_Calls(), (q, k, v)).graph.findNode("aten::scaled_dot_product_attention"))
    assert heard[0] == heard[1]
    assert graphs[0] == graphs[1]


class _Calls(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SDPA(q, k, v, is_causal=True)
