"""Qwen 2 and Qwen 3: Llama whose query, key and value have a bias, and Llama whose q and k are normed.

    Qwen 2     q = xQ + b, k = xK + b, v = xV + b      Yang et al. 2024: https://arxiv.org/abs/2407.10671
    Qwen 3     q = norm(xQ), k = norm(xK)              Yang et al. 2025: https://arxiv.org/abs/2505.09388

Some of their layers may see a window alone.

>>> import torch
>>> from foveate.models import llama, qwen
>>> model = llama.LanguageModel(
...     llama.Config(97, dim=32, layers=2, heads=4, hidden=48, query_key_norm=True, kind="qwen3")
... )
>>> model(torch.tensor([[3, 1, 4, 1, 5]])).shape
torch.Size([1, 5, 97])
"""

from __future__ import annotations

from typing import Any

from foveate.checkpoint.rope_config import upgraded
from foveate.models.llama import FULL, SLIDING, Config, format_of, heads

PRESETS = {
    "qwen2-0.5b": Config(
        vocabulary=151936, positions=131072, dim=896, layers=24, heads=14, key_heads=2, hidden=4864, bias=True,
        out_bias=False, base=1000000.0, tied=True, end=151643, kind="qwen2",
    ),
    "qwen2-7b": Config(
        vocabulary=152064, positions=131072, dim=3584, layers=28, heads=28, key_heads=4, hidden=18944, bias=True,
        out_bias=False, base=1000000.0, end=151643, kind="qwen2",
    ),
    "qwen3-0.6b": Config(
        vocabulary=151936, positions=40960, dim=1024, layers=28, heads=16, key_heads=8, head_dim=128, hidden=3072,
        query_key_norm=True, base=1000000.0, tied=True, end=151645, kind="qwen3",
    ),
    "qwen3-8b": Config(
        vocabulary=151936, positions=40960, layers=36, key_heads=8, head_dim=128, hidden=12288, query_key_norm=True,
        base=1000000.0, end=151645, kind="qwen3",
    ),
}  # fmt: skip


def _layers(found: dict[str, Any]) -> dict[str, Any]:
    """There are windows only where config.json switches them on; before 2025 it says from which layer on."""
    layers, width = found.get("num_hidden_layers", 32), found.get("sliding_window", 4096)
    if not found.get("use_sliding_window"):
        width = None
    first = layers if width is None else found.get("max_window_layers", 28)
    types = found.get("layer_types") or [FULL if n < first else SLIDING for n in range(layers)]
    return upgraded({**found, "sliding_window": width, "layer_types": types})


def _said(config: Config) -> dict[str, Any]:
    """The heads, and which layers have a window, said outright."""
    said = heads(config) | {"use_sliding_window": config.window is not None, "layer_types": config.types}
    return said if config.kind == "qwen3" else {key: value for key, value in said.items() if key != "head_dim"}


WINDOWS = {"window": "sliding_window", "layer_types": "layer_types"}

FORMATS = {
    "qwen2": format_of(
        "Qwen2", WINDOWS, implied={"bias": True, "out_bias": False, "head_dim": None}, upgrade=_layers, also=_said,
        defaults={"max_position_embeddings": 32768},
    ),
    "qwen3": format_of(
        "Qwen3", WINDOWS | {"head_dim": "head_dim", "bias": "attention_bias"}, implied={"query_key_norm": True},
        upgrade=_layers, also=_said, defaults={"head_dim": 128, "max_position_embeddings": 32768},
    ),
}  # fmt: skip
