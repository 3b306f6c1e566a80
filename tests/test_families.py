"""Every family of Hugging Face models computes with foveate what it computes with its own eager attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, flat, real, top_weight
from torch import Tensor, nn

import foveate as fv
from foveate.integrations.transformers import attention_interface
from foveate.pattern.algebra import And, Pattern
from foveate.pattern.custom import FromMask
from foveate.pattern.packing import Documents
from foveate.pattern.positional import Chunks, Window
from foveate.problem import Problem, Result
from foveate.score import Score

PROMISED = {
    "bert", "roberta", "distilbert", "gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss",
    "llama4", "deepseek_v3", "t5", "bart", "marian", "whisper", "vit", "dinov2", "clip", "detr", "llava",
}  # fmt: skip


def test_every_family_that_was_promised_is_compared() -> None:
    assert PROMISED - FAMILIES.keys() == set()
    labels = {family.label.split(" (")[0] for family in FAMILIES.values()}
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    assert [label for label in labels if f"| {label}" not in page] == []


@cache
def model(name: str) -> nn.Module:
    return build(name)


def outputs(name: str, **more: Any) -> dict[str, Tensor]:
    inputs = FAMILIES[name].inputs()
    return real(flat(model(name)(**inputs, **more)), inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_equal_eager(name: str) -> None:
    truth = outputs(name, output_hidden_states=True)
    with fv.patch(model(name)):
        found = outputs(name, output_hidden_states=True)
    assert found.keys() == truth.keys()
    assert any("hidden_states" in key for key in truth)
    for key, value in truth.items():
        assert (found[key] - value).abs().max() <= 1e-5 * value.abs().max(), key
    main = next(key for key in truth if key.startswith("logits"))
    # Not a norm: after a normalization its gradient would be nothing but noise.
    shares = torch.randn(truth[main].shape, generator=torch.Generator().manual_seed(7))
    parameters = [p for p in model(name).parameters() if p.requires_grad]
    mine, theirs = (
        torch.autograd.grad((x[main] * shares).sum(), parameters, allow_unused=True) for x in (found, truth)
    )
    assert [x is None for x in mine] == [x is None for x in theirs]
    largest = max(x.abs().max() for x in theirs if x is not None)
    for found_gradient, true_gradient in zip(mine, theirs, strict=True):
        if found_gradient is not None:
            assert (found_gradient - true_gradient).abs().max() <= 1e-4 * largest


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_far_from_uniform(name: str) -> None:
    assert top_weight(model(name), FAMILIES[name].inputs()) > 0.3


@pytest.mark.parametrize("name", FAMILIES)
def test_all_weights_equal_eager(name: str) -> None:
    with torch.no_grad():
        truth = flat(model(name)(**FAMILIES[name].inputs(), output_attentions=True))
        with fv.patch(model(name)):
            found = flat(model(name)(**FAMILIES[name].inputs(), output_attentions=True))
    assert found.keys() == truth.keys()
    assert any("attentions" in key for key in truth)
    kept = FAMILIES[name].inputs().get("attention_mask")
    for key, value in truth.items():
        if "attentions" not in key:
            continue
        mine, theirs = found[key], value
        if kept is not None and value.shape[2] == kept.shape[1]:  # rows of padding see nothing here
            rows = kept.bool()[:, None, :, None].expand(value.shape)
            mine, theirs = mine[rows], theirs[rows]
        assert (mine - theirs).abs().max() <= 1e-5, key


def _without(pattern: Pattern | None, kinds: tuple[type[Pattern], ...]) -> Pattern | None:
    parts = pattern.parts if isinstance(pattern, And) else (pattern,)
    rest = [part for part in parts if part is not None and not isinstance(part, kinds)]
    return None if not rest else rest[0] if len(rest) == 1 else And(tuple(rest))


def _drop(part: str, call: Problem) -> Problem:
    """The same call without one part of it."""
    score = call.score or Score()
    match part:
        case "mask":
            return replace(call, pattern=None)
        case "window":
            return replace(call, pattern=_without(call.pattern, (Window,)))
        case "chunks":
            return replace(call, pattern=_without(call.pattern, (Chunks, Documents)))
        case "selection":
            return replace(call, pattern=_without(call.pattern, (FromMask,)))
        case "cross":
            crosses = call.q.shape[2] != call.k.shape[2]
            return replace(call, pattern=None) if crosses else call
        case "cap":
            return replace(call, score=replace(score, softcap=None))
        case "sinks":
            return replace(call, score=replace(score, sinks=None))
        case "bias":
            return replace(call, score=replace(score, biases=()))
    raise AssertionError(part)


@pytest.mark.parametrize(("name", "part"), [(name, part) for name in FAMILIES for part in FAMILIES[name].parts])
def test_without_a_part_the_output_would_be_another(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        truth = outputs(name)
        real_dispatch: Callable[[Problem], Result] = attention_interface.dispatch
        monkeypatch.setattr(attention_interface, "dispatch", lambda call: real_dispatch(_drop(part, call)))
        with fv.patch(model(name)):
            found = outputs(name)
    main = next(key for key in truth if key.startswith("logits"))
    assert (found[main] - truth[main]).abs().max() > 1e-2
    assert (found[main] - truth[main]).abs().max() > 1e-2 * truth[main].abs().max()
