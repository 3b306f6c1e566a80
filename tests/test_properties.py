"""Laws of attention that hold for any input, on the definition and on the implementation in pieces."""

import math

import pytest
import torch
from calls import BATCH, GROUP, HEADS, KEY_HEADS, gradients, near, random, scores, tensors
from drawing import Call, trees
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate as fv
from foveate.softmax import chunked

BACKENDS = ("reference", "chunked")
MODEST = settings(max_examples=12, deadline=None, derandomize=True, database=None)
lengths = st.integers(1, 23)
seeds = st.integers(0, 999)
both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="module", autouse=True)
def _small_tiles():
    """Tiles of 4 and segments of 8 keys, so that a dozen keys are worked on in several pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_TILE", 4)
        patch.setattr(chunked, "_KEYS", 8)
        yield


def pattern_of(data, queries, keys):
    return data.draw(trees(Call(BATCH, HEADS, queries, keys, None)))


def dense_of(pattern, queries, keys):
    return pattern.dense(queries, keys, batch=BATCH, heads=HEADS)


def permutation(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def score_by_rows_and_keys(rows, columns):
    """A soft-cap, sinks, and a bias that can be permuted and cut like the mask."""
    full = random(BATCH, HEADS, 41, 41)
    return fv.softcap(3.0) + fv.sinks(random(HEADS)) + fv.bias(full[:, :, rows][..., columns])


@both
@MODEST
@given(st.data(), lengths, lengths, seeds)
def test_order_of_keys_does_not_matter(backend, data, queries, keys, seed):
    (q, k, v), mask = tensors(queries, keys, seed), dense_of(pattern_of(data, queries, keys), queries, keys)
    order, rows = permutation(keys, seed), torch.arange(queries)
    score = score_by_rows_and_keys(rows, torch.arange(keys))
    moved = score_by_rows_and_keys(rows, order)
    out, lse = fv.attention_with_lse(q, k, v, mask, score=score, backend=backend)
    again = fv.attention_with_lse(q, k[:, :, order], v[:, :, order], mask[..., order], score=moved, backend=backend)
    near(again[0], out)
    near(again[1], lse)


@both
@MODEST
@given(st.data(), lengths, lengths, seeds)
def test_every_query_is_on_its_own(backend, data, queries, keys, seed):
    (q, k, v), mask = tensors(queries, keys, seed), dense_of(pattern_of(data, queries, keys), queries, keys)
    order, columns = permutation(queries, seed), torch.arange(keys)
    score = score_by_rows_and_keys(torch.arange(queries), columns)
    out, lse = fv.attention_with_lse(q, k, v, mask, score=score, backend=backend)
    again = fv.attention_with_lse(
        q[:, :, order], k, v, mask[:, :, order], score=score_by_rows_and_keys(order, columns), backend=backend
    )
    near(again[0], out[:, :, order])
    near(again[1], lse[:, :, order])


@both
@MODEST
@given(st.data(), lengths, lengths, seeds, st.floats(-500, 500))
def test_a_shift_of_a_row_of_scores_moves_only_the_log_sum_exp(backend, data, queries, keys, seed, far):
    (q, k, v), pattern = tensors(queries, keys, seed), pattern_of(data, queries, keys)
    shift = random(BATCH, HEADS, queries, 1) + far
    out, lse = fv.attention_with_lse(q, k, v, pattern, backend=backend)
    again, moved = fv.attention_with_lse(q, k, v, pattern, score=shift, backend=backend)
    near(again, out, 64 * 500)  # a score of 500 is itself rounded 500 times as coarsely
    near(moved, lse + shift[..., 0])


@both
@MODEST
@given(st.data(), lengths, lengths, seeds)
def test_the_output_lies_among_the_visible_values(backend, data, queries, keys, seed):
    (q, k, v), pattern = tensors(queries, keys, seed, size=4), pattern_of(data, queries, keys)
    out = fv.attention(q, k, v, pattern, backend=backend)
    mask = dense_of(pattern, queries, keys)[..., None]
    values = v.repeat_interleave(GROUP, 1)[:, :, None]
    low = values.where(mask, math.inf).amin(3)
    high = values.where(mask, -math.inf).amax(3)
    some = mask.any(3).expand_as(out)
    assert ((out >= low - 1e-14) & (out <= high + 1e-14))[some].all()
    assert (out[~some] == 0).all()


@both
@MODEST
@given(st.data(), lengths, lengths, seeds)
def test_linear_in_the_values(backend, data, queries, keys, seed):
    (q, k, v), pattern = tensors(queries, keys, seed), pattern_of(data, queries, keys)
    other = random(*v.shape)

    def attend(values):
        return fv.attention(q, k, values, pattern, score=fv.sinks(random(HEADS)), backend=backend)

    near(attend(3 * v - other), 3 * attend(v) - attend(other))


@both
@MODEST
@given(st.data(), lengths, lengths, seeds)
def test_a_key_twice_is_a_key_with_twice_the_weight(backend, data, queries, keys, seed):
    (q, k, v), mask = tensors(queries, keys, seed), dense_of(pattern_of(data, queries, keys), queries, keys)
    twice = permutation(keys, seed)[: keys // 2 + 1]
    doubled = torch.zeros(keys, dtype=torch.float64)
    doubled[twice] = math.log(2)
    out, lse = fv.attention_with_lse(q, k, v, mask, score=doubled, backend=backend)
    all_of = torch.cat([torch.arange(keys), twice])
    again = fv.attention_with_lse(q, k[:, :, all_of], v[:, :, all_of], mask[..., all_of], backend=backend)
    near(again[0], out)
    near(again[1], lse)


@both
@MODEST
@given(lengths, lengths, seeds)
def test_hiding_keys_is_leaving_them_out(backend, queries, keys, seed):
    q, k, v = tensors(queries, keys, seed, gradients=True)
    keep = torch.rand(keys, generator=torch.Generator().manual_seed(seed)) < 0.6
    hidden = fv.attention_with_lse(q, k, v, fv.padding(keep.expand(BATCH, keys)), backend=backend)
    without = fv.attention_with_lse(q, k[:, :, keep], v[:, :, keep], backend=backend)
    for one, other in zip(hidden, without, strict=True):
        near(one, other)
    for one, other in zip(gradients(hidden, (q, k, v)), gradients(without, (q, k, v)), strict=True):
        near(one, other)


@both
@pytest.mark.parametrize("layout", ["heads last", "expanded", "every second", "dim first", "flipped"])
def test_strides_do_not_matter(backend, layout):
    q, k, v = tensors(7, 11)

    def lay(x):
        match layout:
            case "heads last":
                return x.transpose(1, 2).contiguous().transpose(1, 2)
            case "expanded":
                return x[:, :1, :1].expand_as(x)
            case "every second":
                return torch.stack([x, x.new_full(x.shape, math.nan)], -1).flatten(3)[..., ::2]
            case "dim first":
                return x.mT.contiguous().mT
            case _:
                return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)

    strided = [lay(x).detach().requires_grad_() for x in (q, k, v)]
    plain = [x.detach().contiguous().requires_grad_() for x in strided]
    pattern, score = fv.causal & fv.window(4), scores(7, 11)["together"]
    one, other = (fv.attention_with_lse(*x, pattern, score=score, backend=backend) for x in (strided, plain))
    for found, true in zip((*one, *gradients(one, strided)), (*other, *gradients(other, plain)), strict=True):
        near(found, true)


@both
@pytest.mark.parametrize("term", ["none", "alibi", "relative_bias", "t5", "sinks"])
@MODEST
@given(st.data(), st.integers(2, 23), seeds)
def test_a_decoding_step_is_the_last_row_of_the_prefill(backend, term, data, length, seed):
    """A row of the whole is that query alone, with the keys up to it, wherever it is said to stand."""
    (q, k, v), score = tensors(length, length, seed), scores(length, length)[term]
    offsets = torch.tensor([0, 4, 9, 23]).clamp(max=length)
    pattern = fv.causal & data.draw(
        st.sampled_from([
            fv.window(3), fv.window(2, step=3), fv.chunks(5), fv.prefix(2) | fv.window(2), fv.global_tokens([1]),
            fv.documents(torch.arange(length) // 6), fv.documents(cu_seqlens=offsets),
        ])
    )  # fmt: skip
    whole = fv.attention(q, k, v, pattern, score=score, dropout=0.3, seed=seed, backend=backend)
    options = {"score": score, "dropout": 0.3, "seed": seed, "backend": backend}
    row = data.draw(st.integers(0, length - 1))
    here, past = slice(row, row + 1), slice(0, row + 1)
    if any(held is offsets for held in pattern.tensors()):  # offsets do not go on behind the keys that there are
        cut = fv.causal & fv.documents(cu_seqlens=offsets.clamp(max=row + 1))
        near(fv.attention(q[:, :, here], k[:, :, past], v[:, :, past], cut, **options), whole[:, :, here])
    else:
        near(fv.attention(q[:, :, here], k[:, :, past], v[:, :, past], pattern, **options), whole[:, :, here])
    near(fv.attention(q[:, :, here], k, v, pattern, query_start=row, **options), whole[:, :, here])
    rows = torch.tensor([row, length - 1 - row])
    apart = torch.stack([q[b, :, n : n + 1] for b, n in enumerate(rows)])
    found = fv.attention(apart, k, v, pattern, query_start=rows, **options)
    near(found, torch.stack([whole[b, :, n : n + 1] for b, n in enumerate(rows)]))


@both
@MODEST
@given(st.data(), lengths, lengths, seeds)
def test_and_is_intersection_or_is_union(backend, data, queries, keys, seed):
    (q, k, _), one, other = (
        tensors(queries, keys, seed),
        pattern_of(data, queries, keys),
        pattern_of(data, queries, keys),
    )
    values = torch.eye(keys, dtype=torch.float64).expand(BATCH, KEY_HEADS, keys, keys)

    def support(pattern):
        return fv.attention(q, k, values, pattern, backend=backend) != 0

    assert torch.equal(support(one & other), support(one) & support(other))
    assert torch.equal(support(one | other), support(one) | support(other))
    assert torch.equal(support(~one), ~support(one))


@both
@pytest.mark.parametrize("term", ["none", "together"])
def test_grouped_heads_are_repeated_heads(backend, term):
    inputs, score = tensors(7, 11, gradients=True), scores(7, 11)[term]
    q, k, v = inputs
    grouped = fv.attention_with_lse(q, k, v, fv.causal, score=score, backend=backend)
    again = (x.repeat_interleave(GROUP, 1) for x in (k, v))
    repeated = fv.attention_with_lse(q, *again, fv.causal, score=score, backend=backend)
    for one, other in zip(
        (*grouped, *gradients(grouped, inputs)), (*repeated, *gradients(repeated, inputs)), strict=True
    ):
        near(one, other)


@both
def test_each_query_head_reads_its_own_key_head(backend):
    """V = head index, the trick of traps.md: query head h reads key head h // group."""
    q, k, _ = tensors(3, 5)
    v = torch.arange(KEY_HEADS, dtype=torch.float64).view(1, -1, 1, 1).expand(BATCH, KEY_HEADS, 5, 1)
    out = fv.attention(q, k, v, backend=backend)
    near(out, (torch.arange(HEADS) // GROUP).double().view(1, -1, 1, 1).expand_as(out))
