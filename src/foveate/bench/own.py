"""The models of `foveate.models` in the table of models: opened from what a contestant of Hugging Face writes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foveate.bench.contestants import Turn
from foveate.bench.given import images, padded, remembered, words
from foveate.bench.models import ModelRow
from foveate.generation.cache import KeyValueCache
from foveate.pattern.packing import padding
from foveate.pretrained import from_pretrained


def opened(theirs: Any) -> nn.Module:
    """Our model with the weights of one of Hugging Face, in memory of its own as theirs are, not in a file's pages."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = from_pretrained(folder)
        for parameter in ours.parameters():
            parameter.data = parameter.data.clone()
    return ours.train(theirs.training)


def _turn(row: ModelRow, model: Any) -> Turn:
    return _WORKS[row.work](row, model)


def _packed(row: ModelRow, model: Any) -> Turn:
    """The texts without their padding, end to end in one row that `documents` keeps apart, and laid out again."""
    ids, kept = padded(row)
    return lambda: (model.packed(ids, kept),)


def _prefilling(row: ModelRow, model: Any) -> Turn:
    """The scores of what comes after the last token."""
    ids = words(row, row.sizes[3])
    return lambda: (model.head(model.body(ids)[:, -1:]),)


def _decoded(row: ModelRow, model: Any) -> Turn:
    """Tokens one by one after random keys and values that are in the cache already; their scores."""
    cache, tokens = KeyValueCache(len(model.body.blocks)), row.sizes[3]
    for layer, kept in zip(cache.layers, remembered(row, len(cache)), strict=True):
        layer.append(*kept)
    ids = words(row, tokens)

    def turn() -> tuple[Tensor, ...]:
        found = [model(ids[:, at : at + 1], cache=cache) for at in range(tokens)]
        for layer in cache.layers:
            layer.shorten(layer.length - tokens)
        return (torch.cat(found, 1),)

    return turn


def _encoded(row: ModelRow, model: Any) -> Turn:
    """The hidden states of what is no padding."""
    if row.model == "ViTModel":
        pixels = images(row)
        return lambda: (model(pixels),)
    if row.pattern is None:
        ids = words(row, row.sizes[3])
        return lambda: (model(ids),)
    ids, kept = padded(row)
    return lambda: (model(ids, padding(kept)) * kept[..., None],)


def _stepped(row: ModelRow, model: Any) -> Turn:
    """The loss, and the gradient of the first layer's projections, as Hugging Face stores them."""
    ids = words(row, row.sizes[3])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    attention = model.body.blocks[0].attention
    projections = attention.query, attention.key, attention.value

    def turn() -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
        loss.backward()
        optimizer.step()
        return loss.detach(), torch.cat([part.weight.grad for part in projections]).mT

    return turn


_WORKS: Mapping[str, Callable[[ModelRow, Any], Turn]] = {
    "prefill": _prefilling,
    "decoding": _decoded,
    "forward": _encoded,
    "training": _stepped,
}
OWN_TURNS: Mapping[str, Callable[[ModelRow, Any], Turn]] = {"own": _turn, "own packed": _packed}
