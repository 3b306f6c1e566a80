"""`accelerate()`: PyTorch's own calls on our kernels, with PyTorch's meaning, and everything as it was afterwards."""

from __future__ import annotations

import pytest
import torch
from sdpa_calls import (
    CALLS,
    LEFT_TO_PYTORCH,
    SDPA,
    assert_as_exact,
    biased,
    hidden,
    made,
    only_hides,
    padded,
    qkv,
    truth,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import foveate as fv
from foveate.integrations import fused

pytestmark = pytest.mark.usefixtures("_nothing_stays")


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


def test_a_mask_that_was_expanded_is_read_once() -> None:
    mask = hidden(2, 1, 67, 131)
    assert fused._by_mask(mask.expand(2, 6, 67, 131), 67, 131).tiles[4:] == (2, 1)
    assert fused._by_mask(mask[:, :, :1].expand(2, 6, 67, 131), 67, 131).tiles[4:] == (2, 1)
    (added,) = fused._by_mask(biased(mask).expand(2, 6, 67, 131), 67, 131).alive
    assert added.shape == mask.shape


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


@pytest.mark.parametrize("kind", ["bool, tiles", "bool, few pairs", "float, only hides", "float, a bias"])
@pytest.mark.usefixtures("_ours")
def test_a_nan_that_no_row_may_see_never_matters(kind: str) -> None:
    q, k, v = qkv(queries=7, keys=11) if "few" in kind else qkv()
    kept = padded(2, k.shape[2])
    mask = kept if "bool" in kind else only_hides(kept) if "only" in kind else biased(kept)
    planted = [x.masked_fill(~kept.mT, float("nan")) for x in (k, v)]
    with fv.accelerate() as acceleration:
        found = SDPA(q, *planted, mask)
        leaves = [x.requires_grad_() for x in (q.clone(), *planted)]
        slopes = torch.autograd.grad(SDPA(*leaves, mask).square().sum(), leaves)
    assert acceleration.report().foveate == {("forward", ""): 2, ("backward", ""): 1}
    assert_as_exact(found, SDPA(q, k, v, mask), truth((q, k, v, mask), {}))
    assert all(bool(x.isfinite().all()) for x in slopes)
