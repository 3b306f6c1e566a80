"""What activation checkpointing computes again is computed as it was, whatever was undone or begun meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import build, left_padded
from sdpa_calls import prefer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import foveate as fv
from foveate.integrations import recomputing

BOTH = pytest.mark.parametrize("reentrant", [False, True])


def loss(network: Any) -> Tensor:
    found: Tensor = network(**left_padded(), use_cache=False).logits.pow(2).sum()
    return found


def gradients(network: Any, how: Callable[[], object]) -> Tensor:
    network.zero_grad()
    how()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def trained(name: str = "llama", reentrant: bool | None = None) -> Any:
    """A model in training, with checkpoints if their kind is named."""
    network: Any = build(name).train()
    if reentrant is not None:
        network.activation_checkpointing_enable({"use_reentrant": reentrant})
        network.enable_input_require_grads()  # else the first layer would be computed once
    return network


@BOTH
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_backward_pass_may_come_after_the_patch(name: str, reentrant: bool) -> None:
    """Also under another patch; and one that began before a patch goes on without it."""
    plain = trained(name)
    own = gradients(plain, lambda: loss(plain).backward())
    with fv.patch(plain, fv.window(3)):
        truth = gradients(plain, lambda: loss(plain).backward())
    assert (own - truth).abs().max() > 1e-2 * truth.abs().max()
    network, others = trained(name, reentrant), recomputing.in_force()

    def after(other: fv.Pattern | None) -> None:
        with fv.patch(network, fv.window(3)):
            out = loss(network)
        with fv.patch(network, other) if other is not None else nullcontext():
            out.backward()

    def before() -> None:
        out = loss(network)
        with fv.patch(network, fv.window(3)):
            out.backward()

    def both() -> None:
        first = loss(network)
        with fv.patch(network, fv.window(3)):
            second = loss(network)
        (first + second).backward()

    for how, wanted in (
        (lambda: after(None), truth),
        (lambda: after(fv.window(7)), truth),
        (before, own),
        (both, own + truth),
    ):
        found = gradients(network, how)
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert network.config._attn_implementation == "eager"
    assert all(change in others for change in recomputing.in_force())


@BOTH
def test_a_checkpoint_around_the_whole_model_is_followed_too(reentrant: bool) -> None:
    network = trained()
    with fv.patch(network, fv.window(3)):
        truth = gradients(network, lambda: loss(network).backward())

    def how() -> None:
        words = network.get_input_embeddings()(left_padded()["input_ids"])
        kept = left_padded()["attention_mask"]
        with fv.patch(network, fv.window(3)):
            out = checkpoint(
                lambda x: network(inputs_embeds=x, attention_mask=kept, use_cache=False).logits,
                words, use_reentrant=reentrant,
            )  # fmt: skip
        out.pow(2).sum().backward()

    found = gradients(network, how)
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()


@BOTH
def test_one_model_is_computed_again_beside_another_that_is_patched(reentrant: bool) -> None:
    one, other = trained(reentrant=reentrant), trained("mistral")
    with fv.patch(one, fv.window(3)):
        truth = gradients(one, lambda: loss(one).backward())

    def how() -> None:
        with fv.patch(other), fv.patch(one, fv.window(3)):
            out = loss(one)
        with fv.patch(other, fv.window(2)):
            out.backward()
            assert [plan is not None for plan in map(vars(other.model.layers[0].self_attn).get, ["foveate_plan"])] == [
                True
            ]
            assert other.config._attn_implementation == "foveate"

    found = gradients(one, how)
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()


@BOTH
def test_what_was_watched_trains_on(reentrant: bool) -> None:
    network = trained(reentrant=reentrant)
    with fv.patch(network):
        truth = gradients(network, lambda: loss(network).backward())

    def how() -> None:
        with fv.watch(network):
            out = loss(network)
        out.backward()

    assert (gradients(network, how) - truth).abs().max() <= 1e-5 * truth.abs().max()


@BOTH
@pytest.mark.parametrize("mask", [None, "causal", "added"])
def test_accelerated_calls_are_computed_again_by_whoever_is_there(
    mask: str | None, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, ours=True)
    inputs = [torch.randn(2, 3, 70, 16, requires_grad=True) for _ in range(3)]
    added = torch.randn(70, 70) if mask == "added" else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, added, is_causal=mask == "causal")

    truth = torch.autograd.grad(attend(*inputs).pow(2).sum(), inputs)
    for ends_first in (False, True):
        for x in inputs:
            x.grad = None
        with fv.accelerate() if ends_first else nullcontext():
            out = checkpoint(attend, *inputs, use_reentrant=reentrant).pow(2).sum()
        with nullcontext() if ends_first else fv.accelerate():
            out.backward()
        for x, gradient in zip(inputs, truth, strict=True):
            assert x.grad is not None
            assert (x.grad - gradient).abs().max() <= 1e-5 * gradient.abs().max()


def test_another_pytorch_is_told_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.utils.checkpoint._CheckpointFrame")
    with pytest.warns(UserWarning, match=r"where foveate cannot follow them: call backward\(\) before a patch ends"):
        recomputing._follow_checkpoints.__wrapped__()
