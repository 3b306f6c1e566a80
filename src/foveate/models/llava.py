"""LLaVA, a decoder of text that reads images: CLIP's tower sees, two linear maps translate, Llama goes on.

    z = W₂ · gelu(W₁ · tower(image))      for each patch, after all blocks of the tower but the last, without the class
    x = word, and z where the text has the image's token
    scores = Llama(x)

Liu et al. 2023: https://arxiv.org/abs/2304.08485. LLaVA 1.5: https://arxiv.org/abs/2310.03744.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.checkpoint.format import Format, prefixed
from foveate.checkpoint.rope_config import SCALING, upgraded
from foveate.eager import is_known
from foveate.errors import InvalidInput
from foveate.generation.cache import KeyValueCache
from foveate.generation.greedy import greedy
from foveate.models import clip, llama
from foveate.pattern.algebra import Pattern
from foveate.rotary import Scaling


@dataclass(frozen=True)
class Config:
    """The sizes of a model; what is named after image is the tower's, the rest the decoder's."""

    vocabulary: int = 32064
    positions: int = 4096
    dim: int = 4096
    layers: int = 32
    heads: int = 32
    key_heads: int | None = None  # None = as many as heads
    head_dim: int | None = None  # None = dim / heads
    hidden: int = 11008
    bias: bool = False  # of query, key, value, out
    feed_forward_bias: bool = False
    base: float = 10000.0  # of the turns
    scaling: Scaling | None = None  # of the turns, for texts longer than those of the training
    epsilon: float = 1e-5
    tied: bool = False  # the last map is the words' own embeddings
    end: int | tuple[int, ...] | None = 2
    pad: int | None = None
    image_token: int = 32000  # stands in the text once for each patch
    image: int = 336
    patch: int = 14
    channels: int = 3
    image_dim: int = 1024
    image_layers: int = 24
    image_heads: int = 16
    image_hidden: int = 4096
    image_activation: str = "quick_gelu"
    image_epsilon: float = 1e-5
    join_bias: bool = True  # of the two maps between
    kind: str = "llava"
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what config.json says beside

    @property
    def text(self) -> llama.Config:
        """The decoder's part."""
        names = TEXT_FIELDS.keys() | {"tied"}
        return llama.Config(**{name: getattr(self, name) for name in names})

    @property
    def tower(self) -> clip.Config:
        """The tower's part."""
        return clip.Config(
            image=self.image, patch=self.patch, channels=self.channels, dim=self.image_dim, layers=self.image_layers,
            heads=self.image_heads, hidden=self.image_hidden, activation=self.image_activation,
            epsilon=self.image_epsilon,
        )  # fmt: skip


PRESETS = {
    "llava-1.5-7b": Config(),
    "llava-1.5-13b": Config(dim=5120, layers=40, heads=40, hidden=13824),
}


