"""`accelerate()`: PyTorch's own calls on our kernels, with PyTorch's meaning, and everything as it was afterwards."""

from __future__ import annotations

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
from foveate.integrations import fused
from foveate.integrations.torch import _STATE
from foveate.softmax import native
from foveate.softmax.native import Lead

SDPA = F.scaled_dot_product_attention
INF = float("inf")


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    assert not _STATE.active
    yield
    assert not _STATE.active
    assert torch.backends.mha.get_fastpath_enabled()


def prefer(monkeypatch: pytest.MonkeyPatch, *, ours: bool) -> None:
    """Whatever our kernels can compute they do, be it slower; or nothing, be it faster."""
    monkeypatch.setattr(fused, "leads_forward", lambda *_: ours)
    monkeypatch.setattr(fused, "leads_backward", lambda *_: ours)


@pytest.fixture
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, ours=True)


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
    "float, of nn.Transformer": lambda: ((*qkv(), nn.Transformer.generate_square_subsequent_mask(131)[:67]), {}),
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
    """The error may be a multiple (gradients: 3) of PyTorch's own and of the roundings of what is subtracted in it."""
    assert found.shape == theirs.shape
    assert found.dtype == theirs.dtype
    if not found.numel():
        return
    most = max(1.0, exact.abs().max().item())
    allowed = times * (
        (theirs.double() - exact).abs().max().item() + (1 if times == 2 else 3) * torch.finfo(found.dtype).eps * most
    )
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
    "other leading dimensions": lambda: (
        tuple(x.unflatten(0, shape) for x, shape in zip(qkv(batch=6), [(3, 2), (2, 3), (2, 3)], strict=True)),
        {},
    ),
    "five dimensions, and a mask of all batches": lambda: (
        (*(x.unflatten(0, (3, 2)) for x in qkv(batch=6)), hidden(6, 6, 67, 131)),
        {},
    ),
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
        SDPA(q[:, :, :31], k, v)
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


def test_what_is_slower_stays_with_pytorch_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, ours=False)
    for name in ("everything", "bool, padding", "float, every dimension", "grouped mask"):
        arguments, options = CALLS[name]()
        with fv.accelerate():
            during = SDPA(*arguments, **options)  # type: ignore[arg-type]
        assert torch.equal(during, SDPA(*arguments, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("queries", "key_heads", "lead", "ours"),
    [
        (67, 6, Lead(queries=67, gradient=0, shared=0), True),
        (67, 6, Lead(queries=68, gradient=0, shared=0), False),
        (1, 2, Lead(queries=0, gradient=0, shared=2 * 2 * 131 * 16), True),
        (1, 2, Lead(queries=0, gradient=0, shared=2 * 2 * 131 * 16 + 1), False),
        (1, 6, Lead(queries=0, gradient=0, shared=0), False),
        (1, 6, Lead(queries=0, gradient=0, shared=0, alone=2 * 6 * 131 * 16), True),
    ],
)
def test_one_table_says_where_the_kernels_lead(
    queries: int, key_heads: int, lead: Lead, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's calls and our own read the same limits; for short calls of our own there is one more."""
    monkeypatch.setitem(native.LEADS, torch.float32, lead)
    monkeypatch.setattr(native, "_SHORT", 0)
    q, k, v = qkv(queries=queries, key_heads=key_heads)
    with fv.accelerate() as acceleration:
        SDPA(q, k, v, enable_gqa=True)
    assert bool(acceleration.report().foveate) == ours
    assert (fv.explain(q, k, v).chosen == "native") == ours


def test_gradients_have_a_limit_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    for limit, ours in ((67, True), (68, False)):
        monkeypatch.setitem(native.LEADS, torch.float32, Lead(queries=0, gradient=limit, shared=0))
        with fv.accelerate() as acceleration:
            SDPA(q, k, v).sum().backward()
        assert (("backward", "") in acceleration.report().foveate) == ours


def test_bfloat16_needs_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.bfloat16().requires_grad_() for x in qkv())
    for has in (True, False):
        monkeypatch.setattr(native, "has_pairs", lambda has=has: has)
        with fv.accelerate() as acceleration:
            SDPA(q, k, v).sum().backward()
        assert bool(acceleration.report().foveate) == has


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


@pytest.mark.usefixtures("_ours")
def test_autocast_casts_as_before() -> None:
    q, k, v = qkv()
    mask = biased(hidden(67, 131))
    for arguments in ((q, k, v), (q, k, v, mask)):
        with torch.autocast("cpu", torch.bfloat16):
            before = SDPA(*arguments)
            with fv.accelerate() as acceleration:
                during = SDPA(*arguments)
                leaf = q.clone().requires_grad_()
                SDPA(leaf, *arguments[1:]).float().sum().backward()
        assert during.dtype == before.dtype == torch.bfloat16
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        cast = tuple(x.bfloat16() for x in arguments)
        assert_as_exact(during, before, truth(cast, {}))
        assert acceleration.report().foveate == {("forward", ""): 2, ("backward", ""): 1}


@pytest.mark.usefixtures("_ours")
def test_views_that_only_say_what_they_hold_are_read_right() -> None:
    """The imaginary part of a conjugate is stored with the other sign, and a zero gradient perhaps not at all."""
    q, k, v = qkv()
    turned = torch.view_as_complex(torch.stack([k, -k], -1)).conj().imag
    assert turned.is_neg()
    with fv.accelerate():
        during = SDPA(q, turned, v)
    assert_as_exact(during, SDPA(q, k, v), truth((q, k, v), {}))


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


def models() -> dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, object]]]:
    """PyTorch's own modules, with padding, masks, and both."""
    torch.manual_seed(0)
    x, y = made(2, 67, 24, seed=1), made(2, 41, 24, seed=2)
    pad = ~padded(2, 67)[:, 0, 0]
    future = nn.Transformer.generate_square_subsequent_mask(67)
    layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(24, 4, 48, dropout=0.0, batch_first=True), 2)
    attention = nn.MultiheadAttention(24, 4, batch_first=True)
    return {
        "attention": (attention, (x, y, y), {"need_weights": False}),
        "attention, padded": (attention, (x, x, x), {"need_weights": False, "key_padding_mask": pad}),
        "attention, weights": (attention, (x, x, x), {"attn_mask": future}),
        "encoder": (encoder, (x,), {}),
        "encoder, padded": (encoder, (x,), {"src_key_padding_mask": pad}),
        "encoder, causal": (encoder, (x,), {"mask": future, "is_causal": True}),
        "encoder, causal and padded": (encoder, (x,), {"mask": future, "src_key_padding_mask": only_hides(~pad)}),
        "decoder": (decoder, (y, x), {"memory_key_padding_mask": pad, "tgt_is_causal": True,
                                      "tgt_mask": nn.Transformer.generate_square_subsequent_mask(41)}),
    }  # fmt: skip


