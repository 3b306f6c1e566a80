"""docs/models.md: what every Hugging Face model of tests/families.py asked of Foveate."""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib.metadata import version

import torch

import foveate as fv
from making.filling import DOCS, filled


@cache
def models() -> str:
    """The page of Hugging Face models: each of them is run, and what its layers asked for is written down."""
    sys.path.insert(0, str(DOCS.parent / "tests"))
    from families import FAMILIES, build
    from test_accelerate_families import CALLING

    def code(value: object) -> str:
        return f"`{re.sub('<[^>]*>', '…', str(value))}`"  # without the sizes of its tensors

    lines = ["| model | class | layers reached | who may attend to whom | scores |", "|:--|:--|--:|:--|:--|"]
    for name, family in FAMILIES.items():
        model = build(name)
        with torch.no_grad(), fv.patch(model) as patched, fv.watch(model) as seen:
            model(**family.inputs())
        asked = dict.fromkeys("all" if call.pattern is None else code(call.pattern) for call in seen.calls)
        scores = dict.fromkeys(code(call.score) for call in seen.calls if call.score is not None)
        lines.append(
            f"| {family.label} | `{type(model).__name__}` | {len(patched.layers)} | {'<br>'.join(asked)} "
            f"| {'<br>'.join(scores)} |"
        )
    versions = {package: version(package).partition("+")[0] for package in ("transformers", "torch")}
    others = " and ".join(family.label.split(" (")[0] for name, family in FAMILIES.items() if name not in CALLING)
    return filled("models.md", table="\n".join(lines), reached=reached(f"those above but {others}"), **versions)


def reached(most: str) -> str:
    """The table of what else was compared, each row with the tests that do it and the version that they ran with."""
    without, accelerate, minilm = "itself without it", "`fv.accelerate()`", "MiniLM, as `foveate see` bundles it"
    denoisers = "PixArt, LTX, Wan, AnyFlow, SD3, Flux, QwenImage, CogVideoX, HunyuanVideo, Lumina2 and PRX of diffusers"
    modules = "nn.MultiheadAttention, nn.Transformer, its encoder and decoder"
    rows = (
        (most, accelerate, "itself without it, by “sdpa”", "transformers", "accelerate_families"),
        (minilm, '`attn_implementation="foveate"`', "eager", "transformers", "transformers"),
        (minilm, accelerate, without, "transformers", "accelerate_families"),
        (modules, accelerate, without, "torch", "accelerate_models"),
        ("ViT of timm", accelerate, without, "timm", "timm"),
        ("ViT of timm", "`attn_layer=attention()`", "timm's own layer; under a pattern, its mask", "timm", "timm"),
        ("Swin of timm", accelerate, without, "timm", "timm"),
        ("UNet and DiT of diffusers", accelerate, without, "diffusers", "diffusers"),
        ("UNet and DiT of diffusers", "`narrow`", "its mask", "diffusers", "diffusers"),
        (denoisers, "`narrow`", "its mask", "diffusers", "diffusers_layers"),
    )  # fmt: skip
    pinned = dict(re.findall(r"^([\w-]+)==(.+)$", (DOCS.parent / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    lines = ["| model | route | equal to | tested with | by |", "|:--|:--|:--|:--|:--|"]
    for model, route, equal, package, tests in rows:
        assert (DOCS.parent / "tests" / f"test_{tests}.py").is_file()
        lines.append(
            f"| {model} | {route} | {equal} | {package} {pinned[package].partition('+')[0]} | `test_{tests}.py` |"
        )
    return "\n".join(lines)
