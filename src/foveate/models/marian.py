"""Marian, which translates: BART without a norm of what goes in, and with positions that are not learned.

    x = √dim · word + (sin, cos)(position)

Its blocks are those of "Attention is all you need". Junczys-Dowmunt et al. 2018: https://arxiv.org/abs/1804.00344. The
modules are those of `bart.py`; here is what their parts are called.

>>> import torch
>>> from foveate.models import bart, marian
>>> config = bart.Config(97, 89, 64, 32, 2, 2, 4, 4, 48, 48, learned=False, kind="marian")
>>> bart.LanguageModel(config)(torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[2, 9, 2]])).shape
torch.Size([1, 3, 89])
"""

from __future__ import annotations

from typing import Any

from foveate.checkpoint.format import Codec, Format
from foveate.errors import InvalidInput
from foveate.models.bart import COMMON, FIELDS, Config, LanguageModel, Model

PRESETS = {
    "opus-mt": Config(
        58101, None, 512, 512, 6, 6, 8, 8, 2048, 2048, "swish", learned=False, scaled=True, start=58100, end=0,
        pad=58100, last=0, never=(58100,), kind="marian",
    )
}  # fmt: skip


def _read_never(said: tuple[list[int], ...] | None) -> tuple[int, ...]:
    if any(len(word) != 1 for word in said or ()):
        raise InvalidInput(f"bad_words_ids is {said}: here words that are not written are single tokens")
    return tuple(word[0] for word in said or ())


def _write_never(never: tuple[int, ...]) -> list[list[int]] | None:
    return [[token] for token in never] or None


def _upgraded(found: dict[str, Any]) -> dict[str, Any]:
    """The target has words of its own where config.json says that they are not shared."""
    own = None if found.get("share_encoder_decoder_embeddings", True) else found.get("decoder_vocab_size")
    return {**found, "decoder_vocab_size": own}


def _said(config: Config) -> dict[str, Any]:
    own = config.target_vocabulary
    return {"share_encoder_decoder_embeddings": own is None, "decoder_vocab_size": own or config.vocabulary}


FORMATS = {
    "marian": Format(
        architectures={"MarianMTModel": LanguageModel, "MarianModel": Model}, upgrade=_upgraded, also=_said,
        fields=FIELDS | {"target_vocabulary": "decoder_vocab_size", "never": "bad_words_ids"},
        implied={"learned": False}, codecs={"never": Codec(_read_never, _write_never)},
        defaults={"vocab_size": 58101, "decoder_start_token_id": 58100, "pad_token_id": 58100, "eos_token_id": 0,
                  "forced_eos_token_id": 0},
        generation=("start", "end", "pad", "first", "last", "never"), silent=("first", "last", "never"), **COMMON,
    )
}  # fmt: skip
