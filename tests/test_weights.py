"""The weights that are shown are those that attention uses; rows, columns and summaries of them agree."""

import math

import pytest
import torch
from calls import BATCH, HEADS, KEY_HEADS, near, random, random_mask, scores, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate as fv
from foveate import InvalidInput, inspection
from foveate.problem import problem

QUERIES, KEYS = 11, 13
TERMS = scores(QUERIES, KEYS)
PATTERNS = {"all": None, "causal": fv.causal, "some rows see nothing": fv.from_mask(random_mask(QUERIES, KEYS, 0.1))}
every = pytest.mark.parametrize(("pattern", "term"), [(p, t) for p in PATTERNS for t in TERMS])


def call(pattern, term, **options):
    return (*tensors(QUERIES, KEYS), PATTERNS[pattern]), {"score": TERMS[term], **options}


@every
def test_weights_times_values_is_attention(pattern, term):
    (q, k, v, seen), options = call(pattern, term)
    shares = fv.weights(q, k, v, seen, **options)
    near(
        shares @ v.repeat_interleave(HEADS // KEY_HEADS, 1), fv.attention(q, k, v, seen, **options, backend="reference")
    )
    values = torch.eye(KEYS, dtype=q.dtype).expand(*k.shape[:2], KEYS, KEYS)
    near(shares, fv.attention(q, k, values, seen, **options, backend="chunked"))


@every
def test_a_row_sums_to_one_less_with_sinks_nothing_without_keys(pattern, term):
    arguments, options = call(pattern, term)
    total = fv.weights(*arguments, **options).sum(-1)
    _, lse = fv.attention_with_lse(*arguments, **options, backend="reference")
    if TERMS[term] is not None and TERMS[term].sinks is not None:
        sink = (TERMS[term].sinks.logits[:, None] - lse).exp()
        near(total + sink, torch.ones_like(total))
    else:
        near(total, (lse > -math.inf).double())


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_asked_for_rows_and_columns_are_picked_from_the_whole(data):
    (q, k, v, seen), options = call(data.draw(st.sampled_from(list(PATTERNS))), data.draw(st.sampled_from(list(TERMS))))
    whole = fv.weights(q, k, v, seen, **options)
    rows = data.draw(st.none() | st.lists(st.integers(-QUERIES, QUERIES - 1), min_size=1, max_size=5))
    columns = data.draw(st.none() | st.lists(st.integers(-KEYS, KEYS - 1), min_size=1, max_size=5))
    want = whole if rows is None else whole[:, :, rows]
    want = want if columns is None else want[..., columns]
    near(fv.weights(q, k, v, seen, rows=rows, columns=columns, **options), want, 8)
    if rows is not None:
        near(fv.weights(q, k, v, seen, rows=torch.tensor(rows), columns=columns, **options), want, 8)


def test_none_of_the_rows_is_an_answer_too():
    (q, k, v, _), _ = call("all", "none")
    assert fv.weights(q, k, v, rows=[]).shape == (BATCH, HEADS, 0, KEYS)
    assert fv.weights(q, k, v, columns=[]).shape == (BATCH, HEADS, QUERIES, 0)


@pytest.mark.parametrize("rows", [[QUERIES], [-QUERIES - 1], torch.zeros(2, 2).long(), torch.zeros(2)], ids=str)
def test_rows_that_do_not_exist(rows):
    (q, k, v, _), _ = call("all", "none")
    with pytest.raises(InvalidInput, match="rows is"):
        fv.weights(q, k, v, rows=rows)


@every
def test_what_was_looked_at_agrees_with_all_the_weights(pattern, term):
    (q, k, v, seen), options = call(pattern, term)
    shares = fv.weights(q, k, v, seen, **options)
    looked = inspection.looked(problem(q, k, v, seen, **options), 4)
    _, lse = fv.attention_with_lse(q, k, v, seen, **options, backend="reference")
    near(looked.weights, shares.sort(-1, descending=True).values[..., :4], 8)
    near(looked.weights, shares.gather(-1, looked.indices), 8)
    near(looked.weights.sum(-1) + looked.rest, shares.sum(-1))
    near(looked.received, shares.sum(2))
    near(looked.lse, lse, 8)
    near(looked.entropy, -(shares * shares.clamp(min=1e-300).log()).sum(-1))
    if seen is None:
        assert (looked.watchers == QUERIES).all()
    else:
        assert torch.equal(looked.watchers, seen.dense(QUERIES, KEYS, batch=BATCH, heads=HEADS).sum(2))
    sinks = TERMS[term].sinks if TERMS[term] is not None else None
    if sinks is not None:
        near(looked.weights.sum(-1) + looked.rest + (sinks.logits[:, None] - lse).exp(), torch.ones_like(lse))


@pytest.mark.parametrize("k", [1, KEYS, KEYS + 7])
def test_more_keys_than_there_are(k):
    (q, key, v, _), _ = call("all", "none")
    looked = inspection.looked(problem(q, key, v), k)
    assert looked.weights.shape == (BATCH, HEADS, QUERIES, min(k, KEYS))


def test_many_rows_are_worked_out_a_few_at_a_time(monkeypatch):
    (q, k, v, seen), options = call("causal", "together")
    whole, looked = fv.weights(q, k, v, seen, **options), inspection.looked(problem(q, k, v, seen, **options))
    monkeypatch.setattr(inspection, "_ENTRIES_AT_ONCE", 2 * BATCH * HEADS * KEYS)
    near(fv.weights(q, k, v, seen, **options), whole, 8)
    again = inspection.looked(problem(q, k, v, seen, **options))
    for name in ("weights", "rest", "received", "lse", "entropy"):
        near(getattr(again, name), getattr(looked, name))
    assert torch.equal(again.watchers, looked.watchers)


def test_weights_without_a_batch_and_by_batch_start():
    (q, k, v, _), _ = call("causal", "none")
    start = torch.tensor([0, 3])
    whole = fv.weights(q, k, v, fv.causal, query_start=start, rows=[2, -1])
    for b in range(BATCH):
        alone = fv.weights(q[b], k[b], v[b], fv.causal, query_start=int(start[b]), rows=[2, -1])
        near(alone, whole[b], 8)
        assert (alone[..., int(start[b]) + 3 :][:, 0] == 0).all()


def test_weights_are_float32_or_wider():
    q, k, v = tensors(3, 5, dtype=torch.bfloat16)
    assert fv.weights(q, k, v).dtype == torch.float32
    assert random(1).dtype == fv.weights(*tensors(3, 5)).dtype
