"""Models that people use, one readable file per family; docs/models-of-our-own.md says how such a file is written."""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from foveate.checkpoint.format import Format
from foveate.names import UnknownName

# The `model_type` of config.json, or the class of diffusers that it names → the file that computes it.
FAMILIES = {
    "DiTTransformer2DModel": "dit",
    "PixArtTransformer2DModel": "pixart",
    "bart": "bart",
    "bert": "bert",
    "clip": "clip",
    "clip_text_model": "clip_towers",
    "clip_vision_model": "clip_towers",
    "deit": "vit",
    "detr": "detr",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "distilbert": "distilbert",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "gpt2": "gpt2",
    "llama": "llama",
    "llava": "llava",
    "marian": "marian",
    "mistral": "llama",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "roberta": "roberta",
    "t5": "t5",
    "timesformer": "timesformer",
    "vit": "vit",
    "whisper": "whisper",
    "xlm-roberta": "roberta",
}


def formats(kind: str) -> dict[str, Format]:
    """How each kind of model of one file is written, by its `model_type`."""
    found: dict[str, Format] = importlib.import_module(f"foveate.models.{FAMILIES[kind]}").FORMATS
    return found


def kind_of(said: Mapping[str, Any]) -> Any:
    """The kind of model that a config.json is of, as it says."""
    kind = said.get("model_type", said.get("_class_name"))
    if kind == "Transformer2DModel":  # both, as diffusers called them at first, and many repositories still do
        by_norm = {"ada_norm_single": "PixArtTransformer2DModel", "ada_norm_zero": "DiTTransformer2DModel"}
        return by_norm.get(str(said.get("norm_type")), kind)
    return kind


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in FAMILIES.values():
            return importlib.import_module(f"{__name__}.{name}")
        raise UnknownName(__name__, name)
