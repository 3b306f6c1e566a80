"""The Vision Transformer, an encoder of images, and DeiT, which has one more token and learned from a teacher.

    x = [class, (teacher's,) patches] + position      a square of pixels is a word, by one linear map
    x = x + attention(norm(x));   x = x + mlp(norm(x))
    ImageClassifier       one linear map of what the class has become, norm(x)
    TaughtClassifier      the same, and one for the teacher's token

ViT (Dosovitskiy et al. 2020): https://arxiv.org/abs/2010.11929. DeiT (Touvron et al. 2020):
https://arxiv.org/abs/2012.12877. What DINOv2 adds is in `dinov2.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.checkpoint.format import Format
from foveate.errors import InvalidInput
from foveate.nn import Block, FeedForward, PreNorm, SelfAttention
from foveate.pattern.algebra import Pattern
from foveate.values import describe

Pixels = Float[Tensor, "batch channels height width"]


@dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    image: int = 224
    patch: int = 16
    channels: int = 3
    dim: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    bias: bool = True  # of query, key and value
    epsilon: float = 1e-12
    attention_dropout: float = 0.0
    dropout: float = 0.0
    labels: int = 2
    kind: str = "vit"
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what config.json says beside

    def __post_init__(self) -> None:
        if self.image % self.patch:
            raise InvalidInput(f"images of {self.image} pixels do not divide into patches of {self.patch}: change one")


PRESETS = {
    "vit-base": Config(),
    "vit-large": Config(dim=1024, layers=24, heads=16, hidden=4096),
    "vit-huge": Config(patch=14, dim=1280, layers=32, heads=16, hidden=5120),
    "deit-tiny": Config(dim=192, heads=3, hidden=768, kind="deit"),
    "deit-small": Config(dim=384, heads=6, hidden=1536, kind="deit"),
    "deit-base": Config(kind="deit"),
}


def block(config: Config) -> Block:
    """Attention, then two linear maps; each reads norm(x) and is added to x."""

    def added(part: nn.Module) -> PreNorm:
        return PreNorm(part, nn.LayerNorm(config.dim, config.epsilon), dropout=config.dropout)

    return Block(
        added(
            SelfAttention(config.dim, config.heads, bias=config.bias, out_bias=True, dropout=config.attention_dropout)
        ),
        added(FeedForward(config.dim, config.hidden, activation=F.gelu)),
    )


class Model(nn.Module):
    """The encoder itself: from pixels to what the class and each patch have become.

    >>> import torch
    >>> from foveate.models import vit
    >>> model = vit.Model(vit.Config(image=32, patch=8, dim=48, layers=2, heads=6, hidden=96))
    >>> model(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 17, 48])
    """

    def __init__(self, config: Config, *, pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        self.side = config.image // config.patch
        self.first = 1 if config.kind == "vit" else 2  # where the patches begin
        self.patch = nn.Conv2d(config.channels, config.dim, config.patch, config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.teacher_token = nn.Parameter(torch.zeros(1, 1, config.dim)) if config.kind == "deit" else None
        self.position = nn.Parameter(torch.zeros(1, self.first + self.side**2, config.dim))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, config.epsilon)
        self.pooler = nn.Linear(config.dim, config.dim) if pooler else None
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, pixels: Pixels, pattern: Pattern | None = None) -> Float[Tensor, "batch tokens dim"]:
        """What each token has become: the class, DeiT's second token, then the patches row by row.

        Args:
            pixels: of any size that is a multiple of the patch; the positions are stretched over it.
            pattern: who sees whom; None = everyone sees everyone.

        Raises:
            InvalidInput: another number of channels, sides that are no multiple of the patch.
        """
        size, (batch, channels, height, width) = self.config.patch, pixels.shape
        if channels != self.config.channels or height % size or width % size:
            wanted = f"{self.config.channels} channels, and sides that are multiples of {size}"
            raise InvalidInput(f"pixels is {describe(pixels)}: wanted {wanted}")
        patches = self.patch(pixels.to(self.patch.weight.dtype)).flatten(2).mT
        tokens = [self.class_token] if self.teacher_token is None else [self.class_token, self.teacher_token]
        x = torch.cat([token.expand(batch, -1, -1) for token in tokens] + [patches], 1)
        x = self.dropout(x + self.positions(height // size, width // size))
        for layer in self.blocks:
            x = layer(x, pattern)
        y: Tensor = self.norm(x)
        return y

    def positions(self, rows: int, columns: int) -> Float[Tensor, "1 tokens dim"]:
        """The learned positions; for an image of another size, those of the patches stretched over it."""
        if rows == columns == self.side:
            return self.position
        grid = self.position[:, self.first :].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (rows, columns), mode="bicubic")
        return torch.cat([self.position[:, : self.first], grid.flatten(2).mT], 1)

    def pool(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        """One vector for an image, made of what the class has become."""
        if self.pooler is None:
            raise InvalidInput("the model has no pooler: wanted a Model that is no head's body")
        return torch.tanh(self.pooler(x[:, 0]))


class ImageClassifier(nn.Module):
    """A score of every label for an image."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.body = config, Model(config, pooler=False)
        self.score = nn.Linear(config.dim, config.labels)

    def forward(self, pixels: Pixels, pattern: Pattern | None = None) -> Float[Tensor, "batch labels"]:
        scores: Tensor = self.score(self.body(pixels, pattern)[:, 0])
        return scores


