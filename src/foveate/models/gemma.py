"""Gemma 2 and Gemma 3, decoders of text whose layers see a window or everything in turn.

    x = word · √dim
    x = x + norm(attention(norm(x)));   x = x + norm(mlp(norm(x)))      in every block: norms stand before and behind
    mlp(x) = down(gelu(gate(x)) · up(x))
    LanguageModel      c · tanh(word · norm(x) / c)

norm multiplies by 1 + weight. Gemma 2 caps the scores of its attention the same way, Riviere et al. 2024:
https://arxiv.org/abs/2408.00118. Gemma 3 norms q and k instead, and turns them faster where it sees a window, Kamath et
al. 2025: https://arxiv.org/abs/2503.19786.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.checkpoint.format import Format, Names
from foveate.checkpoint.rope_config import SCALING, check_length, upgraded, upgraded_by_type
from foveate.errors import InvalidInput
from foveate.functional import attention
from foveate.generation.cache import KeyValueCache
from foveate.generation.greedy import greedy
from foveate.nn import Block, GatedFeedForward, PreNorm, Rotary, SelfAttention
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import causal, window
from foveate.rotary import Linear, Scaling
from foveate.score import softcap

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    vocabulary: int = 256000
    positions: int = 8192  # of the training; a text may be longer
    dim: int = 2304
    layers: int = 26
    heads: int = 8
    key_heads: int = 4
    head_dim: int = 256
    hidden: int = 9216  # of the feed-forward
    bias: bool = False  # of query, key, value, out
    query_size: int | float = 256  # q·k is divided by its root
    cap: float | None = None  # of the scores of attention
    final_cap: float | None = None  # of the words' scores
    query_key_norm: bool = False
    window: int = 4096  # how many tokens a sliding layer sees, its own included
    period: int = 2  # every such layer sees everything
    layer_types: tuple[str, ...] | None = None  # SLIDING or FULL for every layer; None = by the period
    base: float = 10000.0  # of the turns
    local_base: float | None = None  # of the turns in sliding layers; None = as everywhere
    scaling: Scaling | None = None  # of the turns in layers that see everything
    epsilon: float = 1e-6
    attention_dropout: float = 0.0
    tied: bool = True  # the last map is the words' own embeddings
    end: int | tuple[int, ...] | None = 1
    pad: int | None = 0
    kind: str = "gemma2"
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what config.json says beside

    def __post_init__(self) -> None:
        if len(self.types) != self.layers or not {FULL, SLIDING}.issuperset(self.types):
            raise InvalidInput(f"layer_types is {self.types}: wanted {FULL} or {SLIDING} for {self.layers} layers")
        check_length(self.scaling, self.positions)

    @property
    def types(self) -> tuple[str, ...]:
        return self.layer_types or tuple(SLIDING if (n + 1) % self.period else FULL for n in range(self.layers))


GEMMA3 = {"query_key_norm": True, "period": 6, "base": 1000000.0, "local_base": 10000.0, "kind": "gemma3_text"}
PRESETS = {
    "gemma-2-2b": Config(cap=50.0, final_cap=30.0),
    "gemma-3-1b": Config(
        262144, 32768, 1152, 26, 4, 1, hidden=6912, window=512, end=(1, 106), **GEMMA3,  # type: ignore[arg-type]
    ),
    "gemma-3-4b-text": Config(
        262208, 131072, 2560, 34, 8, 4, hidden=10240, window=1024, scaling=Linear(8.0), **GEMMA3,  # type: ignore[arg-type]
    ),
}  # fmt: skip


class Norm(nn.Module):
    """x / root mean square of x · (1 + weight), in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.zeros(size)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.epsilon).to(x.dtype)


def block(config: Config, rotary: Rotary) -> Block:
    """Attention to what came before, then the gated feed-forward; each reads norm(x), and norm of it is added to x."""

    def added(part: nn.Module) -> PreNorm:
        return PreNorm(part, norm(config.dim), after=norm(config.dim))

    norm = partial(Norm, epsilon=config.epsilon)
    both = [norm(config.head_dim) if config.query_key_norm else None for _ in "qk"]
    score = None if config.cap is None else softcap(config.cap)
    part = SelfAttention(
        config.dim, config.heads, key_heads=config.key_heads, head_dim=config.head_dim, bias=config.bias,
        rotary=rotary, query_norm=both[0], key_norm=both[1], dropout=config.attention_dropout,
        attend=partial(attention, scale=config.query_size**-0.5, score=score),
    )  # fmt: skip
    gelu = partial(functional.gelu, approximate="tanh")
    return Block(added(part), added(GatedFeedForward(config.dim, config.hidden, activation=gelu)))


