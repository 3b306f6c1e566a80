"""DINOv2, a Vision Transformer that learns what images show without labels, and its registers.

    x = [class, patches] + position, registers in between      a square of pixels is a word, by one linear map
    x = x + γ₁ · attention(norm(x));   x = x + γ₂ · mlp(norm(x))      γ: one factor for each channel
    ImageClassifier       one linear map of norm(x), the class's and the mean over the patches

Oquab et al. 2023: https://arxiv.org/abs/2304.07193. Registers (Darcet et al. 2023) are tokens without a place: what
belongs to the whole image is kept there, and no longer in patches that show little: https://arxiv.org/abs/2309.16588.
γ is LayerScale (Touvron et al. 2021): https://arxiv.org/abs/2103.17239.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.checkpoint.format import Format, Names
from foveate.errors import InvalidInput
from foveate.nn import Block, FeedForward, GatedFeedForward, PreNorm, SelfAttention
from foveate.pattern.algebra import Pattern
from foveate.values import describe

Pixels = Float[Tensor, "batch channels height width"]


@dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    image: int = 518
    patch: int = 14
    channels: int = 3
    dim: int = 768
    layers: int = 12
    heads: int = 12
    ratio: int = 4  # hidden size of the feed-forward / dim
    gated: bool = False  # whether the feed-forward is
    registers: int = 0
    hides: bool = True  # whether there is a vector for hidden patches
    scale: float = 1.0  # what γ starts from
    bias: bool = True  # of query, key and value
    epsilon: float = 1e-6
    attention_dropout: float = 0.0
    dropout: float = 0.0
    labels: int = 2
    kind: str = "dinov2"
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what config.json says beside

    def __post_init__(self) -> None:
        if self.image % self.patch:
            raise InvalidInput(f"images of {self.image} pixels do not divide into patches of {self.patch}: change one")


PRESETS = {
    "dinov2-small": Config(dim=384, heads=6),
    "dinov2-base": Config(),
    "dinov2-large": Config(dim=1024, layers=24, heads=16),
    "dinov2-giant": Config(dim=1536, layers=40, heads=24, gated=True),
    "dinov2-base-registers": Config(registers=4, kind="dinov2_with_registers"),
}


class Scale(nn.Module):
    """γ · x, one learned factor for each channel."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((config.dim,), config.scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def block(config: Config) -> Block:
    """Attention, then the feed-forward; each reads norm(x), is scaled channel by channel and added to x."""

    def added(part: nn.Module) -> PreNorm:
        return PreNorm(part, nn.LayerNorm(config.dim, config.epsilon), after=Scale(config))

    dim, hidden = config.dim, config.ratio * config.dim
    if config.gated:
        # Two thirds as wide, so that it has as many weights; under a name of its own, as files have them.
        gated = GatedFeedForward(dim, (hidden * 2 // 3 + 7) // 8 * 8, bias=True)
        feed_forward: nn.Module = nn.Sequential(OrderedDict(gated=gated))
    else:
        feed_forward = FeedForward(dim, hidden, activation=F.gelu)
    attention = SelfAttention(dim, config.heads, bias=config.bias, out_bias=True, dropout=config.attention_dropout)
    return Block(added(attention), added(feed_forward))


class Model(nn.Module):
    """The encoder itself: from pixels to what the class, the registers and each patch have become.

    >>> import torch
    >>> from foveate.models import dinov2
    >>> model = dinov2.Model(dinov2.Config(image=28, patch=7, dim=48, layers=2, heads=6, registers=4))
    >>> model(torch.randn(2, 3, 28, 28)).shape
    torch.Size([2, 21, 48])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.side = config.image // config.patch
        self.first = 1 + config.registers  # where the patches begin
        self.patch = nn.Conv2d(config.channels, config.dim, config.patch, config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.registers, config.dim)) if config.registers else None
        self.hidden_patch = nn.Parameter(torch.zeros(1, config.dim)) if config.hides else None
        self.position = nn.Parameter(torch.zeros(1, 1 + self.side**2, config.dim))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, config.epsilon)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(
        self, pixels: Pixels, pattern: Pattern | None = None, *, hidden: Bool[Tensor, "batch patches"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """What each token has become: the class, the registers, then the patches row by row.

        Args:
            pixels: of any size that is a multiple of the patch; the positions are stretched over it.
            pattern: who sees whom; None = everyone sees everyone.
            hidden: patches that the model is not to see, and to tell from the others, as it learned to.

        Raises:
            InvalidInput: another number of channels, sides that are no multiple of the patch.
        """
        size, (batch, channels, height, width) = self.config.patch, pixels.shape
        if channels != self.config.channels or height % size or width % size:
            wanted = f"{self.config.channels} channels, and sides that are multiples of {size}"
            raise InvalidInput(f"pixels is {describe(pixels)}: wanted {wanted}")
        patches = self.patch(pixels.to(self.patch.weight.dtype)).flatten(2).mT
        if hidden is not None:
            if self.hidden_patch is None:
                raise InvalidInput("the model has no vector for hidden patches (hides=False): leave hidden out")
            patches = torch.where(hidden[..., None], self.hidden_patch, patches)
        position = self.positions(height // size, width // size)
        parts = [self.class_token + position[:, :1], patches + position[:, 1:]]
        if self.register_tokens is not None:
            parts.insert(1, self.register_tokens)
        x = self.dropout(torch.cat([part.expand(batch, -1, -1) for part in parts], 1))
        for layer in self.blocks:
            x = layer(x, pattern)
        y: Tensor = self.norm(x)
        return y

    def positions(self, rows: int, columns: int) -> Float[Tensor, "1 tokens dim"]:
        """The learned positions; for an image of another size, those of the patches stretched over it."""
        if rows == columns == self.side:
            return self.position
        grid = self.position[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=self.config.kind != "dinov2")
        return torch.cat([self.position[:, :1], grid.flatten(2).mT.to(self.position.dtype)], 1)


class ImageClassifier(nn.Module):
    """A score of every label for an image."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.body = config, Model(config)
        self.score = nn.Linear(2 * config.dim, config.labels)

    def forward(self, pixels: Pixels, pattern: Pattern | None = None) -> Float[Tensor, "batch labels"]:
        x = self.body(pixels, pattern)
        scores: Tensor = self.score(torch.cat([x[:, 0], x[:, self.body.first :].mean(1)], 1))
        return scores


NAMES: Names = {
    "embeddings.cls_token": "class_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.mask_token": "hidden_patch",
    "embeddings.position_embeddings": "position",
    "embeddings.patch_embeddings.projection.*": "patch.*",
    "encoder.layer.*.norm1.*": "blocks.*.attention.norm.*",
    "encoder.layer.*.attention.output.dense.*": "blocks.*.attention.part.out.*",
    "encoder.layer.*.attention.attention.*.*": "blocks.*.attention.part.*.*",  # query, key, value
    "encoder.layer.*.layer_scale1.lambda1": "blocks.*.attention.after.factor",
    "encoder.layer.*.norm2.*": "blocks.*.feed_forward.norm.*",
    "encoder.layer.*.mlp.fc1.*": "blocks.*.feed_forward.part.up.*",
    "encoder.layer.*.mlp.fc2.*": "blocks.*.feed_forward.part.down.*",
    "encoder.layer.*.mlp.weights_in.*": (
        "blocks.*.feed_forward.part.gated.gate.*",
        "blocks.*.feed_forward.part.gated.up.*",
    ),
    "encoder.layer.*.mlp.weights_out.*": "blocks.*.feed_forward.part.gated.down.*",
    "encoder.layer.*.layer_scale2.lambda1": "blocks.*.feed_forward.after.factor",
    "layernorm.*": "norm.*",
}

FIELDS = {
    "image": "image_size", "patch": "patch_size", "channels": "num_channels", "dim": "hidden_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "ratio": "mlp_ratio", "gated": "use_swiglu_ffn",
    "scale": "layerscale_value", "bias": "qkv_bias", "epsilon": "layer_norm_eps", "labels": "num_labels",
    "attention_dropout": "attention_probs_dropout_prob", "dropout": "hidden_dropout_prob",
}  # fmt: skip

PLAIN = Format(
    config=Config,
    architectures={"Dinov2Model": Model, "Dinov2ForImageClassification": ImageClassifier},
    fields=FIELDS | {"hides": "use_mask_token"},
    fixed={"hidden_act": "gelu", "drop_path_rate": 0.0},
    defaults={"image_size": 224},
    names=NAMES,
    heads={"classifier.*": "score.*"},
    prefix="dinov2.",
)

FORMATS = {
    "dinov2": PLAIN,
    "dinov2_with_registers": replace(
        PLAIN,
        architectures={
            "Dinov2WithRegistersModel": Model,
            "Dinov2WithRegistersForImageClassification": ImageClassifier,
        },
        fields=FIELDS | {"registers": "num_register_tokens"},
        defaults={"image_size": 224, "patch_size": 16, "num_register_tokens": 4},
        prefix="dinov2_with_registers.",
    ),
}
