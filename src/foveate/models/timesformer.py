"""TimeSformer, a Vision Transformer for videos, which looks along time and across the image one after the other.

    x = [class, patches] + place (+ time)     a square of pixels of a frame is a word, by one linear map
    divided_space_time    patches: x = x + linear(attention(norm(x)))    to the same place in all frames
                          x = x + attention(norm(x))                     to the same frame; the class is in each of
                                                                         them, and becomes the mean of what it became
    joint_space_time      x = x + attention(norm(x))                     to all places in all frames
    space_only            x = x + attention(norm(x))                     each frame by itself
    each of them          x = x + mlp(norm(x))

Divided, a patch looks at frames + places, not at frames · places. Bertasius, Wang & Torresani 2021, "Is space-time
attention all you need for video understanding?": https://arxiv.org/abs/2102.05095
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.checkpoint.format import Format, Names
from foveate.errors import InvalidInput, unknown_name
from foveate.nn import Block, FeedForward, PreNorm, SelfAttention
from foveate.pattern.algebra import Pattern
from foveate.values import describe

Videos = Float[Tensor, "batch frames channels height width"]

DIVIDED, JOINT, SPACE = "divided_space_time", "joint_space_time", "space_only"


@dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    image: int = 224
    patch: int = 16
    channels: int = 3
    frames: int = 8
    dim: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    attention: str = DIVIDED  # or "joint_space_time", "space_only"
    bias: bool = True  # of query, key and value
    epsilon: float = 1e-6
    attention_dropout: float = 0.0
    dropout: float = 0.0
    labels: int = 2
    kind: str = "timesformer"
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what config.json says beside

    def __post_init__(self) -> None:
        if self.attention not in (DIVIDED, JOINT, SPACE):
            raise unknown_name("attention", self.attention, (DIVIDED, JOINT, SPACE))
        if self.image % self.patch:
            raise InvalidInput(f"images of {self.image} pixels do not divide into patches of {self.patch}: change one")


PRESETS = {
    "timesformer": Config(),
    "timesformer-hr": Config(image=448, frames=16),
    "timesformer-l": Config(frames=96),
}


def attention(config: Config, after: nn.Module | None = None) -> PreNorm:
    """Attention that reads norm(x) and is added to x."""
    dim, dropout = config.dim, config.attention_dropout
    part = SelfAttention(dim, config.heads, bias=config.bias, out_bias=True, dropout=dropout)
    return PreNorm(part, nn.LayerNorm(dim, config.epsilon), after=after, dropout=0 if after else config.dropout)


def feed_forward(config: Config) -> PreNorm:
    """Two linear maps that read norm(x) and are added to x."""
    part = FeedForward(config.dim, config.hidden, activation=F.gelu, dropout=config.dropout)
    return PreNorm(part, nn.LayerNorm(config.dim, config.epsilon), dropout=config.dropout)


class Divided(nn.Module):
    """Attention along time, attention across each frame, then two linear maps."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        linear = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(config.dim, config.dim))
        self.time = attention(config, after=linear)
        self.attention = attention(config)
        self.feed_forward = feed_forward(config)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], frames: int, pattern: Pattern | None, time: Pattern | None
    ) -> Float[Tensor, "batch tokens dim"]:
        """`x` is the class, then place by place its patches in all frames."""
        whole, patches = x[:, None, :1], x[:, 1:].unflatten(1, (-1, frames))
        patches = self.time(patches.flatten(0, 1), time).view_as(patches)
        x = torch.cat([whole.expand(-1, frames, -1, -1), patches.transpose(1, 2)], 2)  # frame by frame
        x = self.attention(x.flatten(0, 1), pattern).view_as(x)
        x = torch.cat([x[:, :, 0].mean(1, keepdim=True), x[:, :, 1:].transpose(1, 2).flatten(1, 2)], 1)
        y: Tensor = self.feed_forward(x)
        return y


