"""Llama, Mistral, Qwen 2 and Qwen 3 are Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as hf
from families import GROUPED, left_padded, right_padded
from parity import Case, check, check_generation
from torch import Tensor, nn

import foveate as fv


def seen(inputs: dict[str, Tensor]) -> fv.Pattern | None:
    return fv.padding(inputs["attention_mask"].bool()) if "attention_mask" in inputs else None


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": model(inputs["input_ids"], seen(inputs))}


def hidden(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"last_hidden_state": model(inputs["input_ids"], seen(inputs))}


def of(name: str, **more: object) -> nn.Module:
    family = name.split("For")[0].removesuffix("Model")
    config = getattr(hf, f"{family}Config")
    return getattr(hf, name)(config(**{**GROUPED, "attn_implementation": "eager", **more}))


def rope(kind: str, **more: float) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


HEAD = {"body.blocks": "model.layers"}
NORMS = ("q_norm", "k_norm")
CASES = {
    "llama": Case(lambda: of("LlamaForCausalLM"), left_padded, logits, HEAD),
    "llama with biases, tied": Case(
        lambda: of("LlamaForCausalLM", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=10),
        left_padded, logits, HEAD,
    ),
    "llama 3": Case(
        lambda: of("LlamaModel", **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                        original_max_position_embeddings=13)),
        left_padded, hidden, {"blocks": "layers"},
    ),
    "llama, linear": Case(lambda: of("LlamaModel", **rope("linear", factor=3.0)), left_padded, hidden,
                          {"blocks": "layers"}),
    "llama, dynamic": Case(
        lambda: of("LlamaModel", **rope("dynamic", factor=3.0), max_position_embeddings=11), left_padded, hidden,
        {"blocks": "layers"},
    ),
    "labels": Case(
        lambda: of("LlamaForSequenceClassification", num_labels=5), right_padded, logits, HEAD
    ),
    "mistral": Case(lambda: of("MistralForCausalLM", sliding_window=5), left_padded, logits, HEAD),
    "qwen 2": Case(lambda: of("Qwen2ForCausalLM"), left_padded, logits, HEAD),
    "qwen 2 with windows": Case(
        lambda: of("Qwen2Model", use_sliding_window=True, sliding_window=5, max_window_layers=1), left_padded, hidden,
        {"blocks": "layers"},
    ),
    "qwen 3": Case(
        lambda: of("Qwen3ForCausalLM", head_dim=10, **rope("yarn", factor=4.0, original_max_position_embeddings=16)),
        left_padded, logits, HEAD, NORMS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_hugging_faces(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


@pytest.mark.parametrize("name", ["llama with biases, tied", "mistral", "qwen 3"])
def test_the_tokens_it_generates_are_hugging_faces(name: str, tmp_path: Path) -> None:
    check_generation(CASES[name], tmp_path, new=40)
