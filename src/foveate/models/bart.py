"""BART, an encoder that reads a text and a decoder that writes another one; in marian.py, one that translates.

    x = norm(word + position)
    x = norm(x + attention(x));   x = norm(x + attention(x, context)), in the decoder;   x = norm(x + mlp(x))
    LanguageModel          word · x + b
    SequenceClassifier     tanh of one linear map, another linear map, of what the source's last token has become

Lewis et al. 2019, "BART: denoising sequence-to-sequence pre-training": https://arxiv.org/abs/1910.13461
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.checkpoint.format import Format, Names
from foveate.errors import InvalidInput, unknown_name
from foveate.generation.cache import KeyValueCache
from foveate.generation.greedy import greedy
from foveate.nn import Block, CrossAttention, FeedForward, Learned, PostNorm, SelfAttention, Sinusoidal
from foveate.nn.transformer import Decoder, Encoder
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import causal, padding

Seen = Pattern | None
Source = Int[Tensor, "batch keys"]
Target = Int[Tensor, "batch length"]
Read = Float[Tensor, "batch keys dim"]
Written = Float[Tensor, "batch length dim"]
ACTIVATIONS: dict[str, Any] = {"gelu": functional.gelu, "relu": functional.relu, "swish": functional.silu}
BEFORE = 2  # rows of the table of positions that stand before the first one


@dataclass(frozen=True)
class Config:
    """The sizes of a model; of a pair the first is the encoder's."""

    vocabulary: int = 50265
    target_vocabulary: int | None = None  # None = words are shared by both sides
    positions: int = 1024
    dim: int = 1024
    layers: int = 12
    decoder_layers: int = 12
    heads: int = 16
    decoder_heads: int = 16
    hidden: int = 4096  # of the feed-forward
    decoder_hidden: int = 4096
    activation: str = "gelu"
    learned: bool = True  # positions and a norm of what goes in; else sines and cosines, and no norm
    scaled: bool = False  # words by √dim
    dropout: float = 0.1
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    start: int = 2  # what a text that is written begins with
    end: int | tuple[int, ...] | None = 2
    pad: int | None = 1
    first: int | None = None  # what comes after `start`, whatever the scores say
    last: int | None = 2  # what a text ends with that is cut
    never: tuple[int, ...] = ()  # tokens that are not written
    labels: int = 3
    kind: str = "bart"
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what config.json says beside

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)


PRESETS = {
    "bart-base": Config(50265, None, 1024, 768, 6, 6, 12, 12, 3072, 3072, first=0),
    "bart-large": Config(first=0),
}


def block(config: Config, *, decodes: bool) -> Block:
    """Attention, in the decoder attention to the context, feed-forward; x is added to each, and the norm is behind."""

    def added(part: nn.Module) -> PostNorm:
        return PostNorm(part, nn.LayerNorm(config.dim), dropout=config.dropout)

    heads, hidden = (config.decoder_heads, config.decoder_hidden) if decodes else (config.heads, config.hidden)
    activation = ACTIVATIONS[config.activation]
    return Block(
        added(SelfAttention(config.dim, heads, dropout=config.attention_dropout)),
        added(FeedForward(config.dim, hidden, activation=activation, dropout=config.hidden_dropout)),
        added(CrossAttention(config.dim, heads, dropout=config.attention_dropout)) if decodes else None,
    )


class Embedding(nn.Module):
    """From tokens of one side to what its first block reads."""

    def __init__(self, config: Config, word: nn.Embedding) -> None:
        super().__init__()
        self.config, self.word = config, word
        table = Learned(config.positions + BEFORE, config.dim) if config.learned else None
        self.position = table or Sinusoidal(config.dim, interleaved=False)
        self.norm = nn.LayerNorm(config.dim) if config.learned else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Int[Tensor, "batch length"], start: int = 0) -> Float[Tensor, "batch length dim"]:
        config, end = self.config, start + tokens.shape[1]
        if end > config.positions:
            raise InvalidInput(f"the text has {end} tokens but the model {config.positions} positions: cut it")
        positions = torch.arange(start, end, device=tokens.device) + (BEFORE if config.learned else 0)
        x = self.word(tokens) * config.dim**0.5 if config.scaled else self.word(tokens)
        return cast(Tensor, self.dropout(self.norm(self.position(x, positions))))