class LanguageModel(nn.Module):
    """A score of every word for the place after each token, of a text with images in it.

    >>> import torch
    >>> from foveate.models import llava
    >>> model = llava.LanguageModel(
    ...     llava.Config(
    ...         97,
    ...         dim=32,
    ...         layers=1,
    ...         heads=4,
    ...         hidden=48,
    ...         image_token=96,
    ...         image=8,
    ...         patch=4,
    ...         image_dim=36,
    ...         image_layers=2,
    ...         image_heads=4,
    ...         image_hidden=48,
    ...     )
    ... )
    >>> model(torch.tensor([[3, 96, 96, 96, 96, 5]]), torch.randn(1, 3, 8, 8)).shape
    torch.Size([1, 6, 97])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.image, self.text = clip.Image(config.tower), llama.LanguageModel(config.text)
        self.first = nn.Linear(config.image_dim, config.dim, bias=config.join_bias)
        self.second = nn.Linear(config.dim, config.dim, bias=config.join_bias)

    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        pixels: clip.Pixels | None = None,
        pattern: Pattern | None = None,
        *,
        positions: Int[Tensor, "batch length"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch length vocabulary"]:
        """The scores.

        Args:
            tokens: with `config.image_token` once for each patch of each image.
            pixels: the images in the order of the texts; None = there are none.
            pattern: narrows who sees whom beyond causal.
            positions: None = 0, 1, 2…, after those in the cache.

        Raises:
            InvalidInput: the text has places for another number of patches.
        """
        hidden = self.text.body(self.words(tokens, pixels), pattern, positions=positions, cache=cache)
        scores: Tensor = self.text.head(hidden)
        return scores

    def look(self, pixels: clip.Pixels) -> Float[Tensor, "images patches dim"]:
        """What stands in the text for each patch."""
        patches = self.image(pixels, blocks=self.config.image_layers - 1)[:, 1:]
        seen: Tensor = self.second(F.gelu(self.first(patches)))
        return seen

    def words(
        self, tokens: Int[Tensor, "batch length"], pixels: clip.Pixels | None
    ) -> Float[Tensor, "batch length dim"]:
        """The words, and the patches in their places."""
        x: Tensor = self.text.body.word(tokens)
        if pixels is None:
            return x
        seen, places = self.look(pixels).flatten(0, 1), tokens == self.config.image_token
        if is_known(places) and int(places.sum()) != len(seen):
            raise InvalidInput(
                f"tokens have {int(places.sum())} places for the {len(seen)} patches of {len(pixels)} images: "
                f"repeat the token {self.config.image_token} once for each patch"
            )
        return x.masked_scatter(places[..., None], seen.to(x.dtype))

    def generate(
        self,
        tokens: Int[Tensor, "batch length"],
        pixels: clip.Pixels | None = None,
        *,
        new: int,
        keep: Bool[Tensor, "batch length"] | None = None,
    ) -> Int[Tensor, "batch longer"]:
        """`foveate.generation.greedy.greedy` with this model: the tokens and up to `new` more; images are read once."""

        def decoder(step: Tensor, pattern: Pattern | None, *, positions: Tensor | None, cache: KeyValueCache) -> Tensor:
            x = self.words(step, pixels if cache.length == 0 else None)
            hidden: Tensor = self.text.body(x, pattern, positions=positions, cache=cache)
            return hidden

        cache, config = KeyValueCache(self.config.layers), self.config
        return greedy(decoder, self.text.head, tokens, cache, new=new, keep=keep, end=config.end, pad=config.pad)


TEXT_FIELDS = {
    "vocabulary": "vocab_size", "positions": "max_position_embeddings", "dim": "hidden_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "key_heads": "num_key_value_heads",
    "head_dim": "head_dim", "hidden": "intermediate_size", "bias": "attention_bias", "feed_forward_bias": "mlp_bias",
    "scaling": "rope_parameters", "base": "rope_parameters.rope_theta", "epsilon": "rms_norm_eps",
    "end": "eos_token_id", "pad": "pad_token_id",
}  # fmt: skip
IMAGE_FIELDS = {
    "image": "image_size", "patch": "patch_size", "channels": "num_channels", "image_dim": "hidden_size",
    "image_layers": "num_hidden_layers", "image_heads": "num_attention_heads", "image_hidden": "intermediate_size",
    "image_activation": "hidden_act", "image_epsilon": "layer_norm_eps",
}  # fmt: skip


def _text(found: dict[str, Any]) -> dict[str, Any]:
    """What an older file says of rotary positions and of tied weights, where it belongs; silence is Llama's."""
    text = upgraded({"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, **found.get("text_config", {})})
    tied = found.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    return {**found, "text_config": text, "tie_word_embeddings": tied}


FORMATS = {
    "llava": Format(
        config=Config,
        architectures={"LlavaForConditionalGeneration": LanguageModel},
        fields={"image_token": "image_token_index", "join_bias": "multimodal_projector_bias"}
        | {"tied": "tie_word_embeddings"}
        | {name: f"text_config.{key}" for name, key in TEXT_FIELDS.items()}
        | {name: f"vision_config.{key}" for name, key in IMAGE_FIELDS.items()},
        fixed={
            "text_config.model_type": "llama", "text_config.hidden_act": "silu", "text_config.attention_dropout": 0.0,
            "vision_config.model_type": "clip_vision_model", "vision_config.attention_dropout": 0.0,
            "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        },
        codecs={"scaling": SCALING},
        names={
            **prefixed("language_model.model.", "text.body.", llama.NAMES),
            **prefixed("vision_tower.", "image.", clip.IMAGE),
            "language_model.lm_head.weight": "text.head.weight",
            "multi_modal_projector.linear_1.*": "first.*", "multi_modal_projector.linear_2.*": "second.*",
        },
        ignored=("vision_tower.embeddings.position_ids",
                 "language_model.model.layers.*.self_attn.rotary_emb.inv_freq"),
        older={"vision_tower.vision_model.": "vision_tower."},
        upgrade=_text,
    )
}  # fmt: skip
