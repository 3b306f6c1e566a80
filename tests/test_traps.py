"""Bugs that other libraries had, with masks and numbers; each docstring names the thread.

pt = pytorch/pytorch, FA = Dao-AILab/flash-attention, ORT = microsoft/onnxruntime.
"""

import math

import pytest
import torch
from calls import BATCH, DIM, GROUP, HEADS, KEY_HEADS, attend, gradients, near, random, tensors

import foveate as fv
from foveate import Unsupported

EXACT = ("reference", "chunked")
ALL = ("reference", "chunked", "sdpa", "flex")  # on a CPU flex has no gradient: it says so, and is tested forward
exact, every = pytest.mark.parametrize("backend", EXACT), pytest.mark.parametrize("backend", ALL)
NAN, INF = math.nan, math.inf


def inputs(queries, keys, dtype=torch.float32, **options):
    """q, k, v that every implementation takes: sdpa wants v as wide as q."""
    q, k, v = tensors(queries, keys, dtype=dtype, **options)
    return q, k, v[..., :DIM].detach().contiguous().requires_grad_(v.requires_grad)


def close(found, true, dtype=torch.float32):
    """Two results of one dtype agree to a few roundings."""
    assert torch.equal(found.isnan(), true.isnan())
    assert (found - true).nan_to_num().abs().max() <= 16 * torch.finfo(dtype).eps * max(
        1, true.nan_to_num().abs().max()
    )


@every
@pytest.mark.parametrize("how", ["mask", "padding", "bias"])
def test_a_row_without_a_key_is_zero_and_so_are_its_gradients(backend, how):
    """pt#103963, pt#41508: softmax over nothing is 0/0."""
    q, k, v = leaves = inputs(3, 5, gradients=backend != "flex")
    mask = torch.ones(BATCH, 1, 3, 5, dtype=torch.bool)
    mask[0] = False
    pattern, score = {
        "mask": (mask, None),
        "padding": (fv.padding(torch.tensor([0, 5])), None),
        "bias": (None, torch.zeros(mask.shape).masked_fill(~mask, -INF)),
    }[how]
    out, lse = attend(backend, q, k, v, pattern, score=score, needs_lse=backend != "sdpa")
    assert (out[0] == 0).all()
    assert out[1].abs().sum() > 0
    assert lse is None or ((lse[0] == -INF).all() and lse[1].isfinite().all())
    for gradient in gradients((out,), leaves) if backend != "flex" else ():
        assert gradient.isfinite().all()
        assert (gradient[0] == 0).all()


@exact
def test_one_head_without_keys_leaves_the_others_alone(backend):
    """pt#160064: one fully masked head, with weights asked for."""
    q, k, v = tensors(3, 5)
    mask = torch.ones(1, HEADS, 1, 1, dtype=torch.bool)
    mask[:, 1] = False
    others = torch.arange(HEADS) != 1
    out, shares = fv.attention(q, k, v, mask, backend=backend), fv.weights(q, k, v, mask)
    assert (out[:, 1] == 0).all()
    assert (shares[:, 1] == 0).all()
    near(out[:, others], fv.attention(q, k, v, backend=backend)[:, others])
    near(shares[:, others], fv.weights(q, k, v)[:, others])


def test_a_band_and_padding_mean_the_same_on_every_path():
    """pt#190486: band mask plus padding differed between the fast and the slow path."""
    pattern = fv.window(3) & fv.padding(torch.tensor([4, 129]))
    arguments = *inputs(131, 137), pattern
    true, _ = attend("reference", *arguments)
    for backend in ("chunked", "flex"):
        close(attend(backend, *arguments)[0], true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "chunked", "sdpa", "auto"])
def test_a_row_of_the_lowest_number_is_not_a_hidden_row(backend, dtype):
    """pt#109517: finfo.min is a number, so a row of nothing else weighs all keys alike."""
    q, k, v = inputs(3, 5, dtype)
    bias = torch.zeros(3, 5)
    bias[1] = torch.finfo(torch.float32).min
    try:
        out = fv.attention(q, k, v, score=bias, backend=backend)
    except Unsupported:  # as good an answer, but not one of auto
        assert backend == "sdpa"
        return
    mean = v.float().mean(2).repeat_interleave(GROUP, 1)
    close(out[:, :, 1].float(), mean, dtype)
    assert out.isfinite().all()