class Model(nn.Module):
    """The decoder itself: from tokens to what each has become.

    >>> import torch
    >>> from foveate.models import gemma
    >>> config = gemma.Config(97, dim=32, layers=2, heads=4, key_heads=2, head_dim=8, hidden=48, window=3, cap=30.0)
    >>> gemma.Model(config)(torch.tensor([[3, 1, 4, 1, 5]])).shape
    torch.Size([1, 5, 32])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.word = nn.Embedding(config.vocabulary, config.dim)
        self.rotary = Rotary(config.head_dim, base=config.base, scaling=config.scaling)
        self.near = self.rotary if config.local_base is None else Rotary(config.head_dim, base=config.local_base)
        self.blocks = nn.ModuleList(
            block(config, self.near if kind == SLIDING else self.rotary) for kind in config.types
        )
        self.norm = Norm(config.dim, config.epsilon)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        pattern: Pattern | None = None,
        *,
        positions: Int[Tensor, "batch length"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """What each token has become.

        The pattern narrows who sees whom beyond causal; positions None = 0, 1, 2…, after those in the cache.
        """
        config, x = self.config, self.word(tokens)
        x = x * torch.tensor(config.dim**0.5, dtype=x.dtype, device=x.device)
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + x.shape[1], device=x.device)
        angles = {FULL: self.rotary.angles(positions, x.dtype), SLIDING: self.near.angles(positions, x.dtype)}
        seen = causal if pattern is None else causal & pattern
        patterns = {FULL: seen, SLIDING: seen & window(config.window)}
        for n, (layer, kind) in enumerate(zip(self.blocks, config.types, strict=True)):
            x = layer(x, patterns[kind], positions=angles[kind], cache=None if cache is None else cache[n])
        y: Tensor = self.norm(x)
        return y


class LanguageModel(nn.Module):
    """A score of every word for the place after each token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.body = config, Model(config)
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
        return self.scores(self.body(tokens, pattern, positions=positions, cache=cache))

    def scores(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length vocabulary"]:
        """The scores of what comes next, capped."""
        scores, cap = self.head(x), self.config.final_cap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def generate(
        self, tokens: Int[Tensor, "batch length"], *, new: int, keep: Bool[Tensor, "batch length"] | None = None
    ) -> Int[Tensor, "batch longer"]:
        """`foveate.generation.greedy.greedy` with this model: the tokens and up to `new` more."""
        cache, config = KeyValueCache(self.config.layers), self.config
        return greedy(self.body, self.scores, tokens, cache, new=new, keep=keep, end=config.end, pad=config.pad)


NAMES: Names = {
    "embed_tokens.weight": "word.weight",
    "layers.*.input_layernorm.weight": "blocks.*.attention.norm.weight",
    "layers.*.self_attn.q_proj.*": "blocks.*.attention.part.query.*",
    "layers.*.self_attn.k_proj.*": "blocks.*.attention.part.key.*",
    "layers.*.self_attn.v_proj.*": "blocks.*.attention.part.value.*",
    "layers.*.self_attn.o_proj.*": "blocks.*.attention.part.out.*",
    "layers.*.self_attn.q_norm.weight": "blocks.*.attention.part.query_norm.weight",
    "layers.*.self_attn.k_norm.weight": "blocks.*.attention.part.key_norm.weight",
    "layers.*.post_attention_layernorm.weight": "blocks.*.attention.after.weight",
    "layers.*.pre_feedforward_layernorm.weight": "blocks.*.feed_forward.norm.weight",
    "layers.*.mlp.*_proj.*": "blocks.*.feed_forward.part.*.*",  # gate, up, down
    "layers.*.post_feedforward_layernorm.weight": "blocks.*.feed_forward.after.weight",
    "norm.weight": "norm.weight",
}

FIELDS = {
    "vocabulary": "vocab_size", "positions": "max_position_embeddings", "dim": "hidden_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "key_heads": "num_key_value_heads",
    "head_dim": "head_dim", "hidden": "intermediate_size", "bias": "attention_bias",
    "query_size": "query_pre_attn_scalar", "cap": "attn_logit_softcapping", "final_cap": "final_logit_softcapping",
    "window": "sliding_window", "layer_types": "layer_types", "epsilon": "rms_norm_eps",
    "attention_dropout": "attention_dropout", "tied": "tie_word_embeddings",
    "end": "eos_token_id", "pad": "pad_token_id",
}  # fmt: skip
FIXED = {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": (None, False)}
COMMON: dict[str, Any] = {
    "config": Config, "names": NAMES, "heads": {"lm_head.weight": "head.weight"}, "prefix": "model.",
    "generation": ("end",), "codecs": {"scaling": SCALING}, "also": lambda config: {"layer_types": config.types},
}  # fmt: skip

FORMATS = {
    "gemma2": Format(
        architectures={"Gemma2ForCausalLM": LanguageModel, "Gemma2Model": Model}, upgrade=upgraded, fixed=FIXED,
        fields=FIELDS | {"scaling": "rope_parameters", "base": "rope_parameters.rope_theta"},
        defaults={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, **COMMON,
    ),
    "gemma3_text": Format(
        architectures={"Gemma3ForCausalLM": LanguageModel, "Gemma3TextModel": Model}, upgrade=upgraded_by_type,
        fields=FIELDS | {"scaling": f"rope_parameters.{FULL}", "base": f"rope_parameters.{FULL}.rope_theta",
                         "local_base": f"rope_parameters.{SLIDING}.rope_theta"},
        implied={"query_key_norm": True}, fixed=FIXED | {"attn_logit_softcapping": None},
        defaults={"vocab_size": 262208, "max_position_embeddings": 131072}, **COMMON,
    ),
}  # fmt: skip
