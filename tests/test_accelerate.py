"""`accelerate()`: PyTorch's own calls on our kernels, with PyTorch's meaning, and everything as it was afterwards."""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import foveate as fv
from foveate.integrations import aten
from foveate.integrations.torch import _STATE

SDPA = F.scaled_dot_product_attention
INF = float("inf")


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    assert not _STATE.active
    yield
    assert not _STATE.active
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.fixture
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever our kernels can compute they do, be it slower."""
    monkeypatch.setattr(aten, "slower", lambda *_, **__: False)
    monkeypatch.setattr(aten, "slower_backward", lambda *_: False)


def made(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(
    batch: int = 2, heads: int = 6, queries: int = 67, keys: int = 131, dim: int = 16, *, key_heads: int | None = None,
    value_dim: int | None = None, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    key_heads, value_dim = key_heads or heads, value_dim or dim
    return (
        made(batch, heads, queries, dim, seed=1, dtype=dtype),
        made(batch, key_heads, keys, dim, seed=2, dtype=dtype),
        made(batch, key_heads, keys, value_dim, seed=3, dtype=dtype),
    )


def hidden(*shape: int, seed: int = 4) -> Tensor:
    """A boolean mask with a row that sees nothing, where it has rows."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    if shape[-2] > 1:
        mask[..., 3, :] = False
    return mask


def padded(batch: int, keys: int) -> Tensor:
    lengths = torch.arange(1, batch + 1) * keys // (batch + 1)
    return (torch.arange(keys) < lengths[:, None])[:, None, None]


