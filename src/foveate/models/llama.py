"""Llama, a decoder of text; Mistral, whose tokens see a window before them; and, in qwen.py, Qwen.

    x = word
    x = x + attention(norm(x));   x = x + down(silu(gate(y)) · up(y)), y = norm(x)      in every block
    LanguageModel          head(norm(x))
    SequenceClassifier     one linear map of the last token's norm(x)

norm divides by the root mean square; q and k turn by their positions; heads of queries share heads of keys.
Touvron et al. 2023: https://arxiv.org/abs/2307.09288. Llama 3: https://arxiv.org/abs/2407.21783. Mistral, Jiang et al.
2023: https://arxiv.org/abs/2310.06825.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.checkpoint.format import Format, Names
from foveate.checkpoint.rope_config import SCALING, check_length, upgraded
from foveate.errors import InvalidInput
from foveate.generation.cache import KeyValueCache
from foveate.generation.greedy import greedy
from foveate.nn import Block, GatedFeedForward, PreNorm, Rotary, SelfAttention
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import causal, window
from foveate.rotary import Llama3, Scaling

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    vocabulary: int = 32000
    positions: int = 4096  # of the training; a text may be longer
    dim: int = 4096
    layers: int = 32
    heads: int = 32
    key_heads: int | None = None  # None = as many as heads
    head_dim: int | None = None  # None = dim / heads
    hidden: int = 11008  # of the feed-forward
    bias: bool = False  # of query, key, value, out
    out_bias: bool | None = None  # None = as bias
    feed_forward_bias: bool = False
    query_key_norm: bool = False
    base: float = 10000.0  # of the turns
    scaling: Scaling | None = None  # of the turns, for texts longer than those of the training
    window: int | None = None  # how many tokens are seen, the own one included; None = all before
    layer_types: tuple[str, ...] | None = (
        None  # SLIDING where a layer has the window, else FULL; None = every layer has it
    )
    epsilon: float = 1e-6
    attention_dropout: float = 0.0
    tied: bool = False  # the last map is the words' own embeddings
    end: int | tuple[int, ...] | None = 2
    pad: int | None = None
    labels: int = 2
    kind: str = "llama"
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what config.json says beside

    def __post_init__(self) -> None:
        kinds = {FULL} if self.window is None else {FULL, SLIDING}
        if len(self.types) != self.layers or not kinds.issuperset(self.types):
            raise InvalidInput(f"layer_types is {self.types}: wanted one of {kinds} for each of {self.layers} layers")
        check_length(self.scaling, self.positions)

    @property
    def types(self) -> tuple[str, ...]:
        """Of every layer: `layer_types`, or the window in all of them where there is one."""
        return self.layer_types or (FULL if self.window is None else SLIDING,) * self.layers


PRESETS = {
    "llama-2-7b": Config(),
    "llama-3.1-8b": Config(
        vocabulary=128256, positions=131072, key_heads=8, hidden=14336, base=500000.0, scaling=Llama3(), epsilon=1e-5,
        end=128001,
    ),
    "mistral-7b": Config(positions=32768, key_heads=8, hidden=14336, window=4096, epsilon=1e-5, kind="mistral"),
}  # fmt: skip


def block(config: Config, rotary: Rotary) -> Block:
    """Attention to what came before, then the gated feed-forward; each reads norm(x) and is added to x."""
    norm = partial(nn.RMSNorm, eps=config.epsilon)
    both = [norm(rotary.dim) if config.query_key_norm else None for _ in "qk"]
    attention = SelfAttention(
        config.dim, config.heads, key_heads=config.key_heads, head_dim=config.head_dim, bias=config.bias,
        out_bias=config.out_bias, rotary=rotary, dropout=config.attention_dropout, query_norm=both[0], key_norm=both[1],
    )  # fmt: skip
    feed_forward = GatedFeedForward(config.dim, config.hidden, bias=config.feed_forward_bias)
    return Block(PreNorm(attention, norm(config.dim)), PreNorm(feed_forward, norm(config.dim)))


class Model(nn.Module):
    """The decoder itself: from tokens to what each has become.

    >>> import torch
    >>> from foveate.models import llama
    >>> model = llama.Model(llama.Config(vocabulary=97, dim=32, layers=2, heads=4, key_heads=2, hidden=48))
    >>> model(torch.tensor([[3, 1, 4, 1, 5]])).shape
    torch.Size([1, 5, 32])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.word = nn.Embedding(config.vocabulary, config.dim)
        self.rotary = Rotary(config.head_dim or config.dim // config.heads, base=config.base, scaling=config.scaling)
        self.blocks = nn.ModuleList(block(config, self.rotary) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, config.epsilon)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        tokens: Int[Tensor, "batch length"] | Float[Tensor, "batch length dim"],
        pattern: Pattern | None = None,
        *,
        positions: Int[Tensor, "batch length"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """What each token has become.

        `tokens` may be what stands in the place of their words, such as parts of an image; `pattern` narrows who sees
        whom beyond causal; `positions` None = 0, 1, 2…, after those in the cache.
        """
        config, x = self.config, self.word(tokens) if tokens.dim() == 2 else tokens
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + x.shape[1], device=x.device)
        angles = self.rotary.angles(positions, x.dtype)
        seen = causal if pattern is None else causal & pattern
        near = seen if config.window is None else seen & window(config.window)
        for n, layer in enumerate(self.blocks):
            pattern = near if config.types[n] == SLIDING else seen
            x = layer(x, pattern, positions=angles, cache=None if cache is None else cache[n])
        y: Tensor = self.norm(x)
        return y


class LanguageModel(nn.Module):
    """A score of every word for the place after each token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.body = Model(config)
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.body.word.weight

    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        pattern: Pattern | None = None,
        *,
        positions: Int[Tensor, "batch length"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch length vocabulary"]:
        scores: Tensor = self.head(self.body(tokens, pattern, positions=positions, cache=cache))
        return scores

    def generate(
        self, tokens: Int[Tensor, "batch length"], *, new: int, keep: Bool[Tensor, "batch length"] | None = None
    ) -> Int[Tensor, "batch longer"]:
        """`foveate.generation.greedy.greedy` with this model: the tokens and up to `new` more."""
        cache, config = KeyValueCache(self.config.layers), self.config
        return greedy(self.body, self.head, tokens, cache, new=new, keep=keep, end=config.end, pad=config.pad)


class SequenceClassifier(nn.Module):
    """A score of every label for a text."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.body = Model(config)
        self.score = nn.Linear(config.dim, config.labels, bias=False)

    def forward(
        self, tokens: Int[Tensor, "batch length"], pattern: Pattern | None = None
    ) -> Float[Tensor, "batch labels"]:
        """The scores; the last token is the last that is not `config.pad`."""
        real = tokens.new_tensor(1) if self.config.pad is None else tokens != self.config.pad
        last = (real * torch.arange(tokens.shape[1], device=tokens.device)).argmax(-1)
        scores: Tensor = self.score(self.body(tokens, pattern)[torch.arange(len(tokens)), last])
        return scores


NAMES: Names = {
    "embed_tokens.weight": "word.weight",
    "layers.*.input_layernorm.weight": "blocks.*.attention.norm.weight",
    "layers.*.self_attn.q_proj.*": "blocks.*.attention.part.query.*",
    "layers.*.self_attn.k_proj.*": "blocks.*.attention.part.key.*",
    "layers.*.self_attn.v_proj.*": "blocks.*.attention.part.value.*",
    "layers.*.self_attn.o_proj.*": "blocks.*.attention.part.out.*",
    "layers.*.self_attn.q_norm.weight": "blocks.*.attention.part.query_norm.weight",
    "layers.*.self_attn.k_norm.weight": "blocks.*.attention.part.key_norm.weight",
    "layers.*.post_attention_layernorm.weight": "blocks.*.feed_forward.norm.weight",
    "layers.*.mlp.*_proj.*": "blocks.*.feed_forward.part.*.*",  # gate, up, down
    "norm.weight": "norm.weight",
}

FIELDS = {
    "vocabulary": "vocab_size", "positions": "max_position_embeddings", "dim": "hidden_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "key_heads": "num_key_value_heads",
    "hidden": "intermediate_size", "scaling": "rope_parameters", "base": "rope_parameters.rope_theta",
    "epsilon": "rms_norm_eps", "attention_dropout": "attention_dropout", "tied": "tie_word_embeddings",
    "end": "eos_token_id", "pad": "pad_token_id", "labels": "num_labels",
}  # fmt: skip


HEADS = {"ForCausalLM": LanguageModel, "Model": Model, "ForSequenceClassification": SequenceClassifier}


def format_of(name: str, fields: Mapping[str, str], **values: Any) -> Format:
    """The format of one kind, by the name that its architectures begin with."""
    usual: dict[str, Any] = {"upgrade": upgraded, "also": heads}
    return Format(
        config=Config,
        architectures={f"{name}{part}": made for part, made in HEADS.items()},
        fields={**FIELDS, **fields}, fixed={"hidden_act": "silu"}, codecs={"scaling": SCALING},
        names=NAMES, heads={"lm_head.weight": "head.weight", "score.weight": "score.weight"}, prefix="model.",
        generation=("end",), ignored=("layers.*.self_attn.rotary_emb.inv_freq",), **usual | values,
    )  # fmt: skip


def heads(config: Config) -> dict[str, Any]:
    """How many heads of keys there are, and how large heads are, said outright."""
    count, size = config.key_heads or config.heads, config.head_dim or config.dim // config.heads
    return {"num_key_value_heads": count, "head_dim": size}


FORMATS = {
    "llama": format_of("Llama", {"head_dim": "head_dim", "bias": "attention_bias", "feed_forward_bias": "mlp_bias"}),
    "mistral": format_of(
        "Mistral", {"head_dim": "head_dim", "window": "sliding_window"},
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    ),
}  # fmt: skip
