"""BERT, RoBERTa and DistilBERT are Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from families import TEXT, right_padded
from parity import Case, check
from torch import Tensor, nn

import foveate as fv
from foveate.models import bert
from foveate.see.text import bundled_model

BERT = {**TEXT, "intermediate_size": 59, "max_position_embeddings": 64, "attn_implementation": "eager"}
DISTIL = {"vocab_size": 97, "dim": 48, "n_layers": 2, "n_heads": 6, "hidden_dim": 59, "max_position_embeddings": 64,
          "attn_implementation": "eager"}  # fmt: skip


def made(name: str, **more: object) -> nn.Module:
    family = name.split("For")[0].removesuffix("Model")
    config = getattr(hf, f"{family}Config")
    sizes = DISTIL if family == "DistilBert" else BERT if family == "Bert" else {**BERT, "pad_token_id": 1}
    return getattr(hf, name)(config(**{**sizes, **more}))


def two_texts() -> dict[str, Tensor]:
    """Padded, and the second half of each row is a text of its own."""
    inputs = right_padded()
    return {**inputs, "token_type_ids": (torch.arange(17) > 8).long().expand(2, 17)}


def words_and_padding() -> dict[str, Tensor]:
    """As RoBERTa's tokenizer pads: the padding's id stands where the mask is 0."""
    inputs = right_padded()
    return {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 1)}


def called(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    keep = inputs.get("attention_mask")
    more = {"segments": inputs["token_type_ids"]} if "token_type_ids" in inputs else {}
    return model(inputs["input_ids"], None if keep is None else fv.padding(keep.bool()), **more)


def base(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = called(model, inputs)
    return {"last_hidden_state": x} | ({} if model.pooler is None else {"pooler_output": model.pool(x)})


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": called(model, inputs)}


def spans(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    start, end = called(model, inputs).unbind(-1)
    return {"start_logits": start, "end_logits": end}


CALLS = {"Model": base, "ForQuestionAnswering": spans}
SHARP = {"Bert": ("self.query", "self.key"), "DistilBert": ("q_lin", "k_lin")}
INPUTS = {"Bert": two_texts, "Roberta": words_and_padding, "XLMRoberta": words_and_padding, "DistilBert": right_padded}
LAYERS = {"Bert": "bert.encoder.layer", "DistilBert": "distilbert.transformer.layer"}
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
FAMILIES = {"Bert": HEADS, "Roberta": HEADS, "DistilBert": HEADS, "XLMRoberta": HEADS[1:3]}


def case(family: str, head: str) -> Case:
    theirs = LAYERS.get(family, "roberta.encoder.layer")
    layers = {"blocks": theirs.partition(".")[2]} if head == "Model" else {"body.blocks": theirs}
    more = {"num_labels": 5} if "Classification" in head else {}
    return Case(
        lambda: made(family + head, **more), INPUTS[family], CALLS.get(head, logits), layers,
        SHARP.get(family, SHARP["Bert"]),
    )  # fmt: skip


CASES = {family + head: case(family, head) for family, heads in FAMILIES.items() for head in heads}


@pytest.mark.parametrize("name", CASES)
def test_it_is_hugging_faces(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


def test_sentence_embeddings_are_hugging_faces_and_know_what_is_alike() -> None:
    place = bundled_model()
    texts = [
        "A man is eating food.",
        "A man is eating a piece of bread.",
        "The girl is carrying a baby.",
        "Somebody rides a horse on an enclosed ground, slowly, while two others look on from behind a fence.",
    ]
    inputs = hf.AutoTokenizer.from_pretrained(place)(texts, padding=True, return_tensors="pt")
    keep = inputs["attention_mask"].bool()
    assert not keep.all()
    with torch.no_grad():
        states = hf.AutoModel.from_pretrained(place).eval()(**inputs).last_hidden_state
        mean = (states * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
        want = mean / mean.norm(dim=1, keepdim=True)
        found = fv.from_pretrained(place).embed(inputs["input_ids"], keep)
    torch.testing.assert_close(found, want, atol=1e-5 * float(want.abs().max()), rtol=0)
    alike = found @ found.T
    assert alike[0, 1] > 0.7
    assert alike[0, 2:].max() < 0.2


SMALL = bert.Config(97, 64, dim=48, layers=2, heads=6, hidden=59)


def small(head: type[nn.Module] = bert.Model, config: bert.Config = SMALL) -> nn.Module:
    torch.manual_seed(3)
    return head(config).eval()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_packed_is_padded_without_the_padding(kind: str) -> None:
    model = small(config=bert.Config(97, 64, dim=48, layers=2, heads=6, hidden=59, pad=1, kind=kind))
    inputs = words_and_padding()
    keep = inputs["attention_mask"].bool()
    padded = model(inputs["input_ids"], fv.padding(keep))
    torch.testing.assert_close(model.packed(inputs["input_ids"], keep)[keep], padded[keep], atol=1e-5, rtol=0)
    assert not model.packed(inputs["input_ids"], keep)[~keep].any()


def test_what_padding_holds_never_matters() -> None:
    model = small()
    tokens, keep = right_padded()["input_ids"], right_padded()["attention_mask"].bool()
    other = tokens.masked_fill(~keep, 7)
    for run in (lambda ids: model(ids, fv.padding(keep))[keep], lambda ids: model.embed(ids, keep)):
        torch.testing.assert_close(run(other), run(tokens), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("kind", "most"), [("bert", 64), ("roberta", 63)])
def test_a_text_longer_than_the_positions_is_refused(kind: str, most: int) -> None:
    model = small(config=bert.Config(97, 64, dim=48, layers=1, heads=6, hidden=59, kind=kind))
    model(torch.full((1, most), 5))
    with pytest.raises(fv.InvalidInput, match=f"{most + 1} tokens but the model {most} positions"):
        model(torch.full((1, most + 1), 5))


def test_a_model_without_pooler_says_so() -> None:
    with pytest.raises(fv.InvalidInput, match="no pooler"):
        small(bert.MaskedWords).body.pool(torch.zeros(1, 2, 48))
