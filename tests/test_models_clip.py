"""CLIP is Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from families import IMAGE, TEXT, right_padded
from parity import Case, check
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import foveate as fv
from foveate.models import clip, clip_towers


def made(**more: object) -> nn.Module:
    text = {**TEXT, "intermediate_size": 59, "max_position_embeddings": 23, "eos_token_id": 96, **more}
    image = {**IMAGE, "hidden_size": 36, "num_channels": 2, **more}
    config = hf.CLIPConfig(text_config=text, vision_config=image, projection_dim=29, attn_implementation="eager")
    return hf.CLIPModel(config)


def pair(width: int = 16, **more: Tensor) -> dict[str, Tensor]:
    """Two texts that end at different places, and three images."""
    inputs = right_padded()
    inputs["input_ids"][0, 13] = inputs["input_ids"][1, 9] = 96
    pixels = torch.randn(3, 2, 16, width, generator=torch.Generator().manual_seed(5))
    return {**inputs, "pixel_values": pixels, **more}


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = inputs.get("attention_mask")
    seen = None if mask is None else fv.padding(mask.bool())
    scores, images, texts = model(inputs["input_ids"], inputs["pixel_values"], seen)
    return {"logits_per_image": scores, "image_embeds": images, "text_embeds": texts}


# Both call the image's tower first.
LAYERS = {"image.blocks": "vision_model.encoder.layers", "text.blocks": "text_model.encoder.layers"}


def wide() -> dict[str, Tensor]:
    return pair(24, interpolate_pos_encoding=torch.tensor(True))


CASES = {
    "CLIP": Case(made, pair, outputs, LAYERS),
    "old end": Case(lambda: made(eos_token_id=2), pair, outputs, LAYERS),
    "gelu, wide": Case(lambda: made(hidden_act="gelu"), wide, outputs, LAYERS),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_hugging_faces(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


TEXT_SIZES = {**TEXT, "intermediate_size": 59, "max_position_embeddings": 23, "eos_token_id": 96, "projection_dim": 29}
IMAGE_SIZES = {**IMAGE, "hidden_size": 36, "num_channels": 2, "projection_dim": 29}


def tower(name: str, sizes: dict[str, object], **more: object) -> nn.Module:
    config = getattr(hf, name).config_class(**sizes, attn_implementation="eager", **more)
    return getattr(hf, name)(config)


def texts() -> dict[str, Tensor]:
    return {key: value for key, value in pair().items() if key != "pixel_values"}


def read(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
    seen = None if mask is None else fv.padding(mask.bool())
    if isinstance(model, clip_towers.TextEmbedder):
        return {"text_embeds": model(ids, seen)}
    x = model(ids, seen)
    return {"last_hidden_state": x, "pooler_output": model.pooled(x, ids)}


def seen(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    pixels = inputs["pixel_values"]
    if isinstance(model, clip_towers.ImageEmbedder):
        return {"image_embeds": model(pixels)}
    x = model(pixels)
    return {"last_hidden_state": x, "pooler_output": model.pooled(x)}


def images(width: int) -> dict[str, Tensor]:
    return {"pixel_values": pair(width)["pixel_values"]} | (
        {"interpolate_pos_encoding": torch.tensor(True)} if width > 16 else {}
    )


BARE, BODY = {"blocks": "encoder.layers"}, "body.blocks"
TOWERS = {
    "text": Case(lambda: tower("CLIPTextModel", TEXT_SIZES), texts, read, BARE),
    "text, projected": Case(
        lambda: tower("CLIPTextModelWithProjection", TEXT_SIZES | {"eos_token_id": 2, "hidden_act": "gelu"}),
        texts, read, {BODY: "text_model.encoder.layers"},
    ),
    "image": Case(lambda: tower("CLIPVisionModel", IMAGE_SIZES), lambda: images(16), seen, BARE),
    "image, projected, wide": Case(
        lambda: tower("CLIPVisionModelWithProjection", IMAGE_SIZES), lambda: images(24), seen,
        {BODY: "vision_model.encoder.layers"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_of_its_own_is_hugging_faces(name: str, tmp_path: Path) -> None:
    check(TOWERS[name], tmp_path)


@pytest.mark.parametrize(("name", "prefix"), [("text", "text_model."), ("image", "vision_model.")])
def test_the_names_of_older_files_are_read(name: str, prefix: str, tmp_path: Path) -> None:
    TOWERS[name].make().save_pretrained(tmp_path)
    want = fv.from_pretrained(tmp_path).state_dict()
    old = {prefix + key: x.clone() for key, x in load_file(tmp_path / "model.safetensors").items()}
    save_file(old | {f"{prefix}embeddings.position_ids": torch.arange(23)[None]}, tmp_path / "model.safetensors")
    found = fv.from_pretrained(tmp_path).state_dict()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[key], want[key]) for key in want)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(fv.InvalidInput, match="100 pixels do not divide into patches of 16"):
        clip.Config(image=100, patch=16)
    with pytest.raises(fv.InvalidInput, match="activation"):
        clip.Config(activation="cubic")
    model = clip.Model(clip.Config(97, 8, 32, 1, 4, 48, image=8, patch=4, dim=32, layers=1, heads=4))
    with pytest.raises(fv.InvalidInput, match="9 tokens but the model 8 positions"):
        model.embed_texts(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(fv.InvalidInput, match="wanted 3 channels, and sides that are multiples of 4"):
        model.embed_images(torch.zeros(1, 3, 8, 9))
