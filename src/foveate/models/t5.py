"""T5, an encoder that reads a text and a decoder that writes another: translation, summary, an answer, all as text.

    x = x + attention(norm(x));   x = x + attention(norm(x), context), in the decoder;   x = x + mlp(norm(x))
    mlp(x) = down(relu(up(x))), or since 1.1 down(gelu(gate(x)) · up(x))
    LanguageModel      word · norm(x) / √dim, or since 1.1 head(norm(x))

norm divides by the root mean square; nothing has a bias. Nor have words a position: every head adds to its scores q·k,
which are not divided, a number for each distance, the same in all layers.

Raffel et al. 2019, "Exploring the limits of transfer learning": https://arxiv.org/abs/1910.10683
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.checkpoint.format import Format, Names
from foveate.errors import unknown_name
from foveate.functional import attention
from foveate.generation.cache import KeyValueCache
from foveate.generation.greedy import greedy
from foveate.nn import Block, CrossAttention, FeedForward, GatedFeedForward, PreNorm, RelativeBias, SelfAttention
from foveate.nn.transformer import Decoder, Encoder
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import causal, padding

Seen = Pattern | None
Source = Int[Tensor, "batch keys"]
Target = Int[Tensor, "batch length"]
Read = Float[Tensor, "batch keys dim"]
Written = Float[Tensor, "batch length dim"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gated-gelu": partial(functional.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    vocabulary: int = 32128
    dim: int = 512
    layers: int = 6  # of the encoder
    decoder_layers: int | None = None  # None = as many
    heads: int = 8
    head_dim: int = 64
    hidden: int = 2048  # of the feed-forward
    activation: str = "relu"
    buckets: int = 32  # of distances
    max_distance: int = 128
    epsilon: float = 1e-6
    dropout: float = 0.1
    tied: bool = True  # the last map is the words' own embeddings, and its input is divided
    start: int = 0  # what a text that is written begins with
    end: int | tuple[int, ...] | None = 1
    pad: int | None = 0
    kind: str = "t5"
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what config.json says beside

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)


PRESETS = {
    "t5-small": Config(),
    "t5-base": Config(dim=768, layers=12, heads=12, hidden=3072),
    "flan-t5-small": Config(layers=8, heads=6, hidden=1024, activation="gated-gelu", tied=False),
    "flan-t5-base": Config(dim=768, layers=12, heads=12, activation="gated-gelu", tied=False),
}


def block(config: Config, *, reads_context: bool) -> Block:
    """Attention, in the decoder attention to the context, feed-forward; each reads norm(x) and is added to x."""

    def added(part: nn.Module) -> PreNorm:
        return PreNorm(part, nn.RMSNorm(config.dim, config.epsilon), dropout=config.dropout)

    size: dict[str, Any] = {"head_dim": config.head_dim, "bias": False, "dropout": config.dropout}
    size["attend"] = partial(attention, scale=1.0)
    mlp = GatedFeedForward if "gated" in config.activation else FeedForward
    activation = ACTIVATIONS[config.activation]
    return Block(
        added(SelfAttention(config.dim, config.heads, **size)),
        added(mlp(config.dim, config.hidden, activation=activation, bias=False, dropout=config.dropout)),
        added(CrossAttention(config.dim, config.heads, **size)) if reads_context else None,
    )


def stack(config: Config, *, decodes: bool) -> Encoder:
    """The blocks of one side, and the bias of distances that they share."""
    kind, layers = (Decoder, config.decoder_layers or config.layers) if decodes else (Encoder, config.layers)
    relative = RelativeBias(config.heads, config.buckets, config.max_distance, bidirectional=not decodes)
    blocks = (block(config, reads_context=decodes) for _ in range(layers))
    made = kind(blocks, nn.RMSNorm(config.dim, config.epsilon), relative=relative)
    for name, parameter in made.named_parameters():
        if name.endswith("query.weight"):  # smaller, for their scores are not divided
            nn.init.normal_(parameter, std=(config.dim * config.head_dim) ** -0.5)
    return made


class TextEncoder(nn.Module):
    """The encoder by itself."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.word = config, nn.Embedding(config.vocabulary, config.dim)
        self.encoder = stack(config, decodes=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, source: Source, pattern: Seen = None) -> Read:
        """What each token has become; the pattern says who is seen: `fv.padding(keep)`."""
        x: Tensor = self.dropout(self.encoder(self.dropout(self.word(source)), pattern))
        return x


