"""BERT, an encoder of text in which every token sees every other; MiniLM is a small one.

    x = norm(word + position + segment)
    x = norm(x + attention(x));   x = norm(x + mlp(x))      in every block: the norm stands behind the sum
    MaskedWords            word · norm(gelu(dense(x))) + bias
    SequenceClassifier     one linear map of tanh(dense(x of the first token))
    TokenClassifier, QuestionSpans      one linear map of every x

Devlin et al. 2018: https://arxiv.org/abs/1810.04805. MiniLM (Wang et al. 2020): https://arxiv.org/abs/2002.10957. One
vector for a sentence (Reimers & Gurevych 2019): https://arxiv.org/abs/1908.10084. `roberta.py` and `distilbert.py` say
what those change; where it is more than names, `kind` decides here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.checkpoint.format import Format
from foveate.errors import InvalidInput
from foveate.nn import Block, FeedForward, PostNorm, SelfAttention
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import documents, padding

Ids = Int[Tensor, "batch length"]


@dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    vocabulary: int = 30522
    positions: int = 512
    segments: int = 2
    dim: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    epsilon: float = 1e-12
    attention_dropout: float = 0.1
    dropout: float = 0.1
    label_dropout: float | None = None  # before the last map of a classifier; None = dropout
    pad: int = 0
    labels: int = 2
    kind: str = "bert"
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what config.json says beside


PRESETS = {
    "bert-base": Config(),
    "bert-large": Config(dim=1024, layers=24, heads=16, hidden=4096),
    "minilm-l6": Config(dim=384, layers=6, hidden=1536),
}


def block(config: Config) -> Block:
    """Attention, then two linear maps; each is added to what it read, and the sum normalized."""

    def added(part: nn.Module) -> PostNorm:
        return PostNorm(part, nn.LayerNorm(config.dim, config.epsilon), dropout=config.dropout)

    return Block(
        added(SelfAttention(config.dim, config.heads, dropout=config.attention_dropout)),
        added(FeedForward(config.dim, config.hidden, activation=F.gelu)),
    )


class Model(nn.Module):
    """The encoder itself: from tokens to what each has become.

    >>> import torch
    >>> import foveate as fv
    >>> from foveate.models import bert
    >>> model = bert.Model(bert.Config(vocabulary=97, dim=32, layers=2, heads=4, hidden=64))
    >>> model(torch.tensor([[3, 1, 4], [2, 7, 0]]), fv.padding(torch.tensor([3, 2]))).shape
    torch.Size([2, 3, 32])
    """

    def __init__(self, config: Config, *, pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        self.first = config.pad + 1 if config.kind in ("roberta", "xlm-roberta") else 0  # where the first token stands
        self.word = nn.Embedding(config.vocabulary, config.dim, config.pad)
        self.position = nn.Embedding(config.positions, config.dim, config.pad if self.first else None)
        self.segment = nn.Embedding(config.segments, config.dim) if config.kind != "distilbert" else None
        self.norm, self.dropout = nn.LayerNorm(config.dim, config.epsilon), nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.layers))
        self.pooler = nn.Linear(config.dim, config.dim) if pooler and config.kind != "distilbert" else None
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self, tokens: Ids, pattern: Pattern | None = None, *, segments: Ids | None = None, positions: Ids | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """What each token has become.

        Args:
            pattern: who sees whom: `fv.padding(keep)`, `fv.documents(ids)`; None = everyone sees everyone.
            segments: 1 for tokens of a second text, 0 else; None = 0.
            positions: None = `places(tokens)`.
        """
        x: Tensor = self.position(self.places(tokens) if positions is None else positions)
        if self.segment is not None:
            x = x + (self.segment.weight[0] if segments is None else self.segment(segments))
        x = self.dropout(self.norm(self.word(tokens) + x))
        for layer in self.blocks:
            x = layer(x, pattern)
        return x

    def places(self, tokens: Ids) -> Int[Tensor, "#batch length"]:
        """0, 1, 2…; in RoBERTa the words count from pad + 1 on, and padding stands at pad."""
        most = self.config.positions - self.first
        if tokens.shape[1] > most:
            raise InvalidInput(f"the text has {tokens.shape[1]} tokens but the model {most} positions: cut it")
        if not self.first:
            return torch.arange(tokens.shape[1], device=tokens.device)[None]
        real = tokens != self.config.pad
        return real.cumsum(1) * real + self.config.pad

    def packed(self, tokens: Ids, keep: Bool[Tensor, "batch length"]) -> Float[Tensor, "batch length dim"]:
        """`model(tokens, fv.padding(keep))` without work for padding, which gives 0: all texts lie in one row."""
        positions = self.places(tokens).expand_as(tokens)[keep]
        x: Tensor = self(tokens[keep][None], documents(keep.nonzero()[:, 0]), positions=positions[None])
        return x.new_zeros(*keep.shape, x.shape[2]).index_put((keep,), x[0])

    def embed(self, tokens: Ids, keep: Bool[Tensor, "batch length"]) -> Float[Tensor, "batch dim"]:
        """One vector of length 1 for each text, the mean over its tokens: what sentence-transformers compares."""
        x: Tensor = self(tokens, padding(keep)).masked_fill(~keep[..., None], 0)
        return F.normalize(x.sum(1) / keep.sum(1, keepdim=True).clamp(min=1), dim=-1)

    def pool(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch dim"]:
        """BERT's own vector for a text, by which it learned whether one sentence follows another."""
        if self.pooler is None:
            raise InvalidInput("the model has no pooler: wanted a BERT or RoBERTa that is no head's body")
        return torch.tanh(self.pooler(x[:, 0]))


