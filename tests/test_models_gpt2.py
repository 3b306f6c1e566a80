"""GPT-2 is Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from families import left_padded, right_padded
from parity import Case, check, check_generation
from torch import Tensor, nn

import foveate as fv
from foveate.models import gpt2

SMALL = {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0, "attn_implementation": "eager"}  # fmt: skip


def seen(inputs: dict[str, Tensor]) -> fv.Pattern | None:
    return fv.padding(inputs["attention_mask"].bool()) if "attention_mask" in inputs else None


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": model(inputs["input_ids"], seen(inputs))}


def hidden(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"last_hidden_state": model(inputs["input_ids"], seen(inputs))}


def of(name: str, **more: object) -> nn.Module:
    return getattr(hf, name)(hf.GPT2Config(**{**SMALL, **more}))


HEAD = {"body.blocks": "transformer.h"}
CASES = {
    "words": Case(lambda: of("GPT2LMHeadModel"), left_padded, logits, HEAD, ("c_attn",)),
    "untied": Case(
        lambda: of("GPT2LMHeadModel", tie_word_embeddings=False, n_inner=59, activation_function="gelu"),
        left_padded, logits, HEAD, ("c_attn",),
    ),
    "base": Case(lambda: of("GPT2Model"), left_padded, hidden, {"blocks": "h"}, ("c_attn",)),
    "labels": Case(
        lambda: of("GPT2ForSequenceClassification", num_labels=5), right_padded, logits, HEAD, ("c_attn",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_hugging_faces(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


def test_the_tokens_it_generates_are_hugging_faces(tmp_path: Path) -> None:
    check_generation(CASES["untied"], tmp_path, new=40)


def test_the_cache_is_exact_a_piece_at_a_time() -> None:
    model = gpt2.LanguageModel(gpt2.Config(vocabulary=97, positions=64, dim=48, layers=2, heads=6)).eval()
    tokens = left_padded()["input_ids"]
    whole = model(tokens)
    cache = fv.KeyValueCache(2)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split([5, 1, 1, 7, 3], 1)]
    assert cache.length == 17
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)


def test_a_text_longer_than_the_positions_is_refused() -> None:
    model = gpt2.Model(gpt2.Config(vocabulary=97, positions=8, dim=16, layers=1, heads=2))
    with pytest.raises(fv.InvalidInput, match="9 tokens but the model 8 positions"):
        model(torch.zeros(1, 9, dtype=torch.int64))
