"""T5 is Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from families import pairs, right_padded
from parity import Case, check, check_translation
from torch import Tensor, nn

import foveate as fv
from foveate.models import t5

SMALL = {"vocab_size": 97, "d_model": 48, "d_kv": 10, "d_ff": 59, "num_layers": 3, "num_decoder_layers": 2,
         "num_heads": 6, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 13,
         "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "attn_implementation": "eager"}  # fmt: skip


def kept(inputs: dict[str, Tensor], name: str) -> fv.Pattern | None:
    return fv.padding(inputs[name].bool()) if name in inputs else None


def called(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    patterns = kept(inputs, "attention_mask"), kept(inputs, "decoder_attention_mask")
    return model(inputs["input_ids"], inputs["decoder_input_ids"], *patterns)


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": called(model, inputs)}


def base(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    seen = kept(inputs, "attention_mask")
    context = model.encode(inputs["input_ids"], seen)
    decoded = model.decode(inputs["decoder_input_ids"], context, kept(inputs, "decoder_attention_mask"), seen)
    return {"last_hidden_state": decoded, "encoder_last_hidden_state": context}


def encoded(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"last_hidden_state": model(inputs["input_ids"], kept(inputs, "attention_mask"))}


def of(name: str, **more: object) -> nn.Module:
    return getattr(hf, name)(hf.T5Config(**{**SMALL, **more}))


def newer() -> nn.Module:
    """T5 1.1, whose last map is a matrix of its own."""
    model = of("T5ForConditionalGeneration", feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(torch.empty(97, 48))
    return model


SHARP = ("Attention.q", "Attention.k")
MASKS = ("attention_mask", "decoder_attention_mask")
BOTH = {"encoder.blocks": "encoder.block", "decoder.blocks": "decoder.block"}
HEAD = {f"body.{ours}": theirs for ours, theirs in BOTH.items()}
CASES = {
    "t5": Case(lambda: of("T5ForConditionalGeneration"), pairs, logits, HEAD, SHARP, MASKS),
    "t5 1.1": Case(newer, pairs, logits, HEAD, SHARP, MASKS),
    "base": Case(lambda: of("T5Model", feed_forward_proj="gated-gelu"), pairs, base, BOTH, SHARP, MASKS),
    "encoder": Case(
        lambda: of("T5EncoderModel"), right_padded, encoded, {"encoder.blocks": "encoder.block"}, SHARP
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_hugging_faces(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


@pytest.mark.parametrize("name", ["t5 1.1"])
def test_the_texts_it_writes_are_hugging_faces(name: str, tmp_path: Path) -> None:
    check_translation(CASES[name], tmp_path, new=40)


def test_the_source_is_projected_once() -> None:
    model = t5.LanguageModel(t5.Config(97, 32, 2, None, 4, 8, 48, end=None)).eval()
    projected = []
    model.body.decoder.blocks[0].cross.part.key.register_forward_hook(lambda *call: projected.append(call))
    model.generate(torch.tensor([[3, 1, 4, 1, 5]]), new=6)
    assert len(projected) == 1
