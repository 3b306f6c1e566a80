"""Bugs that other libraries had, with sizes, strides, derivatives and processes; each docstring names the thread.

pt = pytorch/pytorch, FA = Dao-AILab/flash-attention.
"""

import math
import subprocess
import sys
import threading

import pytest
import torch
from calls import BATCH, DIM, HEADS, KEY_HEADS, gradients, near, random, random_mask, scores, tensors
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import foveate as fv
from foveate import Unsupported

EXACT = ("reference", "chunked")
exact = pytest.mark.parametrize("backend", EXACT)
TERMS = scores(3, 5)


def same_as_the_definition(backend, leaves, pattern=None, score=None):
    """Out, log-sum-exp and gradients of a call are those of the reference."""
    found, true = (
        fv.attention_with_lse(*leaves, pattern, score=score, backend=name) for name in (backend, "reference")
    )
    for one, other in zip((*found, *gradients(found, leaves)), (*true, *gradients(true, leaves)), strict=True):
        near(one, other)


@pytest.mark.parametrize("backend", [*EXACT, "auto"])
@pytest.mark.parametrize("axis", ["batch", "heads", "queries", "keys", "dim", "value dim"])
@pytest.mark.parametrize("pattern", [None, fv.causal, fv.window(2)], ids=repr)
def test_a_dimension_of_size_zero(backend, axis, pattern):
    """pt#141218; FA#2470: no keys at all is zeros and zero gradients."""
    b, h, n, m, d, e = (0 if axis == name else size for name, size in zip(
        ("batch", "heads", "queries", "keys", "dim", "value dim"), (2, 3, 5, 7, 11, 13), strict=True
    ))  # fmt: skip
    q, k, v = leaves = [torch.ones(s, requires_grad=True) for s in ((b, h, n, d), (b, h, m, d), (b, h, m, e))]
    out, lse = fv.attention_with_lse(q, k, v, pattern, backend=backend)
    assert out.shape == (b, h, n, e)
    assert lse.shape == (b, h, n)
    assert fv.attention(q, k, v, pattern, backend=backend).shape == out.shape
    assert fv.weights(q, k, v, pattern).shape == (b, h, n, m)
    (out.sum() + lse.masked_fill(lse == -math.inf, 0).sum()).backward()
    for x in leaves:
        assert x.grad.shape == x.shape
        assert x.grad.isfinite().all()
    if axis == "keys":
        assert (out == 0).all()
        assert (lse == -math.inf).all()
        assert (q.grad == 0).all()


@exact
def test_tokens_past_the_last_document_are_zero(backend):
    """FA#1228: rows past the last of cu_seqlens held what was in memory before."""
    q, k, v = tensors(11, 11)
    out = fv.attention(q, k, v, fv.documents(cu_seqlens=torch.tensor([0, 3, 7])), backend=backend)
    assert (out[:, :, 7:] == 0).all()
    near(out[:, :, 3:7], fv.attention(q[:, :, 3:7], k[:, :, 3:7], v[:, :, 3:7], backend=backend))


@pytest.mark.parametrize("backend", [*EXACT, "sdpa"])
@pytest.mark.parametrize("dim", [1, 5, 6, 59, 111])
def test_any_head_size_with_the_scale_of_that_size(backend, dim):
    """Odd head sizes; ipex-llm#12619: the scale was that of the padded size."""
    q, k, v = (random(2, 3, n, dim, seed=n) for n in (5, 7, 7))
    out = fv.attention(q, k, v, backend=backend)
    near(out, torch.softmax(q @ k.mT / math.sqrt(dim), -1) @ v)


@pytest.mark.parametrize("length", [127, 128, 129, 255, 256, 257])
def test_lengths_at_the_edges_of_tiles(length):
    """pt#153799: lengths that are no multiple of the tile."""
    q, k, v = (random(1, h, n, 3, seed=h * n).requires_grad_() for h, n in ((2, length), (1, 257), (1, 257)))
    for pattern in (None, fv.causal & fv.window(130), fv.from_mask(torch.rand(length, 257) < 0.3)):
        same_as_the_definition("chunked", (q, k, v), pattern)


def test_a_length_past_two_to_the_sixteenth():
    """Lengths at 2^16 + 1: the last rows are those of a short call."""
    length, width = 2**16 + 1, 3
    q = random(1, 1, length, 2)
    out = fv.attention(q, q, q, fv.causal & fv.window(width), backend="chunked")
    last = q[:, :, -67:]
    near(out[:, :, -61:], fv.attention(last, last, last, fv.causal & fv.window(width))[:, :, -61:])


def test_more_pairs_than_an_int32_counts():
    """pt#187227: 46400² > 2³¹ − 1."""
    length = 46_400
    assert fv.causal.density(length, length) == (length + 1) / (2 * length)
    assert fv.causal.summary(length, length).visible_pairs() == length * (length + 1) // 2


@pytest.mark.parametrize("backend", [*EXACT, "sdpa", "auto"])
def test_a_gradient_without_strides(backend):
    """FA#355: `.sum().backward()` hands over one number with strides 0."""
    results = []
    for total in (lambda out: out.sum(), lambda out: (out * torch.ones_like(out)).sum()):
        leaves = [x.detach().requires_grad_() for x in (*tensors(5, 7)[:2], random(BATCH, KEY_HEADS, 7, DIM))]
        total(fv.attention(*leaves, backend=backend)).backward()
        results.append([x.grad for x in leaves])
    for one, other in zip(*results, strict=True):
        near(one, other)


