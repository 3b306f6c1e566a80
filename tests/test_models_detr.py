"""DETR is Hugging Face's."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import sharpened
from parity import Case, _random, check
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

import foveate as fv
from foveate.models import detr, resnet

SIZES = {
    "d_model": 48, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 6, "decoder_attention_heads": 3,
    "encoder_ffn_dim": 59, "decoder_ffn_dim": 53, "num_queries": 7, "num_labels": 5, "attn_implementation": "eager",
}  # fmt: skip
STAGES = {"embedding_size": 8, "hidden_sizes": [12, 20, 28], "depths": [1, 2, 1], "out_features": ["stage3"]}


def made(name: str = "DetrForObjectDetection", **more: object) -> nn.Module:
    return lived(getattr(hf, name)(hf.DetrConfig(backbone_config=hf.ResNetConfig(**{**STAGES, **more}), **SIZES)))


def lived(model: nn.Module) -> nn.Module:
    """Norms as they are after training; frozen is what the paper freezes (Hugging Face: all, and nothing of timm's)."""
    for module in model.modules():
        if isinstance(module, DetrFrozenBatchNorm2d):
            for name, buffer in module.named_buffers():
                buffer.uniform_(*((0.5, 1.5) if name in ("weight", "running_var") else (-0.5, 0.5)))
    for key, parameter in model.named_parameters():
        frozen = re.search(r"backbone\.model\.(embedder|encoder\.stages\.0|conv1|layer1)\.", key)
        parameter.requires_grad_(not frozen)
    return model


def images(height: int = 75, width: int = 101) -> dict[str, Tensor]:
    """Two images, the second smaller than the first."""
    kept = torch.ones(2, height, width, dtype=torch.int64)
    kept[1, 2 * height // 3 :] = kept[1, :, width // 2 :] = 0
    spots = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(5))
    pixels = nn.functional.interpolate(4 * spots, (height, width), mode="bilinear")  # else all places look alike
    return {"pixel_values": pixels, "pixel_mask": kept}


def seen(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    return inputs["pixel_values"], inputs["pixel_mask"].bool() if "pixel_mask" in inputs else None


def base(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    read = model.encode(*seen(inputs))
    return {"last_hidden_state": model.decode(*read), "encoder_last_hidden_state": read[0]}


def found(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    scores, boxes = model(*seen(inputs))
    return {"logits": scores, "pred_boxes": boxes}


def layers(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}backbone.stages": f"{theirs}backbone.model.encoder.stages",
            f"{ours}blocks": f"{theirs}encoder.layers", f"{ours}decoder_blocks": f"{theirs}decoder.layers"}  # fmt: skip


SHARP = ("q_proj", "k_proj", "query_position_embeddings")


def case(**more: object) -> Case:
    return Case(partial(made, **more), images, found, layers("body.", "model."), SHARP, ("pixel_mask",))


CASES = {
    "DETR": Case(partial(made, "DetrModel"), images, base, layers("", ""), SHARP, ("pixel_mask",)),
    "objects": case(),
    "basic units, no shortcut at first": case(layer_type="basic", hidden_sizes=[8, 20, 28]),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_hugging_faces(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


def test_mask_and_positions_and_norms_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the parity would not see if it did nothing."""
    torch.manual_seed(3)
    theirs = sharpened(_random(made()), images(), SHARP)
    theirs.save_pretrained(tmp_path)
    ours, (pixels, keep) = fv.from_pretrained(tmp_path), seen(images())
    truth = theirs(**images())

    @torch.no_grad()
    def off(keep: Tensor | None = keep) -> float:
        scores, boxes = ours(pixels, keep)
        pairs = ((scores, truth.logits), (boxes, truth.pred_boxes))
        return min(float((one - true).abs().max() / true.abs().max()) for one, true in pairs)

    assert off() < 1e-5
    assert off(None) > 1e-2
    with monkeypatch.context() as patch:
        patch.setattr(detr, "padding", lambda real: None)  # positions stop at the padding, attention does not
        assert off() > 1e-2
    with monkeypatch.context() as patch:
        patch.setattr(detr.Model, "positions", lambda self, real: torch.zeros(*real.flatten(1).shape, 48))
        assert off() > 1e-2
    norm = "backbone.stages.1.0.shortcut.norm"
    for name, least in {"query": 1e-3, f"{norm}.running_mean": 1e-2, f"{norm}.running_var": 1e-2}.items():
        part, kept = ours.body.state_dict()[name], ours.body.state_dict()[name].clone()
        part.fill_(3)
        assert off() > least, name
        part.copy_(kept)
    assert off() < 1e-5


UNIT = r"encoder\.stages\.(\d)\.layers\.(\d)\."
TIMM = {  # Hugging Face's names → timm's, which count stages and convolutions from 1
    r"embedder\.embedder\.convolution": lambda _: "conv1",
    r"embedder\.embedder\.normalization": lambda _: "bn1",
    UNIT + r"shortcut\.convolution": lambda at: f"layer{int(at[1]) + 1}.{at[2]}.downsample.0",
    UNIT + r"shortcut\.normalization": lambda at: f"layer{int(at[1]) + 1}.{at[2]}.downsample.1",
    UNIT + r"layer\.(\d)\.convolution": lambda at: f"layer{int(at[1]) + 1}.{at[2]}.conv{int(at[3]) + 1}",
    UNIT + r"layer\.(\d)\.normalization": lambda at: f"layer{int(at[1]) + 1}.{at[2]}.bn{int(at[3]) + 1}",
}


def published(folder: Path) -> None:
    """A folder as the published ones are: timm's names of the convolutions, and a config.json that only names them."""
    file = folder / "model.safetensors"
    tensors = {}
    for key, tensor in load_file(file).items():
        for theirs, timms in TIMM.items():
            key = re.sub(theirs, timms, key)
        tensors[key] = tensor
        if key.endswith("downsample.1.running_mean"):
            tensors[key.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    save_file(tensors, file, {"format": "pt"})
    config = folder / "config.json"
    said = json.loads(config.read_text())
    del said["backbone_config"]
    older = {"backbone": "resnet18", "backbone_kwargs": {"out_indices": [1, 2, 3, 4], "in_chans": 3}}
    config.write_text(json.dumps(said | older | {"use_timm_backbone": True}))


def test_the_names_of_the_published_folders_are_read_and_written(tmp_path: Path) -> None:
    torch.manual_seed(3)
    kind, widths, depths = resnet.TIMM["resnet18"]
    theirs = made(layer_type=kind, embedding_size=64, hidden_sizes=list(widths), depths=list(depths),
                  out_features=["stage4"]).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    published(tmp_path / "theirs")
    ours = fv.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        truth, (scores, boxes) = theirs(**images()), ours(*seen(images()))
    for value, true in ((scores, truth.logits), (boxes, truth.pred_boxes)):
        torch.testing.assert_close(value, true, atol=1e-5 * float(true.abs().max()), rtol=0)

    fv.save_pretrained(ours, tmp_path / "ours")
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert "model.backbone.conv_encoder.model.layer2.0.conv1.weight" in got
    assert got.keys() == {key for key in want if not key.endswith("num_batches_tracked")}
    assert all(torch.equal(tensor, want[key]) for key, tensor in got.items())
    said = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (said["backbone"], said["use_timm_backbone"], said["backbone_config"]) == ("resnet18", True, None)
    again = fv.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config


def test_a_model_made_here_is_opened_by_hugging_face(tmp_path: Path) -> None:
    ours = detr.Detector(SMALL).eval()
    fv.save_pretrained(ours, tmp_path)
    theirs, news = hf.DetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(news.values()), news
    with torch.no_grad():
        torch.testing.assert_close(theirs(**images()).pred_boxes, ours(*seen(images())).boxes)


def test_objects_are_those_of_hugging_faces_processor() -> None:
    torch.manual_seed(3)
    model = detr.Detector(SMALL).eval()
    with torch.no_grad():
        pixels, keep = seen(images(64, 96))
        for seen_by, sizes in ((keep, [(64, 96), (42, 48)]), (None, [(64, 96)] * 2)):
            scores, boxes = model(pixels, seen_by)
            outputs = hf.models.detr.modeling_detr.DetrObjectDetectionOutput(logits=scores, pred_boxes=boxes)
            above = float(scores.softmax(-1)[..., :-1].amax(-1).median())
            true = DetrImageProcessorPil().post_process_object_detection(outputs, above, sizes)
            objects = model.detect(pixels, seen_by, above=above)
            assert sum(len(one.labels) for one in objects) == SMALL.queries
            for ours, theirs in zip(objects, true, strict=True):
                torch.testing.assert_close(tuple(ours), (theirs["scores"], theirs["labels"], theirs["boxes"]))


SMALL = detr.Config(7, 32, 1, 1, 4, 4, 48, 48, labels=5, stem=8, widths=(16, 24), depths=(1, 1))


def test_what_does_not_fit_is_refused() -> None:
    model = detr.Detector(SMALL)
    for shape in ((1, 4, 64, 64), (1, 3, 0, 64), (3, 64, 64)):
        with pytest.raises(fv.InvalidInput, match=r"wanted \[batch, 3 channels, height, width\]"):
            model(torch.zeros(shape))
    for keep in (torch.ones(1, 64, 65, dtype=torch.bool), torch.ones(1, 64, 64, dtype=torch.int64)):
        with pytest.raises(fv.InvalidInput, match=r"keep is .*: wanted a boolean for each pixel of .*1×3×64×64"):
            model(torch.zeros(1, 3, 64, 64), keep)
    bad = {
        "dim is 34: wanted a multiple of 4": {"dim": 34},
        "32 does not divide into 5 heads": {"heads": 5},
        "unknown backbone 'timm'": {"backbone": "timm"},
        "unknown unit of a ResNet 'bottle'": {"unit": "bottle"},
        "wanted one of each for every stage": {"depths": (1, 1, 1)},
        "wanted bottlenecks": {"unit": "basic", "dilated": True},
    }
    for sentence, change in bad.items():
        with pytest.raises(fv.InvalidInput, match=sentence):
            detr.Model(replace(SMALL, **change))
    with pytest.raises(fv.InvalidInput, match=r"timm has no ResNet of \('bottleneck', \(16, 24\), \(1, 1\)\)"):
        fv.save_pretrained(detr.Model(replace(SMALL, backbone="timm_backbone")), "never")
    with pytest.raises(fv.InvalidInput, match="dilated is said by files of the backbone 'timm_backbone' alone"):
        fv.save_pretrained(detr.Model(replace(SMALL, dilated=True)), "never")


def test_settings_that_mean_something_else_are_refused(tmp_path: Path) -> None:
    fv.save_pretrained(detr.Model(SMALL), tmp_path)
    config = tmp_path / "config.json"
    said = json.loads(config.read_text())
    inside = said["backbone_config"]
    bad: dict[str, dict[str, object]] = {
        "unknown backbone 'swin'": {"backbone_config": {**inside, "model_type": "swin"}},
        "unknown backbone of timm 'resnest50d'": {"backbone_config": None, "backbone": "resnest50d"},
        "output_stride is 8: wanted 16 or 32": {
            "backbone_config": {"model_type": "timm_backbone", "backbone": "resnet50", "output_stride": 8}
        },
        r"out_features is \['stage1'\]: wanted stage2 at its end": {
            "backbone_config": {**inside, "out_features": ["stage1"]}
        },
        "position_embedding_type is 'learned': this detr computes 'sine' alone": {"position_embedding_type": "learned"},
        "auxiliary_loss is True: this detr computes False alone": {"auxiliary_loss": True},
        "downsample_in_bottleneck is True": {"backbone_config": {**inside, "downsample_in_bottleneck": True}},
        "'DetrForSegmentation'": {"architectures": ["DetrForSegmentation"]},
    }
    for sentence, change in bad.items():
        config.write_text(json.dumps(said | change))
        with pytest.raises(fv.InvalidInput, match=sentence):
            fv.from_pretrained(tmp_path)
