"""Gemma 2 and Gemma 3 are Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers as hf
from families import GROUPED, left_padded
from parity import Case, check, check_generation
from torch import Tensor, nn

import foveate as fv
from foveate.models import gemma

SMALL = {**GROUPED, "head_dim": 8, "sliding_window": 5, "attn_implementation": "eager"}
TURNS = {
    "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 3e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}


def seen(inputs: dict[str, Tensor]) -> fv.Pattern | None:
    return fv.padding(inputs["attention_mask"].bool()) if "attention_mask" in inputs else None


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": model(inputs["input_ids"], seen(inputs))}


def hidden(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"last_hidden_state": model(inputs["input_ids"], seen(inputs))}


def of(name: str, config: str, **more: object) -> nn.Module:
    return getattr(hf, name)(getattr(hf, config)(**{**SMALL, **more}))


def both(name: str, config: str, **more: object) -> nn.Module:
    """With a layer of either type."""
    return of(name, config, layer_types=["sliding_attention", "full_attention"], **more)


HEAD, BASE = {"body.blocks": "model.layers"}, {"blocks": "layers"}
CASES = {
    "gemma 2": Case(
        lambda: both("Gemma2ForCausalLM", "Gemma2Config", attn_logit_softcapping=3.0, final_logit_softcapping=2.0,
                     query_pre_attn_scalar=11),
        left_padded, logits, HEAD,
    ),
    "gemma 2, base, no caps": Case(
        lambda: both("Gemma2Model", "Gemma2Config", attn_logit_softcapping=None, final_logit_softcapping=None,
                     attention_bias=True),
        left_padded, hidden, BASE,
    ),
    "gemma 3": Case(
        lambda: both("Gemma3ForCausalLM", "Gemma3TextConfig", rope_parameters=TURNS), left_padded, logits, HEAD,
        ("q_norm", "k_norm"),
    ),
    "gemma 2, untied": Case(
        lambda: both("Gemma2ForCausalLM", "Gemma2Config", final_logit_softcapping=2.0, tie_word_embeddings=False),
        left_padded, logits, HEAD,
    ),
    "gemma 3, untied": Case(
        lambda: both("Gemma3ForCausalLM", "Gemma3TextConfig", tie_word_embeddings=False), left_padded, logits, HEAD,
        ("q_norm", "k_norm"),
    ),
    "gemma 3, base": Case(
        lambda: both("Gemma3TextModel", "Gemma3TextConfig"), left_padded, hidden, BASE, ("q_norm", "k_norm"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_hugging_faces(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


@pytest.mark.parametrize("name", ["gemma 2, untied", "gemma 3, untied"])
def test_the_tokens_it_generates_are_hugging_faces(name: str, tmp_path: Path) -> None:
    check_generation(CASES[name], tmp_path, new=40)


def test_an_older_config_means_the_same(tmp_path: Path) -> None:
    """Before 2025 the turns and the layers were said in other words."""
    config = gemma.Config(97, 64, 32, 7, 4, 2, 8, 48, query_key_norm=True, period=3, base=3e4, local_base=2e4,
                          scaling=fv.rotary.Linear(8.0), kind="gemma3_text")  # fmt: skip
    fv.save_pretrained(gemma.Model(config), tmp_path)
    file = tmp_path / "config.json"
    said = json.loads(file.read_text())
    del said["rope_parameters"], said["layer_types"]
    said |= {"rope_theta": 3e4, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
             "sliding_window_pattern": 3}  # fmt: skip
    file.write_text(json.dumps(said))
    found = fv.from_pretrained(tmp_path).config
    assert (found.base, found.local_base, found.scaling) == (3e4, 2e4, fv.rotary.Linear(8.0))
    assert found.layer_types == config.types
    theirs = hf.AutoConfig.from_pretrained(tmp_path)
    assert theirs.layer_types == list(config.types)
    assert theirs.rope_parameters["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e4}
