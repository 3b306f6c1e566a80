"""RoBERTa: BERT, trained longer and on words alone; its positions count words and pass over padding.

Liu et al. 2019: https://arxiv.org/abs/1907.11692. XLM-RoBERTa (Conneau et al. 2019), the same for a hundred languages:
https://arxiv.org/abs/1911.02116. The modules are those of `bert.py`; here is what their parts are called.
"""

from __future__ import annotations

from foveate.checkpoint.format import Format
from foveate.models.bert import (
    FIELDS,
    FIXED,
    NAMES,
    Config,
    MaskedWords,
    Model,
    QuestionSpans,
    SequenceClassifier,
    TokenClassifier,
)

PRESETS = {
    "roberta-base": Config(50265, 514, 1, epsilon=1e-5, pad=1, kind="roberta"),
    "roberta-large": Config(50265, 514, 1, 1024, 24, 16, 4096, 1e-5, pad=1, kind="roberta"),
    "xlm-roberta-base": Config(250002, 514, 1, epsilon=1e-5, pad=1, kind="xlm-roberta"),
}

HEADS = {
    "lm_head.dense.*": "dense.*",
    "lm_head.layer_norm.*": "norm.*",
    "lm_head.decoder.weight": "head.weight",
    "lm_head.bias": "head.bias",
    "classifier.dense.*": "pooler.*",
    "classifier.out_proj.*": "score.*",
    "classifier.*": "tags.*",
    "qa_outputs.*": "spans.*",
}


def _written(name: str) -> Format:
    """How models are written whose architectures begin with `name`."""
    return Format(
        config=Config,
        architectures={
            f"{name}ForMaskedLM": MaskedWords,
            f"{name}Model": Model,
            f"{name}ForSequenceClassification": SequenceClassifier,
            f"{name}ForTokenClassification": TokenClassifier,
            f"{name}ForQuestionAnswering": QuestionSpans,
        },
        fields=FIELDS,
        fixed=FIXED,
        defaults={"vocab_size": 50265, "pad_token_id": 1},
        names=NAMES,
        heads=HEADS,
        prefix="roberta.",
        ignored=("embeddings.position_ids", "lm_head.decoder.bias", "pooler.dense.*"),
    )


FORMATS = {"roberta": _written("Roberta"), "xlm-roberta": _written("XLMRoberta")}
