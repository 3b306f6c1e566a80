"""Patterns that are made from the data: which keys, or blocks of keys, are worth a query's attention.

    topk, topk_of      the keys with the highest scores, exactly
    heavy_hitters      the keys that received most attention so far
    lightning          DeepSeek Sparse Attention: a small indexer scores every key; with its loss
    block_topk, moba   blocks whose pooled key fits the query
    compress, select   Native Sparse Attention: blocks by the attention to compressed keys

Each gives a pattern, `selected(indices)`, so that attention, weights, gradients and sight work on it unchanged. No
gradient goes through a choice.
"""

from typing import TYPE_CHECKING

from foveate.names import explained_names
from foveate.selection.blocks import block_topk, moba
from foveate.selection.compressed import compress, select
from foveate.selection.indexer import lightning, lightning_loss, lightning_scores
from foveate.selection.tokens import heavy_hitters, topk, topk_of

__all__ = [
    "block_topk",
    "compress",
    "heavy_hitters",
    "lightning",
    "lightning_loss",
    "lightning_scores",
    "moba",
    "select",
    "topk",
    "topk_of",
]

if not TYPE_CHECKING:
    __getattr__ = explained_names(__name__)
