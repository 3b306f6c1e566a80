"""Every family of Hugging Face that calls PyTorch's attention computes the same under `accelerate()`."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, build, flat, real
from torch import Tensor

import foveate as fv
from foveate.see.text import bundled_model

pytestmark = pytest.mark.usefixtures("_nothing_stays", "_ours")

CALLING = [name for name in FAMILIES if name not in ("gemma2", "gpt_oss")]  # PyTorch's function has no cap, no sinks
OF_PARTS = {"detr": {"": "sdpa", "backbone_config": "eager"}}  # a ResNet does not attend
# With a gradient PyTorch's function is asked for what only its formula gives: a learned mask, values of another width.
KEPT = {"t5": "the mask needs a gradient", "deepseek_v3": "no fused kernel", "deepseek_v32": "no fused kernel"}
PLAIN = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@cache
def model(name: str) -> Any:
    network: Any = build(name)
    network.set_attn_implementation(OF_PARTS.get(name, "sdpa"))
    return network


def results(network: Any, name: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The outputs, and the gradients of all parameters."""
    inputs = FAMILIES[name].inputs()
    found = real(flat(network(**inputs, output_hidden_states=True)), inputs)
    main = next(key for key in found if key.startswith("logits"))
    shares = torch.randn(found[main].shape, generator=torch.Generator().manual_seed(7))
    parameters = [p for p in network.parameters() if p.requires_grad]
    slopes = torch.autograd.grad((found[main] * shares).sum(), parameters, allow_unused=True)
    return {key: value.detach() for key, value in found.items()}, [x for x in slopes if x is not None]


def assert_outputs_alike(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    for key, value in found.items():
        assert (value - truth[key]).abs().max() <= 1e-5 * truth[key].abs().max(), key


def assert_gradients_alike(found: list[Tensor], truth: list[Tensor]) -> None:
    largest = max(x.abs().max() for x in truth)
    for mine, theirs in zip(found, truth, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * largest


@pytest.mark.parametrize("name", CALLING)
def test_outputs_and_gradients_before_during_and_after(name: str) -> None:
    before = results(model(name), name)
    with fv.accelerate() as acceleration:
        during = results(model(name), name)
        asked = acceleration.report()
        with torch.inference_mode():
            quick = real(flat(model(name)(**FAMILIES[name].inputs())), FAMILIES[name].inputs())
    after = results(model(name), name)
    assert during[0].keys() == before[0].keys()
    assert_outputs_alike(during[0], before[0])
    assert_outputs_alike(quick, before[0])
    assert_gradients_alike(during[1], before[1])
    assert all(torch.equal(after[0][key], value) for key, value in before[0].items())
    assert all(map(torch.equal, after[1], before[1]))
    assert all(KEPT[name] in why for _, why in asked.pytorch)
    assert sum(asked.foveate.values()) > 0 or name in KEPT
    assert acceleration.report().pytorch == asked.pytorch  # without a gradient all is ours
    assert ("forward", "") in acceleration.report().foveate


GENERATING = ["llama", "mistral", "gemma3", "deepseek_v3", "gpt2", "t5", "bart"]
WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GENERATING)
def test_generated_tokens_are_those_without(name: str, way: str) -> None:
    """With a batch whose second text is padded: on the left for a decoder."""
    prompt = {key: value for key, value in FAMILIES[name].inputs().items() if not key.startswith("decoder")}
    how = {**PLAIN, **WAYS[way], "output_logits": True, "return_dict_in_generate": True}
    truth = model(name).generate(**prompt, **how)
    with fv.accelerate() as acceleration:
        found = model(name).generate(**prompt, **how)
    assert torch.equal(found.sequences, truth.sequences)
    for mine, theirs in zip(found.logits, truth.logits, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert not acceleration.report().pytorch


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_checkpoints_is_the_same(reentrant: bool) -> None:
    network: Any = build("mistral").train()
    network.set_attn_implementation("sdpa")
    network.activation_checkpointing_enable({"use_reentrant": reentrant})
    ids = FAMILIES["mistral"].inputs()["input_ids"]

    def slopes() -> list[Tensor]:
        network.zero_grad()
        network(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    before = slopes()
    with fv.accelerate() as acceleration:
        during = slopes()
    assert acceleration.report().foveate == {("forward", ""): 4, ("backward", ""): 2}  # each forward is done again
    assert_gradients_alike(during, before)
    assert all(map(torch.equal, slopes(), before))


def test_embeddings_of_the_bundled_model_are_those_without() -> None:
    place = bundled_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    network = transformers.AutoModel.from_pretrained(place).eval()
    assert network.config._attn_implementation == "sdpa"
    texts = ["The animal didn't cross the street because it was too tired.", "A short one."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")

    @torch.inference_mode()
    def embeddings() -> Tensor:
        kept = inputs["attention_mask"][..., None]
        states: Tensor = network(**inputs).last_hidden_state
        return (states * kept).sum(1) / kept.sum(1)

    before = embeddings()
    with fv.accelerate() as acceleration:
        during = embeddings()
    assert (during - before).abs().max() <= 1e-5 * before.abs().max()
    assert acceleration.report().foveate == {("forward", ""): 6}
    assert not acceleration.report().pytorch
