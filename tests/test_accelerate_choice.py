"""Which calls run on our kernels and which stay with PyTorch under `accelerate()`, and what its report says of them."""

from __future__ import annotations

import pytest
import torch
from sdpa_calls import CALLS, SDPA, biased, hidden, made, prefer, qkv
from torch.nn.attention import SDPBackend, sdpa_kernel

import foveate as fv
from foveate.dispatch import thresholds
from foveate.dispatch.thresholds import Lead
from foveate.integrations import fused

pytestmark = pytest.mark.usefixtures("_nothing_stays")


def test_what_stays_with_pytorch_and_why() -> None:
    q, k, v = qkv()
    mask = biased(hidden(67, 131))
    with fv.accelerate() as acceleration:
        torch.manual_seed(3)
        dropped = SDPA(q, k, v, dropout_p=0.5)
        SDPA(q, k, v, mask.clone().requires_grad_())
        SDPA(q.double(), k.double(), v.double())
        SDPA(q[:, :, :7], k, v)
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
        (67, 6, Lead(queries=67, gradient=0, products=0, shared=0), True),
        (67, 6, Lead(queries=68, gradient=0, products=0, shared=0), False),
        (1, 2, Lead(queries=0, gradient=0, products=0, shared=2 * 2 * 131 * 16), True),
        (1, 2, Lead(queries=0, gradient=0, products=0, shared=2 * 2 * 131 * 16 + 1), False),
        (1, 6, Lead(queries=0, gradient=0, products=0, shared=0), False),
        (1, 6, Lead(queries=0, gradient=0, products=0, shared=0, alone=2 * 6 * 131 * 16), True),
    ],
)
def test_one_table_says_where_the_kernels_lead(
    queries: int, key_heads: int, lead: Lead, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's calls and our own read the same limits; for short calls of our own there is one more."""
    monkeypatch.setattr(thresholds, "lead", lambda _: lead)
    q, k, v = qkv(queries=queries, key_heads=key_heads)
    with fv.accelerate() as acceleration:
        SDPA(q, k, v, enable_gqa=True)
    assert bool(acceleration.report().foveate) == ours
    assert (fv.explain(q, k, v).chosen == "native") == ours


def test_gradients_have_a_limit_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    for limit, ours in ((67, True), (68, False)):
        lead = Lead(queries=0, gradient=limit, products=0, shared=0)
        monkeypatch.setattr(thresholds, "lead", lambda _, lead=lead: lead)
        with fv.accelerate() as acceleration:
            SDPA(q, k, v).sum().backward()
        assert (("backward", "") in acceleration.report().foveate) == ours


def test_limits_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows of bfloat16 are PyTorch's where the processor multiplies it, and ours where it does not."""
    q, k, v = (x.bfloat16()[:, :, :20].requires_grad_() for x in qkv())
    for has in (True, False):
        monkeypatch.setattr(thresholds, "has_pairs", lambda has=has: has)
        with fv.accelerate() as acceleration:
            SDPA(q, k, v).sum().backward()
        assert bool(acceleration.report().pytorch) == has
        assert bool(acceleration.report().foveate) == (not has)


def test_short_calls_of_our_own_have_a_limit_more(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    products = 2 * 6 * 67 * 131 * 16
    for limit, ours in ((products, True), (products + 1, False)):
        lead = Lead(queries=0, gradient=0, products=limit, shared=0)
        monkeypatch.setattr(thresholds, "lead", lambda _, lead=lead: lead)
        assert (fv.explain(q, k, v).chosen == "native") == ours


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
