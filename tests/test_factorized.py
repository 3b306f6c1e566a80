"""Dilated, strided and fixed attention equal attention with their patterns, and cost what they promise."""

import pytest
import torch
from calls import gradients, near, random_mask, tensors

import foveate as fv
from foveate import InvalidInput
from foveate.mechanisms import strided
from foveate.problem import problem

lengths = pytest.mark.parametrize("length", [1, 4, 5, 23])
strides = pytest.mark.parametrize("stride", [1, 3, 5, 29])


def same(found, true, leaves):
    near(found, true)
    for mine, want in zip(gradients((found,), leaves), gradients((true,), leaves), strict=True):
        near(mine, want)


@lengths
@strides
def test_strided_is_attention_with_the_pattern(length, stride):
    leaves = tensors(length, length, gradients=True)
    same(fv.strided_attention(*leaves, stride), fv.attention(*leaves, fv.strided(stride), backend="reference"), leaves)


@lengths
@pytest.mark.parametrize(("stride", "last"), [(1, 1), (3, 1), (5, 3), (4, 4), (29, 2)])
def test_fixed_is_attention_with_the_pattern(length, stride, last):
    leaves = tensors(length, length, gradients=True)
    true = fv.attention(*leaves, fv.fixed(stride, last), backend="reference")
    same(fv.fixed_attention(*leaves, stride, last), true, leaves)
    far = fv.attention(*leaves, fv.causal & fv.every(stride, last), backend="reference")
    same(strided.run_fixed(problem(*leaves), stride, last, own=False), far, leaves)


@lengths
@strides
@pytest.mark.parametrize("causal", [False, True])
def test_dilated_is_attention_with_a_step(length, stride, causal):
    leaves = tensors(length, length, gradients=True)
    near_by = fv.causal & fv.window(2) if causal else fv.window(2)
    apart = fv.causal & fv.window(2, step=stride) if causal else fv.window(2, step=stride)
    true = fv.attention(*leaves, apart, backend="reference")
    same(fv.dilated_attention(*leaves, stride, near_by), true, leaves)
    everyone = fv.attention(*leaves, fv.window(length, step=stride), backend="reference")
    near(fv.dilated_attention(*leaves, stride), everyone)


def test_the_scale_and_no_batch():
    q, k, v = (x[0] for x in tensors(23, 23))
    near(fv.strided_attention(q, k, v, 5, scale=0.3), fv.attention(q, k, v, fv.strided(5), scale=0.3))
    near(fv.fixed_attention(q, k, v, 5, scale=0.3), fv.attention(q, k, v, fv.fixed(5), scale=0.3))
    near(fv.dilated_attention(q, k, v, 5, scale=0.3), fv.attention(q, k, v, fv.window(23, step=5), scale=0.3))


def test_few_pairs_are_asked_for(monkeypatch):
    """Over all calls: at most length · (stride + length / stride) pairs and no more than their tiles."""
    pairs = []
    true = strided.dispatch
    monkeypatch.setattr(
        strided, "dispatch", lambda call: pairs.append(call.q[..., 0].numel() * call.k.shape[2]) or true(call)
    )
    length, stride = 1024, 32
    q = torch.randn(1, 1, length, 4)
    strided.run_strided(problem(q, q, q), stride)
    near_by, far = pairs
    assert near_by == length**2  # by its tiles, of which the pattern leaves nearly all out
    assert far == length**2 // stride


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("strided", (0,), "strided's stride is 0: wanted a whole number of at least 1"),
        ("fixed", (4, 5), "fixed was given stride 4 and last 5: wanted at most"),
        ("fixed", (4, 0), "fixed's last is 0"),
        ("dilated", (0,), "the step of dilated_attention is 0"),
        ("dilated", (2, random_mask(23, 23)), "the pattern is <bool 2×6×23×23>: wanted one of positions"),
    ],
)
def test_bad_input_gets_a_sentence(name, arguments, message):
    with pytest.raises(InvalidInput, match=message):
        getattr(fv, f"{name}_attention")(*tensors(23, 23), *arguments)


def test_queries_and_keys_are_one_text():
    for run in (strided.run_strided, strided._dilated, strided.run_fixed):
        with pytest.raises(InvalidInput, match="there are 11 queries and 13 keys: wanted self-attention"):
            run(
                problem(*tensors(11, 13)),
                3,
                *([None] if run is strided._dilated else [1] * (run is strided.run_fixed)),
            )
