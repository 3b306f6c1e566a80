"""The attention function that transformers calls for one layer, by itself."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.integrations.transformers import attention, mask


def test_offsets_may_differ_where_queries_look_at_other_texts() -> None:
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4)
    ends = {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "cu_seq_lens_k": torch.tensor([0, 4, 7])}
    layer = torch.nn.Module()
    out, _ = attention(layer, q, k, k, None, is_causal=False, **ends)
    truth = torch.cat([fv.attention(q[:, :, :2], k[:, :, :4], k[:, :, :4]),
                       fv.attention(q[:, :, 2:], k[:, :, 4:], k[:, :, 4:])], 2)  # fmt: skip
    torch.testing.assert_close(out.transpose(1, 2), truth)
    with pytest.raises(fv.FoveateError, match="cu_seq_lens differ for queries and keys under the mask causal"):
        attention(layer, q, k, k, None, is_causal=True, **ends)


def test_queries_that_all_rows_share_are_repeated() -> None:
    q, k = torch.randn(1, 2, 3, 4), torch.randn(5, 2, 7, 4)
    out, weights = attention(torch.nn.Module(), q, k, k, None, is_causal=False)
    assert weights is None
    torch.testing.assert_close(out.transpose(1, 2), fv.attention(q.expand(5, -1, -1, -1), k, k))


def test_a_layer_without_a_mask_is_causal_if_it_says_so() -> None:
    q = torch.randn(1, 2, 5, 4)
    layer = torch.nn.Module()
    for more, pattern in (
        ({}, fv.causal),
        ({"is_causal": False}, None),
        ({"sliding_window": 2}, fv.causal & fv.window(2)),
    ):
        out, weights = attention(layer, q, q, q, None, output_attentions=True, scaling=3.0, **more)
        torch.testing.assert_close(out.transpose(1, 2), fv.attention(q, q, q, pattern, scale=3.0))
        torch.testing.assert_close(weights, fv.weights(q, q, q, pattern, scale=3.0))


def test_one_query_without_a_mask_stands_at_the_last_key() -> None:
    from foveate.integrations.transformers.attention_interface import PLAN, Plan

    q, k = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 7, 4)
    layer = torch.nn.Module()
    setattr(layer, PLAN, Plan(fv.window(3), gives_weights=True))
    out, _ = attention(layer, q, k, k, None)
    torch.testing.assert_close(out.transpose(1, 2), fv.attention(q, k[:, :, 4:], k[:, :, 4:]))


def test_a_sink_for_every_query_takes_its_share() -> None:
    """As Inkling 2 has: a logit of each query, with no value behind it."""
    q, k = torch.randn(2, 6, 5, 4, dtype=torch.float64), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    logit = torch.randn(2, 6, 5, 1, dtype=torch.float64)
    given = [x.requires_grad_() for x in (q, k, logit)]
    out, weights = attention(torch.nn.Module(), q, k, k, None, sinks=logit, output_attentions=True)
    scores = q @ k.repeat_interleave(2, 1).mT / 2
    scores = scores.masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    shares = torch.cat([scores, logit], -1).softmax(-1)[..., :-1]
    truth = (shares @ k.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(weights, shares)
    mine, theirs = (torch.autograd.grad((x**2).sum(), given, retain_graph=True) for x in (out, truth))
    torch.testing.assert_close(mine, theirs)


def test_a_layer_that_changes_its_keys_under_the_mask_is_refused() -> None:
    q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 6, 8)
    with pytest.raises(fv.FoveateError, match="Module attends from 4 queries to 6 keys under a mask made for 4 and 4"):
        attention(torch.nn.Module(), q, k, k, mask(1, 4, 4))


def test_what_an_indexer_of_blocks_chose_is_refused() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(
        fv.FoveateError, match="Linear uses blocks of keys that an indexer chose, which foveate does not"
    ):
        attention(torch.nn.Linear(1, 1), q, q, q, None, block_indices=torch.zeros(1, 2, 1))


def test_a_window_that_shows_nothing_is_refused_without_a_mask_too() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(fv.FoveateError, match="Module has a sliding window of 0, through which no query sees a key"):
        attention(torch.nn.Module(), q, q, q, None, sliding_window=0)


def test_a_paged_cache_is_refused() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(fv.FoveateError, match="Linear uses a paged cache, which foveate does not take"):
        attention(torch.nn.Linear(1, 1), q, q, q, None, cache=object())
