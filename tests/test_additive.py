"""Additive and local attention against their papers' sums written as loops, in bounded memory."""

import math
import subprocess
import sys

import pytest
import torch
from calls import BATCH, DIM, GROUP, HEADS, VALUE_DIM, gradients, near, random, random_mask, scores, tensors
from torch import Tensor

import foveate as fv
from foveate import InvalidInput
from foveate.mechanisms import additive

QUERIES, KEYS = 11, 13
PATTERNS = {"all": None, "causal": fv.causal, "some rows see nothing": fv.from_mask(random_mask(QUERIES, KEYS, 0.1))}
patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def vectors(heads: bool) -> Tensor:
    return random(*((HEADS, DIM) if heads else (DIM,)), seed=4)


def looped(q, k, v, vector, pattern) -> tuple[Tensor, Tensor]:
    """(out, weights) as the paper writes it: one query, one key, one number at a time."""
    seen = torch.ones(BATCH, HEADS, QUERIES, KEYS).bool()
    if pattern is not None:
        seen = pattern.dense(QUERIES, KEYS, batch=BATCH, heads=HEADS).expand(BATCH, HEADS, -1, -1)
    weights, outs = [], []
    for b in range(BATCH):
        for h in range(HEADS):
            w = vector if vector.dim() == 1 else vector[h]
            for i in range(QUERIES):
                energy = {
                    j: sum(w[d] * torch.tanh(q[b, h, i, d] + k[b, h // GROUP, j, d]) for d in range(DIM)).exp()
                    for j in range(KEYS)
                    if seen[b, h, i, j]
                }
                total = sum(energy.values())
                row = [energy[j] / total if j in energy else q.new_zeros(()) for j in range(KEYS)]
                weights.append(torch.stack(row))
                outs.append(sum(row[j] * v[b, h // GROUP, j] for j in range(KEYS)))
    return (
        torch.stack(outs).view(BATCH, HEADS, QUERIES, VALUE_DIM),
        torch.stack(weights).view(BATCH, HEADS, QUERIES, KEYS),
    )


@patterns
@pytest.mark.parametrize("heads", [False, True])
def test_additive_attention_is_the_paper_s_sum(pattern, heads):
    q, k, v = tensors(QUERIES, KEYS)
    out, weights = looped(q, k, v, vectors(heads), pattern)
    near(fv.additive_attention(q, k, v, vectors(heads), pattern), out)
    near(fv.additive_weights(q, k, vectors(heads), pattern), weights)


def test_its_gradients_are_those_of_the_sum():
    leaves = (*tensors(QUERIES, KEYS, gradients=True), vectors(True).requires_grad_())
    out = fv.additive_attention(*leaves, fv.causal)
    true, _ = looped(*leaves, fv.causal)
    for mine, want in zip(gradients((out,), leaves), gradients((true,), leaves), strict=True):
        near(mine, want)


@pytest.mark.parametrize("normalizer", [None, fv.sparsemax], ids=str)
def test_gradcheck_twice(normalizer):
    q, k, v = tensors(3, 5, gradients=True)
    vector, mask = vectors(False).requires_grad_(), random_mask(3, 5, 0.6)

    def call(q, k, v, vector):
        return fv.additive_attention(q, k, v, vector, mask, normalizer=normalizer)

    assert torch.autograd.gradcheck(call, (q, k, v, vector))
    if normalizer is None:
        assert torch.autograd.gradgradcheck(call, (q, k, v, vector))


@pytest.mark.parametrize("limit", [1, HEADS * KEYS * DIM, HEADS * KEYS * DIM * 4, HEADS * KEYS * DIM * QUERIES])
@pytest.mark.parametrize("term", ["none", "together"])
def test_the_size_of_a_block_is_no_part_of_the_meaning(monkeypatch, limit, term):
    score = scores(QUERIES, KEYS)[term]
    leaves = (*tensors(QUERIES, KEYS, gradients=True), vectors(False).requires_grad_())
    held = tuple(x.requires_grad_() for x in score.tensors()) if score else ()

    def both():
        center = (leaves[0].sum(-1) + 5).clamp(-2, 14)
        return (
            fv.additive_attention(*leaves, fv.causal, score=score),
            fv.local_attention(*leaves[:3], center, width=2, score=score),
        )

    whole = both()
    true = gradients(whole, (*leaves, *held))
    monkeypatch.setattr(additive, "_CPU", limit)
    monkeypatch.setattr(additive, "_MOST", limit)
    parts = both()
    for mine, want in zip((*parts, *gradients(parts, (*leaves, *held))), (*whole, *true), strict=True):
        near(mine, want)


def local_loop(q, k, v, center, width, sigma, vector=None, pattern=None, scale=None) -> Tensor:
    scale = DIM**-0.5 if scale is None else scale
    seen = torch.ones(BATCH, HEADS, QUERIES, KEYS).bool()
    if pattern is not None:
        seen = pattern.dense(QUERIES, KEYS, batch=BATCH, heads=HEADS).expand(BATCH, HEADS, -1, -1)
    outs = []
    for b in range(BATCH):
        for h in range(HEADS):
            for i in range(QUERIES):
                p, key, value = center[b, h % center.shape[1], i], k[b, h // GROUP], v[b, h // GROUP]
                window = [j for j in range(KEYS) if abs(j - p.item()) <= width and seen[b, h, i, j]]
                if vector is None:
                    energy = {j: (scale * q[b, h, i] @ key[j]).exp() for j in window}
                else:
                    energy = {j: (vector @ (q[b, h, i] + key[j]).tanh()).exp() for j in window}
                total = sum(energy.values())
                parts = [energy[j] / total * torch.exp(-((j - p) ** 2) / (2 * sigma**2)) * value[j] for j in window]
                outs.append(sum(parts) if parts else 0 * value.sum(0))
    return torch.stack(outs).view(BATCH, HEADS, QUERIES, VALUE_DIM)


def centers(heads: int) -> Tensor:
    """Positions between keys, on keys, before the first and behind the last."""
    found = random(BATCH, heads, QUERIES, seed=6) * 5 + KEYS / 2
    found[:, 0, :4] = torch.tensor([4.0, -1.5, KEYS + 0.5, -40.0])
    found[:, 0, -1] = 6.0  # a row that sees both ends of its window
    return found


@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize(("width", "sigma"), [(2, None), (3, 0.7), (1, math.inf)])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_local_attention_is_the_paper_s_sum_with_a_gradient_to_the_center(score, width, sigma, heads):
    leaves = (*tensors(QUERIES, KEYS, gradients=True), centers(heads).requires_grad_(), vectors(False).requires_grad_())
    q, k, v, center, vector = leaves
    vector = vector if score == "additive" else None
    out = fv.local_attention(q, k, v, center, fv.causal, width=width, sigma=sigma, vector=vector)
    true = local_loop(q, k, v, center, width, width / 2 if sigma is None else sigma, vector, fv.causal)
    near(out, true)
    for name, mine, want in zip("qkvcw", gradients((out,), leaves), gradients((true,), leaves), strict=True):
        if mine is None or want is None:
            assert (want is None or not want.any()) and (mine is None or not mine.any()), name  # noqa: PT018
        else:
            near(mine, want)
    if sigma != math.inf:
        assert gradients((fv.local_attention(q, k, v, center, width=width),), (center,))[0].any()


def test_a_window_around_the_own_position_without_a_gaussian_is_a_pattern():
    q, k, v = tensors(QUERIES, KEYS)
    center = (torch.arange(QUERIES).double() + 2).expand(BATCH, 1, QUERIES)
    near(fv.local_attention(q, k, v, center, width=2, sigma=math.inf), fv.attention(q, k, v, fv.window(3)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_hidden_keys_never_matter_and_a_nan_in_a_query_reaches_its_row(bad):
    q, k, v = tensors(QUERIES, KEYS)
    center = torch.full((BATCH, 1, QUERIES), 6.0).double()
    vector = vectors(False)

    def both(q, k, v):
        return (
            fv.additive_attention(q, k, v, vector, fv.prefix(7)),
            fv.local_attention(q, k, v, center, fv.prefix(7), width=3),
        )

    clean = both(q, k, v)
    k[:, :, 7:], v[:, :, 7:] = bad, bad
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    found = both(*leaves)
    for mine, true in zip(found, clean, strict=True):
        near(mine.detach(), true, 8)
    assert all(x.isfinite().all() for x in gradients(found, leaves))
    broken = q.detach().clone()
    broken[:, 1, 3] = math.nan
    for out in both(broken, k.detach(), v.detach()):
        assert out[:, 1, 3].isnan().all()
        assert out.isnan().sum() == BATCH * VALUE_DIM


def test_without_a_batch_and_without_keys():
    q, k, v = tensors(QUERIES, KEYS)
    center = centers(1)
    near(fv.additive_attention(q[1], k[1], v[1], vectors(False)), fv.additive_attention(q, k, v, vectors(False))[1])
    near(fv.additive_weights(q[1], k[1], vectors(False)), fv.additive_weights(q, k, vectors(False))[1])
    near(fv.local_attention(q[1], k[1], v[1], center[1], width=2), fv.local_attention(q, k, v, center, width=2)[1])
    none = k[:, :, :0], v[:, :, :0]
    for out in (fv.additive_attention(q, *none, vectors(False)), fv.local_attention(q, *none, center, width=2)):
        assert out.shape == (BATCH, HEADS, QUERIES, VALUE_DIM)
        assert (out == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_keeps_its_budget(dtype):
    q, k, v = (x.to(dtype) for x in tensors(QUERIES, KEYS))
    vector = vectors(False).to(dtype)
    wide = [x.double() for x in (q, k, v, vector)]
    true = fv.additive_attention(*wide)
    mine = fv.additive_attention(q, k, v, vector)
    keys, values = (x.repeat_interleave(GROUP, 1) for x in (k, v))
    plain = ((q[:, :, :, None] + keys[:, :, None]).tanh() @ vector).softmax(-1) @ values
    assert mine.dtype == dtype
    allowed = 2 * (plain.double() - true).abs().max() + 2 * torch.finfo(dtype).eps * max(1, true.abs().max())
    assert (mine.double() - true).abs().max() <= allowed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": -1}, "the width is -1: wanted a whole number of at least 0"),
        ({"width": 2, "sigma": 0.0}, "sigma is 0.0: wanted a positive number"),
        ({"width": 0}, "sigma is 0.0: wanted a positive number"),
        (
            {"width": 2, "center": torch.zeros(3)},
            "the center is <float32 3>: wanted floats .batch, heads or 1, queries.",
        ),
        (
            {"width": 2, "vector": torch.zeros(DIM + 1)},
            "the vector is <float32 6> beside q .*: wanted floats .dim. = .5.",
        ),
    ],
)
def test_bad_input_gets_a_sentence(options, message):
    options = {"center": centers(1), **options}
    with pytest.raises(InvalidInput, match=message):
        fv.local_attention(*tensors(QUERIES, KEYS), **options)


def test_a_vector_of_another_size():
    with pytest.raises(InvalidInput, match="the vector is <float64 7>"):
        fv.additive_attention(*tensors(QUERIES, KEYS), random(7))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is there alone")
@pytest.mark.parametrize("length", [1024, pytest.param(4096, marks=pytest.mark.slow)])
def test_4096_by_4096_with_256_numbers_each_stays_under_a_gibibyte(length):
    code = f"""
import torch, foveate as fv
torch.set_num_threads(1)
q, k, v = (torch.randn(1, 1, {length}, 256).requires_grad_() for _ in range(3))
fv.additive_attention(q, k, v, torch.randn(256).requires_grad_()).sum().backward()
# Not ru_maxrss: that of the parent survives exec.
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, timeout=900)
    # The smaller one alone would hold 1 GiB of sums and 1 GiB of their gradient.
    assert float(done.stdout) < (1 if length == 4096 else 0.5)
