"""DiT and PixArt-α are those of diffusers, whose folders are read and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from parity import Case, _close, _random, _same
from torch import Tensor, nn

import foveate as fv
from foveate.models import dit, pixart

SIZES = {"num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 5, "out_channels": 7, "num_layers": 2,
         "sample_size": 10, "patch_size": 2}  # fmt: skip
WORDS, CAPTION = 11, 13


def drawn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_texts(**more: Any) -> nn.Module:
    sizes = {**SIZES, "cross_attention_dim": 24, "caption_channels": CAPTION, **more}
    return diffusers.PixArtTransformer2DModel(**sizes)


def of_classes(**more: Any) -> nn.Module:
    return diffusers.DiTTransformer2DModel(**{**SIZES, "num_embeds_ada_norm": 9, **more})


def texts(height: int = 10, width: int = 10, size: int = CAPTION) -> dict[str, Any]:
    """Two noisy images with a caption each, the second of seven words."""
    keep = torch.ones(2, WORDS, dtype=torch.int64)
    keep[1, 7:] = 0
    return {
        "hidden_states": drawn(2, 5, height, width), "timestep": torch.tensor([3, 989]),
        "encoder_hidden_states": drawn(2, WORDS, size, seed=6), "encoder_attention_mask": keep,
    }  # fmt: skip


def wide_texts() -> dict[str, Any]:
    """Not of the size of the training."""
    return texts(6, 14)


def short_texts() -> dict[str, Any]:
    """Captions as attention reads them."""
    return texts(size=17)


def sized_texts() -> dict[str, Any]:
    """Images whose height and width are told."""
    sizes = torch.tensor([[31.0, 57.0], [800.0, 1011.0]])
    return {**texts(6, 14), "added_cond_kwargs": {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}}


def classes(side: int = 10) -> dict[str, Any]:
    """Two noisy images, one of class 4, the other of none."""
    return {"hidden_states": drawn(2, 5, side, side), "timestep": torch.tensor([3, 989]),
            "class_labels": torch.tensor([4, 9])}  # fmt: skip


def large_classes() -> dict[str, Any]:
    return classes(14)


def call(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    images, times = inputs["hidden_states"], inputs["timestep"]
    if isinstance(model, dit.ClassToImage):
        return {"sample": model(images, times, inputs["class_labels"])}
    keep = inputs.get("encoder_attention_mask")
    pattern = None if keep is None else fv.padding(keep.bool())
    size = inputs["added_cond_kwargs"]["resolution"] if "added_cond_kwargs" in inputs else None
    return {"sample": model(images, times, inputs["encoder_hidden_states"], pattern, size=size)}


def case(make: Callable[..., nn.Module], inputs: Callable[[], dict[str, Any]], **more: Any) -> Case:
    mask = ("encoder_attention_mask",)
    return Case(lambda: make(**more), inputs, call, {"blocks": "transformer_blocks"}, ("to_q", "to_k"), mask)


CASES = {
    "texts": case(of_texts, texts),
    "texts, wide": case(of_texts, wide_texts),
    "texts, sized": case(of_texts, sized_texts, use_additional_conditions=True),
    "texts, sized by the size of the training": case(of_texts, sized_texts, sample_size=128),
    "texts, stretched": case(of_texts, texts, interpolation_scale=3, sample_size=14),
    "texts, no linear maps of the caption": case(of_texts, short_texts, cross_attention_dim=17, caption_channels=None),
    "texts, without biases, no variance": case(of_texts, texts, attention_bias=False, out_channels=None),
    "classes": case(of_classes, classes),
    "classes, large": case(of_classes, large_classes),
    "classes, no variance": case(of_classes, classes, out_channels=None, attention_bias=False, patch_size=1),
}


def top_weights(model: nn.Module, inputs: dict[str, Any]) -> dict[str, float]:
    """The mean of the largest weight of every row, of self- and of cross-attention, worked out by hand."""
    seen: dict[str, Tensor] = {}
    hooks = [
        part.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out.unflatten(-1, (3, -1))}))
        for name, part in model.named_modules()
        if name.endswith(("to_q", "to_k"))
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    tops: dict[str, list[Tensor]] = {}
    for name, q in seen.items():
        if name.endswith("to_q"):
            scores = torch.einsum("bqhd,bkhd->bhqk", q, seen[name[:-1] + "k"]) / 8**0.5
            if "attn2" in name:
                scores.masked_fill_(inputs["encoder_attention_mask"][:, None, None] == 0, float("-inf"))
            tops.setdefault(name.split(".")[-2], []).append(scores.softmax(-1).amax(-1))
    return {name: float(torch.cat([x.flatten() for x in found]).mean()) for name, found in tops.items()}


def made(of: Case) -> nn.Module:
    """Random weights, and attention far from even."""
    torch.manual_seed(3)
    theirs = _random(of.make()).eval()
    for _ in range(20):
        tops = top_weights(theirs, of.inputs())
        if min(tops.values()) > 0.35:
            break
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                dull = any(top <= 0.35 and f".{part}." in name for part, top in tops.items())
                if dull and any(part in name for part in of.sharp):
                    parameter.mul_(1.3)
    return theirs


@pytest.mark.parametrize("name", CASES)
def test_it_is_that_of_diffusers(name: str, tmp_path: Path) -> None:
    of = CASES[name]
    theirs = made(of)
    assert min(top_weights(theirs, of.inputs()).values()) > 0.3
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fv.from_pretrained(tmp_path / "theirs")
    assert not ours.training
    bare = {key: value for key, value in of.inputs().items() if key not in of.mask}
    for inputs in (of.inputs(), bare) if len(bare) < len(of.inputs()) else (bare,):
        _same(of, ours, theirs, inputs)
    fv.save_pretrained(ours, tmp_path / "ours")
    back, news = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(news.values()), news
    want, found = theirs.state_dict(), back.state_dict()
    assert want.keys() == found.keys()
    assert [key for key in want if not torch.equal(want[key], found[key])] == []
    assert {k: v for k, v in back.config.items() if k[0] != "_"} == {
        k: v for k, v in theirs.config.items() if k[0] != "_"
    }
    assert torch.equal(back(**of.inputs()).sample, theirs(**of.inputs()).sample)


def test_words_that_are_hidden_do_not_count(tmp_path: Path) -> None:
    made(CASES["texts"]).save_pretrained(tmp_path)
    model, inputs = fv.from_pretrained(tmp_path), texts()
    before = call(model, inputs)["sample"]
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].clone()
    inputs["encoder_hidden_states"][1, 7:] = 1e4
    assert torch.equal(call(model, inputs)["sample"], before)
    inputs["encoder_hidden_states"][1, 6] = 0
    assert not torch.equal(call(model, inputs)["sample"][1], before[1])


# ----------------------------------------------------------------------------------------------------------- folders


def test_shards_of_either_side_are_read_by_the_other(tmp_path: Path) -> None:
    theirs, inputs = made(CASES["texts"]), texts()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours = fv.from_pretrained(tmp_path / "theirs")
    _close("sample", call(ours, inputs)["sample"], theirs(**inputs).sample, {})
    fv.save_pretrained(ours, tmp_path / "ours", shard_size=20_000)
    files = {path.name for path in (tmp_path / "ours").iterdir()}
    assert {"config.json", "diffusion_pytorch_model.safetensors.index.json"} < files
    assert all(name == "config.json" or name.startswith("diffusion_pytorch_model") for name in files)
    back = type(theirs).from_pretrained(tmp_path / "ours")
    assert torch.equal(back(**inputs).sample, theirs(**inputs).sample)
    fv.save_pretrained(ours, tmp_path / "ours")  # one file takes the place of the shards
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors"
    }  # fmt: skip
    back = type(theirs).from_pretrained(tmp_path / "ours")
    assert torch.equal(back(**inputs).sample, theirs(**inputs).sample)


def test_bin_files_of_diffusers(tmp_path: Path) -> None:
    theirs = made(CASES["classes"])
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "diffusion_pytorch_model.bin").is_file()
    _close("sample", call(fv.from_pretrained(tmp_path), classes())["sample"], theirs(**classes()).sample, {})


def _said(folder: Path, **more: Any) -> None:
    said = json.loads((folder / "config.json").read_text()) | more
    (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not ...}))


@pytest.mark.parametrize("name", ["texts", "classes"])
def test_the_class_that_diffusers_had_for_both_is_known(name: str, tmp_path: Path) -> None:
    """As in the repositories of PixArt-α and DiT, whose files have a buffer more."""
    theirs, of = made(CASES[name]), CASES[name]
    if name == "texts":
        theirs.caption_projection.register_buffer("y_embedding", torch.randn(7, CAPTION))
    theirs.save_pretrained(tmp_path / "theirs")
    _said(tmp_path / "theirs", _class_name="Transformer2DModel", double_self_attention=False, num_vector_embeds=None)
    ours = fv.from_pretrained(tmp_path / "theirs")
    fv.save_pretrained(ours, tmp_path / "ours")
    assert torch.equal(
        type(theirs).from_pretrained(tmp_path / "ours")(**of.inputs()).sample, theirs(**of.inputs()).sample
    )
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["_class_name"] == type(theirs).__name__


BROKEN = {
    "class": ({"_class_name": "UNet2DConditionModel"}, "unknown family 'UNet2DConditionModel': .*PixArtTransformer"),
    "no class": ({"_class_name": ...}, "unknown family None"),
    "the class for both": (
        {"_class_name": "Transformer2DModel", "norm_type": "layer_norm"}, "unknown family 'Transformer2DModel'"
    ),
    "norm": ({"norm_type": "ada_norm"}, "norm_type is 'ada_norm': this PixArtTransformer2DModel computes 'ada"),
    "activation": ({"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
    "no caption": ({"cross_attention_dim": None}, "cross_attention_dim is None: wanted int"),
    "patches": ({"patch_size": 3}, "images of 10 pixels do not divide into patches of 3"),
    "heads": ({"attention_head_dim": 7}, "3 heads of 7 are 21 entries: wanted a multiple of 4"),
    "context": ({"cross_attention_dim": 20}, "captions are mapped to 24 entries but read with 20"),
    "thirds": (
        {"num_attention_heads": 2, "cross_attention_dim": 16, "use_additional_conditions": True},
        "16 entries do not divide into thirds",
    ),
    "layers": ({"num_layers": 3}, "16 missing|missing: transformer_blocks.2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_sentence(name: str, tmp_path: Path) -> None:
    of_texts().save_pretrained(tmp_path)
    more, message = BROKEN[name]
    _said(tmp_path, **more)
    with pytest.raises(fv.InvalidInput, match=message) as caught:
        fv.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_weights_and_a_pipeline_are_one_sentence_each(tmp_path: Path) -> None:
    of_texts().save_pretrained(tmp_path / "transformer")
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(fv.InvalidInput, match=r"no weights: wanted diffusion_pytorch_model\.safetensors, "):
        fv.from_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(fv.InvalidInput, match=r"is a pipeline of diffusers: wanted one of its parts, as .*transformer"):
        fv.from_pretrained(tmp_path)


# -------------------------------------------------------------------------------------------------------- the modules

TEXT = pixart.Config(10, channels=5, heads=3, head_dim=8, layers=2, caption_dim=CAPTION, context_dim=24)
CLASS = dit.Config(10, channels=5, heads=3, head_dim=8, layers=2, classes=9)


def test_each_begins_with_no_noise_and_texts_with_no_caption() -> None:
    torch.manual_seed(3)
    of_class, of_text = dit.ClassToImage(CLASS), pixart.TextToImage(TEXT)
    assert not call(of_class, classes())["sample"].any()
    assert not call(of_text, texts())["sample"].any()
    x, condition = torch.randn(2, 25, 24), torch.randn(2, 24)
    assert torch.equal(of_class.blocks[0](x, condition, None), x)
    captions = torch.randn(2, 2, WORDS, 24)
    same, other = (of_text.blocks[0](x, torch.zeros(2, 6, 24), caption, None, None) for caption in captions)
    assert torch.equal(same, other)


def test_patches_see_those_that_a_pattern_allows() -> None:
    torch.manual_seed(3)
    for model, inputs in ((dit.ClassToImage(CLASS), classes()), (pixart.TextToImage(TEXT), texts())):
        _random(model)
        changed = inputs["hidden_states"].clone()
        changed[:, :, 8:] += 1  # the last row of patches
        given = [inputs["timestep"], inputs.get("class_labels", inputs.get("encoder_hidden_states"))]
        name = "pattern" if isinstance(model, dit.ClassToImage) else "image_pattern"
        for pattern, same in ((fv.neighborhood(1, 5), True), (fv.neighborhood(3, 5), False)):
            before, after = (model(x, *given, **{name: pattern}) for x in (inputs["hidden_states"], changed))
            assert torch.equal(before[:, :, :4], after[:, :, :4]) is same  # two layers reach two rows
            assert not torch.equal(before[:, :, 4:], after[:, :, 4:])


@pytest.mark.parametrize("name", ["texts, sized", "classes"])
def test_in_bfloat16_it_is_as_near_as_that_of_diffusers(name: str, tmp_path: Path) -> None:
    of, theirs = CASES[name], made(CASES[name])
    theirs.save_pretrained(tmp_path)
    whole = theirs(**of.inputs()).sample
    half = fv.from_pretrained(tmp_path, dtype=torch.bfloat16)
    inputs = of.inputs()
    for key in ("hidden_states", "encoder_hidden_states"):
        if key in inputs:
            inputs[key] = inputs[key].bfloat16()
    found, other = call(half, of.inputs())["sample"], theirs.bfloat16()(**inputs).sample
    assert found.dtype == torch.bfloat16
    assert (found - whole).abs().max() <= 2 * (other - whole).abs().max()


def test_what_does_not_fit_is_said() -> None:
    model, sized, of_class = (
        pixart.TextToImage(TEXT),
        pixart.TextToImage(replace(TEXT, sized=True)),
        dit.ClassToImage(CLASS),
    )
    images, times, caption = drawn(2, 5, 10, 10), torch.tensor([3, 989]), drawn(2, WORDS, CAPTION)
    wanted = r"wanted \[batch, 5 channels, height, width\], and sides that are multiples of 2"
    for shape in ((2, 4, 10, 10), (2, 5, 10, 11), (2, 5, 9, 10), (5, 10, 10)):
        for network, told in ((model, caption), (of_class, times)):
            with pytest.raises(fv.InvalidInput, match=f"{'×'.join(map(str, shape))}>: {wanted}"):
                network(torch.zeros(shape), times, told)
    for wrong in (torch.tensor(3), torch.tensor([1, 2, 3]), torch.tensor([[1], [2]])):
        for network, told in ((model, caption), (of_class, times)):
            with pytest.raises(fv.InvalidInput, match=r"times is <.*>: wanted one for each image, \[2\]"):
                network(images, wrong, told)
        with pytest.raises(fv.InvalidInput, match=r"labels is <.*>: wanted one for each image, \[2\]"):
            of_class(images, times, wrong)
    for nothing in (None, caption[:1], caption[0], caption[..., :5]):
        with pytest.raises(fv.InvalidInput, match=r"caption is .*: wanted \[2, words, 13\] of a text encoder"):
            model(images, times, nothing)
    for nothing in (None, torch.ones(2), torch.ones(2, 3)):
        with pytest.raises(fv.InvalidInput, match=r"size is .*: wanted height and width of each image, \[2, 2\]"):
            sized(images, times, caption, size=nothing)
    with pytest.raises(fv.InvalidInput, match="the model is not told sizes: leave it out"):
        model(images, times, caption, size=torch.ones(2, 2))


def test_presets_are_as_large_as_the_papers_say() -> None:
    """DiT's paper has one condition for all blocks, diffusers a copy for each."""
    with torch.device("meta"):
        large = {name: dit.ClassToImage(config) for name, config in dit.PRESETS.items()}
        text = pixart.TextToImage(pixart.PRESETS["pixart-alpha-1024"])
    found = {name: _millions(model) - _millions(model.conditions[1:]) for name, model in large.items()}
    assert found == {"dit-s-2": 33, "dit-b-2": 130, "dit-l-2": 458, "dit-xl-2": 675, "dit-xl-2-512": 675}
    assert _millions(text) == 611


def _millions(model: nn.Module) -> int:
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6)
