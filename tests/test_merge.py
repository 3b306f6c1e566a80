"""Attention over parts of the keys, merged, is attention over all of them."""

import math
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from calls import BATCH, HEADS, VALUE_DIM, gradients, near, random, tensors
from drawing import Call, trees
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate as fv
from foveate.mechanisms import merge

MODEST = settings(max_examples=12, deadline=None, derandomize=True, database=None)
TERMS = ("none", "bias", "softcap", "sinks", "together")
lengths, seeds = st.integers(1, 23), st.integers(0, 999)
both = pytest.mark.parametrize("backend", ["reference", "chunked"])


@st.composite
def masks(draw, queries, keys):
    pattern = draw(trees(Call(BATCH, HEADS, queries, keys, None)))
    return pattern.dense(queries, keys, batch=BATCH, heads=HEADS)


@both
@MODEST
@given(st.data(), lengths, st.integers(3, 23), seeds, st.sampled_from(TERMS))
def test_split_equals_whole(backend, data, queries, keys, seed, term):
    """Attention over parts of the keys, merged, is attention over all of them: out, log-sum-exp and gradients."""
    inputs, mask = (
        tensors(queries, keys, seed, gradients=True),
        data.draw(masks(queries, keys)),
    )
    q, k, v = inputs
    table, caps = random(BATCH, HEADS, queries, keys), fv.softcap(2.0)
    sinks = fv.sinks(random(HEADS)) if term in ("sinks", "together") else None

    def score(part, first):
        terms = [fv.bias(table[..., part])] if term in ("bias", "together") else []
        terms += [caps] if term in ("softcap", "together") else []
        terms += [sinks] if sinks and first else []
        return None if not terms else sum(terms[1:], terms[0])

    def over(part):
        return fv.attention_with_lse(
            q, k[:, :, part], v[:, :, part], mask[..., part], score=score(part, part.start == 0), backend=backend
        )

    cuts = sorted(data.draw(st.lists(st.integers(0, keys), min_size=2, max_size=3)))
    ends = [0, *(cut for cut in cuts), keys]
    parts = [slice(a, b) for a, b in pairwise(ends)]
    if sinks and parts[0].stop == 0:  # two parts start at 0: only one may have the sinks
        parts = [part for part in parts if part.stop > part.start]
    whole, merged = over(slice(0, keys)), fv.merge([over(part) for part in parts])
    for found, true in zip((*merged, *gradients(merged, inputs)), (*whole, *gradients(whole, inputs)), strict=True):
        near(found, true)


@MODEST
@given(seeds, st.permutations(range(4)))
def test_merge_is_associative_and_has_no_order(seed, order):
    parts = [
        (random(BATCH, HEADS, 5, VALUE_DIM, seed=seed + n), random(BATCH, HEADS, 5, seed=seed - n)) for n in range(4)
    ]
    parts[1][1][:, :, 2:] = -math.inf
    parts[2][1][:, :, 3:] = -math.inf
    parts[0][1][:, :, 4:] = -math.inf
    parts[3][1][:, :, 4:] = -math.inf
    whole = fv.merge(parts)
    for other in (
        fv.merge([parts[n] for n in order]),
        fv.merge([fv.merge(parts[:2]), fv.merge(parts[2:])]),
        fv.merge([parts[0], fv.merge(parts[1:])]),
    ):
        near(other[0], whole[0])
        near(other[1], whole[1])
    assert (whole[1][:, :, 4:] == -math.inf).all()
    assert (whole[0][:, :, 4:] == 0).all()


SHIFTS = {
    "causal": fv.causal,
    "window": fv.window(3),
    "rule": fv.rule(lambda batch, head, query, key: (query - key) % 3 < 2),
    "~": ~fv.causal | fv.window(2, step=2),
}
COUNTED = {
    "prefix": fv.prefix(6) | fv.causal,
    "chunks": fv.chunks(4),
    "every": fv.every(4),
    "documents": fv.documents(torch.tensor([0] * 6 + [1] * 7)),
    "global_tokens": fv.global_tokens([2]) | fv.causal,
    "streaming": fv.streaming(2, 3),
}