def first(found: object) -> Tensor:
    out = found[0] if isinstance(found, tuple) else found
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", models())
@pytest.mark.usefixtures("_ours")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_modules_of_pytorch(name: str, training: bool) -> None:
    model, inputs, options = models()[name]
    model.train(training)

    def gradients() -> list[Tensor]:
        out = first(model(*inputs, **options))
        parameters = [x for x in model.parameters() if x.requires_grad]
        return [out.detach(), *torch.autograd.grad(out.square().mean(), parameters)]

    with torch.no_grad():
        quick = first(model(*inputs, **options))
    before = gradients()
    with fv.accelerate() as acceleration:
        during = gradients()
        with torch.no_grad():
            without = first(model(*inputs, **options))
    assert all(map(torch.equal, before, gradients()))
    for one, other in zip(before, during, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    kept = padded(2, 67)[:, 0, 0] if "encoder" in name and "padded" in name else torch.ones(without.shape[:2]).bool()
    # The fast path that is off meanwhile writes zeros where a row is padding.
    torch.testing.assert_close(quick[kept], without[kept], atol=1e-5, rtol=1e-4)
    assert bool(acceleration.report().foveate) == (name != "attention, weights")
    assert not acceleration.report().pytorch


def hugging_face() -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    ids = torch.randint(0, 61, (2, 67))
    size = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    kept = torch.ones(2, 67, dtype=torch.int64)
    kept[0, :23] = 0
    bert = BertModel(BertConfig(**size, num_attention_heads=4, attn_implementation="sdpa"))
    llama = LlamaModel(LlamaConfig(**size, num_attention_heads=6, num_key_value_heads=2, attn_implementation="sdpa"))
    return {
        "bert": (bert, {"input_ids": ids}),
        "bert, padded": (bert, {"input_ids": ids, "attention_mask": kept}),
        "llama": (llama, {"input_ids": ids}),
        "llama, padded": (llama, {"input_ids": ids, "attention_mask": kept}),
    }


@pytest.mark.parametrize("name", ["bert", "bert, padded", "llama", "llama, padded"])
@pytest.mark.usefixtures("_ours")
def test_hugging_face_models(name: str) -> None:
    model, inputs = hugging_face()[name]
    model.eval()
    for weight in (w for n, w in model.named_parameters() if "query" in n or "q_proj" in n):
        weight.data *= 30  # far from uniform weights, or nothing would be seen of a fault

    def gradients() -> list[Tensor]:
        out = model(**inputs).last_hidden_state
        leaves = [x for x in model.parameters() if x.requires_grad]
        slopes = torch.autograd.grad(out.square().mean(), leaves, allow_unused=True)
        return [out.detach(), *(slope for slope in slopes if slope is not None)]

    before = gradients()
    with fv.accelerate() as acceleration:
        during = gradients()
        with torch.inference_mode():
            quick = model(**inputs).last_hidden_state
    for one, other in zip(before, during, strict=True):
        most = one.abs().max().item()
        torch.testing.assert_close(one, other, atol=1e-4 * most + 1e-7, rtol=0)
    torch.testing.assert_close(quick, before[0], atol=1e-5 * before[0].abs().max().item(), rtol=0)
    assert acceleration.report().foveate == {("forward", ""): 4, ("backward", ""): 2}
    assert not acceleration.report().pytorch


@pytest.mark.usefixtures("_ours")
def test_grouped_heads_are_decoded_on_our_kernels() -> None:
    """`generate()` with a cache: the prompt, then one query for each token, its keys read once for all their heads."""
    model, _ = hugging_face()["llama"]
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    writer = LlamaForCausalLM(model.config).eval()
    ids = torch.randint(0, 61, (1, 300), generator=torch.Generator().manual_seed(1))
    how = {"max_new_tokens": 7, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    truth = writer.generate(ids, **how)
    with fv.accelerate() as acceleration:
        found = writer.generate(ids, **how)
    assert torch.equal(found.sequences, truth.sequences)
    for mine, theirs in zip(found.logits, truth.logits, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert acceleration.report().foveate == {("forward", ""): 2 * 7}
    assert not acceleration.report().pytorch


def calls_go_to_us() -> bool:
    q = made(1, 1, 512, 8, seed=1)
    with fv.accelerate() as acceleration:
        pass
    before = sum(_STATE.active[0].report().foveate.values()) if _STATE.active else 0
    SDPA(q, q, q, is_causal=True)
    assert not acceleration.report().foveate
    return bool(_STATE.active) and sum(_STATE.active[0].report().foveate.values()) == before + 1


def test_nested_use_ends_with_the_last() -> None:
    with fv.accelerate() as outer:
        assert calls_go_to_us()
        with fv.accelerate() as inner:
            assert calls_go_to_us()
        assert calls_go_to_us()
        fv.accelerate()
        fv.restore()
        assert calls_go_to_us()
    assert not calls_go_to_us()
    assert outer.report().foveate == {("forward", ""): 4}
    assert inner.report().foveate == {("forward", ""): 1}


def test_the_order_in_which_they_end_does_not_matter() -> None:
    first, second = fv.accelerate(), fv.accelerate()
    with first:
        pass
    assert calls_go_to_us()
    fv.restore()
    assert not calls_go_to_us()
    with pytest.raises(fv.InvalidInput, match="this acceleration has ended: call accelerate\\(\\) again"), second:
        pass


def test_an_exception_inside_puts_everything_back() -> None:
    with pytest.raises(ZeroDivisionError), fv.accelerate():
        raise ZeroDivisionError
    assert not calls_go_to_us()


def test_restore_inside_its_block_is_enough() -> None:
    with fv.accelerate():
        fv.restore()
        assert not calls_go_to_us()
    with pytest.raises(fv.InvalidInput, match="nothing is accelerated"):
        fv.restore()


def test_the_fast_path_is_put_back_as_it_was() -> None:
    mha = torch.backends.mha
    for was in (False, True):
        mha.set_fastpath_enabled(was)
        with fv.accelerate(), fv.accelerate():
            assert not mha.get_fastpath_enabled()
        assert mha.get_fastpath_enabled() == was


def test_the_report_says_how_many_went_where_and_why() -> None:
    q = made(1, 2, 512, 8, seed=1)
    fv.accelerate()
    assert str(fv.report()) == "no call of scaled_dot_product_attention on the CPU"
    for _ in range(3):
        SDPA(q, q, q, is_causal=True)
    SDPA(q, q, q, dropout_p=0.1)
    fv.restore()
    assert str(fv.report()) == (
        "foveate        3 × forward\npytorch        1 × forward: dropout draws from PyTorch's own random stream"
    )


def test_without_the_kernels_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_native", None)
    with pytest.raises(fv.FoveateError, match="needs the compiled kernels: install a C\\+\\+ compiler"):
        fv.accelerate()


def test_threads_share_it_and_their_calls_are_counted() -> None:
    q = made(1, 2, 512, 8, seed=1)
    want = SDPA(q, q, q, is_causal=True)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            with fv.accelerate():
                found = SDPA(q, q, q, is_causal=True)
            if not torch.allclose(found, want, atol=1e-5):
                wrong.append(number)

    with fv.accelerate() as acceleration:
        workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert wrong == []
    assert acceleration.report().foveate == {("forward", ""): 400}


def test_threads_that_begin_and_end_it_all_the_time() -> None:
    """Dispatch does not wait for a thread that is on its way into a kernel: with others alive, none is taken out."""
    q, leaf = made(1, 2, 512, 8, seed=1), made(1, 2, 16, 8, seed=2).requires_grad_()
    want = SDPA(q, q, q, is_causal=True)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            with fv.accelerate():
                found = SDPA(q, q, q, is_causal=True)
            again = SDPA(q, q, q, is_causal=True)
            SDPA(leaf, leaf, leaf).sum().backward()
            if not torch.allclose(found, want, atol=1e-5) or not torch.allclose(again, want, atol=1e-5):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_the_kernels_are_taken_out_by_the_last_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def entered() -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key("aten::scaled_dot_product_attention", "AutogradCPU")

    for count in (2, 1):
        monkeypatch.setattr(threading, "active_count", lambda count=count: count)
        with fv.accelerate() as acceleration:
            assert entered()
        assert entered() == (count > 1)
        assert not calls_go_to_us()
        assert not acceleration.report().foveate
    assert not entered()


@pytest.mark.usefixtures("_ours")
def test_kernels_that_had_to_stay_pass_every_call_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 2)

    def everything() -> list[Tensor]:
        q, k, v = (x.requires_grad_() for x in qkv())
        quick = SDPA(*(x.detach() for x in (q, k, v)), is_causal=True)
        return [quick, *torch.autograd.grad(SDPA(q, k, v, is_causal=True).square().sum(), (q, k, v))]

    before = everything()
    with fv.accelerate():
        during = everything()
    assert not any(map(torch.equal, before, during))  # other roundings tell whose they are
    assert all(map(torch.equal, before, everything()))


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "theirs"])
def test_other_threads_run_meanwhile(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels give the interpreter free, and so does what is handed on to PyTorch, as its own call does."""
    prefer(monkeypatch, ours=ours)
    big = made(1, 8, 1024, 64, seed=1).bfloat16()
    for leaf in (big, big.clone().requires_grad_()):
        turns, stop = 0, threading.Event()

        def work(leaf: Tensor = leaf, stop: threading.Event = stop) -> None:
            for _ in range(5):
                SDPA(leaf, big, big)
            stop.set()

        with fv.accelerate():
            worker = threading.Thread(target=work)
            worker.start()
            while not stop.wait(0.0005):
                turns += 1
            worker.join()
        assert turns > 5


def _child() -> None:
    raise SystemExit(0 if calls_go_to_us() else 1)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_is_accelerated_too() -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with _STATE.lock:
            held.set()
            done.wait(120)

    with fv.accelerate():
        holder = threading.Thread(target=hold)  # the lock is another thread's while the child is made
        holder.start()
        held.wait(120)
        child = multiprocessing.get_context("fork").Process(target=_child)
        child.start()
        child.join(60)
        child.kill()
        done.set()
        holder.join()
    assert child.exitcode == 0


def test_a_mask_that_was_expanded_is_read_once() -> None:
    mask = hidden(2, 1, 67, 131)
    assert fused._by_mask(mask.expand(2, 6, 67, 131), 67, 131).tiles[4:] == (2, 1)
    assert fused._by_mask(mask[:, :, :1].expand(2, 6, 67, 131), 67, 131).tiles[4:] == (2, 1)
    (added,) = fused._by_mask(biased(mask).expand(2, 6, 67, 131), 67, 131).alive
    assert added.shape == mask.shape


def test_nothing_is_printed(tmp_path: Path) -> None:
    script = tmp_path / "quiet.py"
    script.write_text(
        "import torch, foveate as fv\n"
        "q = torch.randn(1, 2, 512, 8)\n"
        "for _ in range(2):\n"
        "    with fv.accelerate():\n"
        "        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)\n"
    )
    done = subprocess.run([sys.executable, "-Wd", str(script)], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("name", ["everything", "causal", "grouped mask", "bool, every dimension", "bool, padding"])
@pytest.mark.usefixtures("_ours")
def test_the_operators_of_aten_answer_as_before(name: str) -> None:
    """Called by themselves, as graphs call them: (out, log-sum-exp) and the gradients, their layouts included."""
    (q, k, v, *mask), options = CALLS[name]()
    causal = bool(options.get("is_causal"))
    rest = {"attn_mask": only_hides(mask[0]) if mask else None, "scale": 0.3}
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    d_out = made(*q.shape, seed=9)

    def everything() -> list[Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, **rest)
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, causal, **rest
        )
        return [out, lse, *gradients]

    before = everything()
    with fv.accelerate() as acceleration:
        during = everything()
    for one, other in zip(before, during, strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert acceleration.report().foveate == {("forward", ""): 1, ("backward", ""): 1}
