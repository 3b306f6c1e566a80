"""GPT-2, a decoder of text: every token sees those before it, and the last one says what comes next.

    x = word + position
    x = x + attention(norm(x));   x = x + mlp(norm(x))      in every block: the norm stands before
    LanguageModel          word · norm(x)
    SequenceClassifier     one linear map of the last token's norm(x)

Radford et al. 2019, "Language models are unsupervised multitask learners":
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.checkpoint.format import Format, Names
from foveate.errors import InvalidInput
from foveate.generation.cache import GrowingLayer, KeyValueCache
from foveate.generation.greedy import greedy
from foveate.nn import MultiHeadAttention
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import causal

ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}


@dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    vocabulary: int = 50257
    positions: int = 1024
    dim: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int | None = None  # of the feed-forward; None = 4 · dim
    activation: str = "gelu_new"
    epsilon: float = 1e-5
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    dropout: float = 0.1
    tied: bool = True  # the last map is the words' own embeddings
    end: int | tuple[int, ...] | None = 50256
    pad: int | None = None
    labels: int = 2
    kind: str = "gpt2"
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what config.json says beside

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise InvalidInput(f"the activation is {self.activation!r}: wanted one of {', '.join(ACTIVATIONS)}")


PRESETS = {
    "gpt2": Config(),
    "gpt2-medium": Config(dim=1024, layers=24, heads=16),
    "gpt2-large": Config(dim=1280, layers=36, heads=20),
    "gpt2-xl": Config(dim=1600, layers=48, heads=25),
}


class Block(nn.Module):
    """Attention to what came before, then two linear maps; each reads norm(x) and is added to x."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = 4 * config.dim if config.hidden is None else config.hidden
        self.attention_norm = nn.LayerNorm(config.dim, config.epsilon)
        self.attention = MultiHeadAttention(config.dim, config.heads, dropout=config.attention_dropout)
        self.mlp_norm = nn.LayerNorm(config.dim, config.epsilon)
        self.up = nn.Linear(config.dim, hidden)
        self.activation = nn.GELU(ACTIVATIONS[config.activation])
        self.down = nn.Linear(hidden, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, pattern: Pattern, cache: GrowingLayer | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), pattern=pattern, cache=cache))
        y: Tensor = x + self.dropout(self.down(self.activation(self.up(self.mlp_norm(x)))))
        return y


class Model(nn.Module):
    """The decoder itself: from tokens to what each has become.

    >>> import torch
    >>> from foveate.models import gpt2
    >>> model = gpt2.Model(gpt2.Config(vocabulary=97, dim=32, layers=2, heads=4))
    >>> model(torch.tensor([[3, 1, 4, 1, 5]])).shape
    torch.Size([1, 5, 32])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.word = nn.Embedding(config.vocabulary, config.dim)
        self.position = nn.Embedding(config.positions, config.dim)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, config.epsilon)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the paper: normal, and smaller where a block adds to x, the more blocks there are."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                adds = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.layers) ** 0.5 if adds else 0.02)

    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        pattern: Pattern | None = None,
        *,
        positions: Int[Tensor, "batch length"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """What each token has become.

        Args:
            pattern: narrows who sees whom beyond causal: `fv.padding(keep)`, `fv.documents(ids)`.
            positions: None = 0, 1, 2…, after those in the cache.
            cache: keys and values of the tokens before.

        Raises:
            InvalidInput: more tokens than there are positions.
        """
        start = 0 if cache is None else cache.length
        if positions is None:
            if start + tokens.shape[1] > self.config.positions:
                raise InvalidInput(
                    f"the text has {start + tokens.shape[1]} tokens but the model {self.config.positions} positions: "
                    "cut it"
                )
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        seen = causal if pattern is None else causal & pattern
        x: Tensor = self.dropout(self.word(tokens) + self.position(positions))
        for n, block in enumerate(self.blocks):
            x = block(x, seen, None if cache is None else cache[n])
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
        config = self.config
        return greedy(
            self.body, self.head, tokens, KeyValueCache(config.layers), new=new, keep=keep, end=config.end,
            pad=config.pad, positions=config.positions,
        )  # fmt: skip


class SequenceClassifier(nn.Module):
    """A score of every label for a text, from what its last token has become."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.body = Model(config)
        self.score = nn.Linear(config.dim, config.labels, bias=False)

    def forward(
        self, tokens: Int[Tensor, "batch length"], pattern: Pattern | None = None
    ) -> Float[Tensor, "batch labels"]:
        """The scores; the last token is the last that is not `config.pad`."""
        real = torch.ones_like(tokens) if self.config.pad is None else (tokens != self.config.pad).long()
        last = (real * torch.arange(tokens.shape[1], device=tokens.device)).argmax(1)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        scores: Tensor = self.score(self.body(tokens, pattern)[rows, last])
        return scores


NAMES: Names = {
    "wte.weight": "word.weight",
    "wpe.weight": "position.weight",
    "h.*.ln_1.*": "blocks.*.attention_norm.*",
    "h.*.attn.c_attn.*": ("blocks.*.attention.query.*", "blocks.*.attention.key.*", "blocks.*.attention.value.*"),
    "h.*.attn.c_proj.*": "blocks.*.attention.out.*",
    "h.*.ln_2.*": "blocks.*.mlp_norm.*",
    "h.*.mlp.c_fc.*": "blocks.*.up.*",
    "h.*.mlp.c_proj.*": "blocks.*.down.*",
    "ln_f.*": "norm.*",
}

FIELDS = {
    "vocabulary": "vocab_size", "positions": "n_positions", "dim": "n_embd", "layers": "n_layer", "heads": "n_head",
    "hidden": "n_inner", "activation": "activation_function", "epsilon": "layer_norm_epsilon",
    "embedding_dropout": "embd_pdrop", "attention_dropout": "attn_pdrop", "dropout": "resid_pdrop",
    "tied": "tie_word_embeddings", "end": "eos_token_id", "pad": "pad_token_id", "labels": "num_labels",
}  # fmt: skip

FORMATS = {
    "gpt2": Format(
        config=Config,
        architectures={
            "GPT2LMHeadModel": LanguageModel,
            "GPT2Model": Model,
            "GPT2ForSequenceClassification": SequenceClassifier,
        },
        fields=FIELDS,
        fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        names=NAMES,
        heads={"lm_head.weight": "head.weight", "score.weight": "score.weight"},
        prefix="transformer.",
        transposed=("h.*.attn.c_attn.weight", "h.*.attn.c_proj.weight", "h.*.mlp.c_fc.weight", "h.*.mlp.c_proj.weight"),
        ignored=("h.*.attn.bias", "h.*.attn.masked_bias"),
    )
}