def in_parts(q, k, v, pattern, score, cut, backend):
    """What the tour tells people who hold the keys in two parts."""
    first = fv.attention_with_lse(q, k[:, :, :cut], v[:, :, :cut], pattern, score=score, query_start=0, backend=backend)
    second = fv.attention_with_lse(
        q, k[:, :, cut:], v[:, :, cut:], pattern, score=score, query_start=-cut, backend=backend
    )
    return fv.merge([first, second])[0]


@both
@pytest.mark.parametrize("cut", [1, 5, 12])
def test_parts_of_the_keys_hold_for_every_pattern_of_the_distance(cut, backend):
    q, k, v = tensors(13, 13, 0)
    scores = (None, fv.alibi(fv.alibi_slopes(HEADS)), fv.relative_bias(random(7, HEADS)))
    for pattern, score in product([None, *SHIFTS.values()], scores):
        whole = fv.attention(q, k, v, pattern, score=score, query_start=0, backend=backend)
        near(in_parts(q, k, v, pattern, score, cut, backend), whole)


@pytest.mark.parametrize("name", COUNTED)
def test_parts_of_the_keys_do_not_hold_for_patterns_that_count_from_the_first_key(name):
    """A part is a legal call, so nothing is refused; all keys with a pattern for each part are the way out."""
    (q, k, v), pattern, cut = tensors(13, 13, 0), COUNTED[name], 5
    whole = fv.attention(q, k, v, pattern)
    assert (in_parts(q, k, v, pattern, None, cut, "auto") - whole).abs().max() > 0.1
    parts = [fv.attention_with_lse(q, k, v, pattern & part) for part in (fv.prefix(cut), ~fv.prefix(cut))]
    near(fv.merge(parts)[0], whole)


def test_the_tour_names_the_patterns_for_which_parts_hold_and_those_for_which_they_do_not():
    tour = (Path(__file__).parent.parent / "docs" / "tour.md").read_text(encoding="utf-8")
    holds, _, others = tour.partition("**This holds for what depends on query − key alone**")[2].partition(
        "Every other"
    )
    for name in (*SHIFTS, "alibi", "relative_bias"):
        assert f"`{name}`" in holds, name
    for name in COUNTED:
        assert f"`{name}`" in others.partition("```")[0], name


def test_a_part_without_keys_has_no_say_whatever_it_holds():
    out, lse = random(BATCH, HEADS, 5, VALUE_DIM).requires_grad_(), random(BATCH, HEADS, 5).requires_grad_()
    nothing = torch.full_like(out, math.nan), torch.full_like(lse, -math.inf).requires_grad_()
    for parts in ([(out, lse), nothing], [nothing, (out, lse)], [(out, lse)]):
        merged = fv.merge(parts)
        assert torch.equal(merged[0], out)
        assert torch.equal(merged[1], lse)
        d_out, d_lse = torch.autograd.grad(merged[0].sum() + 2 * merged[1].sum(), (out, lse))
        near(d_out, torch.ones_like(out))
        near(d_lse, torch.full_like(lse, 2))


def test_two_parts_without_keys_merge_to_none():
    """vllm#39148: exp(−inf − −inf) is NaN."""
    parts = [
        (torch.zeros(BATCH, HEADS, 3, VALUE_DIM).requires_grad_(), torch.full((BATCH, HEADS, 3), -math.inf))
        for _ in range(2)
    ]
    for _, lse in parts:
        lse.requires_grad_()
    out, lse = fv.merge(parts)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    found = torch.autograd.grad(
        out.sum() + lse.masked_fill(lse == -math.inf, 0).sum(), [x for pair in parts for x in pair]
    )
    assert all((x == 0).all() for x in found)


def outs(count, *, gradient=False):
    return [random(BATCH, HEADS, 5, VALUE_DIM, seed=n).requires_grad_(gradient) for n in range(count)]