@every
@pytest.mark.parametrize("poison", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("where", ["end", "left", "mask", "mask by head", "bias", "bias by head"])
def test_what_no_row_sees_never_matters(backend, poison, where):
    """pt#101967: 0 · NaN is NaN, so padding has to be left out and not weighted with 0."""
    keep = torch.tensor([[True] * 4 + [False] * 3, [True] * 6 + [False]])
    keep = keep.flip(1) if where == "left" else keep
    seen = keep[:, None].repeat(1, KEY_HEADS, 1)
    if "head" in where:  # a key that one key head shows and another does not
        seen[:, 1] = seen[:, 1].flip(1)
    mask = seen.repeat_interleave(GROUP, 1)[:, :, None] if "head" in where else keep[:, None, None]
    pattern, score = fv.padding(torch.tensor([4, 6])) if where == "end" else fv.padding(keep), None
    if "mask" in where:
        pattern = mask
    if "bias" in where:
        pattern, score = None, torch.zeros(mask.shape).masked_fill(~mask, -INF)
    q, k, v = inputs(3, 7)
    results = []
    for fill in (0, poison):
        leaves = q, *(x.masked_fill(~seen[..., None], fill) for x in (k, v))
        leaves = tuple(x.detach().requires_grad_(backend != "flex") for x in leaves)
        out, _ = attend(backend, *leaves, pattern, score=score)
        results.append((out, *(gradients((out,), leaves) if backend != "flex" else ())))
    for true, found in zip(*results, strict=True):
        assert found.isfinite().all()
        close(found, true)


def leaks(backend, poison, score=None):
    """Whether a poisoned key that some rows see reaches the rows that do not, in the output or in their gradient."""
    leaves = []
    for x in inputs(5, 5):
        x = x.clone()
        if len(leaves):
            x[:, :, 3] = poison
        leaves.append(x.requires_grad_(backend != "flex"))
    mask = fv.causal if backend != "sdpa" else torch.ones(5, 5, dtype=torch.bool).tril()
    out, _ = attend(backend, *leaves, mask, score=score)
    assert not out[:, :, 3:].isfinite().all()
    if backend == "flex":
        return not out[:, :, :3].isfinite().all()
    (found,) = torch.autograd.grad(out[:, :, :3].sum(), leaves[:1])
    return not (out[:, :, :3].isfinite().all() and found[:, :, :3].isfinite().all())


@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
@pytest.mark.parametrize("term", ["none", "softcap", "alibi", "relative_bias", "bias"])
@exact
def test_what_this_row_does_not_see_never_matters(backend, poison, term):
    """pt#101967, for a key that is hidden from one row and visible to another."""
    slopes, table = torch.rand(HEADS), torch.rand(3, HEADS)
    terms = {"softcap": fv.softcap(3.0), "alibi": fv.alibi(slopes), "relative_bias": fv.relative_bias(table)}
    assert not leaks(backend, poison, fv.bias(torch.rand(5, 5)) if term == "bias" else terms.get(term))


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_sdpa_and_flex_promise_less_and_say_so(backend):
    """The one documented difference; when torch mends it, the note in `explain` can go."""
    assert leaks(backend, NAN)
    q, k, v = inputs(5, 5)
    assert "NaN" not in str(fv.explain(q, k, v, fv.causal, backend="chunked"))
    assert "NaN or inf in a key that is hidden from one row" in str(fv.explain(q, k, v, fv.causal, backend=backend))


@every
def test_nan_in_a_query_stays_in_its_row_and_is_not_hidden(backend):
    """pt#141128: a NaN query gave zeros."""
    q, k, v = inputs(5, 7)
    q[1, 2, 3] = NAN
    out, _ = attend(backend, q, k, v, torch.ones(5, 7, dtype=torch.bool))
    where = torch.zeros(out.shape, dtype=torch.bool)
    where[1, 2, 3] = True
    assert torch.equal(out.isnan(), where)


@pytest.mark.parametrize("backend", ["chunked", "flex"])
def test_tiles_without_a_key(backend):
    """pt#127055: the first tile of a row has no key, so its running maximum is −inf."""
    mask = torch.zeros(300, 300, dtype=torch.bool)
    mask[200:, 290:] = True
    mask[7, 150] = True
    arguments = *inputs(300, 300), mask
    close(attend(backend, *arguments)[0], attend("reference", *arguments)[0])


@every
@pytest.mark.parametrize("far", [-6e4, -1e6, -1e30, 1e6])
def test_scores_that_are_all_far_away(backend, far):
    """flashinfer#4267: everything below a sentinel of −5e4 was taken for hidden."""
    q, k, v = inputs(3, 5)
    far_out, lse = attend(backend, q * 0, k, v, score=torch.full((3, 5), far), needs_lse=backend != "sdpa")
    close(far_out, v.mean(2, keepdim=True).repeat_interleave(GROUP, 1).expand_as(far_out))
    assert lse is None or torch.allclose(lse, torch.full_like(lse, far + math.log(5)))


@pytest.mark.parametrize("backend", ["reference", "chunked", "flex"])
def test_a_soft_cap_of_an_enormous_score_is_the_cap(backend):
    """vllm#56579: exp/exp in a hand-written tanh overflowed to NaN."""
    q, k, v = inputs(3, 5, gradients=backend != "flex")
    out, lse = attend(backend, q * 1e15, k * 1e15, v, score=fv.softcap(30.0), needs_lse=True)
    assert out.isfinite().all()
    assert (lse.abs() <= 30 + math.log(5) + 1e-5).all()
    if backend != "flex":
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("backend", ["reference", "chunked", "flex"])
def test_a_soft_cap_does_not_bring_hidden_keys_back(backend):
    """ORT#28379: the cap came after the bias, and cap · tanh(−inf) = −cap is visible again."""
    arguments, mask = inputs(3, 5), torch.rand(3, 5) < 0.6
    bias = fv.bias(torch.zeros(3, 5).masked_fill(~mask, -INF))
    for score in (bias + fv.softcap(2.0), fv.softcap(2.0) + bias):
        close(attend(backend, *arguments, score=score)[0], attend(backend, *arguments, mask, score=fv.softcap(2.0))[0])


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_scores_in_half_precision(backend, dtype):
    """pt#121558: a score of 133120 in bfloat16 gave NaN."""
    if backend == "flex" and dtype == torch.float16 and torch.__version__ < "2.13":
        pytest.skip("what is not compiled overflows there; what is compiled does not")
    q, k, v = (torch.full_like(x, 160.0) for x in inputs(3, 5, dtype))
    out, _ = attend(backend, q, k, v, score=torch.zeros(3, 5), scale=1.0)
    assert (out == 160).all()


@every
def test_true_means_may_attend(backend):
    """pt#170415: True = attend in SDPA and True = ignore in nn.MultiheadAttention."""
    q, k, v = inputs(3, 5)
    out, _ = attend(backend, q, k, v, torch.eye(3, 5, dtype=torch.bool))
    close(out, v[:, :, :3].repeat_interleave(GROUP, 1))


@exact
@pytest.mark.parametrize(
    "shape",
    [(), (11,), (7, 1), (7, 11), (HEADS, 1, 1), (1, HEADS, 1, 11), (BATCH, 1, 7, 1), (BATCH, HEADS, 7, 11)],
    ids=str,
)
def test_only_the_bias_needs_a_gradient_in_its_own_shape(backend, shape):
    """pt#188302: no gradient where q, k and v need none; and the sum over what was broadcast."""
    q, k, v = tensors(7, 11)
    if shape == (HEADS, 1, 1):
        q, k, v = q[:1], k[:1], v[:1]
    bias, whole = random(*shape).requires_grad_(), random(*shape).requires_grad_()
    out = fv.attention(q, k, v, fv.causal, score=bias, backend=backend)
    (found,) = gradients((out,), (bias,))
    # The same bias written out in full, on the definition.
    full = whole.expand(q.shape[0], HEADS, 7, 11)
    (true,) = gradients((fv.attention(q, k, v, fv.causal, score=full, backend="reference"),), (whole,))
    near(found, true)


def test_a_float32_bias_under_autocast_keeps_its_precision():
    """pt#99012: a float32 mask beside bfloat16 queries was refused; ours is added as it is."""
    q, k, v = inputs(7, 11)
    bias = 100 + torch.rand(7, 11, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        out = fv.attention(q, k, v, score=bias)
    rounded = [x.bfloat16().double() for x in (q, k, v)]
    true = fv.attention(*rounded, score=bias.double(), backend="reference")
    assert out.dtype == torch.bfloat16
    assert (out.double() - true).abs().max() <= 2 * 2.0**-8 * max(1, true.abs().max())
