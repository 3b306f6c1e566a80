"""diffusers' models of random weights: the same results under `accelerate()`, and patterns that narrow their layers."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate as fv
from foveate.integrations.diffusers import narrow


@cache
def unet() -> tuple[Any, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=12, in_channels=3, out_channels=3, block_out_channels=(16, 32), norm_num_groups=8,
        layers_per_block=1, cross_attention_dim=24, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    text = torch.randn(2, 7, 24)
    return sharpened(model), {"sample": torch.randn(2, 3, 12, 12), "timestep": 3, "encoder_hidden_states": text}


@cache
def dit() -> tuple[Any, dict[str, Any]]:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=10, patch_size=2,
        num_embeds_ada_norm=11, norm_num_groups=1,
    )  # fmt: skip
    where = {"timestep": torch.tensor([3, 5]), "class_labels": torch.tensor([1, 2])}
    return sharpened(model), {"hidden_states": torch.randn(2, 4, 10, 10), **where}


MODELS = {"unet": unet, "dit": dit}


def sharpened(model: Any) -> Any:
    """Far from uniform weights, or a fault would not be seen; and no projection that begins as zeros."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".to_q." in name or ".to_k." in name:
                weight *= 4
            elif not weight.any():
                weight.normal_(0, 0.1)
    return model.eval()


def results(name: str) -> list[Tensor]:
    model, inputs = MODELS[name]()
    out = model(**inputs).sample
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
    return [out.detach(), *(gradient for gradient in found if gradient is not None)]


def assert_alike(found: list[Tensor], wanted: list[Tensor]) -> None:
    """The output to 1e-5 of its largest value, gradients to 1e-4 of theirs."""
    for tolerance, mine, theirs in ((1e-5, found[:1], wanted[:1]), (1e-4, found[1:], wanted[1:])):
        most = max((x.abs().max() for x in theirs), default=0)
        for one, other in zip(mine, theirs, strict=True):
            assert (one - other).abs().max() <= tolerance * most


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("_nothing_stays", "_ours")
def test_accelerate_reaches_diffusers(name: str) -> None:
    before = results(name)
    with fv.accelerate() as acceleration:
        during = results(name)
    report = acceleration.report()
    layers = sum(hasattr(module, "set_processor") for module in MODELS[name]()[0].modules())
    assert report.foveate == {("forward", ""): layers, ("backward", ""): layers}
    assert not report.pytorch
    assert_alike(during, before)
    assert all(map(torch.equal, results(name), before))


@pytest.mark.parametrize("name", MODELS)
def test_a_pattern_that_hides_nothing_changes_nothing(name: str) -> None:
    before = results(name)
    with narrow(MODELS[name]()[0], fv.window(4096)):
        assert_alike(results(name), before)
    assert all(map(torch.equal, results(name), before))


def grids(positions: int) -> fv.Pattern:
    return fv.neighborhood(2, math.isqrt(positions))


@pytest.mark.parametrize("name", MODELS)
def test_a_pattern_does_what_its_mask_would(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A UNet has grids of 144 and 36 places, a DiT one of 25; attention to a text keeps seeing all of it."""
    before = results(name)
    with narrow(MODELS[name]()[0], grids):
        found = results(name)
    plain = torch.nn.functional.scaled_dot_product_attention

    def masked(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        same = q.shape[2] == k.shape[2]
        return plain(q, k, v, grids(q.shape[2]).dense(q.shape[2], q.shape[2]) if same else attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked)
    assert_alike(found, results(name))
    assert (found[0] - before[0]).abs().max() > 1e-2 * before[0].abs().max()


def test_layers_are_chosen_by_name_and_put_back() -> None:
    model, inputs = unet()
    own = [(module, type(module)) for module in model.modules()]
    there = [name for name, layer in model.named_modules() if hasattr(layer, "set_processor")]

    def narrowed(layers: list[str] | None) -> list[str]:
        with torch.no_grad(), narrow(model, fv.window(3), layers=layers) as found:
            chosen = found.layers
            model(**inputs)
            assert found.layers == chosen
        assert all(type(module) is kind for module, kind in own)
        return list(chosen)

    assert narrowed(None) == [name for name in there if name.endswith(".attn1")]
    assert narrowed(["mid_block"]) == [name for name in there if name.startswith("mid_block.")]
    assert narrowed(["attn2"]) == [name for name in there if name.endswith(".attn2")]
    with pytest.raises(fv.InvalidInput, match=r"no attention layer is named 'attn': there are down_blocks"):
        narrow(model, fv.window(3), layers=["attn"])


def test_narrowing_may_be_nested() -> None:
    model, _ = unet()
    before = results("unet")
    with narrow(model, grids), pytest.raises(ZeroDivisionError), narrow(model, fv.window(3)):
        raise ZeroDivisionError
    assert all(map(torch.equal, results("unet"), before))


def test_what_is_no_model_of_diffusers_is_refused() -> None:
    with pytest.raises(fv.InvalidInput, match="was given a Linear: wanted a model of diffusers"):
        narrow(torch.nn.Linear(2, 2), fv.causal)