class Model(nn.Module):
    """The encoder and the decoder: from two texts to what each token of the second has become.

    >>> import torch
    >>> from foveate.models import t5
    >>> model = t5.Model(t5.Config(vocabulary=97, dim=32, layers=2, heads=4, head_dim=8, hidden=48))
    >>> model(torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[0, 9, 2]])).shape
    torch.Size([1, 3, 32])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.word = config, nn.Embedding(config.vocabulary, config.dim)
        self.encoder, self.decoder = stack(config, decodes=False), stack(config, decodes=True)
        self.dropout = nn.Dropout(config.dropout)

    def encode(self, source: Source, pattern: Seen = None) -> Read:
        """The context: what each token of the source has become."""
        x: Tensor = self.dropout(self.encoder(self.dropout(self.word(source)), pattern))
        return x

    def decode(
        self, target: Target, context: Read, pattern: Seen = None, context_pattern: Seen = None,
        cache: KeyValueCache | None = None,
    ) -> Written:  # fmt: skip
        """What each token of the target has become; `pattern` narrows who sees whom in it beyond causal."""
        seen = causal if pattern is None else causal & pattern
        x: Tensor = self.decoder(self.dropout(self.word(target)), context, seen, context_pattern, cache=cache)
        return functional.dropout(x, self.dropout.p, self.training)

    def forward(self, source: Source, target: Target, pattern: Seen = None, target_pattern: Seen = None) -> Written:
        """What each token of the target has become; the pattern says who is seen in the source: `fv.padding(keep)`."""
        return self.decode(target, self.encode(source, pattern), target_pattern, pattern)


class LanguageModel(nn.Module):
    """A score of every word for the place after each token of the target."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.body = Model(config)
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.body.word.weight

    def forward(
        self, source: Source, target: Target, pattern: Seen = None, target_pattern: Seen = None
    ) -> Float[Tensor, "batch length vocabulary"]:
        """The scores; the target begins with `config.start`."""
        return self.scores(self.body(source, target, pattern, target_pattern))

    def scores(self, x: Written) -> Float[Tensor, "batch length vocabulary"]:
        """The scores of what comes next."""
        y: Tensor = self.head(x * self.config.dim**-0.5 if self.config.tied else x)
        return y

    @torch.no_grad()
    def generate(
        self, source: Source, *, new: int, keep: Bool[Tensor, "batch keys"] | None = None
    ) -> Int[Tensor, "batch longer"]:
        """`config.start` and up to `new` tokens, each the likeliest; `keep` says which of the source are real."""
        config, seen = self.config, None if keep is None else padding(keep)
        context = self.body.encode(source, seen)

        def decoder(target: Tensor, _: None, *, positions: None, cache: KeyValueCache) -> Tensor:
            return self.body.decode(target, context, None, seen, cache=cache)

        begin, cache = torch.full_like(source[:, :1], config.start), KeyValueCache(len(self.body.decoder.blocks))
        return greedy(decoder, self.scores, begin, cache, new=new, end=config.end, pad=config.pad)


def names(config: Config) -> Names:
    """Both sides: their blocks are lists of parts, which have numbers there."""
    mlp = {"wi_0": "gate", "wi_1": "up"} if "gated" in config.activation else {"wi": "up"}
    attended = {name[0]: name for name in ("query", "key", "value", "out")}
    attention, cross = ("attention", "SelfAttention", attended), ("cross", "EncDecAttention", attended)
    last = ("feed_forward", "DenseReluDense", {**mlp, "wo": "down"})
    found = {"shared.weight": "word.weight"}
    for side, parts in {"encoder": (attention, last), "decoder": (attention, cross, last)}.items():
        found[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = f"{side}.relative.weight"
        found[f"{side}.final_layer_norm.weight"] = f"{side}.norm.weight"
        for n, (part, called, inside) in enumerate(parts):
            there, here = f"{side}.block.*.layer.{n}", f"{side}.blocks.*.{part}"
            found[f"{there}.layer_norm.weight"] = f"{here}.norm.weight"
            found |= {f"{there}.{called}.{old}.weight": f"{here}.part.{new}.weight" for old, new in inside.items()}
    return found


FIELDS = {
    "vocabulary": "vocab_size", "dim": "d_model", "layers": "num_layers", "decoder_layers": "num_decoder_layers",
    "heads": "num_heads", "head_dim": "d_kv", "hidden": "d_ff", "activation": "feed_forward_proj",
    "buckets": "relative_attention_num_buckets", "max_distance": "relative_attention_max_distance",
    "epsilon": "layer_norm_epsilon", "dropout": "dropout_rate", "tied": "scale_decoder_outputs",
    "start": "decoder_start_token_id", "end": "eos_token_id", "pad": "pad_token_id",
}  # fmt: skip


def _upgraded(found: dict[str, Any]) -> dict[str, Any]:
    """Before 2025 one word said whether the last map is tied; and what follows from the activation is not read."""
    known = {key: value for key, value in found.items() if key not in ("dense_act_fn", "is_gated_act")}
    return {"scale_decoder_outputs": found.get("tie_word_embeddings") is not False, **known}


def _said(config: Config) -> dict[str, Any]:
    return {"tie_word_embeddings": config.tied, "num_decoder_layers": config.decoder_layers or config.layers}


FORMATS = {
    "t5": Format(
        config=Config,
        architectures={
            "T5ForConditionalGeneration": LanguageModel, "T5WithLMHeadModel": LanguageModel, "T5Model": Model,
            "T5EncoderModel": TextEncoder,
        },
        fields=FIELDS, names=names, heads={"lm_head.weight": "head.weight"}, upgrade=_upgraded, also=_said,
        generation=("start", "end", "pad"),
        # The words' embeddings under more names, and a bias that was there and never read.
        ignored=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
                 "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
    )
}  # fmt: skip
