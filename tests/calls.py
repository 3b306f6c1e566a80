"""Tensors and comparisons that tests share: different primes for every axis, float64, bounds in units of eps."""

from __future__ import annotations

import torch
from torch import Tensor

import foveate as fv
from foveate import Score
from foveate.dispatch.choose import dispatch
from foveate.problem import problem
from foveate.softmax import flex

BATCH, KEY_HEADS, GROUP, DIM, VALUE_DIM = 2, 3, 2, 5, 7
HEADS = KEY_HEADS * GROUP


def tensors(
    queries: int,
    keys: int,
    seed: int = 0,
    *,
    gradients: bool = False,
    dtype: torch.dtype = torch.float64,
    size: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v with grouped heads."""
    draw = torch.Generator().manual_seed(seed)
    shapes = (BATCH, HEADS, queries, DIM), (BATCH, KEY_HEADS, keys, DIM), (BATCH, KEY_HEADS, keys, VALUE_DIM)
    q, k, v = (
        (torch.randn(shape, dtype=torch.float64, generator=draw) * size).to(dtype).requires_grad_(gradients)
        for shape in shapes
    )
    return q, k, v


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_mask(queries: int, keys: int, share: float = 0.5, seed: int = 2) -> Tensor:
    shape = (BATCH, HEADS, queries, keys)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def scores(queries: int, keys: int) -> dict[str, Score | None]:
    """One score of every kind, and all of them together, for calls of this size."""
    every = {
        "alibi": fv.alibi(random(HEADS).abs()),
        "alibi by batch": fv.alibi(random(BATCH, HEADS).abs()),
        "relative_bias": fv.relative_bias(random(7, HEADS)),
        "t5": fv.relative_bias(random(12, HEADS), 17),
        "t5 decoder": fv.relative_bias(random(11, HEADS), 13, bidirectional=False),
        "bias": fv.bias(random(1, HEADS, queries, keys)),
        "softcap": fv.softcap(2.0),
        "sinks": fv.sinks(random(HEADS)),
    }
    together = every["alibi"] + every["t5"] + every["bias"] + every["softcap"] + every["sinks"]
    return {"none": None, **every, "together": together}


def near(found: Tensor, true: Tensor, times: int = 64) -> None:
    """Assert that two float64 results differ by rounding alone, and are infinite in the same places."""
    assert found.shape == true.shape
    assert torch.equal(found.isinf(), true.isinf())
    found, true = found.masked_fill(found.isinf(), 0).double(), true.masked_fill(true.isinf(), 0).double()
    if true.numel():
        bound = times * 2.0**-52 * max(1.0, true.abs().max().item())
        error = (found - true).abs().max().item()
        assert error <= bound, f"off by {error:.3g}, allowed {bound:.3g}"


def gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of one fixed random sum of the outputs; rows whose log-sum-exp is −inf take no part."""
    total = sum(
        (out.masked_fill(out.isinf(), 0) * random(*out.shape, seed=5 + n)).sum() for n, out in enumerate(outputs)
    )
    return torch.autograd.grad(total, inputs, allow_unused=True)  # type: ignore[return-value]


def attend(backend: str, *arguments: object, **options: object) -> tuple[Tensor, Tensor | None]:
    """(out, log-sum-exp if there is one) of one implementation by name; flex runs uncompiled, to test what it means."""
    call = problem(*arguments, **options)  # type: ignore[arg-type]
    if backend == "flex":
        assert not flex.refuses(call, compiled=False)
        result = flex.run(call, compiled=False)
    else:
        result = dispatch(call, backend)
    return result.out, result.lse
