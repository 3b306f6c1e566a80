"""Models that people use, one readable file per family; docs/models-of-our-own.md says how such a file is written."""

import importlib

from foveate.naming import Format

# The `model_type` of config.json → the file that computes it.
FAMILIES = {
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
    "vit": "vit",
    "whisper": "whisper",
    "xlm-roberta": "roberta",
}


def formats(kind: str) -> dict[str, Format]:
    """How each kind of model of one file is written, by its `model_type`."""
    found: dict[str, Format] = importlib.import_module(f"foveate.models.{FAMILIES[kind]}").FORMATS
    return found
