"""What stands in padding never matters, and a row without a key is 0, in every family that can be given either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Inputs, build
from torch import Tensor

import foveate as fv

TEXTS = [name for name in FAMILIES if FAMILIES[name].inputs().keys() == {"input_ids", "attention_mask"}]
ENCODERS = ["bert", "roberta", "distilbert"]
PAIRS = ["t5", "bart", "marian"]


def logits(network: Any, **inputs: Any) -> Tensor:
    found: Tensor = network(**inputs).logits
    return found


# DeepSeek-V3.2's indexer, which is transformers' own, chooses a key whose score is NaN, hidden or not.
@pytest.mark.parametrize("name", [name for name in TEXTS if name != "deepseek_v32"])
def test_a_nan_in_padding_never_matters(name: str) -> None:
    network, inputs = build(name), FAMILIES[name].inputs()
    kept = inputs["attention_mask"].bool()
    states = network.get_input_embeddings()(inputs["input_ids"]).detach()
    planted = states.masked_fill(~kept[..., None], float("nan"))
    with torch.no_grad():
        truth = logits(network, inputs_embeds=states, attention_mask=kept)[kept]
        with fv.patch(network):
            found = logits(network, inputs_embeds=planted, attention_mask=kept)[kept]
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("name", PAIRS)
def test_a_nan_in_the_padding_of_what_a_decoder_reads_never_matters(name: str) -> None:
    network, inputs = build(name), FAMILIES[name].inputs()
    kept, rows = inputs["attention_mask"].bool(), inputs["decoder_attention_mask"].bool()
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    with torch.no_grad():
        states = network.get_encoder()(inputs["input_ids"], attention_mask=kept).last_hidden_state
        planted = states.masked_fill(~kept[..., None], float("nan"))
        truth = logits(network, encoder_outputs=(states,), **rest)[rows]
        with fv.patch(network):
            found = logits(network, encoder_outputs=(planted,), **rest)[rows]
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()


def emptied(name: str) -> Inputs:
    """A text, and another that is nothing but padding."""
    inputs = FAMILIES[name].inputs()
    return {**inputs, "attention_mask": torch.tensor([[1], [0]]).expand(-1, 17)}


@pytest.mark.parametrize("name", [*TEXTS, *PAIRS])
def test_a_text_without_a_token_is_finite_and_changes_no_other(name: str) -> None:
    network, inputs = build(name), emptied(name)
    with torch.no_grad():
        truth = logits(network, **inputs)[0]
    with fv.patch(network):
        found = network(**inputs)
        found.logits.sum().backward()
    assert found.logits.isfinite().all()
    assert (found.logits[0] - truth).abs().max() <= 1e-5 * truth.abs().max()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in network.parameters())


@pytest.mark.parametrize("name", [*ENCODERS, *PAIRS])
def test_a_row_without_a_key_has_no_weights_and_no_gradient(name: str) -> None:
    network, inputs = build(name), emptied(name)
    with fv.patch(network):
        whole = network(**inputs, output_attentions=True)
    for weights in whole.encoder_attentions if name in PAIRS else whole.attentions:
        assert (weights[1] == 0).all()
        assert (weights[0].sum(-1) - 1).abs().max() < 1e-5
    for weights in whole.cross_attentions if name in PAIRS else ():
        assert (weights[1] == 0).all()