class Model(nn.Module):
    """The encoder itself: from the pixels of a video to what the class and each patch have become.

    >>> import torch
    >>> from foveate.models import timesformer
    >>> model = timesformer.Model(timesformer.Config(image=16, patch=8, frames=3, dim=48, layers=2, heads=6, hidden=96))
    >>> model(torch.randn(2, 3, 3, 16, 16)).shape
    torch.Size([2, 13, 48])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.side = config.image // config.patch
        self.patch = nn.Conv2d(config.channels, config.dim, config.patch, config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.position = nn.Parameter(torch.zeros(1, 1 + self.side**2, config.dim))
        self.time = None if config.attention == SPACE else nn.Parameter(torch.zeros(1, config.frames, config.dim))
        self.dropout = nn.Dropout(config.dropout)
        self.divided = config.attention == DIVIDED
        self.blocks = nn.ModuleList(
            Divided(config) if self.divided else Block(attention(config), feed_forward(config))
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim, config.epsilon)
        for name, parameter in self.named_parameters():
            if ".time.after." in name and not name.startswith("blocks.0."):
                nn.init.zeros_(parameter)  # at first, as if there were no time
            elif parameter.dim() > 1 and name != "time":
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(
        self, pixels: Videos, pattern: Pattern | None = None, *, time: Pattern | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """What each token has become: the class, then place by place its patches in all frames.

        With `space_only` each frame is a row of its own: the class, then its patches.

        Args:
            pixels: of any number of frames and sides that are multiples of the patch; where they are not those of the
                training, each place and time has what was learned for the nearest.
            pattern: who sees whom in attention across a frame (`joint_space_time`: all frames); None = everyone.
            time: who sees whom along time, for `divided_space_time`: `fv.causal` looks at no later frame.

        Raises:
            InvalidInput: no video, another number of channels, sides that are no multiple of the patch.
        """
        size, wanted = self.config.patch, self.config.channels
        fits = pixels.dim() == 5 and pixels.shape[1] > 0 and pixels.shape[2] == wanted
        if not fits or any(side % size for side in pixels.shape[3:]):
            shape = f"[batch, frames, {wanted} channels, height, width], and sides that are multiples of {size}"
            raise InvalidInput(f"pixels is {describe(pixels)}: wanted {shape}")
        if time is not None and not self.divided:
            raise InvalidInput(f"time is {time!r} but the model attends by {self.config.attention}: leave time out")
        batch, frames = pixels.shape[:2]
        x = self.patch(pixels.to(self.patch.weight.dtype).flatten(0, 1))
        position = self.positions(*x.shape[2:])
        x = torch.cat([self.class_token.expand(batch * frames, -1, -1), x.flatten(2).mT], 1)
        x = self.dropout(x + position)
        if self.time is not None:
            x = x.unflatten(0, (batch, frames))
            patches = self.dropout(x[:, :, 1:].transpose(1, 2) + self.times(frames))  # place by place
            x = torch.cat([x[:, 0, :1], patches.flatten(1, 2)], 1)
        for block in self.blocks:
            x = block(x, frames, pattern, time) if self.divided else block(x, pattern)
        y: Tensor = self.norm(x)
        return y

    def positions(self, rows: int, columns: int) -> Float[Tensor, "1 tokens dim"]:
        """The learned places; for an image of another size, each patch has that of the nearest."""
        if rows == columns == self.side:
            return self.position
        grid = self.position[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        return torch.cat([self.position[:, :1], F.interpolate(grid, (rows, columns)).flatten(2).mT], 1)

    def times(self, frames: int) -> Float[Tensor, "1 frames dim"]:
        """The learned times; for another number of frames, each has that of the nearest."""
        assert self.time is not None
        return self.time if frames == self.config.frames else F.interpolate(self.time.mT, frames).mT


class VideoClassifier(nn.Module):
    """A score of every label for a video: one linear map of what the class has become."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.body = config, Model(config)
        self.score = nn.Linear(config.dim, config.labels)

    def forward(
        self, pixels: Videos, pattern: Pattern | None = None, *, time: Pattern | None = None
    ) -> Float[Tensor, "batch labels"]:
        """Where each frame is seen by itself, the mean of what the frames score."""
        scores: Tensor = self.score(self.body(pixels, pattern, time=time)[:, 0])
        return scores.unflatten(0, pixels.shape[:2]).mean(1) if self.body.time is None else scores


QKV = "query", "key", "value"
NAMES: Names = {
    "embeddings.cls_token": "class_token",
    "embeddings.position_embeddings": "position",
    "embeddings.time_embeddings": "time",
    "embeddings.patch_embeddings.projection.*": "patch.*",
    "encoder.layer.*.temporal_layernorm.*": "blocks.*.time.norm.*",
    "encoder.layer.*.temporal_attention.attention.qkv.*": tuple(f"blocks.*.time.part.{name}.*" for name in QKV),
    "encoder.layer.*.temporal_attention.output.dense.*": "blocks.*.time.part.out.*",
    "encoder.layer.*.temporal_dense.*": "blocks.*.time.after.1.*",
    "encoder.layer.*.layernorm_before.*": "blocks.*.attention.norm.*",
    "encoder.layer.*.attention.attention.qkv.*": tuple(f"blocks.*.attention.part.{name}.*" for name in QKV),
    "encoder.layer.*.attention.output.dense.*": "blocks.*.attention.part.out.*",
    "encoder.layer.*.layernorm_after.*": "blocks.*.feed_forward.norm.*",
    "encoder.layer.*.intermediate.dense.*": "blocks.*.feed_forward.part.up.*",
    "encoder.layer.*.output.dense.*": "blocks.*.feed_forward.part.down.*",
    "layernorm.*": "norm.*",
}

FORMATS = {
    "timesformer": Format(
        config=Config,
        architectures={"TimesformerForVideoClassification": VideoClassifier, "TimesformerModel": Model},
        fields={
            "image": "image_size", "patch": "patch_size", "channels": "num_channels", "frames": "num_frames",
            "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
            "hidden": "intermediate_size", "attention": "attention_type", "bias": "qkv_bias",
            "epsilon": "layer_norm_eps", "attention_dropout": "attention_probs_dropout_prob",
            "dropout": "hidden_dropout_prob", "labels": "num_labels",
        },
        fixed={"hidden_act": "gelu", "drop_path_rate": 0},
        names=NAMES,
        heads={"classifier.*": "score.*"},
        prefix="timesformer.",
    )
}  # fmt: skip
