"""Bugs that other libraries had, with causal alignment and windows; each docstring names the thread.

pt = pytorch/pytorch, FA = Dao-AILab/flash-attention, HF = huggingface/transformers.
"""

import math

import pytest
import torch
from calls import DIM, GROUP, attend, near, tensors

import foveate as fv

exact = pytest.mark.parametrize("backend", ["reference", "chunked"])
every = pytest.mark.parametrize("backend", ["reference", "chunked", "sdpa", "flex"])


def inputs(queries, keys):
    """q, k, v in float32 that every implementation takes: sdpa wants v as wide as q."""
    q, k, v = tensors(queries, keys, dtype=torch.float32)
    return q, k, v[..., :DIM].contiguous()


def close(found, true):
    """Two float32 results agree to a few roundings."""
    assert (found - true).abs().max() <= 16 * 2.0**-23 * max(1, true.abs().max())


@exact
def test_left_padding_is_the_call_without_it(backend):
    """HF#47678: left padding shifted the causal mask."""
    q, k, v = tensors(7, 7)
    real = [7, 4]
    keep = torch.arange(7) >= 7 - torch.tensor(real)[:, None]
    out = fv.attention(q, k, v, fv.causal & fv.padding(keep), backend=backend)
    for b, n in enumerate(real):
        near(out[b, :, 7 - n :], fv.attention(q[b, :, -n:], k[b, :, -n:], v[b, :, -n:], fv.causal, backend=backend))
        assert (out[b, :, : 7 - n] == 0).all()


@every
def test_one_query_after_sixteen_keys_sees_them_all(backend):
    """pt#103082: a top-left causal mask let the one query see the first key only."""
    arguments = inputs(1, 16)
    close(attend(backend, *arguments, fv.causal)[0], attend("reference", *arguments)[0])


@pytest.mark.parametrize("backend", ["reference", "chunked", "flex"])
def test_more_queries_than_keys_leave_the_top_rows_empty(backend):
    """FA#1778: with the last query at the last key, the first rows stand before every key."""
    q, k, v = inputs(11, 5)
    out, lse = attend(backend, q, k, v, fv.causal, needs_lse=True)
    assert (out[:, :, :6] == 0).all()
    assert (lse[:, :, :6] == -math.inf).all()
    close(out[:, :, 6], v[:, :, 0].repeat_interleave(GROUP, 1))


@exact
@pytest.mark.parametrize("size", [1, 2, 5, 128, 129])
def test_a_window_shows_as_many_keys_as_it_says(backend, size):
    """HF#39408, HF#29623: off by one at the edge of a window."""
    v = torch.eye(131, dtype=torch.float64).expand(1, 1, 131, 131)
    seen = fv.attention(v, v, v, fv.causal & fv.window(size), backend=backend) != 0
    assert torch.equal(seen.sum(-1)[0, 0], torch.arange(1, 132).clamp(max=size))
    assert seen.diagonal(dim1=2, dim2=3).all()


@exact
def test_several_new_tokens_in_a_window(backend):
    """HF#37574, HF#45940: a sliding cache with several new tokens, at warm-up and after it has rolled over."""
    (q, k, v), pattern = tensors(23, 23), fv.causal & fv.window(5)
    whole = fv.attention(q, k, v, pattern, backend=backend)
    for end, new in ((3, 2), (5, 5), (11, 3), (23, 7)):
        first = max(0, end - new - 4)  # all that the first new token may still see
        part = fv.attention(q[:, :, end - new : end], k[:, :, first:end], v[:, :, first:end], pattern, backend=backend)
        near(part, whole[:, :, end - new : end])
