"""DETR finds the objects in an image: all at once, and each as one of a hundred queries that look at the image.

    image     x = W · features(pixels)                      one vector for each place, of 32 × 32 pixels: `resnet.py`
    encoder   x = norm(x + attention(x + p, x + p, x));     x = norm(x + mlp(x))
    decoder   y = norm(y + attention(y + o, y + o, y));     y = norm(y + attention(y + o, x + p, x));
              y = norm(y + mlp(y))                          0 at first, once for each query
    Detector  a score of every label and of "no object", and a box, both of norm(y)

Positions are added to queries and keys, not to values: p is where a place is, o is learned for each query.
Carion et al. 2020, "End-to-end object detection with Transformers": https://arxiv.org/abs/2005.12872
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.checkpoint.format import Format, Names, prefixed
from foveate.errors import InvalidInput, unknown_name
from foveate.models import resnet
from foveate.nn import FeedForward, MultiHeadAttention, PostNorm, Sinusoidal
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import padding
from foveate.values import describe

Pixels = Float[Tensor, "batch channels height width"]
Keep = Bool[Tensor, "batch height width"]
Places = Float[Tensor, "batch places dim"]
Objects = Float[Tensor, "batch queries dim"]
Seen = Pattern | None
Context = tuple[Tensor, Tensor] | None  # keys, values
Read = tuple[Places, Places, Seen]  # what is at each place, by what it is found, which places are real
CONVOLUTIONS = "backbone.conv_encoder.model."  # how their names begin


@dataclass(frozen=True)
class Config:
    """The sizes of a model; those from channels to dilated are the convolutions'."""

    queries: int = 100  # the most objects of an image
    dim: int = 256
    layers: int = 6
    decoder_layers: int = 6
    heads: int = 8
    decoder_heads: int = 8
    hidden: int = 2048
    decoder_hidden: int = 2048
    dropout: float = 0.1
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    labels: int = 91
    channels: int = 3
    stem: int = 64
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    unit: str = resnet.BOTTLENECK  # or "basic"
    dilated: bool = False  # a place is 16 × 16 pixels
    backbone: str = "resnet"  # or "timm_backbone": by whose names the convolutions are written
    kind: str = "detr"
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what config.json says beside

    def __post_init__(self) -> None:
        if self.dim % 4:
            raise InvalidInput(f"dim is {self.dim}: wanted a multiple of 4, for sines and cosines of rows and columns")
        if self.backbone not in resnet.NAMES:
            raise unknown_name("backbone", self.backbone, resnet.NAMES)


PRESETS = {
    "detr-resnet-50": Config(),
    "detr-resnet-101": Config(depths=(3, 4, 23, 3)),
    "detr-resnet-50-dc5": Config(dilated=True, backbone="timm_backbone"),
    "detr-resnet-101-dc5": Config(depths=(3, 4, 23, 3), dilated=True, backbone="timm_backbone"),
}


class Attention(MultiHeadAttention):
    """Attention whose queries, and keys where there is no context, are made of x + position, and values of x."""

    def forward(self, x: Tensor, position: Tensor, context: Context = None, pattern: Seen = None) -> Tensor:  # type: ignore[override]
        finds = x + position
        return super().forward(finds, context or (finds, x), pattern)


class Block(nn.Module):
    """Attention, in the decoder attention to the image, feed-forward; x is added to each, and the norm is behind."""

    def __init__(self, config: Config, *, decodes: bool) -> None:
        super().__init__()

        def added(part: nn.Module) -> PostNorm:
            return PostNorm(part, nn.LayerNorm(dim), dropout=config.dropout)

        dim, dropout = config.dim, config.attention_dropout
        heads, hidden = (config.decoder_heads, config.decoder_hidden) if decodes else (config.heads, config.hidden)
        self.attention = added(Attention(dim, heads, dropout=dropout))
        self.cross = added(Attention(dim, heads, dropout=dropout)) if decodes else None
        self.feed_forward = added(FeedForward(dim, hidden, dropout=config.hidden_dropout))

    def forward(self, x: Tensor, position: Tensor, context: Context = None, pattern: Seen = None) -> Tensor:
        """The pattern says which places are real; queries see one another without one."""
        x = self.attention(x, position, pattern=None if self.cross else pattern)
        if self.cross is not None:
            x = self.cross(x, position, context, pattern)
        return cast(Tensor, self.feed_forward(x))


