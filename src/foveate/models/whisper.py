"""Whisper, an encoder of sound and a decoder that writes what is said in it, in the same language or in English.

    sound     x = gelu(conv(gelu(conv(mel)))) + sines and cosines      two mel frames become one token
    text      y = word + position
    encoder   x = x + attention(norm(x));   x = x + mlp(norm(x));   context = norm(x)
    decoder   y = y + attention(norm(y));   y = y + attention(norm(y), context);   y = y + mlp(norm(y))
    LanguageModel          word · norm(y)

Keys have no bias: it would change all the scores of a query alike, and so no weight.
Radford et al. 2022, "Robust speech recognition via large-scale weak supervision": https://arxiv.org/abs/2212.04356
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.checkpoint.format import Format, Names
from foveate.errors import InvalidInput
from foveate.generation.cache import KeyValueCache
from foveate.generation.greedy import greedy
from foveate.nn import Block, CrossAttention, Decoder, Encoder, FeedForward, MultiHeadAttention, PreNorm, SelfAttention
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import causal
from foveate.values import describe

Sound = Float[Tensor, "batch mels frames"]
Target = Int[Tensor, "batch length"]
Heard = Float[Tensor, "batch keys dim"]
Written = Float[Tensor, "batch length dim"]


@dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    vocabulary: int = 51865
    mels: int = 80  # numbers in a frame of sound, of which there are 100 in a second
    sound_positions: int = 1500  # tokens of sound: 30 seconds
    positions: int = 448  # of the text
    dim: int = 384
    layers: int = 4
    decoder_layers: int = 4
    heads: int = 6
    decoder_heads: int = 6
    hidden: int = 1536
    decoder_hidden: int = 1536
    dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    start: int = 50258  # what a text begins with
    end: int | None = 50257
    pad: int | None = 50257
    never: tuple[int, ...] | None = None  # what is not written: brackets, notes, other signs
    never_first: tuple[int, ...] | None = None  # nor as the first word: a space, the end
    kind: str = "whisper"
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what config.json says beside


def _sized(dim: int, layers: int, heads: int, decoder_layers: int | None = None, **more: Any) -> Config:
    return Config(
        dim=dim, layers=layers, decoder_layers=decoder_layers or layers, heads=heads, decoder_heads=heads,
        hidden=4 * dim, decoder_hidden=4 * dim, **more,
    )  # fmt: skip


PRESETS = {
    "whisper-tiny": _sized(384, 4, 6),
    "whisper-base": _sized(512, 6, 8),
    "whisper-small": _sized(768, 12, 12),
    "whisper-medium": _sized(1024, 24, 16),
    "whisper-large-v3": _sized(1280, 32, 20, mels=128, vocabulary=51866),
    "whisper-large-v3-turbo": _sized(1280, 32, 20, 4, mels=128, vocabulary=51866),
}


def block(config: Config, *, decodes: bool) -> Block:
    """Attention, in the decoder attention to the sound, feed-forward; each reads norm(x) and is added to x."""

    def added(part: nn.Module) -> PreNorm:
        if isinstance(part, MultiHeadAttention):
            part.key.register_parameter("bias", None)
        return PreNorm(part, nn.LayerNorm(config.dim), dropout=config.dropout)

    heads, hidden = (config.decoder_heads, config.decoder_hidden) if decodes else (config.heads, config.hidden)
    return Block(
        added(SelfAttention(config.dim, heads, dropout=config.attention_dropout)),
        added(FeedForward(config.dim, hidden, activation=F.gelu, dropout=config.hidden_dropout)),
        added(CrossAttention(config.dim, heads, dropout=config.attention_dropout)) if decodes else None,
    )


def waves(length: int, dim: int) -> Float[Tensor, "length dim"]:
    """Sines, then cosines, of wave lengths from 2π to 20000π."""
    rates = torch.exp(torch.arange(dim // 2) * (-math.log(10000) / (dim // 2 - 1)))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class Model(nn.Module):
    """The encoder and the decoder: from sound and text to what each token of the text has become.

    >>> import torch
    >>> from foveate.models import whisper
    >>> config = whisper.Config(97, 8, 20, 16, 32, 1, 1, 4, 4, 48, 48, start=1, end=2, pad=0)
    >>> whisper.Model(config)(torch.randn(1, 8, 40), torch.tensor([[1, 9, 2]])).shape
    torch.Size([1, 3, 32])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.first = nn.Conv1d(config.mels, config.dim, 3, padding=1)
        self.second = nn.Conv1d(config.dim, config.dim, 3, stride=2, padding=1)
        # Not learned, but a tensor of the files.
        self.sound_position = nn.Parameter(waves(config.sound_positions, config.dim), requires_grad=False)
        self.word = nn.Embedding(config.vocabulary, config.dim, config.pad)
        self.position = nn.Embedding(config.positions, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        blocks = [block(config, decodes=False) for _ in range(config.layers)]
        self.encoder = Encoder(blocks, nn.LayerNorm(config.dim))
        blocks = [block(config, decodes=True) for _ in range(config.decoder_layers)]
        self.decoder = Decoder(blocks, nn.LayerNorm(config.dim))
        for parameter in self.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:
                nn.init.normal_(parameter, std=0.02)

    def encode(self, sound: Sound) -> Heard:
        """The context: what each two frames of sound have become.

        Raises:
            InvalidInput: another number of mels, more sound than there are positions.
        """
        most = 2 * self.config.sound_positions
        if sound.shape[1] != self.config.mels or not 0 < sound.shape[2] <= most:
            wanted = f"[batch, {self.config.mels} mels, up to {most} frames]"
            raise InvalidInput(f"sound is {describe(sound)}: wanted {wanted}")
        x = F.gelu(self.second(F.gelu(self.first(sound)))).mT
        return cast(Tensor, self.encoder(self.dropout(x + self.sound_position[: x.shape[1]])))

    def decode(
        self, tokens: Target, context: Heard, pattern: Pattern | None = None, *, cache: KeyValueCache | None = None
    ) -> Written:
        """What each token of the text has become; `pattern` narrows who sees whom beyond causal."""
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.positions:
            raise InvalidInput(f"the text has {end} tokens but the model {self.config.positions} positions: cut it")
        x = self.dropout(self.word(tokens) + self.position.weight[start:end])
        return cast(Tensor, self.decoder(x, context, causal if pattern is None else causal & pattern, cache=cache))

    def forward(self, sound: Sound, tokens: Target, pattern: Pattern | None = None) -> Written:
        """What each token of the text has become."""
        return self.decode(tokens, self.encode(sound), pattern)


class LanguageModel(nn.Module):
    """A score of every word for the place after each token of the text."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.body = config, Model(config)
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False)
        self.head.weight = self.body.word.weight

    def forward(
        self, sound: Sound, tokens: Target, pattern: Pattern | None = None
    ) -> Float[Tensor, "batch length vocabulary"]:
        """The scores; the text begins with `config.start`, the language and the task."""
        return cast(Tensor, self.head(self.body(sound, tokens, pattern)))

    @torch.no_grad()
    def generate(self, sound: Sound, tokens: Target | None = None, *, new: int) -> Int[Tensor, "batch longer"]:
        """`tokens` and up to `new` more, each the likeliest; None = `config.start`.

        What is heard is worked out once, and its keys and values once for each layer.
        """
        config, context = self.config, self.body.encode(sound)
        if tokens is None:
            tokens = torch.full((len(sound), 1), config.start, device=sound.device)

        def decoder(step: Tensor, _: None, *, positions: None, cache: KeyValueCache) -> Tensor:
            return self.body.decode(step, context, cache=cache)

        cache = KeyValueCache(config.decoder_layers)
        return greedy(
            decoder, self.head, tokens, cache, new=new, end=config.end, pad=config.pad, positions=config.positions,
            never=config.never or (), never_first=config.never_first or (),
        )  # fmt: skip


def _side(theirs: str) -> dict[str, str]:
    """The blocks of one side."""
    there, here = f"{theirs}.layers.*", f"{theirs}.blocks.*"
    found = {
        f"{theirs}.layer_norm.*": f"{theirs}.norm.*",
        f"{there}.fc1.*": f"{here}.feed_forward.part.up.*",
        f"{there}.fc2.*": f"{here}.feed_forward.part.down.*",
        f"{there}.final_layer_norm.*": f"{here}.feed_forward.norm.*",
    }
    inside = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    for part, attention in {"self_attn": "attention", "encoder_attn": "cross"}.items():
        found |= {f"{there}.{part}.{old}.*": f"{here}.{attention}.part.{new}.*" for old, new in inside.items()}
        found[f"{there}.{part}_layer_norm.*"] = f"{here}.{attention}.norm.*"
    return found


NAMES: Names = {
    "encoder.conv1.*": "first.*",
    "encoder.conv2.*": "second.*",
    "encoder.embed_positions.weight": "sound_position",
    "decoder.embed_tokens.weight": "word.weight",
    "decoder.embed_positions.weight": "position.weight",
    **_side("encoder"),
    **_side("decoder"),
}

FIELDS = {
    "vocabulary": "vocab_size", "mels": "num_mel_bins", "sound_positions": "max_source_positions",
    "positions": "max_target_positions", "dim": "d_model", "layers": "encoder_layers",
    "decoder_layers": "decoder_layers", "heads": "encoder_attention_heads", "decoder_heads": "decoder_attention_heads",
    "hidden": "encoder_ffn_dim", "decoder_hidden": "decoder_ffn_dim", "dropout": "dropout",
    "attention_dropout": "attention_dropout", "hidden_dropout": "activation_dropout",
    "start": "decoder_start_token_id", "end": "eos_token_id", "pad": "pad_token_id", "never": "suppress_tokens",
    "never_first": "begin_suppress_tokens",
}  # fmt: skip

FORMATS = {
    "whisper": Format(
        config=Config, fields=FIELDS, names=NAMES, heads={"proj_out.weight": "head.weight"}, prefix="model.",
        architectures={"WhisperForConditionalGeneration": LanguageModel, "WhisperModel": Model},
        fixed={
            "activation_function": "gelu", "scale_embedding": False, "tie_word_embeddings": True,
            "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "apply_spec_augment": False,
        },
        defaults={"decoder_start_token_id": 50257, "eos_token_id": 50256, "pad_token_id": 50256,
                  "begin_suppress_tokens": [220, 50256]},
        generation=("start", "end", "pad", "never", "never_first"), silent=("never", "never_first"),
    )
}  # fmt: skip
