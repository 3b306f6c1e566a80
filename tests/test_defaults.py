"""PyTorch's default device and dtype are for new tensors of a user: what is computed stays where q, k and v are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from kernels import normal
from torch import Tensor

import foveate as fv
from foveate import inspection
from foveate.problem import problem

Q, K, SLOPES = normal(1, 4, 70, 16), normal(1, 2, 70, 16, seed=1), torch.tensor([0.5, 0.25, 0.1, 0.01])
DECAY, VECTOR, DOCUMENTS = -normal(1, 2, 70).abs(), normal(16), torch.arange(70)[None] // 9
FEW = normal(1, 4, 1, 16)


def _attention(backend: str, pattern: fv.Pattern | None, score: fv.Score | None) -> list[Tensor]:
    q = Q.clone().requires_grad_()
    out = fv.attention(q, K, K, pattern, score=score, backend=backend)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), q)]


def _accelerated() -> list[Tensor]:
    with fv.accelerate():
        return [torch.nn.functional.scaled_dot_product_attention(Q, Q, Q, is_causal=True)]


WORKS: dict[str, Callable[[], list[Tensor]]] = {
    **{
        f"{name}, reach": lambda name=name: _attention(name, fv.causal & fv.window(5), None)
        for name in ("native", "chunked")
    },
    **{
        f"{name}, tiles": lambda name=name: _attention(
            name, fv.streaming(2, 9) | fv.documents(DOCUMENTS), fv.alibi(SLOPES)
        )
        for name in ("native", "chunked", "reference")
    },
    "native, twice": lambda: [fv.attention(Q, K, K, backend="native") for _ in range(2)],
    "few keys": lambda: [fv.attention(FEW, K[:, :, :7], K[:, :, :7], backend="sdpa")],
    "decoding": lambda: [fv.attention(FEW, K, K, fv.causal, backend="native")],
    "chosen keys": lambda: _attention("native", fv.selection.topk(Q, K, fv.causal, top_k=3), None),
    "linear": lambda: list(fv.linear_attention(Q, K, K, decay=DECAY))[:1],
    "additive": lambda: [fv.additive_attention(Q, K, K, VECTOR)],
    "weights": lambda: [fv.weights(Q, K, K, fv.causal)],
    "accelerate": _accelerated,
}  # fmt: skip


@contextmanager
def _wide() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", WORKS)
def test_defaults_change_nothing(name: str) -> None:
    wanted = WORKS[name]()
    for default in (torch.device("meta"), _wide()):
        with default:
            found = WORKS[name]()
        for mine, true in zip(found, wanted, strict=True):
            assert (mine.device, mine.dtype) == (true.device, true.dtype)
            torch.testing.assert_close(mine, true)


def test_what_was_looked_at_does_not_depend_on_them() -> None:
    def looked() -> list[Tensor]:
        seen = inspection.looked(problem(Q, K, K, fv.causal & fv.window(2)), 3)
        return [seen.indices, seen.weights, seen.received, seen.watchers, seen.lse]

    wanted = looked()
    for default in (torch.device("meta"), _wide()):
        with default:
            found = looked()
        assert all(map(torch.equal, found, wanted))
