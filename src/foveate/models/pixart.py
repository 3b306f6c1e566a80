"""PixArt-α, a Transformer that takes the noise out of images, told by a text what they are to show.

    x = patches of a noisy image + position             a square of the image is a word, by one linear map
    x = x + gate · attention(norm(x) · (1 + scale) + shift)
    x = x + cross(x, caption)                           what a text encoder (T5) made of the words, by two linear maps
    x = x + gate · mlp(norm(x) · (1 + scale) + shift)   with a scale, shift and gate of its own
    noise = linear(norm(x) · (1 + scale) + shift)

scale, shift and gate are a linear map of the time, how noisy the image is, worked out once for all blocks; each block
adds a table of its own (adaLN-single). A model for images of many shapes is told their height and width as well.

Chen et al. 2023, "PixArt-α": https://arxiv.org/abs/2310.00426, on DiT, whose patches and positions are in `dit.py`:
https://arxiv.org/abs/2212.09748
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.checkpoint.format import Format, Names, prefixed
from foveate.checkpoint.safetensors import DIFFUSERS
from foveate.errors import InvalidInput
from foveate.models import dit
from foveate.models.dit import Images, Patches, Times
from foveate.nn import CrossAttention, FeedForward, KeysValues, SelfAttention
from foveate.pattern.algebra import Pattern
from foveate.values import describe

Caption = Float[Tensor, "batch words size"]


@dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    image: int = 128  # the side of the images of the training
    patch: int = 2
    channels: int = 4
    out_channels: int | None = 8  # the noise, and its variance; None = as many as go in
    heads: int = 16
    head_dim: int = 72
    layers: int = 28
    caption_dim: int | None = 4096  # of a caption as it is given; None = no linear maps before attention reads it
    context_dim: int = 1152  # of a caption as attention reads it
    sized: bool | None = None  # whether the model is told height and width; None = if image is 128
    stretch: float | None = None  # how many times the positions of 64 are stretched over the image; None = image / 64
    bias: bool = True  # of query, key and value
    epsilon: float = 1e-6
    dropout: float = 0.0
    kind: str = "PixArtTransformer2DModel"
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what config.json says beside

    def __post_init__(self) -> None:
        dit.check_sizes(self.image, self.patch, self.heads, self.head_dim)
        if self.caption_dim is not None and self.context_dim != self.dim:
            raise InvalidInput(
                f"captions are mapped to {self.dim} entries but read with {self.context_dim}: change one"
            )
        if self.told and self.dim % 3:
            raise InvalidInput(f"{self.dim} entries do not divide into thirds for height, width and ratio: change it")

    @property
    def dim(self) -> int:
        """The size of what stands for a patch."""
        return self.heads * self.head_dim

    @property
    def told(self) -> bool:
        """Whether the model is told height and width."""
        return self.image == 128 if self.sized is None else self.sized


PRESETS = {
    "pixart-alpha-256": Config(image=32),
    "pixart-alpha-512": Config(image=64),
    "pixart-alpha-1024": Config(),
}


class Block(nn.Module):
    """Attention, cross-attention to the caption, two linear maps; the first and the last as the time says."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim = config.dim
        heads: dict[str, Any] = {"head_dim": config.head_dim, "bias": config.bias, "out_bias": True}
        self.table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.attention_norm = nn.LayerNorm(dim, config.epsilon, elementwise_affine=False)
        self.attention = SelfAttention(dim, config.heads, **heads)
        self.cross = CrossAttention(dim, config.heads, context_dim=config.context_dim, **heads)
        self.mlp_norm = nn.LayerNorm(dim, config.epsilon, elementwise_affine=False)
        self.mlp = FeedForward(dim, activation=nn.GELU("tanh"), dropout=config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Patches,
        six: Float[Tensor, "batch 6 dim"],
        caption: Caption | KeysValues,
        pattern: Pattern | None,
        image_pattern: Pattern | None,
    ) -> Patches:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (six + self.table).chunk(6, 1)
        x = x + gate * self.dropout(self.attention(self.attention_norm(x) * (1 + scale) + shift, image_pattern))
        x = x + self.dropout(self.cross(x, caption, pattern))
        y: Tensor = x + mlp_gate * self.mlp(self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift)
        return y


