"""CLIP, an encoder of texts and one of images that learned to put a picture and its caption at the same place.

    text      x = word + position, causal blocks;               t = W_t · norm(x of the text's last token)
    image     x = norm([class, patches] + position), blocks;    i = W_i · norm(x of the class)
    both      x = x + attention(norm(x));   x = x + mlp(norm(x))
    score     e^s · i·t / (|i| |t|)           how well each text describes each image

Radford et al. 2021: https://arxiv.org/abs/2103.00020
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.checkpoint.format import Format, prefixed
from foveate.errors import InvalidInput, unknown_name
from foveate.nn import Block, FeedForward, PreNorm, SelfAttention
from foveate.nn.block import Activation
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import causal
from foveate.values import describe

Ids = Int[Tensor, "texts length"]
Pixels = Float[Tensor, "images channels height width"]
Patches = Float[Tensor, "images tokens dim"]


def quick_gelu(x: Tensor) -> Tensor:
    """x · σ(1.702·x), close to GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Activation] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class Config:
    """The sizes of a model; what is named after text is the text encoder's, the rest the image encoder's."""

    vocabulary: int = 49408
    positions: int = 77
    text_dim: int = 512
    text_layers: int = 12
    text_heads: int = 8
    text_hidden: int = 2048
    text_activation: str = "quick_gelu"
    text_epsilon: float = 1e-5
    end: int = 49407  # the token that texts end with; 2 in old files = the largest token of the text
    image: int = 224
    patch: int = 32
    channels: int = 3
    dim: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    shared_dim: int = 512  # of the vectors that are compared
    kind: str = "clip"
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what config.json says beside

    def __post_init__(self) -> None:
        if self.image % self.patch:
            raise InvalidInput(f"images of {self.image} pixels do not divide into patches of {self.patch}: change one")
        for name in (self.text_activation, self.activation):
            if name not in ACTIVATIONS:
                raise unknown_name("activation", name, ACTIVATIONS)


PRESETS = {
    "clip-vit-base-patch32": Config(),
    "clip-vit-base-patch16": Config(patch=16),
    "clip-vit-large-patch14": Config(
        49408, 77, 768, 12, 12, 3072, patch=14, dim=1024, layers=24, heads=16, hidden=4096, shared_dim=768
    ),
}


def block(dim: int, heads: int, hidden: int, activation: str, epsilon: float) -> Block:
    """Attention, then two linear maps; each reads norm(x) and is added to x."""
    return Block(
        PreNorm(SelfAttention(dim, heads), nn.LayerNorm(dim, epsilon)),
        PreNorm(FeedForward(dim, hidden, activation=ACTIVATIONS[activation]), nn.LayerNorm(dim, epsilon)),
    )