def biased(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return made(*mask.shape, seed=5).masked_fill(~mask, -INF).to(dtype)


def only_hides(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, -INF)


def strided(x: Tensor) -> Tensor:
    """The same numbers, read by steps of two, in another order of dimensions."""
    wide = torch.zeros(x.shape[2], x.shape[0], x.shape[1], 2 * x.shape[3])
    wide = wide.permute(1, 2, 0, 3)[..., ::2]
    return wide.copy_(x)


def fused_layout(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


Call = tuple[tuple[Tensor, ...], dict[str, object]]

CALLS: dict[str, Callable[[], Call]] = {
    "everything": lambda: (qkv(), {}),
    "scale": lambda: (qkv(), {"scale": -0.7}),
    "scale 0": lambda: (qkv(), {"scale": 0.0}),
    "causal": lambda: (qkv(queries=131), {"is_causal": True}),
    "causal, more keys": lambda: (qkv(), {"is_causal": True}),
    "causal, more queries": lambda: (qkv(queries=197, keys=101), {"is_causal": True}),
    "causal, one query": lambda: (qkv(queries=1), {"is_causal": True}),
    "one query": lambda: (qkv(queries=1), {}),
    "one key": lambda: (qkv(keys=1), {}),
    "grouped": lambda: (qkv(key_heads=2), {"enable_gqa": True}),
    "grouped causal": lambda: (qkv(key_heads=3, queries=131), {"enable_gqa": True, "is_causal": True}),
    "grouped mask": lambda: ((*qkv(key_heads=2), hidden(2, 6, 67, 131)), {"enable_gqa": True}),
    "bool, every dimension": lambda: ((*qkv(), hidden(2, 6, 67, 131)), {}),
    "bool, two dimensions": lambda: ((*qkv(), hidden(67, 131)), {}),
    "bool, three dimensions": lambda: ((*qkv(), hidden(6, 67, 131)), {}),
    "bool, of heads": lambda: ((*qkv(), hidden(1, 6, 67, 131)), {}),
    "bool, padding": lambda: ((*qkv(), padded(2, 131)), {}),
    "bool, padding, expanded": lambda: ((*qkv(), padded(2, 131).expand(2, 6, 67, 131)), {}),
    "bool, of rows": lambda: ((*qkv(), hidden(2, 1, 67, 1)), {}),
    "bool, one for all": lambda: ((*qkv(), torch.ones(1, 1, dtype=torch.bool)), {}),
    "bool, transposed": lambda: ((*qkv(), hidden(131, 67).mT), {}),
    "bool, tiles of 64": lambda: ((*qkv(queries=128, keys=192), hidden(2, 1, 128, 192).tril(3)), {}),
    "bool, few pairs": lambda: ((*qkv(queries=7, keys=11), hidden(2, 6, 7, 11)), {}),
    "float, every dimension": lambda: ((*qkv(), biased(hidden(2, 6, 67, 131))), {}),
    "float, two dimensions": lambda: ((*qkv(), biased(hidden(67, 131))), {}),
    "float, padding": lambda: ((*qkv(), biased(padded(2, 131))), {}),
    "float, expanded": lambda: ((*qkv(), biased(hidden(2, 1, 67, 131)).expand(2, 6, 67, 131)), {}),
    "float, transposed": lambda: ((*qkv(), biased(hidden(131, 67)).mT), {}),
    "float, only hides": lambda: ((*qkv(), only_hides(hidden(2, 1, 67, 131))), {}),
    "float, only hides, from row 0 on": lambda: ((*qkv(), nn.Transformer.generate_square_subsequent_mask(131)[:67]), {}),
    "float, hides, and a bias in the last row": lambda: (
        (*qkv(), only_hides(hidden(67, 131)).index_fill(0, torch.tensor([66]), 0.5)), {}
    ),
    "float, the least number": lambda: (
        (*qkv(), only_hides(hidden(2, 1, 67, 131)).clamp(min=torch.finfo(torch.float32).min)), {}
    ),
    "another value dim": lambda: (qkv(value_dim=23), {}),
    "another value dim, causal": lambda: (qkv(value_dim=5), {"is_causal": True}),
    "three dimensions": lambda: (tuple(x[0] for x in qkv()), {}),
    "three dimensions and a mask": lambda: ((*(x[0] for x in qkv()), hidden(6, 67, 131)), {}),
    "three dimensions, grouped": lambda: (tuple(x[0] for x in qkv(key_heads=2)), {"enable_gqa": True}),
    "two dimensions": lambda: (tuple(x[0, 0] for x in qkv()), {"is_causal": True}),
    "five dimensions": lambda: (tuple(x.unflatten(0, (3, 2)) for x in qkv(batch=6)), {"is_causal": True}),
    "five dimensions and a mask": lambda: (
        (*(x.unflatten(0, (3, 2)) for x in qkv(batch=6)), hidden(6, 67, 131)), {}
    ),
    "five dimensions and a mask of four": lambda: (
        (*(x.unflatten(0, (3, 2)) for x in qkv(batch=6)), hidden(2, 6, 67, 131)), {}
    ),
    "a batch that is broadcast": lambda: ((qkv()[0], *(x[:1] for x in qkv()[1:])), {}),
    "[batch, length, heads, dim]": lambda: (tuple(map(fused_layout, qkv())), {"is_causal": True}),
    "one tensor for three": lambda: (
        made(2, 67, 3, 6, 16, seed=1).permute(2, 0, 3, 1, 4).unbind(0), {"is_causal": True}
    ),
    "steps of two": lambda: (tuple(map(strided, qkv())), {}),
    "keys transposed": lambda: ((qkv()[0], qkv()[1].mT.contiguous().mT, qkv()[2]), {}),
    "expanded": lambda: ((qkv()[0], *(x[:, :1].expand(-1, 6, -1, -1) for x in qkv()[1:])), {}),
    "no batch": lambda: (qkv(batch=0), {}),
    "no query": lambda: (qkv(queries=0), {}),
    "no key": lambda: (qkv(keys=0), {}),
    "no dim": lambda: (tuple(x[..., :0] for x in qkv()), {}),
    "dim 1": lambda: (qkv(dim=1), {"is_causal": True}),
}  # fmt: skip

LEFT_TO_PYTORCH = {  # what our kernels never take
    "five dimensions and a mask of four", "a batch that is broadcast", "no batch", "no query", "no key", "no dim"
}  # fmt: skip


def truth(arguments: tuple[Tensor, ...], options: dict[str, object]) -> Tensor:
    """The formula of PyTorch in float64, on the same numbers."""
    wide = [x.double() if x.is_floating_point() else x for x in arguments]
    with sdpa_kernel(SDPBackend.MATH):
        return SDPA(*wide, **options)  # type: ignore[arg-type]


def assert_as_exact(found: Tensor, theirs: Tensor, exact: Tensor, times: int = 2) -> None:
    """Of the error allowed: a multiple of PyTorch's own and of the rounding of the result."""
    assert found.shape == theirs.shape
    assert found.dtype == theirs.dtype
    if not found.numel():
        return
    most = max(1.0, exact.abs().max().item())
    allowed = times * ((theirs.double() - exact).abs().max().item() + torch.finfo(found.dtype).eps * most)
    off = (found.double() - exact).abs().max().item()
    assert off <= allowed, f"off by {off:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("_ours")
def test_every_call_before_during_and_after(name: str) -> None:
    arguments, options = CALLS[name]()
    before = SDPA(*arguments, **options)  # type: ignore[arg-type]
    with fv.accelerate() as acceleration:
        during = SDPA(*arguments, **options)  # type: ignore[arg-type]
        with torch.inference_mode():
            assert torch.equal(during, SDPA(*arguments, **options))  # type: ignore[arg-type]
    after = SDPA(*arguments, **options)  # type: ignore[arg-type]
    assert torch.equal(before, after)
    assert during.stride() == before.stride()
    assert_as_exact(during, before, truth(arguments, options))
    report = acceleration.report()
    assert sum((report.pytorch if name in LEFT_TO_PYTORCH else report.foveate).values()) == 2
    assert not (report.foveate if name in LEFT_TO_PYTORCH else report.pytorch)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("_ours")
def test_gradients_of_every_call(name: str) -> None:
    def gradients(*, double: bool = False) -> tuple[Tensor, ...]:
        arguments, options = CALLS[name]()
        wide = [x.double() if double and x.is_floating_point() else x for x in arguments]
        leaves = [x.detach().requires_grad_() for x in wide[:3]]
        out = SDPA(*leaves, *wide[3:], **options)  # type: ignore[arg-type]
        found = torch.autograd.grad((out * made(*out.shape, seed=9)).sum(), leaves)
        return out.detach(), *found

    before = gradients()
    with fv.accelerate() as acceleration:
        during = gradients()
    with sdpa_kernel(SDPBackend.MATH):
        exact = gradients(double=True)
    for found, theirs, true in zip(during, before, exact, strict=True):
        assert found.stride() == theirs.stride()
        assert_as_exact(found, theirs, true, times=3)
    report = acceleration.report()
    ours = {"forward", "backward"} if report.foveate else set()
    assert {direction for direction, _ in report.foveate} == ours
    assert bool(ours) == (not report.pytorch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["everything", "causal", "grouped mask", "float, every dimension", "bool, padding"])
@pytest.mark.usefixtures("_ours")
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    arguments, options = CALLS[name]()
    for mask in ([], [arguments[3].float()] if len(arguments) > 3 and arguments[3].is_floating_point() else []):
        cast = [x.to(dtype) if x.is_floating_point() else x for x in (*arguments[:3], *(mask or arguments[3:]))]
        if dtype == torch.float64 and mask:
            continue  # a float32 mask beside float64 is the next test's
        before = SDPA(*cast, **options)  # type: ignore[arg-type]
        with fv.accelerate() as acceleration:
            during = SDPA(*cast, **options)  # type: ignore[arg-type]
        assert_as_exact(during, before, truth(tuple(cast), options))
        if dtype == torch.float64:
            assert acceleration.report().pytorch == {("forward", "dtype float64"): 1}
        else:
            assert acceleration.report().foveate == {("forward", ""): 1}


@pytest.mark.usefixtures("_ours")
def test_a_causal_mask_is_aligned_top_left() -> None:
    """With values that are unit vectors the result is the weights: who was seen, as a set."""
    for queries, keys in ((3, 5), (5, 3), (67, 131), (131, 67)):
        q, k = made(1, 2, queries, 7, seed=1), made(1, 2, keys, 7, seed=2)
        with fv.accelerate():
            seen = SDPA(q, k, torch.eye(keys).expand(1, 2, keys, keys), is_causal=True) > 0
        assert torch.equal(seen, torch.ones(queries, keys, dtype=torch.bool).tril().expand_as(seen))


WRONG: dict[str, Callable[[], Call]] = {
    "a mask and causal": lambda: ((*qkv(), hidden(67, 131)), {"is_causal": True}),
    "a mask of integers": lambda: ((*qkv(), torch.ones(67, 131, dtype=torch.int64)), {}),
    "a float64 mask": lambda: ((*qkv(), torch.ones(67, 131, dtype=torch.float64)), {}),
    "a mask that does not fit": lambda: ((*qkv(), hidden(66, 131)), {}),
    "a mask of one dimension": lambda: ((*qkv(), hidden(1, 131)[0]), {}),
    "other dims": lambda: ((qkv()[0][..., :15], *qkv()[1:]), {}),
    "fewer values than keys": lambda: ((*qkv()[:2], qkv()[2][:, :, :130]), {}),
    "more values than keys": lambda: ((*qkv()[:2], qkv(keys=132)[2]), {}),
    "heads that are no multiple": lambda: (qkv(key_heads=4), {"enable_gqa": True}),
    "heads that are not said to be grouped": lambda: (qkv(key_heads=2), {}),
    "other dtypes": lambda: ((qkv()[0].half(), *qkv()[1:]), {}),
    "one dimension": lambda: (tuple(x[0, 0, 0] for x in qkv()), {}),
    "other ranks": lambda: ((qkv()[0], qkv()[1][0], qkv()[2][0, 0]), {}),
    "other devices": lambda: ((qkv()[0], *(x.to("meta") for x in qkv()[1:])), {}),
    "dropout below 0": lambda: (qkv(), {"dropout_p": -0.5}),
    "dropout above 1": lambda: (qkv(), {"dropout_p": 1.5}),
    "no tensor": lambda: ((qkv()[0], None, qkv()[2]), {}),  # type: ignore[dict-item]
    "a complex number": lambda: (tuple(x.to(torch.complex64) for x in qkv()), {}),
}


def outcome(arguments: tuple[Tensor, ...], options: dict[str, object]) -> tuple[object, ...]:
    try:
        return (SDPA(*arguments, **options),)  # type: ignore[arg-type]
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.usefixtures("_ours")
def test_a_wrong_call_says_what_pytorch_says(name: str) -> None:
    torch.manual_seed(0)
    before = outcome(*WRONG[name]())
    with fv.accelerate():
        torch.manual_seed(0)
        during = outcome(*WRONG[name]())
    if isinstance(before[0], Tensor):  # PyTorch lets it pass
        assert (
            torch.equal(
                before[0],
                during[0],
            )
            or name == "more values than keys"
        )  # type: ignore[arg-type]
    else:
        assert during == before


def test_what_stays_with_pytorch_and_why() -> None:
    q, k, v = qkv()
    mask = biased(hidden(67, 131))
    with fv.accelerate() as acceleration:
        torch.manual_seed(3)
        dropped = SDPA(q, k, v, dropout_p=0.5)
        SDPA(q, k, v, mask.clone().requires_grad_())
        SDPA(q.double(), k.double(), v.double())
        SDPA(q, k, v)
        with sdpa_kernel(SDPBackend.MATH):
            plain = SDPA(q, k, v)
        SDPA(q[:, :, :0], k, v)
    assert acceleration.report().foveate == {}
    assert acceleration.report().pytorch == {
        ("forward", "dropout draws from PyTorch's own random stream"): 1,
        ("forward", "the mask needs a gradient"): 1,
        ("forward", "dtype float64"): 1,
        ("forward", "PyTorch's kernel is as fast or faster"): 1,
        ("forward", "a path of PyTorch's is switched off"): 1,
        ("forward", "an empty tensor"): 1,
    }
    torch.manual_seed(3)
    assert torch.equal(dropped, SDPA(q, k, v, dropout_p=0.5))
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(plain, SDPA(q, k, v))


def test_what_is_slower_stays_with_pytorch_to_the_bit() -> None:
    for name in ("everything", "bool, padding", "float, every dimension", "grouped mask"):
        arguments, options = CALLS[name]()
        with fv.accelerate():
            during = SDPA(*arguments, **options)  # type: ignore[arg-type]
        assert torch.equal(during, SDPA(*arguments, **options))  # type: ignore[arg-type]


def test_a_gradient_may_cross_the_end_of_an_acceleration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward on our kernel, backward on PyTorch's, and the other way round: what is saved means the same to both."""
    monkeypatch.setattr(aten, "slower", lambda *_, **__: False)
    monkeypatch.setattr(aten, "slower_backward", lambda *_: False)
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
