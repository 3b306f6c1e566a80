"""Llama, Mistral, Qwen 2 and Qwen 3 are Hugging Face's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import GROUPED, left_padded, right_padded
from parity import Case, check, check_generation
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import foveate as fv
from foveate.checkpoint.rope_config import read_scaling, write_scaling
from foveate.models import llama


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


def refused(folder: Path, said: str, **config: object) -> None:
    """A folder whose config.json says something more is refused in one sentence."""
    fv.save_pretrained(llama.Model(SMALL), folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(fv.InvalidInput, match=said) as caught:
        fv.from_pretrained(folder)
    assert "\n" not in str(caught.value)


SMALL = llama.Config(97, 64, 32, 2, 4, 2, hidden=48)
BAD = {
    "unknown rope_type 'longrope'": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
    "without factor": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
    "partial_rotary_factor": {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}},
    "rotary dim is 7": {"head_dim": 7},
    "hidden_act is 'gelu': this llama computes 'silu' alone": {"hidden_act": "gelu"},
    "4 heads are no multiple of 3 key heads": {"num_key_value_heads": 3},
}


@pytest.mark.parametrize("said", BAD)
def test_a_config_that_is_not_computed_here_is_one_sentence(said: str, tmp_path: Path) -> None:
    refused(tmp_path, said, **BAD[said])


def test_sizes_that_do_not_fit_are_refused_when_they_are_written_down() -> None:
    with pytest.raises(fv.InvalidInput, match="is for a model of 32 positions: this one has 64"):
        replace(SMALL, scaling=fv.rotary.DynamicNTK(2.0, 32))
    with pytest.raises(fv.InvalidInput, match=r"layer_types is .* for each of 2 layers"):
        replace(SMALL, layer_types=(llama.SLIDING, llama.FULL))
    with pytest.raises(fv.InvalidInput, match="query_key_norm is False: a qwen3 has True"):
        fv.save_pretrained(llama.Model(replace(SMALL, kind="qwen3")), "nowhere")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_is_not_said_here_is_said_outright_there(kind: str, tmp_path: Path) -> None:
    """A Config of few words is a model of the same sizes to Hugging Face."""
    few = {"qwen2": {"bias": True, "out_bias": False}, "qwen3": {"query_key_norm": True}}.get(kind, {})
    window = {} if kind == "llama" else {"window": 5}
    config = llama.Config(97, 64, 32, 2, 4, hidden=48, kind=kind, **few, **window)
    model = llama.LanguageModel(config).eval()
    fv.save_pretrained(model, tmp_path)
    theirs, news = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(news.values()), news
    tokens = left_padded()["input_ids"]
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=0)


def test_an_older_config_means_the_same(tmp_path: Path) -> None:
    """Before 2025 the turns were said in two places."""
    law = fv.rotary.YaRN(4.0, 16, beta_fast=24.0)
    config = replace(SMALL, head_dim=8, base=5e5, scaling=law)
    fv.save_pretrained(llama.Model(config), tmp_path)
    file = tmp_path / "config.json"
    said = json.loads(file.read_text())
    rope = said.pop("rope_parameters")
    base = rope.pop("rope_theta")
    assert rope == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 24.0}
    file.write_text(json.dumps(said | {"rope_theta": base, "rope_scaling": {"type": rope.pop("rope_type"), **rope}}))
    assert fv.from_pretrained(tmp_path).config == config


def test_yarn_with_two_scales_is_sharper_by_their_ratio() -> None:
    """DeepSeek's words for it."""
    rope = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "rope_theta": 1e4}
    both = read_scaling({**rope, "mscale": 0.7, "mscale_all_dim": 1.3})
    config = hf.LlamaConfig(rope_parameters={**rope, "mscale": 0.7, "mscale_all_dim": 1.3})
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    assert both.attention_factor == pytest.approx(factor)
    assert read_scaling(write_scaling(both)) == both