@pytest.mark.parametrize("backend", [*EXACT, "auto"])
def test_last_stride_not_one_and_expanded_keys(backend):
    """pt#112577: a fused kernel read past v when its last stride was not 1."""
    q, k, v = random(2, 3, 5, 7), random(2, 3, 7, 11).mT, random(1, 1, 1, 7).expand(2, 3, 11, 7)
    strided = fv.attention(q, k, v, backend=backend)
    near(strided, fv.attention(q, k.contiguous(), v.contiguous(), backend="reference"))


@exact
@pytest.mark.parametrize("term", TERMS)
def test_gradients_are_those_of_finite_differences(backend, term):
    """FA#2402 (soft-cap gradient) and every other term: q, k, v, the log-sum-exp and the score's own tensors."""
    words, held = TERMS[term].spec() if TERMS[term] is not None else ("", [])
    leaves = tuple(x.detach()[:1].requires_grad_() if n < 3 else x.detach().clone().requires_grad_()
                   for n, x in enumerate((*tensors(3, 5), *held)))  # fmt: skip
    if term in ("alibi by batch",):
        leaves = *leaves[:3], leaves[3][:1].detach().requires_grad_()

    def attend(q, k, v, *more):
        from foveate.score import parse

        score = parse(words, list(more)) if words else None
        mask = random_mask(3, 5, 0.7)[:1]
        return fv.attention_with_lse(q, k, v, mask, score=score, backend=backend)[0], fv.attention_with_lse(
            q, k, v, fv.causal, score=score, backend=backend
        )[1]

    assert gradcheck(attend, leaves, fast_mode=True)


def test_the_definition_differentiates_twice():
    """pt#116350: a second derivative is right or a clear error, never silently wrong."""
    leaves = tuple(x.detach()[:1, :2] for x in tensors(3, 5))
    leaves = tuple(x[:, :1].requires_grad_() if n else x.requires_grad_() for n, x in enumerate(leaves))
    bias = random(2, 3, 5).requires_grad_()

    def attend(q, k, v, bias):
        score = fv.softcap(2.0) + fv.bias(bias[None])
        return fv.attention_with_lse(q, k, v, fv.causal, score=score, backend="reference")

    assert gradgradcheck(attend, (*leaves, bias), fast_mode=True)


def test_chunked_says_that_it_does_not():
    """pt#116350, the other half."""
    leaves = tensors(3, 5, gradients=True)
    out = fv.attention(*leaves, backend="chunked")
    (first,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(Unsupported, match=r'chunked: has no second derivative.*backend="reference"'):
        first.sum().backward()


def test_vmap_is_right_or_a_clear_error():
    """The definition maps; the operator of chunked says that it has no batching rule."""
    q, k, v = (torch.stack([x, x.flip(0), 2 * x]) for x in tensors(3, 5))

    def attend(q, k, v, backend):
        return fv.attention(q, k, v, fv.causal, score=TERMS["together"], backend=backend)

    mapped = torch.vmap(lambda *x: attend(*x, "reference"))(q, k, v)
    near(mapped, torch.stack([attend(*x, "reference") for x in zip(q, k, v, strict=True)]))
    with pytest.raises(RuntimeError, match="it has no vmap and no forward derivative"):
        torch.vmap(lambda *x: attend(*x, "chunked"))(q, k, v)


@exact
def test_the_logarithm_is_natural(backend):
    """Kernels work in powers of 2; what they return is ln Σ exp."""
    q, k, v = tensors(3, 5)
    _, lse = fv.attention_with_lse(q * 0, k, v, backend=backend)
    near(lse, torch.full_like(lse, math.log(5)))
    _, lse = fv.attention_with_lse(q, k, v, scale=0.3, backend=backend)
    near(lse, torch.logsumexp(0.3 * (q.unflatten(1, (KEY_HEADS, -1)) @ k[:, :, None].mT).flatten(1, 2), -1))


@exact
def test_a_rerun_is_bit_equal(backend):
    """Deterministic means the same bits, gradients included."""
    leaves = tensors(131, 137, gradients=True)
    runs = []
    for _ in range(2):
        out = fv.attention_with_lse(*leaves, fv.causal | fv.chunks(5), score=fv.sinks(random(HEADS)), backend=backend)
        runs.append((*out, *gradients(out, leaves)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_fake_and_real_results_have_the_same_strides():
    """pt#146848: a compiled graph trusts the strides of the fake run."""

    def heads_last(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    real = fv.attention_with_lse(*map(heads_last, tensors(5, 7)), fv.causal, backend="chunked")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        leaves = [mode.from_tensor(heads_last(x)) for x in tensors(5, 7)]
        fake = fv.attention_with_lse(*leaves, fv.causal, backend="chunked")
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@exact
def test_several_threads_at_once(backend):
    """Observers, summaries that are remembered, and the order of keys in them are shared by all threads."""
    calls = [(tensors(131, 61 + n, seed=n), fv.causal & fv.window(3 + n % 3)) for n in range(6)]
    want = [fv.attention(*x, pattern, backend="reference") for x, pattern in calls]
    found = [[] for _ in calls]

    def work(n):
        for _ in range(5):
            found[n].append(fv.attention(*calls[n][0], calls[n][1], backend=backend))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for true, results in zip(want, found, strict=True):
        assert len(results) == 5
        for result in results:
            near(result, true)


def test_a_fork_after_use():
    """pt#41197: a child that is forked after its parent computed hangs in the parent's thread pool."""
    program = """if True:
        import os, torch, foveate as fv
        torch.set_num_threads(1)
        q = torch.randn(1, 2, 300, 8, requires_grad=True)
        def attend():
            return fv.attention(q, q, q, fv.causal & fv.window(5), backend="chunked")
        true = attend()
        true.sum().backward()
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(attend(), true) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)
