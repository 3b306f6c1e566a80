"""LLaVA is Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from families import GROUPED, IMAGE, image_in_text
from parity import Case, _random, check
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import foveate as fv
from foveate.models import llava


def made(**more: object) -> nn.Module:
    text = hf.LlamaConfig(**{**GROUPED, **more})
    vision = hf.CLIPVisionConfig(**{**IMAGE, "hidden_size": 36, "num_hidden_layers": 3})
    config = hf.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=96, attn_implementation="eager",
        multimodal_projector_bias=not more,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    mask, pixels = inputs.get("attention_mask"), inputs["pixel_values"]
    seen = None if mask is None else fv.padding(mask.bool())
    return {
        "logits": model(inputs["input_ids"], pixels, seen),
        "image_hidden_states": model.look(pixels).flatten(0, 1),
    }


LAYERS = {"text.body.blocks": "model.language_model.layers"}
CASES = {
    "LLaVA": Case(made, image_in_text, outputs, LAYERS),
    "tied": Case(lambda: made(tie_word_embeddings=True, attention_bias=True), image_in_text, outputs, LAYERS),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_hugging_faces(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


def test_each_patch_stands_in_its_own_place(tmp_path: Path) -> None:
    """One text with two images, a text with one and a text with none."""
    torch.manual_seed(3)
    theirs = _random(made()).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(3, 96, (3, 37), generator=torch.Generator().manual_seed(5))
    ids[0, 2:18] = ids[0, 20:36] = ids[1, 11:27] = 96
    pixels = torch.randn(3, *image_in_text()["pixel_values"].shape[1:], generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=pixels).logits
        ours = fv.from_pretrained(tmp_path)
        found, other = ours(ids, pixels), ours(ids, pixels.flip(0))
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()
    changed = (other - found).abs().amax((1, 2))
    assert (changed[:2] > 1e-2).all()
    assert changed[2] <= 1e-5


def test_the_tokens_it_generates_are_hugging_faces(tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs, inputs = _random(made()).eval(), image_in_text()
    theirs.generation_config.eos_token_id = None
    theirs.config.text_config.eos_token_id = None
    theirs.save_pretrained(tmp_path)
    ours = fv.from_pretrained(tmp_path)
    want = theirs.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert len(set(want[0, -20:].tolist())) > 4
    keep = inputs["attention_mask"].bool()
    assert torch.equal(ours.generate(inputs["input_ids"], inputs["pixel_values"], new=20, keep=keep), want)


def test_the_towers_names_of_older_files_are_read(tmp_path: Path) -> None:
    theirs = made()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {key.replace("vision_tower.", "vision_tower.vision_model."): x for key, x in load_file(file).items()}
    want = fv.from_pretrained(tmp_path).state_dict()
    save_file({key: x.clone() for key, x in old.items()}, tmp_path / "old", {"format": "pt"})
    (tmp_path / "old").replace(file)
    found = fv.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[key], want[key]) for key in want)


def test_a_text_with_too_few_places_is_refused() -> None:
    config = llava.Config(
        97, dim=32, layers=1, heads=4, hidden=48, image_token=96, image=8, patch=4, image_dim=36, image_layers=2,
        image_heads=4, image_hidden=48,
    )  # fmt: skip
    with pytest.raises(fv.InvalidInput, match="3 places for the 4 patches of 1 images"):
        llava.LanguageModel(config)(torch.tensor([[5, 96, 96, 96]]), torch.zeros(1, 3, 8, 8))
