"""DiT, a Transformer that takes the noise out of images, told what class of thing they are to show.

    x = patches of a noisy image + position             a square of the image is a word, by one linear map
    x = x + gate · attention(norm(x) · (1 + scale) + shift)
    x = x + gate · mlp(norm(x) · (1 + scale) + shift)   with a scale, shift and gate of its own
    noise = linear(norm(x) · (1 + scale) + shift)

scale, shift and gate are a linear map of time + class: how noisy the image is, and what it shows. The map begins as 0,
and so each block as x (adaLN-zero). Images are those of an autoencoder, an eighth as wide as what one sees.

Peebles & Xie 2022: https://arxiv.org/abs/2212.09748. Texts instead of classes are in `pixart.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.checkpoint.format import Format, Names, prefixed
from foveate.checkpoint.safetensors import DIFFUSERS
from foveate.errors import InvalidInput
from foveate.nn import FeedForward, SelfAttention
from foveate.pattern.algebra import Pattern
from foveate.values import describe

Images = Float[Tensor, "batch channels height width"]
Patches = Float[Tensor, "batch patches dim"]
Times = Float[Tensor, " batch"]
Labels = Int[Tensor, " batch"]
WAVES = 256  # how many cosines and sines stand for a number


@dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    image: int = 32  # the side of the images of the training
    patch: int = 2
    channels: int = 4
    out_channels: int | None = None  # None = as many as go in; twice as many: the noise, and its variance
    heads: int = 16
    head_dim: int = 72
    layers: int = 28
    classes: int = 1000
    bias: bool = True  # of query, key and value
    epsilon: float = 1e-5  # of the norm before the feed-forward; the others have 1e-6
    dropout: float = 0.0
    kind: str = "DiTTransformer2DModel"
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what config.json says beside

    def __post_init__(self) -> None:
        check_sizes(self.image, self.patch, self.heads, self.head_dim)

    @property
    def dim(self) -> int:
        """The size of what stands for a patch."""
        return self.heads * self.head_dim


def check_sizes(image: int, patch: int, heads: int, head_dim: int) -> None:
    """Refuses images that do not divide, and sizes that do not divide into sines and cosines of rows and columns."""
    if image % patch:
        raise InvalidInput(f"images of {image} pixels do not divide into patches of {patch}: change one")
    if heads * head_dim % 4:
        raise InvalidInput(f"{heads} heads of {head_dim} are {heads * head_dim} entries: wanted a multiple of 4")


PRESETS = {
    "dit-s-2": Config(heads=6, head_dim=64, layers=12, out_channels=8),
    "dit-b-2": Config(heads=12, head_dim=64, layers=12, out_channels=8),
    "dit-l-2": Config(heads=16, head_dim=64, layers=24, out_channels=8),
    "dit-xl-2": Config(out_channels=8),
    "dit-xl-2-512": Config(image=64, out_channels=8),
}


def waves(numbers: Float[Tensor, " numbers"], slowest: int = WAVES // 2) -> Float[Tensor, "numbers waves"]:
    """(cos(n·θ_i), sin(n·θ_i)), θ_i = 10000^(−i / slowest), in float32, as models have learned them."""
    steps = torch.arange(WAVES // 2, dtype=torch.float32, device=numbers.device)
    angles = numbers.float()[:, None] * torch.exp(-math.log(10000) * steps / slowest)
    return torch.cat([angles.cos(), angles.sin()], 1)


class Projection(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, size: int, dim: int, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(size, dim), nn.Linear(dim, dim), activation

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch dim"]:
        return cast(Tensor, self.down(self.activation(self.up(x.to(self.up.weight.dtype)))))


class Patching(nn.Conv2d):
    """One linear map of each square of an image, and where the square is.

    That is sines and cosines of column and row: `side` of them in an image of any size, `stretch` times as dense.
    """

    def __init__(self, channels: int, dim: int, size: int, side: int, stretch: float = 1) -> None:
        super().__init__(channels, dim, size, size)
        self.side, self.stretch = side, stretch

    def forward(self, images: Images) -> Patches:
        size, channels = self.stride[0], self.in_channels
        if images.dim() != 4 or images.shape[1] != channels or any(n % size for n in images.shape[2:]):
            wanted = f"[batch, {channels} channels, height, width], and sides that are multiples of {size}"
            raise InvalidInput(f"images is {describe(images)}: wanted {wanted}")
        x = super().forward(images.to(self.weight.dtype))
        return x.flatten(2).mT + self.positions(*x.shape[2:]).to(x)

    def positions(self, rows: int, columns: int) -> Float[Tensor, "patches dim"]:
        """The sines and then the cosines of the column, and those of the row."""
        down, across = (torch.arange(n).double() * self.side / n / self.stretch for n in (rows, columns))
        steps = 10000 ** -(torch.arange(self.out_channels // 4).double() * 4 / self.out_channels)
        angles = torch.stack([across.expand(rows, -1), down[:, None].expand(-1, columns)], 2)[..., None] * steps
        return torch.stack([angles.sin(), angles.cos()], 3).flatten(2).flatten(0, 1)

    def joined(self, x: Float[Tensor, "batch patches size"], like: Images) -> Images:
        """The image of these patches, as high and wide as another."""
        size = self.stride[0]
        x = x.unflatten(1, (like.shape[2] // size, like.shape[3] // size)).unflatten(3, (size, size, -1))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def one_for_each(images: Images, **given: Tensor) -> None:
    """Refuses what is not one number for each image."""
    for name, numbers in given.items():
        if numbers.shape != images.shape[:1]:
            raise InvalidInput(f"{name} is {describe(numbers)}: wanted one for each image, [{len(images)}]")


class Condition(nn.Module):
    """How noisy an image is and what it shows, as one vector."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.time = Projection(WAVES, config.dim)
        self.label = nn.Embedding(config.classes + 1, config.dim)  # the last: none of them

    def forward(self, times: Times, labels: Labels) -> Float[Tensor, "batch dim"]:
        return cast(Tensor, self.time(waves(times, slowest=WAVES // 2 - 1)) + self.label(labels))


class Block(nn.Module):
    """Attention, then two linear maps, each between a scale, shift and gate that time and class say."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim = config.dim
        self.modulation = nn.Linear(dim, 6 * dim)
        self.attention_norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.attention = SelfAttention(dim, config.heads, head_dim=config.head_dim, bias=config.bias, out_bias=True)
        self.mlp_norm = nn.LayerNorm(dim, config.epsilon, elementwise_affine=False)
        self.mlp = FeedForward(dim, activation=nn.GELU("tanh"), dropout=config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Patches, condition: Float[Tensor, "batch dim"], pattern: Pattern | None) -> Patches:
        six = self.modulation(F.silu(condition)).unflatten(1, (6, -1))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = six.chunk(6, 1)
        x = x + gate * self.dropout(self.attention(self.attention_norm(x) * (1 + scale) + shift, pattern))
        return cast(Tensor, x + mlp_gate * self.mlp(self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift))


class ClassToImage(nn.Module):
    """The noise in images of a class.

    >>> import torch
    >>> from foveate.models import dit
    >>> model = dit.ClassToImage(dit.Config(image=8, heads=2, head_dim=12, layers=2, classes=5))
    >>> model(torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([4, 1, 5])).shape
    torch.Size([3, 4, 8, 8])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.patch = Patching(config.channels, dim, config.patch, config.image // config.patch)
        self.conditions = nn.ModuleList(Condition(config) for _ in range(config.layers))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        out = config.channels if config.out_channels is None else config.out_channels
        self.out = nn.Linear(dim, config.patch**2 * out)
        for name, parameter in self.named_parameters():
            if "modulation" in name or name.startswith("out."):
                nn.init.zeros_(parameter)
            elif name.startswith("conditions."):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter.flatten(1))

    def forward(self, images: Images, times: Times, labels: Labels, pattern: Pattern | None = None) -> Images:
        """The noise in each image, and in further channels its variance.

        Args:
            images: of any size that is a multiple of the patch.
            times: how noisy each is, from 0 to 999.
            labels: what each is to show; `classes` is none of them.
            pattern: which patches see which; None = each all.

        Raises:
            InvalidInput: images, times or labels of another shape, sides that are no multiple of the patch.
        """
        x = self.patch(images)
        one_for_each(images, times=times, labels=labels)
        conditions = [condition(times, labels) for condition in self.conditions]
        for block, condition in zip(self.blocks, conditions, strict=True):
            x = block(x, condition, pattern)
        shift, scale = self.modulation(F.silu(conditions[0])).unflatten(1, (2, -1)).chunk(2, 1)
        return self.patch.joined(self.out(self.norm(x) * (1 + scale) + shift), images)


ATTENTION = {"to_q.*": "query.*", "to_k.*": "key.*", "to_v.*": "value.*", "to_out.0.*": "out.*"}
PROJECTION, MLP = {"linear_1.*": "up.*", "linear_2.*": "down.*"}, {"0.proj.*": "up.*", "2.*": "down.*"}
NAMES: Names = {
    "pos_embed.proj.*": "patch.*",
    **prefixed("transformer_blocks.*.norm1.emb.timestep_embedder.", "conditions.*.time.", PROJECTION),
    "transformer_blocks.*.norm1.emb.class_embedder.embedding_table.weight": "conditions.*.label.weight",
    "transformer_blocks.*.norm1.linear.*": "blocks.*.modulation.*",
    **prefixed("transformer_blocks.*.attn1.", "blocks.*.attention.", ATTENTION),
    **prefixed("transformer_blocks.*.ff.net.", "blocks.*.mlp.", MLP),
    "proj_out_1.*": "modulation.*", "proj_out_2.*": "out.*",
}  # fmt: skip

FIELDS = {
    "image": "sample_size", "patch": "patch_size", "channels": "in_channels", "out_channels": "out_channels",
    "heads": "num_attention_heads", "head_dim": "attention_head_dim", "layers": "num_layers",
    "bias": "attention_bias", "epsilon": "norm_eps", "dropout": "dropout",
}  # fmt: skip
FIXED = {"activation_fn": "gelu-approximate", "norm_elementwise_affine": False}

FORMATS = {
    "DiTTransformer2DModel": Format(
        config=Config, architectures={"DiTTransformer2DModel": ClassToImage}, names=NAMES,
        fields=FIELDS | {"classes": "num_embeds_ada_norm"}, fixed=FIXED | {"norm_type": "ada_norm_zero"},
        ignored=("pos_embed.pos_embed",), kind_key="_class_name", files=DIFFUSERS,
    )
}  # fmt: skip