class MaskedWords(nn.Module):
    """A score of every word for each place, what BERT is trained on."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.body = config, Model(config, pooler=False)
        self.dense, self.norm = nn.Linear(config.dim, config.dim), nn.LayerNorm(config.dim, config.epsilon)
        self.head = nn.Linear(config.dim, config.vocabulary)
        self.head.weight = self.body.word.weight

    def forward(self, tokens: Ids, pattern: Pattern | None = None, *, segments: Ids | None = None) -> Tensor:
        """`[batch, length, vocabulary]`."""
        x = F.gelu(self.dense(self.body(tokens, pattern, segments=segments)))
        scores: Tensor = self.head(self.norm(x))
        return scores


class SequenceClassifier(nn.Module):
    """A score of every label for a text, from what its first token has become."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.body = config, Model(config, pooler=False)
        self.pooler, self.score = nn.Linear(config.dim, config.dim), nn.Linear(config.dim, config.labels)
        self.activation = nn.ReLU() if config.kind == "distilbert" else nn.Tanh()
        self.dropout = nn.Dropout(config.dropout if config.label_dropout is None else config.label_dropout)

    def forward(self, tokens: Ids, pattern: Pattern | None = None, *, segments: Ids | None = None) -> Tensor:
        """`[batch, labels]`."""
        x = self.body(tokens, pattern, segments=segments)[:, 0]
        scores: Tensor = self.score(self.dropout(self.activation(self.pooler(x))))
        return scores


class TokenClassifier(nn.Module):
    """A score of every label for each token: parts of speech, names of people and places."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.body = config, Model(config, pooler=False)
        self.dropout = nn.Dropout(config.dropout if config.label_dropout is None else config.label_dropout)
        self.tags = nn.Linear(config.dim, config.labels)

    def forward(self, tokens: Ids, pattern: Pattern | None = None, *, segments: Ids | None = None) -> Tensor:
        """`[batch, length, labels]`."""
        scores: Tensor = self.tags(self.dropout(self.body(tokens, pattern, segments=segments)))
        return scores


class QuestionSpans(nn.Module):
    """Where in a text the answer to a question stands: question and text are two segments of one row."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.body, self.spans = config, Model(config, pooler=False), nn.Linear(config.dim, 2)

    def forward(self, tokens: Ids, pattern: Pattern | None = None, *, segments: Ids | None = None) -> Tensor:
        """`[batch, length, 2]`: how well the answer starts and ends at each token."""
        scores: Tensor = self.spans(self.body(tokens, pattern, segments=segments))
        return scores


NAMES = {
    "embeddings.word_embeddings.*": "word.*",
    "embeddings.position_embeddings.*": "position.*",
    "embeddings.token_type_embeddings.*": "segment.*",
    "embeddings.LayerNorm.*": "norm.*",
    "encoder.layer.*.attention.output.dense.*": "blocks.*.attention.part.out.*",
    "encoder.layer.*.attention.self.*.*": "blocks.*.attention.part.*.*",  # query, key, value
    "encoder.layer.*.attention.output.LayerNorm.*": "blocks.*.attention.norm.*",
    "encoder.layer.*.intermediate.dense.*": "blocks.*.feed_forward.part.up.*",
    "encoder.layer.*.output.dense.*": "blocks.*.feed_forward.part.down.*",
    "encoder.layer.*.output.LayerNorm.*": "blocks.*.feed_forward.norm.*",
    "pooler.dense.*": "pooler.*",
}
FIELDS = {
    "vocabulary": "vocab_size", "positions": "max_position_embeddings", "segments": "type_vocab_size",
    "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "hidden": "intermediate_size",
    "epsilon": "layer_norm_eps", "attention_dropout": "attention_probs_dropout_prob", "dropout": "hidden_dropout_prob",
    "label_dropout": "classifier_dropout", "pad": "pad_token_id", "labels": "num_labels",
}  # fmt: skip
FIXED = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False, "tie_word_embeddings": True}
FORMATS = {
    "bert": Format(
        config=Config,
        architectures={
            "BertModel": Model, "BertForMaskedLM": MaskedWords, "BertForPreTraining": MaskedWords,
            "BertForSequenceClassification": SequenceClassifier, "BertForTokenClassification": TokenClassifier,
            "BertForQuestionAnswering": QuestionSpans,
        },
        fields=FIELDS, fixed=FIXED, names=NAMES, prefix="bert.",
        heads={
            "cls.predictions.transform.dense.*": "dense.*",
            "cls.predictions.transform.LayerNorm.*": "norm.*",
            "cls.predictions.decoder.weight": "head.weight", "cls.predictions.bias": "head.bias",
            "bert.pooler.dense.*": "pooler.*", "classifier.*": "score.*",
            "classifier.weight": "tags.weight", "classifier.bias": "tags.bias", "qa_outputs.*": "spans.*",
        },
        # Old buffers, a bias under its second name, and what the first training had beside the words.
        ignored=("embeddings.position_ids", "cls.predictions.decoder.bias", "pooler.dense.*", "cls.seq_relationship.*"),
    )
}  # fmt: skip
