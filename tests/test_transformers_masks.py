"""The mask functions of Hugging Face transformers become patterns, and nothing about a mask is lost on the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as known

import foveate as fv
from foveate.integrations.transformers import Mask, mask

IDS = torch.tensor([[0] * 5 + [1] * 6, [0] * 3 + [1] * 4 + [2] * 4])
POSITIONS = torch.tensor([[*range(5), *range(6)], [*range(3), *range(4), *range(4)]])
BLOCKS = torch.tensor([[-1, -1, 0, 0, 0, -1, -1, 1, 1, -1, -1], [-1, 0, 0, 0, -1, 1, 1, 1, 1, -1, -1]])
NO_LEFT, LEFT = torch.tensor([0, 0]), torch.tensor([0, 2])
WINDOW, CHUNKS = known.sliding_window_causal_mask_function(3), known.chunked_causal_mask_function(4, NO_LEFT)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "causal": (known.causal_mask_function, "causal"),
    "everyone": (known.bidirectional_mask_function, "None"),
    "window": (WINDOW, "causal & window(3)"),
    "two-sided window": (known.sliding_window_bidirectional_mask_function(3), "window(4)"),
    "chunks": (CHUNKS, "causal & chunks(4)"),
    "chunks after padding": (known.chunked_causal_mask_function(4, LEFT), "causal & documents(<int64 2×11>)"),
    "packed": (
        known.packed_sequence_compatibility_function(known.causal_mask_function, POSITIONS, IDS),
        "causal & documents(<int64 2×11>)",
    ),
    "packed, window": (
        known.packed_sequence_compatibility_function(WINDOW, POSITIONS, IDS),
        "causal & documents(<int64 2×11>) & window(3)",
    ),
    "packed, chunks": (
        known.packed_sequence_compatibility_function(CHUNKS, POSITIONS, IDS),
        "causal & documents(<int64 2×11>) & documents(<int64 2×11>)",
    ),
    "packed, everyone": (
        known.packed_sequence_compatibility_function(known.bidirectional_mask_function, POSITIONS, IDS),
        "documents(<int64 2×11>)",
    ),
    "ids below zero": (known.packed_sequence_mask_function(IDS - 1), "documents(<int64 2×11>)"),
    "images in text": (
        known.or_masks(known.causal_mask_function, known.blockwise_overlay(BLOCKS)), "causal | documents(<int64 2×11>)"
    ),
    "images in text, window": (
        known.and_masks(known.or_masks(WINDOW, known.blockwise_overlay(BLOCKS)), known.sliding_window_overlay(3)),
        "(causal & window(3) | documents(<int64 2×11>)) & window(left=2, right=None)",
    ),
    "or everyone": (known.or_masks(WINDOW, known.bidirectional_mask_function), "None"),
    "padding": (known.padding_mask_function(IDS > 0), "padding(<bool 2×11>)"),
}  # fmt: skip


def rows_with_a_key(seen: Tensor) -> Tensor:
    return seen.any(-1, keepdim=True).expand(seen.shape)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("first", "keys"), [(0, 11), (4, 7)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mask_is_a_pattern_and_never_a_matrix(name: str, first: int, keys: int, padded: bool) -> None:
    """For a whole text, and where a rolling cache has let go of the first keys."""
    function, written = FUNCTIONS[name]
    kept = torch.ones(2, 11, dtype=torch.bool)
    if padded:
        kept[1, :2] = False
    truth = known.sdpa_mask(2, keys, keys, first, first, function, kept, allow_is_causal_skip=False)
    made = mask(2, keys, keys, first, first, function, kept)
    assert made.query_start == 0
    seen = torch.ones(2, 1, keys, keys, dtype=torch.bool)
    if made.pattern is not None:
        seen = made.pattern.dense(keys, keys, query_start=0, batch=2)
    # In chunks, what is padding belongs to no chunk: such a row has no use for its keys.
    rows = rows_with_a_key(seen) if name == "chunks after padding" else torch.ones_like(seen)
    assert torch.equal(seen[rows], truth.expand(seen.shape)[rows])
    assert "from_mask" not in repr(made.pattern)
    if first == 0 and not padded:
        assert repr(made.pattern) == written


def test_queries_start_where_the_cache_ends() -> None:
    made = mask(2, 5, 9, q_offset=4, mask_function=known.causal_mask_function)
    assert (made.pattern, made.query_start) == (fv.causal, 4)
    static = mask(2, 1, 9, q_offset=torch.tensor(4), mask_function=known.causal_mask_function)
    assert torch.equal(torch.as_tensor(static.query_start), torch.tensor([4]))


@pytest.mark.parametrize("use_vmap", [False, True])
def test_an_unknown_mask_function_becomes_a_matrix(use_vmap: bool) -> None:
    kept = torch.tensor([[True] * 4, [False] + [True] * 3])
    made = mask(
        2, 4, 4, q_offset=1, mask_function=lambda batch, head, query, key: (query - key) % 2 == 0, attention_mask=kept,
        use_vmap=use_vmap,
    )  # fmt: skip
    assert repr(made.pattern) == "from_mask(<bool 2×1×4×4>)"
    assert made.pattern is not None
    seen = [[[(q + 1 - k) % 2 == 0 and bool(row[k]) for k in range(4)] for q in range(4)] for row in kept]
    assert made.pattern.dense(4, 4, batch=2)[:, 0].tolist() == seen


def test_a_layer_that_does_arithmetic_finds_the_matrix_of_eager() -> None:
    how = {"q_offset": 2, "mask_function": WINDOW, "attention_mask": torch.tensor([[True] * 5, [False] + [True] * 4])}
    truth = known.eager_mask(2, 3, 5, **how)
    made = mask(2, 3, 5, **how)
    scores = torch.randn(2, 7, 3, 5)
    assert torch.equal(scores + made, scores + truth)
    assert torch.equal(made[:, :, :2], truth[:, :, :2])
    assert torch.equal(made.to(torch.float64), truth.to(torch.float64))
    assert made.shape == truth.shape
    assert torch.equal(torch.maximum(made, truth), truth)
    assert torch.equal(torch.cat([made, truth], -1), torch.cat([truth, truth], -1))
    everyone = mask(2, 3, 5, mask_function=known.bidirectional_mask_function)
    assert torch.equal(scores + everyone, scores)


def test_a_mask_stays_a_pattern_where_it_is_already() -> None:
    made = mask(1, 4, 4)
    assert made.to("cpu") is made
    assert made.to(torch.device("cpu")) is made
    assert isinstance(made.to("meta"), Tensor)


def test_a_mask_is_handed_on_by_transformers() -> None:
    made = mask(1, 4, 4)
    assert mask(1, 4, 4, attention_mask=made) is made  # type: ignore[arg-type]
    assert made.contiguous() is made
    assert made.ndim == made.dim() == 4
    assert "matrix" not in vars(made)
    assert isinstance(made, Mask)