class TaughtClassifier(nn.Module):
    """DeiT's two scores of every label: the class's own, and what a teacher taught; their mean is the answer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.body = config, Model(config, pooler=False)
        self.own, self.taught = nn.Linear(config.dim, config.labels), nn.Linear(config.dim, config.labels)

    def forward(self, pixels: Pixels, pattern: Pattern | None = None) -> Float[Tensor, "batch 2 labels"]:
        x = self.body(pixels, pattern)
        return torch.stack([self.own(x[:, 0]), self.taught(x[:, 1])], 1)


NAMES = {
    "embeddings.cls_token": "class_token",
    "embeddings.distillation_token": "teacher_token",
    "embeddings.position_embeddings": "position",
    "embeddings.patch_embeddings.projection.*": "patch.*",
    "encoder.layer.*.layernorm_before.*": "blocks.*.attention.norm.*",
    "encoder.layer.*.attention.output.dense.*": "blocks.*.attention.part.out.*",
    "encoder.layer.*.attention.attention.*.*": "blocks.*.attention.part.*.*",  # query, key, value
    "encoder.layer.*.layernorm_after.*": "blocks.*.feed_forward.norm.*",
    "encoder.layer.*.intermediate.dense.*": "blocks.*.feed_forward.part.up.*",
    "encoder.layer.*.output.dense.*": "blocks.*.feed_forward.part.down.*",
    "layernorm.*": "norm.*",
    "pooler.dense.*": "pooler.*",
}

FIELDS = {
    "image": "image_size",
    "patch": "patch_size",
    "channels": "num_channels",
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "bias": "qkv_bias",
    "epsilon": "layer_norm_eps",
    "attention_dropout": "attention_probs_dropout_prob",
    "dropout": "hidden_dropout_prob",
    "labels": "num_labels",
}

VIT = Format(
    config=Config,
    architectures={"ViTForImageClassification": ImageClassifier, "ViTModel": Model},
    fields=FIELDS,
    fixed={"hidden_act": "gelu", "pooler_act": "tanh"},
    names=NAMES,
    heads={"classifier.*": "score.*", "cls_classifier.*": "own.*", "distillation_classifier.*": "taught.*"},
    prefix="vit.",
    ignored=("pooler.dense.*", "embeddings.mask_token"),
)

FORMATS = {
    "vit": VIT,
    "deit": replace(
        VIT,
        architectures={
            "DeiTForImageClassificationWithTeacher": TaughtClassifier,
            "DeiTForImageClassification": ImageClassifier,
            "DeiTModel": Model,
        },
        prefix="deit.",
    ),
}
