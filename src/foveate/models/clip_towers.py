"""CLIP's two encoders, each a model of its own: what other models see and read with.

    clip.Text, clip.Image         what each token and each patch has become
    TextEmbedder                  W · norm(x of the text's last token)
    ImageEmbedder                 W · norm(x of the class)

Radford et al. 2021: https://arxiv.org/abs/2103.00020
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from foveate.checkpoint.format import Format
from foveate.models.clip import IMAGE, IMAGE_FIELDS, TEXT, TEXT_FIELDS, Config, Ids, Image, Pixels, Text
from foveate.models.clip import PRESETS as WHOLE
from foveate.pattern.algebra import Pattern

PRESETS = {f"{name}-text": replace(config, kind="clip_text_model") for name, config in WHOLE.items()} | {
    f"{name}-vision": replace(config, kind="clip_vision_model") for name, config in WHOLE.items()
}


class TextEmbedder(nn.Module):
    """One vector for every text, to be compared with those of images.

    >>> import torch
    >>> from foveate.models import clip, clip_towers
    >>> config = clip.Config(97, 8, 32, 1, 4, 48, end=96, shared_dim=24, kind="clip_text_model")
    >>> clip_towers.TextEmbedder(config)(torch.tensor([[3, 1, 96], [4, 96, 0]])).shape
    torch.Size([2, 24])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.body = config, Text(config)
        self.embed = nn.Linear(config.text_dim, config.shared_dim, bias=False)

    def forward(self, tokens: Ids, pattern: Pattern | None = None) -> Float[Tensor, "texts shared"]:
        """The vectors, of any length; `pattern` narrows who sees whom beyond causal."""
        return cast(Tensor, self.embed(self.body.pooled(self.body(tokens, pattern), tokens)))


class ImageEmbedder(nn.Module):
    """One vector for every image, to be compared with those of texts."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.body = config, Image(config)
        self.embed = nn.Linear(config.dim, config.shared_dim, bias=False)

    def forward(self, pixels: Pixels) -> Float[Tensor, "images shared"]:
        """The vectors, of any length."""
        return cast(Tensor, self.embed(self.body.pooled(self.body(pixels))))


FORMATS = {
    "clip_text_model": Format(
        config=Config,
        architectures={"CLIPTextModel": Text, "CLIPTextModelWithProjection": TextEmbedder},
        fields={"shared_dim": "projection_dim"} | TEXT_FIELDS,
        fixed={"attention_dropout": 0.0},
        names=TEXT,
        heads={"text_projection.weight": "embed.weight"},
        prefix="text_model.",
        ignored=("embeddings.position_ids",),
    ),
    "clip_vision_model": Format(
        config=Config,
        architectures={"CLIPVisionModel": Image, "CLIPVisionModelWithProjection": ImageEmbedder},
        fields={"shared_dim": "projection_dim"} | IMAGE_FIELDS,
        fixed={"attention_dropout": 0.0},
        names=IMAGE,
        heads={"visual_projection.weight": "embed.weight"},
        prefix="vision_model.",
        ignored=("embeddings.position_ids",),
    ),
}
