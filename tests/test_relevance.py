"""The weights that a model returns are those that its output was made of: gradient × attention is what eager gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build, flat, right_padded
from torch import Tensor

import foveate as fv


def relevance(network: Any, inputs: dict[str, Tensor], **more: Any) -> dict[str, Tensor]:
    """By kind and layer, the gradient of what the real rows of the output say, and the weights."""
    out = network(**inputs, output_attentions=True, **more)
    returned = {name: weights for name, weights in flat(out).items() if "attentions" in name}
    first: Tensor = out.logits if "logits" in out else out[0]
    kept = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
    if kept is not None and first.shape[:2] == kept.shape:
        first = first[kept.bool()]
    found = torch.autograd.grad(first.pow(2).sum(), list(returned.values()))
    return {name: gradient * returned[name] for name, gradient in zip(returned, found, strict=True)}


@pytest.mark.parametrize("name", [*FAMILIES])
def test_gradient_times_attention_equals_eager(name: str) -> None:
    network, inputs = build(name), FAMILIES[name].inputs()
    truth = relevance(network, inputs)
    assert any(wanted.abs().max() > 0 for wanted in truth.values())
    with fv.patch(network):
        found = relevance(network, inputs)
    assert list(found) == list(truth)
    for place, wanted in truth.items():
        assert (found[place] - wanted).abs().max() <= 1e-4 * wanted.abs().max(), place


def test_the_output_is_the_same_whether_weights_are_asked_for_or_not() -> None:
    for name in ("llama", "gpt_oss", "t5"):
        network, inputs = build(name), FAMILIES[name].inputs()
        with fv.patch(network):
            plain, asked = network(**inputs).logits, network(**inputs, output_attentions=True).logits
        assert (plain - asked).abs().max() <= 1e-5 * plain.abs().max()


def test_half_precision_loses_no_more_digits_than_eager() -> None:
    inputs = right_padded()
    kept = inputs["attention_mask"].bool()
    truth = build("bert").double()(**inputs).logits[kept]
    network = build("bert").bfloat16()
    plain = (network(**inputs, output_attentions=True).logits[kept] - truth).abs().max()
    with fv.patch(network):
        out = network(**inputs, output_attentions=True)
    assert (out.logits[kept] - truth).abs().max() <= 2 * plain
    assert out.attentions[0].dtype == torch.bfloat16
    assert torch.autograd.grad(out.logits.float().sum(), out.attentions[0])[0].abs().max() > 0


def test_dropout_falls_on_what_was_returned_before_it() -> None:
    """By the same stream as without weights, so that asking for them changes no draw."""
    network: Any = build("bert").train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in network.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    outs = []
    with fv.patch(network):
        for more in ({}, {"output_attentions": True}):
            torch.manual_seed(5)
            outs.append(network(**right_padded(), **more))
    kept = right_padded()["attention_mask"].bool()
    torch.testing.assert_close(outs[1].logits[kept], outs[0].logits[kept])
    torch.testing.assert_close(outs[1].attentions[0][0].sum(-1), torch.ones(6, 17))


def test_those_who_watch_are_told_once() -> None:
    network = build("bert")
    with fv.watch(network) as seen:
        network(**right_padded(), output_attentions=True)
    assert len(seen) == 2