def test_gates_weigh_and_0_lets_nothing_through():
    parts, gates = outs(3, gradient=True), random(BATCH, HEADS, 5, 3, seed=9).sigmoid().requires_grad_()
    true = torch.einsum("cbhnd,bhnc->bhnd", torch.stack(parts), gates)
    found = fv.merge_by_gates(parts, gates)
    near(found, true)
    for mine, want in zip(gradients((found,), (*parts, gates)), gradients((true,), (*parts, gates)), strict=True):
        near(mine, want)
    closed = gates.detach().clone()
    closed[..., 1] = 0
    bad = [parts[0], torch.full_like(parts[1], math.nan).requires_grad_(), parts[2]]
    out = fv.merge_by_gates(bad, closed)
    near(out, fv.merge_by_gates([parts[0], parts[2]], closed[..., [0, 2]]))
    assert (torch.autograd.grad(out.sum(), bad[1])[0] == 0).all()
    one = fv.merge_by_gates(parts, gates[:, :1, :1])  # one gate for all heads and rows
    near(one, torch.einsum("cbhnd,bc->bhnd", torch.stack(parts), gates[:, 0, 0]))


def test_gates_of_shares_are_the_merge_by_log_sum_exp():
    parts = [(out, random(BATCH, HEADS, 5, seed=n)) for n, out in enumerate(outs(3))]
    shares = torch.stack([lse for _, lse in parts], -1).softmax(-1)
    near(fv.merge_by_gates([out for out, _ in parts], shares), fv.merge(parts)[0])


def test_rows_replace_and_minus_1_is_none():
    out, part = outs(2, gradient=True)
    part = part[:, :, :3]
    rows = torch.tensor([[4, 0, 2], [1, -1, -1]])
    found = fv.merge_by_rows(out, part, rows)
    true = out.detach().clone()
    for b, taken in enumerate(rows.tolist()):
        for i, row in enumerate(taken):
            if row >= 0:
                true[b, :, row] = part.detach()[b, :, i]
    near(found, true, 1)
    d_out, d_part = gradients((found,), (out, part))
    weights = random(*found.shape, seed=5)
    for b, taken in enumerate(rows.tolist()):
        for row in range(5):
            near(d_out[b, :, row], torch.zeros_like(d_out[b, :, row]) if row in taken else weights[b, :, row], 1)
        for i, row in enumerate(taken):
            near(d_part[b, :, i], weights[b, :, row] if row >= 0 else torch.zeros_like(d_part[b, :, i]), 1)
    near(fv.merge_by_rows(out, part, rows[:1]), fv.merge_by_rows(out, part, rows[0]), 1)
    near(fv.merge_by_rows(out[0], part[0], rows[0]), fv.merge_by_rows(out, part, rows)[0], 1)
    nothing = torch.zeros(0, dtype=torch.long)
    near(fv.merge_by_rows(out, part[:, :, :0], nothing), out, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fv.merge_by_gates([], random(1)), "merge_by_gates was given no outs"),
        (lambda: fv.merge_by_gates(outs(2), random(BATCH, HEADS, 5, 3)), "the gates are .* for 2 outs .*5, 2"),
        (lambda: fv.merge_by_gates(outs(2), random(2)), "the gates are <float64 2>"),
        (lambda: fv.merge_by_gates([outs(1)[0], outs(1)[0].float()], random(2)), "wanted one shape and dtype"),
        (lambda: fv.merge_by_rows(*outs(2), torch.tensor([0, 1, 2, 3, 5])), "the rows go from 0 to 5: wanted 0 to 4"),
        (lambda: merge._by_rows(*outs(2), torch.tensor([0, 1])), r"the rows are <int64 2> .*: wanted \[5\]"),
        (lambda: fv.merge_by_rows(outs(1)[0], outs(1)[0].float(), torch.arange(5)), "wanted the same, but for the num"),
    ],
)
def test_a_wrong_merge_gets_a_sentence(call, message):
    with pytest.raises(fv.InvalidInput, match=message):
        call()
