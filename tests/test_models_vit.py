"""ViT, DeiT and DINOv2 are Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from parity import Case, check
from torch import Tensor, nn

import foveate as fv
from foveate.models import dinov2, vit

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "image_size": 12, "patch_size": 4,
         "num_channels": 2, "attn_implementation": "eager"}  # fmt: skip
HIDDEN = {"ViT": {"intermediate_size": 59}, "DeiT": {"intermediate_size": 59}}


def made(name: str, **more: object) -> nn.Module:
    family = name.split("For")[0].removesuffix("Model")
    config = getattr(hf, f"{family}Config")(**{**SIZES, **HIDDEN.get(family, {}), **more})
    model = getattr(hf, name)(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "token" in key or "lambda" in key:  # as they are after some training
                parameter.add_(torch.randn(parameter.shape))
    return model


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 2, 12, 12, generator=torch.Generator().manual_seed(5))}


def wide_image() -> dict[str, Tensor]:
    """Not of the size that the positions were learned for."""
    return {"pixel_values": torch.randn(2, 2, 20, 28, generator=torch.Generator().manual_seed(5))}


def wide_image_for_vit() -> dict[str, Tensor]:
    return {**wide_image(), "interpolate_pos_encoding": torch.tensor(True)}


def hidden_patches() -> dict[str, Tensor]:
    return {**image(), "bool_masked_pos": torch.arange(18).view(2, 9) % 5 < 2}


def base(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    more = {"hidden": inputs["bool_masked_pos"]} if "bool_masked_pos" in inputs else {}
    x = model(inputs["pixel_values"], **more)
    return {"last_hidden_state": x, "pooler_output": x[:, 0] if isinstance(model, dinov2.Model) else model.pool(x)}


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    scores = model(inputs["pixel_values"])
    if not isinstance(model, vit.TaughtClassifier):
        return {"logits": scores}
    return {"logits": scores.mean(1), "cls_logits": scores[:, 0], "distillation_logits": scores[:, 1]}


LAYERS = {"ViT": "vit.layers", "DeiT": "deit.layers", "Dinov2": "dinov2.encoder.layer",
          "Dinov2WithRegisters": "dinov2_with_registers.encoder.layer"}  # fmt: skip


def case(name: str, inputs: object = image, **more: object) -> Case:
    prefix = LAYERS[name.split("For")[0].removesuffix("Model")]
    if name.endswith("Model"):
        return Case(lambda: made(name, **more), inputs, base, {"blocks": prefix.partition(".")[2]})
    return Case(lambda: made(name, num_labels=5, **more), inputs, logits, {"body.blocks": prefix})


CASES = {
    "ViT": case("ViTModel"),
    "ViT without biases": case("ViTModel", qkv_bias=False),
    "ViT, labels": case("ViTForImageClassification"),
    "ViT, wide": case("ViTForImageClassification", wide_image_for_vit),
    "DeiT": case("DeiTModel"),
    "DeiT, labels": case("DeiTForImageClassification"),
    "DeiT, taught": case("DeiTForImageClassificationWithTeacher"),
    "DeiT, wide": case("DeiTForImageClassificationWithTeacher", wide_image_for_vit),
    "DINOv2": case("Dinov2Model"),
    "DINOv2, hidden patches": case("Dinov2Model", hidden_patches),
    "DINOv2, labels": case("Dinov2ForImageClassification", use_mask_token=False),
    "DINOv2, wide": case("Dinov2ForImageClassification", wide_image),
    "DINOv2, gated": case("Dinov2Model", use_swiglu_ffn=True),
    "registers": case("Dinov2WithRegistersModel"),
    "registers, labels": case("Dinov2WithRegistersForImageClassification", wide_image),
    "registers, hidden patches, gated": case("Dinov2WithRegistersModel", hidden_patches, use_swiglu_ffn=True),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_hugging_faces(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


SMALL = {"image": 12, "patch": 4, "channels": 2, "dim": 48, "layers": 1, "heads": 6}


@pytest.mark.parametrize("model", [vit.Model(vit.Config(**SMALL)), dinov2.Model(dinov2.Config(**SMALL))])
def test_pixels_that_do_not_fit_are_refused(model: nn.Module) -> None:
    for shape in ((1, 3, 12, 12), (1, 2, 12, 13), (1, 2, 10, 12)):
        size = "×".join(map(str, shape))
        with pytest.raises(fv.InvalidInput, match=f"{size}>: wanted 2 channels, and sides that are multiples of 4"):
            model(torch.zeros(shape))


def test_what_a_model_lacks_is_said() -> None:
    with pytest.raises(fv.InvalidInput, match="100 pixels do not divide into patches of 16"):
        vit.Config(image=100)
    with pytest.raises(fv.InvalidInput, match="100 pixels do not divide into patches of 14"):
        dinov2.Config(image=100)
    with pytest.raises(fv.InvalidInput, match="no pooler"):
        vit.ImageClassifier(vit.Config(**SMALL)).body.pool(torch.zeros(1, 10, 48))
    model = dinov2.Model(dinov2.Config(**SMALL, hides=False))
    with pytest.raises(fv.InvalidInput, match="no vector for hidden patches"):
        model(torch.zeros(1, 2, 12, 12), hidden=torch.ones(1, 9, dtype=torch.bool))