class Model(nn.Module):
    """The encoder and the decoder: from pixels to what each query has become.

    >>> import torch
    >>> from foveate.models import detr
    >>> model = detr.Model(detr.Config(7, 32, 1, 1, 4, 4, 48, 48, stem=8, widths=(16, 24), depths=(1, 1)))
    >>> model(torch.randn(1, 3, 40, 64)).shape
    torch.Size([1, 7, 32])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        sizes = config.channels, config.stem, config.widths, config.depths, config.unit, config.dilated
        self.backbone = resnet.ResNet(*sizes)
        self.project = nn.Conv2d(config.widths[-1], config.dim, 1)
        self.waves = Sinusoidal(config.dim // 2)
        self.query = nn.Parameter(torch.randn(config.queries, config.dim))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, decodes=False) for _ in range(config.layers))
        self.decoder_blocks = nn.ModuleList(Block(config, decodes=True) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.dim)

    def encode(self, pixels: Pixels, keep: Keep | None = None) -> Read:
        """What each place has become; `keep` are the real pixels, where smaller images are padded; None = all.

        Raises:
            InvalidInput: another number of channels, a keep that is not one boolean for each pixel.
        """
        if keep is not None and (keep.dtype != torch.bool or keep.shape != pixels[:, 0].shape):
            raise InvalidInput(f"keep is {describe(keep)}: wanted a boolean for each pixel of {describe(pixels)}")
        features = self.project(self.backbone(pixels.to(self.project.weight.dtype)))
        real = torch.ones_like(pixels[:, 0]) if keep is None else keep
        real = F.interpolate(real[None].float(), features.shape[2:])[0].bool()
        x, position = self.dropout(features.flatten(2).mT), self.positions(real).to(features.dtype)
        pattern = None if keep is None else padding(real.flatten(1))
        for block in self.blocks:
            x = block(x, position, pattern=pattern)
        return x, x + position, pattern

    def positions(self, real: Bool[Tensor, "batch rows columns"]) -> Places:
        """Waves of how far down, then of how far right a place is; an image is 2π high and wide without its padding."""
        counts = [(real.cumsum(axis, dtype=torch.float32), axis) for axis in (1, 2)]
        shares = [count / (count.narrow(axis, -1, 1) + 1e-6) for count, axis in counts]
        return torch.cat([self.waves.table(share * (2 * torch.pi)) for share in shares], -1).flatten(1, 2)

    def decode(self, values: Places, keys: Places, pattern: Seen) -> Objects:
        """What each query has become."""
        y = torch.zeros_like(self.query).expand(len(values), -1, -1)
        for block in self.decoder_blocks:
            y = block(y, self.query, (keys, values), pattern)
        return cast(Tensor, self.norm(y))

    def forward(self, pixels: Pixels, keep: Keep | None = None) -> Objects:
        """What each query has become."""
        return self.decode(*self.encode(pixels, keep))


class Found(NamedTuple):
    """Scores of the labels, the last of which is "no object", and boxes: center x and y, width, height, from 0 to 1."""

    scores: Float[Tensor, "batch queries labels"]
    boxes: Float[Tensor, "batch queries 4"]


class Detected(NamedTuple):
    """The objects of one image; boxes are left, top, right, bottom in pixels."""

    probabilities: Float[Tensor, " objects"]
    labels: Int[Tensor, " objects"]
    boxes: Float[Tensor, "objects 4"]


class Detector(nn.Module):
    """What each query found, and where."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.body = config, Model(config)
        self.score = nn.Linear(config.dim, config.labels + 1)
        dim, relu = config.dim, nn.ReLU()
        self.box = nn.Sequential(nn.Linear(dim, dim), relu, nn.Linear(dim, dim), relu, nn.Linear(dim, 4))

    def forward(self, pixels: Pixels, keep: Keep | None = None) -> Found:
        """Scores and boxes, relative to each image without its padding."""
        x = self.body(pixels, keep)
        return Found(self.score(x), self.box(x).sigmoid())

    @torch.no_grad()
    def detect(self, pixels: Pixels, keep: Keep | None = None, *, above: float = 0.9) -> list[Detected]:
        """The objects of each image whose probability is above that."""
        scores, boxes = self(pixels, keep)
        real = torch.ones_like(pixels[:, 0], dtype=torch.bool) if keep is None else keep
        sides = torch.stack([real.any(1).sum(1), real.any(2).sum(1)], 1)[:, None]  # width, height
        center, size = (boxes * sides.repeat(1, 1, 2)).chunk(2, -1)
        corners = torch.cat([center - size / 2, center + size / 2], -1)
        best, labels = scores.softmax(-1)[..., :-1].max(-1)
        return [Detected(best[n, sure], labels[n, sure], corners[n, sure]) for n, sure in enumerate(best > above)]


def names(config: Config) -> Names:
    """The convolutions' are those of the library that made them."""
    found: dict[str, Any] = {
        **prefixed(CONVOLUTIONS, "backbone.", resnet.NAMES[config.backbone]),
        "input_projection.*": "project.*", "query_position_embeddings.weight": "query", "decoder.layernorm.*": "norm.*",
    }  # fmt: skip
    inside = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    for there, here in {"encoder.layers.*": "blocks.*", "decoder.layers.*": "decoder_blocks.*"}.items():
        for part, attention in {"self_attn": "attention", "encoder_attn": "cross"}.items():
            found |= {f"{there}.{part}.{old}.*": f"{here}.{attention}.part.{new}.*" for old, new in inside.items()}
            found[f"{there}.{part}_layer_norm.*"] = f"{here}.{attention}.norm.*"
        for old, new in {"fc1": "part.up", "fc2": "part.down", "final_layer_norm": "norm"}.items():
            found[f"{there}.{old}.*"] = f"{here}.feed_forward.{new}.*"
    return found


FIELDS = {
    "queries": "num_queries", "dim": "d_model", "layers": "encoder_layers", "decoder_layers": "decoder_layers",
    "heads": "encoder_attention_heads", "decoder_heads": "decoder_attention_heads", "hidden": "encoder_ffn_dim",
    "decoder_hidden": "decoder_ffn_dim", "dropout": "dropout", "attention_dropout": "attention_dropout",
    "hidden_dropout": "activation_dropout", "labels": "num_labels", "dilated": "dilation", **resnet.FIELDS,
}  # fmt: skip
FORMATS = {
    "detr": Format(
        config=Config, architectures={"DetrForObjectDetection": Detector, "DetrModel": Model}, fields=FIELDS,
        fixed={
            "position_embedding_type": "sine", "activation_function": "relu", "auxiliary_loss": False,
            "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, **resnet.FIXED,
        },
        defaults={"num_labels": 2}, names=names, prefix="model.",
        heads={"class_labels_classifier.*": "score.*"}
        | {f"bbox_predictor.layers.{n}.*": f"box.{2 * n}.*" for n in range(3)},
        ignored=tuple(CONVOLUTIONS + name for name in resnet.IGNORED),
        upgrade=resnet.spelled_out, also=resnet.named,
    )
}  # fmt: skip
