"""Whisper is Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from families import PAIR, sound
from parity import Case, _random, check
from torch import Tensor, nn
from transformers import GenerationMixin

import foveate as fv
from foveate.models import whisper

SIZES = {key: value for key, value in PAIR.items() if key != "max_position_embeddings"} | {
    "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 31, "attn_implementation": "eager",
    "begin_suppress_tokens": None,
}  # fmt: skip


def made(name: str, **more: object) -> nn.Module:
    return getattr(hf, name)(hf.WhisperConfig(**{**SIZES, **more}))


def padded_texts() -> dict[str, Tensor]:
    keep = torch.ones(2, 11, dtype=torch.int64)
    keep[1, 7:] = 0
    return {**sound(), "decoder_attention_mask": keep}


def called(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = inputs.get("decoder_attention_mask")
    seen = None if mask is None else fv.padding(mask.bool())
    found = model(inputs["input_features"], inputs["decoder_input_ids"], seen)
    return {"last_hidden_state" if isinstance(model, whisper.Model) else "logits": found}


def layers(theirs: str, ours: str) -> dict[str, str]:
    return {f"{ours}{side}.blocks": f"{theirs}{side}.layers" for side in ("encoder", "decoder")}


MASK = ("decoder_attention_mask",)
CASES = {
    "Whisper": Case(lambda: made("WhisperModel"), padded_texts, called, layers("", ""), mask=MASK),
    "Whisper, words": Case(
        lambda: made("WhisperForConditionalGeneration"), padded_texts, called, layers("model.", "body."), mask=MASK
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_hugging_faces(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


PLAIN = {"do_sample": False, "num_beams": 1}
START = torch.tensor([[2, 9, 7], [2, 30, 41]])


def talking(*, end: bool = True) -> tuple[nn.Module, Tensor]:
    """A random model of many words, and what it says; one of its texts ends before the other."""
    for seed in range(20):
        torch.manual_seed(seed)
        theirs = _random(made("WhisperForConditionalGeneration")).eval()
        with torch.no_grad():
            for key, parameter in theirs.named_parameters():
                if "q_proj.weight" in key or "k_proj.weight" in key:
                    parameter.mul_(3)
        free = written(theirs, 12, START, eos_token_id=None)
        ends = [token for token in free[0, 5:-1].tolist() if token not in free[1]]
        if ends and all(len(set(row.tolist())) > 4 for row in free[:, 3:]):
            theirs.config.eos_token_id = theirs.generation_config.eos_token_id = ends[0] if end else None
            return theirs, free
    raise AssertionError("the texts are too dull to tell anything")


def written(theirs: nn.Module, new: int, start: Tensor | None = None, **more: object) -> Tensor:
    """Its own loop over 30 seconds of sound aside, which is no part of the model."""
    given = {} if start is None else {"decoder_input_ids": start}
    return GenerationMixin.generate(
        theirs, input_features=sound()["input_features"], max_new_tokens=new, **given, **PLAIN, **more
    )


def test_it_writes_hugging_faces_text(tmp_path: Path) -> None:
    theirs, _ = talking()
    theirs.save_pretrained(tmp_path)
    want = written(theirs, 12, START)
    ours = fv.from_pretrained(tmp_path)
    assert torch.equal(ours.generate(sound()["input_features"], START, new=12), want)
    assert torch.equal(ours.generate(sound()["input_features"], new=3), written(theirs, 3))
    assert (want[0] == 0).any(), "no text ended before another"


def test_words_that_are_suppressed_are_not_written(tmp_path: Path) -> None:
    theirs, free = talking(end=False)
    first, later = free[:, 3].tolist(), [token for token in free[0, 4:].tolist() if token not in free[:, 3]]
    theirs.config.begin_suppress_tokens = first  # what counts is said in generation_config.json
    for never, never_first in ((later[:2], None), (None, first), (later[:2], [*first, 500]), (None, None)):
        folder = tmp_path / f"{never}{never_first}"
        theirs.generation_config.suppress_tokens = never
        theirs.generation_config.begin_suppress_tokens = never_first
        theirs.save_pretrained(folder)
        ours = fv.from_pretrained(folder)
        want = written(theirs, 12, START)
        assert torch.equal(want, free) == (never == never_first)
        assert torch.equal(ours.generate(sound()["input_features"], START, new=12), want)
        fv.save_pretrained(ours, folder / "ours")
        assert torch.equal(written(type(theirs).from_pretrained(folder / "ours"), 12, START), want)
        begun = theirs.generate(input_features=sound()["input_features"], max_new_tokens=5, **PLAIN)
        mine = ours.generate(sound()["input_features"], new=5)
        assert torch.equal(mine[:, -begun.shape[1] :], begun)


def test_what_is_heard_is_projected_once() -> None:
    config = whisper.Config(97, 8, 20, 16, 32, 2, 2, 4, 4, 48, 48, start=1, end=None, pad=0)
    model, calls = whisper.LanguageModel(config).eval(), []
    for layer in model.body.decoder.blocks:
        layer.cross.part.key.register_forward_hook(lambda *_: calls.append(1))
    model.generate(torch.randn(1, 8, 40), new=5)
    assert len(calls) == config.decoder_layers


def test_sound_that_does_not_fit_is_refused() -> None:
    model = whisper.Model(whisper.Config(97, 8, 20, 16, 32, 1, 1, 4, 4, 48, 48, start=1, end=2, pad=0))
    for shape in ((1, 8, 41), (1, 7, 40), (1, 8, 0)):
        with pytest.raises(fv.InvalidInput, match=r"wanted \[batch, 8 mels, up to 40 frames\]"):
            model.encode(torch.zeros(shape))
    with pytest.raises(fv.InvalidInput, match="17 tokens but the model 16 positions"):
        model(torch.zeros(1, 8, 40), torch.zeros(1, 17, dtype=torch.int64))