class Text(nn.Module):
    """The encoder of texts: from tokens to what each has become."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.word = nn.Embedding(config.vocabulary, config.text_dim)
        self.position = nn.Embedding(config.positions, config.text_dim)
        sizes = config.text_dim, config.text_heads, config.text_hidden, config.text_activation, config.text_epsilon
        self.blocks = nn.ModuleList(block(*sizes) for _ in range(config.text_layers))
        self.norm = nn.LayerNorm(config.text_dim, config.text_epsilon)

    def forward(self, tokens: Ids, pattern: Pattern | None = None) -> Float[Tensor, "texts length dim"]:
        """What each token has become; `pattern` narrows who sees whom beyond causal: `fv.padding(keep)`."""
        length = tokens.shape[1]
        if length > self.config.positions:
            raise InvalidInput(f"the text has {length} tokens but the model {self.config.positions} positions: cut it")
        x = self.word(tokens) + self.position.weight[:length]
        for layer in self.blocks:
            x = layer(x, causal if pattern is None else causal & pattern)
        return cast(Tensor, self.norm(x))

    def pooled(self, x: Float[Tensor, "texts length dim"], tokens: Ids) -> Float[Tensor, "texts dim"]:
        """What the token has become that each text ends with."""
        end = tokens.amax(1, keepdim=True) if self.config.end == 2 else self.config.end
        return x[torch.arange(len(tokens), device=tokens.device), (tokens == end).int().argmax(1)]


class Image(nn.Module):
    """The encoder of images: from pixels to what the class and each patch have become."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.side = config, config.image // config.patch
        self.patch = nn.Conv2d(config.channels, config.dim, config.patch, config.patch, bias=False)
        self.class_token = nn.Parameter(torch.zeros(config.dim))
        self.position = nn.Embedding(1 + self.side**2, config.dim)
        self.first_norm = nn.LayerNorm(config.dim, config.epsilon)
        sizes = config.dim, config.heads, config.hidden, config.activation, config.epsilon
        self.blocks = nn.ModuleList(block(*sizes) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, config.epsilon)  # for the class alone

    def forward(self, pixels: Pixels, pattern: Pattern | None = None, *, blocks: int | None = None) -> Patches:
        """The class, then the patches row by row, after so many blocks; positions are stretched over other sizes."""
        size, (batch, channels, height, width) = self.config.patch, pixels.shape
        if channels != self.config.channels or height % size or width % size:
            wanted = f"{self.config.channels} channels, and sides that are multiples of {size}"
            raise InvalidInput(f"pixels is {describe(pixels)}: wanted {wanted}")
        x = self.patch(pixels.to(self.patch.weight.dtype)).flatten(2).mT
        x = torch.cat([self.class_token.expand(batch, 1, -1), x], 1) + self.positions(height // size, width // size)
        x = self.first_norm(x)
        for layer in self.blocks[:blocks]:
            x = layer(x, pattern)
        return cast(Tensor, x)

    def pooled(self, x: Patches) -> Float[Tensor, "images dim"]:
        """What the class of each image has become."""
        return cast(Tensor, self.norm(x[:, 0]))

    def positions(self, rows: int, columns: int) -> Float[Tensor, "tokens dim"]:
        """The learned positions; for an image of another size, those of the patches stretched over it."""
        learned = self.position.weight
        if rows == columns == self.side:
            return learned
        grid = learned[1:].unflatten(0, (self.side, self.side)).permute(2, 0, 1)[None]
        return torch.cat([learned[:1], F.interpolate(grid, (rows, columns), mode="bicubic")[0].flatten(1).mT])


class Compared(NamedTuple):
    """A score of every text for every image, whose rows' softmax says which text it is, and what was compared."""

    scores: Float[Tensor, "images texts"]
    images: Float[Tensor, "images shared"]
    texts: Float[Tensor, "texts shared"]


class Model(nn.Module):
    """Both encoders, and how well each text describes each image.

    >>> import torch
    >>> from foveate.models import clip
    >>> model = clip.Model(clip.Config(97, 8, 32, 1, 4, 48, end=96, image=8, patch=4, dim=32, layers=1, heads=4))
    >>> texts, images = torch.tensor([[3, 1, 96], [4, 96, 0], [5, 9, 96]]), torch.randn(2, 3, 8, 8)
    >>> model(texts, images).scores.shape
    torch.Size([2, 3])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.text, self.image = config, Text(config), Image(config)
        self.from_text = nn.Linear(config.text_dim, config.shared_dim, bias=False)
        self.from_image = nn.Linear(config.dim, config.shared_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.6592))  # ln(1 / 0.07)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Ids, pixels: Pixels, pattern: Pattern | None = None) -> Compared:
        """Every text beside every image; `pattern` narrows who sees whom in the texts."""
        images, texts = self.embed_images(pixels), self.embed_texts(tokens, pattern)
        return Compared(self.scale.exp() * images @ texts.mT, images, texts)

    def embed_texts(self, tokens: Ids, pattern: Pattern | None = None) -> Float[Tensor, "texts shared"]:
        """One vector of length 1 for every text, from the token that it ends with."""
        return F.normalize(self.from_text(self.text.pooled(self.text(tokens, pattern), tokens)), dim=-1)

    def embed_images(self, pixels: Pixels) -> Float[Tensor, "images shared"]:
        """One vector of length 1 for every image, from its class token."""
        return F.normalize(self.from_image(self.image.pooled(self.image(pixels))), dim=-1)


BLOCKS = {
    f"encoder.layers.*.{theirs}.*": f"blocks.*.{ours}.*"
    for theirs, ours in {
        "layer_norm1": "attention.norm", "self_attn.q_proj": "attention.part.query",
        "self_attn.k_proj": "attention.part.key", "self_attn.v_proj": "attention.part.value",
        "self_attn.out_proj": "attention.part.out", "layer_norm2": "feed_forward.norm",
        "mlp.fc1": "feed_forward.part.up", "mlp.fc2": "feed_forward.part.down",
    }.items()
}  # fmt: skip
TEXT = BLOCKS | {
    "embeddings.token_embedding.weight": "word.weight", "embeddings.position_embedding.weight": "position.weight",
    "final_layer_norm.*": "norm.*",
}  # fmt: skip
IMAGE = BLOCKS | {
    "embeddings.class_embedding": "class_token", "embeddings.patch_embedding.weight": "patch.weight",
    "embeddings.position_embedding.weight": "position.weight", "pre_layrnorm.*": "first_norm.*",
    "post_layernorm.*": "norm.*",
}  # fmt: skip

TEXT_FIELDS = {
    "vocabulary": "vocab_size", "positions": "max_position_embeddings", "text_dim": "hidden_size",
    "text_layers": "num_hidden_layers", "text_heads": "num_attention_heads", "text_hidden": "intermediate_size",
    "text_activation": "hidden_act", "text_epsilon": "layer_norm_eps", "end": "eos_token_id",
}  # fmt: skip
IMAGE_FIELDS = {
    "image": "image_size", "patch": "patch_size", "channels": "num_channels", "dim": "hidden_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "hidden": "intermediate_size",
    "activation": "hidden_act", "epsilon": "layer_norm_eps",
}  # fmt: skip

FORMATS = {
    "clip": Format(
        config=Config, architectures={"CLIPModel": Model},
        fields={"shared_dim": "projection_dim"}
        | {name: f"text_config.{key}" for name, key in TEXT_FIELDS.items()}
        | {name: f"vision_config.{key}" for name, key in IMAGE_FIELDS.items()},
        fixed={"text_config.attention_dropout": 0.0, "vision_config.attention_dropout": 0.0},
        names={
            **prefixed("text_model.", "text.", TEXT), **prefixed("vision_model.", "image.", IMAGE),
            "text_projection.weight": "from_text.weight", "visual_projection.weight": "from_image.weight",
            "logit_scale": "scale",
        },
        ignored=("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
    )
}  # fmt: skip