class TextToImage(nn.Module):
    """The noise in images that show what captions say.

    >>> import torch
    >>> from foveate.models import pixart
    >>> model = pixart.TextToImage(pixart.Config(8, heads=2, head_dim=12, layers=2, caption_dim=10, context_dim=24))
    >>> model(torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.randn(3, 7, 10)).shape
    torch.Size([3, 8, 8, 8])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        stretch = max(config.image // 64, 1) if config.stretch is None else config.stretch
        self.patch = dit.Patching(config.channels, dim, config.patch, config.image // config.patch, stretch)
        self.time = dit.Projection(dit.WAVES, dim)
        self.side = dit.Projection(dit.WAVES, dim // 3) if config.told else None
        self.ratio = dit.Projection(dit.WAVES, dim // 3) if config.told else None
        self.modulation = nn.Linear(dim, 6 * dim)
        self.caption = None if config.caption_dim is None else dit.Projection(config.caption_dim, dim, nn.GELU("tanh"))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        out = config.channels if config.out_channels is None else config.out_channels
        self.out = nn.Linear(dim, config.patch**2 * out)
        for name, parameter in self.named_parameters():
            if ".cross.out." in name or name.startswith("out."):
                nn.init.zeros_(parameter)  # at first the caption says nothing
            elif name.startswith(("time.", "side.", "ratio.", "modulation.", "caption.")):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() > 1 and "table" not in name:
                nn.init.xavier_uniform_(parameter.flatten(1))

    def forward(
        self,
        images: Images,
        times: Times,
        caption: Caption,
        pattern: Pattern | None = None,
        *,
        image_pattern: Pattern | None = None,
        size: Float[Tensor, "batch 2"] | None = None,
    ) -> Images:
        """The noise in each image, and in further channels its variance.

        Args:
            images: of any size that is a multiple of the patch.
            times: how noisy each is, from 0 to 999.
            caption: what a text encoder made of the words of each text.
            pattern: which words are seen: `fv.padding(keep)`.
            image_pattern: which patches see which; None = each all.
            size: height and width of each image in pixels, for a model that is told them.

        Raises:
            InvalidInput: another number of channels, sides that are no multiple of the patch, times that are not one
                for each image, no caption or one of another shape, no size where one is wanted, or one where none is.
        """
        x = self.patch(images)
        dit.one_for_each(images, times=times)
        wanted = self.config.caption_dim or self.config.context_dim
        if not isinstance(caption, Tensor) or caption.dim() != 3 or caption.shape[::2] != (len(x), wanted):
            raise InvalidInput(f"caption is {describe(caption)}: wanted [{len(x)}, words, {wanted}] of a text encoder")
        time = self.time(dit.waves(times)) + self.sizes(size, len(x))
        six = self.modulation(F.silu(time)).unflatten(1, (6, -1))
        caption = caption.to(x.dtype) if self.caption is None else self.caption(caption)
        for block in self.blocks:
            x = block(x, six, caption, pattern, image_pattern)
        shift, scale = (self.table + time[:, None]).chunk(2, 1)
        return self.patch.joined(self.out(self.norm(x) * (1 + scale) + shift), images)

    def sizes(self, size: Tensor | None, batch: int) -> Tensor | float:
        """What is added to the time: height, width and their ratio, one after the other."""
        if self.side is None or self.ratio is None:
            if size is not None:
                raise InvalidInput(f"size is {describe(size)} but the model is not told sizes: leave it out")
            return 0.0
        if not isinstance(size, Tensor) or size.shape != (batch, 2):
            raise InvalidInput(f"size is {describe(size)}: wanted height and width of each image, [{batch}, 2]")
        sides, ratio = self.side(dit.waves(size.flatten())), self.ratio(dit.waves(size[:, 0] / size[:, 1]))
        return torch.cat([sides.view(batch, -1), ratio], 1)


NAMES: Names = {
    "pos_embed.proj.*": "patch.*",
    **prefixed("adaln_single.emb.timestep_embedder.", "time.", dit.PROJECTION),
    **prefixed("adaln_single.emb.resolution_embedder.", "side.", dit.PROJECTION),
    **prefixed("adaln_single.emb.aspect_ratio_embedder.", "ratio.", dit.PROJECTION),
    "adaln_single.linear.*": "modulation.*",
    **prefixed("caption_projection.", "caption.", dit.PROJECTION),
    "transformer_blocks.*.scale_shift_table": "blocks.*.table",
    **prefixed("transformer_blocks.*.attn1.", "blocks.*.attention.", dit.ATTENTION),
    **prefixed("transformer_blocks.*.attn2.", "blocks.*.cross.", dit.ATTENTION),
    **prefixed("transformer_blocks.*.ff.net.", "blocks.*.mlp.", dit.MLP),
    "scale_shift_table": "table",
    "proj_out.*": "out.*",
}

FORMATS = {
    "PixArtTransformer2DModel": Format(
        config=Config,
        architectures={"PixArtTransformer2DModel": TextToImage},
        fields=dit.FIELDS
        | {
            "caption_dim": "caption_channels", "context_dim": "cross_attention_dim",
            "sized": "use_additional_conditions", "stretch": "interpolation_scale",
        },
        fixed=dit.FIXED | {"norm_type": "ada_norm_single", "attention_type": "default"},
        defaults={"caption_channels": None},
        names=NAMES,
        ignored=("caption_projection.y_embedding", "pos_embed.pos_embed"),
        kind_key="_class_name",
        files=DIFFUSERS,
    )
}  # fmt: skip