class Model(nn.Module):
    """The encoder and the decoder: from two texts to what each token of the second has become.

    >>> import torch
    >>> from foveate.models import bart
    >>> model = bart.Model(bart.Config(97, None, 64, 32, 2, 2, 4, 4, 48, 48))
    >>> model(torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[2, 9, 2]])).shape
    torch.Size([1, 3, 32])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, word = config, nn.Embedding(config.vocabulary, config.dim)
        self.source, own = Embedding(config, word), config.target_vocabulary
        self.target = Embedding(config, word if own is None else nn.Embedding(own, config.dim))
        self.encoder = Encoder(block(config, decodes=False) for _ in range(config.layers))
        self.decoder = Decoder(block(config, decodes=True) for _ in range(config.decoder_layers))
        for parameter in (x for x in self.parameters() if x.dim() > 1):
            nn.init.normal_(parameter, std=0.02)

    def encode(self, source: Source, pattern: Seen = None) -> Read:
        """The context: what each token of the source has become."""
        return cast(Tensor, self.encoder(self.source(source), pattern))

    def decode(
        self, target: Target, context: Read, pattern: Seen = None, context_pattern: Seen = None,
        cache: KeyValueCache | None = None,
    ) -> Written:  # fmt: skip
        """What each token of the target has become; `pattern` narrows who sees whom in it beyond causal."""
        x = self.target(target, 0 if cache is None else cache.length)
        seen = causal if pattern is None else causal & pattern
        return cast(Tensor, self.decoder(x, context, seen, context_pattern, cache=cache))

    def forward(self, source: Source, target: Target, pattern: Seen = None, target_pattern: Seen = None) -> Written:
        """What each token of the target has become; `pattern` says who is seen in the source: `fv.padding(keep)`."""
        return self.decode(target, self.encode(source, pattern), target_pattern, pattern)


class LanguageModel(nn.Module):
    """A score of every word for the place after each token of the target."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.body = config, Model(config)
        self.head = nn.Linear(config.dim, config.target_vocabulary or config.vocabulary, bias=False)
        self.head.weight = self.body.target.word.weight
        self.bias = nn.Buffer(torch.zeros(1, self.head.out_features))

    def forward(
        self, source: Source, target: Target, pattern: Seen = None, target_pattern: Seen = None
    ) -> Float[Tensor, "batch length vocabulary"]:
        """The scores; the target begins with `config.start`."""
        return self.scores(self.body(source, target, pattern, target_pattern))

    def scores(self, x: Written) -> Float[Tensor, "batch length vocabulary"]:
        """The scores of what comes next."""
        return cast(Tensor, self.head(x) + self.bias)

    @torch.no_grad()
    def generate(
        self, source: Source, *, new: int, keep: Bool[Tensor, "batch keys"] | None = None
    ) -> Int[Tensor, "batch longer"]:
        """`config.start` and up to `new` tokens, each the likeliest; `keep` says which of the source are real."""
        config, seen = self.config, None if keep is None else padding(keep)
        context = self.body.encode(source, seen)

        def decoder(target: Tensor, _: None, *, positions: None, cache: KeyValueCache) -> Tensor:
            return self.body.decode(target, context, None, seen, cache=cache)

        begin, cache = torch.full_like(source[:, :1], config.start), KeyValueCache(config.decoder_layers)
        return greedy(
            decoder, self.scores, begin, cache, new=new, end=config.end, pad=config.pad, positions=config.positions,
            first=config.first, last=config.last, never=config.never,
        )  # fmt: skip


class SequenceClassifier(nn.Module):
    """A score of every label for a text, which both sides read."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.body = config, Model(config)
        self.dense, self.score = nn.Linear(config.dim, config.dim), nn.Linear(config.dim, config.labels)

    def forward(self, source: Source, pattern: Seen = None) -> Float[Tensor, "batch labels"]:
        """The scores; every text ends with `config.end`."""
        target = torch.cat([torch.full_like(source[:, :1], self.config.start), source[:, :-1]], 1)
        x = self.body(source, target, pattern)
        last = ((source == self.config.end) * torch.arange(source.shape[1], device=source.device)).argmax(1)
        return cast(Tensor, self.score(torch.tanh(self.dense(x[torch.arange(len(x)), last]))))


def names(config: Config) -> Names:
    """Both sides; their words are one matrix where they share them."""
    word = "shared.weight" if config.target_vocabulary is None else "encoder.embed_tokens.weight"
    found = {word: "source.word.weight", "decoder.embed_tokens.weight": "target.word.weight"}
    inside = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    for side, ours in (("encoder", "source"), ("decoder", "target")):
        there, here = f"{side}.layers.*", f"{side}.blocks.*"
        found[f"{side}.embed_positions.weight"] = f"{ours}.position.weight"
        found[f"{side}.layernorm_embedding.*"] = f"{ours}.norm.*"
        for part, attention in {"self_attn": "attention", "encoder_attn": "cross"}.items():
            found |= {f"{there}.{part}.{old}.*": f"{here}.{attention}.part.{new}.*" for old, new in inside.items()}
            found[f"{there}.{part}_layer_norm.*"] = f"{here}.{attention}.norm.*"
        for old, new in {"fc1": "part.up", "fc2": "part.down", "final_layer_norm": "norm"}.items():
            found[f"{there}.{old}.*"] = f"{here}.feed_forward.{new}.*"
    return found


FIELDS = {
    "vocabulary": "vocab_size", "positions": "max_position_embeddings", "dim": "d_model", "layers": "encoder_layers",
    "decoder_layers": "decoder_layers", "heads": "encoder_attention_heads", "decoder_heads": "decoder_attention_heads",
    "hidden": "encoder_ffn_dim", "decoder_hidden": "decoder_ffn_dim", "activation": "activation_function",
    "scaled": "scale_embedding", "dropout": "dropout", "attention_dropout": "attention_dropout",
    "hidden_dropout": "activation_dropout", "start": "decoder_start_token_id", "end": "eos_token_id",
    "pad": "pad_token_id", "first": "forced_bos_token_id", "last": "forced_eos_token_id",
}  # fmt: skip
COMMON: dict[str, Any] = {
    "config": Config, "names": names, "prefix": "model.",
    "fixed": {"encoder_layerdrop": 0, "decoder_layerdrop": 0, "tie_word_embeddings": True},
    "heads": {"lm_head.weight": "head.weight", "final_logits_bias": "bias", "classification_head.dense.*": "dense.*",
              "classification_head.out_proj.*": "score.*"},
    "ignored": ("encoder.embed_tokens.weight", "*.embed_positions.weight", "encoder.version", "decoder.version"),
}  # fmt: skip

FORMATS = {
    "bart": Format(
        architectures={"BartForConditionalGeneration": LanguageModel, "BartModel": Model,
                       "BartForSequenceClassification": SequenceClassifier},
        fields=FIELDS | {"labels": "num_labels"}, implied={"learned": True, "target_vocabulary": None, "never": ()},
        generation=("start", "end", "pad", "first", "last"), silent=("first", "last"), **COMMON,
    )
}  # fmt: skip
