"""DistilBERT: BERT with half the blocks and without segments, taught by BERT's own scores.

Sanh et al. 2019: https://arxiv.org/abs/1910.01108. The modules are those of `bert.py`; here is what
their parts are called.
"""

from __future__ import annotations

from foveate.checkpoint.format import Format
from foveate.models.bert import Config, MaskedWords, Model, QuestionSpans, SequenceClassifier, TokenClassifier

PRESETS = {"distilbert": Config(layers=6, label_dropout=0.2, kind="distilbert")}

NAMES = {
    "embeddings.word_embeddings.*": "word.*",
    "embeddings.position_embeddings.*": "position.*",
    "embeddings.LayerNorm.*": "norm.*",
    "transformer.layer.*.attention.q_lin.*": "blocks.*.attention.part.query.*",
    "transformer.layer.*.attention.k_lin.*": "blocks.*.attention.part.key.*",
    "transformer.layer.*.attention.v_lin.*": "blocks.*.attention.part.value.*",
    "transformer.layer.*.attention.out_lin.*": "blocks.*.attention.part.out.*",
    "transformer.layer.*.sa_layer_norm.*": "blocks.*.attention.norm.*",
    "transformer.layer.*.ffn.lin1.*": "blocks.*.feed_forward.part.up.*",
    "transformer.layer.*.ffn.lin2.*": "blocks.*.feed_forward.part.down.*",
    "transformer.layer.*.output_layer_norm.*": "blocks.*.feed_forward.norm.*",
}

FIELDS = {
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "dim": "dim",
    "layers": "n_layers",
    "heads": "n_heads",
    "hidden": "hidden_dim",
    "attention_dropout": "attention_dropout",
    "dropout": "dropout",
    "label_dropout": "seq_classif_dropout",
    "pad": "pad_token_id",
    "labels": "num_labels",
}

FORMATS = {
    "distilbert": Format(
        config=Config,
        architectures={
            "DistilBertForMaskedLM": MaskedWords,
            "DistilBertModel": Model,
            "DistilBertForSequenceClassification": SequenceClassifier,
            "DistilBertForTokenClassification": TokenClassifier,
            "DistilBertForQuestionAnswering": QuestionSpans,
        },
        fields=FIELDS,
        fixed={"activation": "gelu", "tie_word_embeddings": True},
        defaults={"n_layers": 6, "seq_classif_dropout": 0.2},
        names=NAMES,
        heads={
            "vocab_transform.*": "dense.*",
            "vocab_layer_norm.*": "norm.*",
            "vocab_projector.*": "head.*",
            "pre_classifier.*": "pooler.*",
            "classifier.*": "score.*",
            "classifier.weight": "tags.weight",
            "classifier.bias": "tags.bias",
            "qa_outputs.*": "spans.*",
        },
        prefix="distilbert.",
        ignored=("embeddings.position_ids",),
    )
}
