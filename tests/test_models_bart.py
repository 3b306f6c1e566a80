"""BART and Marian are Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import PAIR, Inputs, pairs, right_padded
from parity import Case, check, check_translation
from torch import Tensor, nn

import foveate as fv
from foveate.models import bart

SMALL = {**PAIR, "decoder_layers": 3, "attn_implementation": "eager"}


def kept(inputs: dict[str, Tensor], name: str) -> fv.Pattern | None:
    return fv.padding(inputs[name].bool()) if name in inputs else None


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    patterns = kept(inputs, "attention_mask"), kept(inputs, "decoder_attention_mask")
    return {"logits": model(inputs["input_ids"], inputs["decoder_input_ids"], *patterns)}


def base(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    seen = kept(inputs, "attention_mask")
    context = model.encode(inputs["input_ids"], seen)
    decoded = model.decode(inputs["decoder_input_ids"], context, kept(inputs, "decoder_attention_mask"), seen)
    return {"last_hidden_state": decoded, "encoder_last_hidden_state": context}


def labels(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": model(inputs["input_ids"], kept(inputs, "attention_mask"))}


def ended() -> Inputs:
    """Two texts that end with the token that says so."""
    inputs = right_padded()
    last = inputs["attention_mask"].sum(1, keepdim=True) - 1
    return {**inputs, "input_ids": inputs["input_ids"].scatter(1, last, 2)}


def of(name: str, **more: object) -> nn.Module:
    config = hf.MarianConfig if name.startswith("Marian") else hf.BartConfig
    model = getattr(hf, name)(config(**{**SMALL, **more}))
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_(0, 0.1)
    return model


MASKS = ("attention_mask", "decoder_attention_mask")
BOTH = {"encoder.blocks": "encoder.layers", "decoder.blocks": "decoder.layers"}
HEAD = {f"body.{ours}": f"model.{theirs}" for ours, theirs in BOTH.items()}
PROJECTIONS = ("q_proj", "k_proj")
CASES = {
    "bart": Case(lambda: of("BartForConditionalGeneration"), pairs, logits, HEAD, mask=MASKS),
    "bart, base": Case(lambda: of("BartModel", scale_embedding=True, activation_function="relu"), pairs, base, BOTH,
                       mask=MASKS),
    "labels": Case(lambda: of("BartForSequenceClassification", num_labels=5), ended, labels, HEAD),
    "marian": Case(
        lambda: of("MarianMTModel", scale_embedding=True, activation_function="swish"), pairs, logits, HEAD, mask=MASKS
    ),
    "marian, two vocabularies": Case(
        lambda: of("MarianMTModel", share_encoder_decoder_embeddings=False, decoder_vocab_size=101), pairs, logits,
        HEAD, mask=MASKS,
    ),
    "marian, base": Case(
        lambda: of("MarianModel"), pairs, base, BOTH, mask=MASKS,
        absent=frozenset(f"{side}.embed_positions.weight" for side in ("encoder", "decoder")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_hugging_faces(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


WRITING = {
    "bart": (
        lambda: of(
            "BartForConditionalGeneration",
            decoder_layers=2,
            forced_eos_token_id=2,
            scale_embedding=True,
        ),
        lambda token: {"forced_bos_token_id": 7},
    ),
    "marian": (
        lambda: of("MarianMTModel", decoder_layers=2, forced_eos_token_id=2, scale_embedding=True),
        lambda token: {"bad_words_ids": [[0], [token]]},
    ),
}


@pytest.mark.parametrize("name", WRITING)
def test_the_texts_it_writes_are_hugging_faces(name: str, tmp_path: Path) -> None:
    make, settings = WRITING[name]
    check_translation(Case(make, pairs, logits, HEAD, mask=MASKS), tmp_path, 40, settings)


def test_a_text_longer_than_the_positions_is_refused() -> None:
    model = bart.Model(bart.Config(97, None, 8, 32, 2, 2, 4, 4, 48, 48))
    with pytest.raises(fv.InvalidInput, match="9 tokens but the model 8 positions"):
        model(torch.zeros(1, 9, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))


def test_what_generation_config_does_not_say_is_not_so(tmp_path: Path) -> None:
    """Where it is there, Hugging Face reads nothing of the kind from config.json."""
    theirs = hf.BartForConditionalGeneration(hf.BartConfig(**{**SMALL, "forced_eos_token_id": 9}))
    theirs.save_pretrained(tmp_path)
    assert fv.from_pretrained(tmp_path).config.last == 9
    file = tmp_path / "generation_config.json"
    said = json.loads(file.read_text())
    said.pop("forced_eos_token_id")
    file.write_text(json.dumps(said))
    assert hf.BartForConditionalGeneration.from_pretrained(tmp_path).generation_config.forced_eos_token_id is None
    assert fv.from_pretrained(tmp_path).config.last is None
