"""Other normalizers than softmax: what they are, that chunked computes what the definition says, what is refused."""

import math
import sys

import entmax
import pytest
import torch
from budget import assert_within_budget, by_sorting
from calls import BATCH, DIM, HEADS, KEY_HEADS, VALUE_DIM, gradients, near, random, random_mask, scores, tensors
from test_laws import SCORES, make_problem
from torch import Tensor

import foveate as fv
from foveate import InvalidInput, Unsupported, inspection
from foveate.normalizers import Normalizer, parse
from foveate.problem import problem
from foveate.softmax import chunked, reference

QUERIES, KEYS = 11, 13
SMOOTH = {"sigmoid": fv.sigmoid, "sparsemax": fv.sparsemax, "entmax(1.5)": fv.entmax(1.5)}
EVERY = SMOOTH | {"entmax(1.25)": fv.entmax(1.25), "hardmax": fv.hardmax}
SIMPLEX = {name: normalizer for name, normalizer in EVERY.items() if name != "sigmoid"}
PATTERNS = {"all": None, "causal": fv.causal, "some rows see nothing": fv.from_mask(random_mask(QUERIES, KEYS, 0.1))}
every = pytest.mark.parametrize("normalizer", EVERY.values(), ids=str)
patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def rows(size: float = 1) -> Tensor:
    return random(17, 5, 23) * size


@pytest.mark.parametrize("size", [0.01, 1, 30])
@pytest.mark.parametrize(
    ("normalizer", "oracle"),
    [(fv.sparsemax, entmax.sparsemax), (fv.entmax(1.5), entmax.entmax15),
     (fv.entmax(1.25), lambda x, dim: entmax.entmax_bisect(x, 1.25, dim, n_iter=100))],
    ids=["sparsemax", "entmax-1.5", "entmax-1.25"],
)  # fmt: skip
def test_rows_equal_the_entmax_package(normalizer, oracle, size):
    mine, theirs = rows(size).requires_grad_(), rows(size).requires_grad_()
    found, true = normalizer.weights(mine), oracle(theirs, dim=-1)
    near(found, true)
    near(*(torch.autograd.grad((p * random(23, seed=3)).sum(), x)[0] for p, x in ((found, mine), (true, theirs))))


@every
@patterns
def test_attention_is_the_scores_through_the_paper_s_formula_times_values(normalizer, pattern):
    q, k, v = tensors(QUERIES, KEYS)
    wide = q @ k.repeat_interleave(HEADS // KEY_HEADS, 1).mT / math.sqrt(DIM)
    if pattern is not None:
        wide = wide.masked_fill(~pattern.dense(QUERIES, KEYS, batch=BATCH, heads=HEADS), -math.inf)
    if repr(normalizer) in SMOOTH:
        weights = by_sorting(normalizer, wide)
    elif normalizer is fv.hardmax:
        weights = torch.nn.functional.one_hot(wide.argmax(-1), KEYS).double().masked_fill(wide == -math.inf, 0)
    else:
        weights = entmax.entmax_bisect(wide.clamp(min=-1e9), 1.25, -1, 100).masked_fill(wide == -math.inf, 0)
    out = fv.attention(q, k, v, pattern, normalizer=normalizer, backend="reference")
    near(fv.weights(q, k, v, pattern, normalizer=normalizer), weights)
    near(out, weights @ v.repeat_interleave(HEADS // KEY_HEADS, 1))


@every
@patterns
@pytest.mark.parametrize("term", ["none", "alibi by batch", "t5", "bias", "softcap"])
def test_chunked_is_the_definition_with_gradients(normalizer, pattern, term):
    score = scores(QUERIES, KEYS)[term]
    for dropout in (0.0, 0.3):
        found = []
        for backend in ("reference", "chunked"):
            leaves = tensors(QUERIES, KEYS, gradients=True)
            held = [x.requires_grad_() for x in score.tensors()] if score else []
            options = {"score": score, "normalizer": normalizer, "dropout": dropout, "seed": 5, "backend": backend}
            out = fv.attention(*leaves, pattern, **options)
            given = torch.autograd.grad((out * random(*out.shape)).sum(), [*leaves, *held], allow_unused=True)
            found.append((out, *(torch.zeros(()) if x is None else x for x in given)))
        for true, mine in zip(*found, strict=True):
            near(mine, true if true.shape == mine.shape else torch.zeros_like(mine))


@pytest.mark.parametrize("pattern", ["everything", "causal window", "documents", "bigbird", "mask", "rule", "nothing"])
@pytest.mark.parametrize("normalizer", SMOOTH.values(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunked_keeps_the_budget(pattern, normalizer, dtype):
    call = make_problem(pattern, "none", normalizer=normalizer, needs_lse=False)
    assert_within_budget(chunked.run, call, dtype)


@pytest.mark.parametrize("normalizer", SMOOTH.values(), ids=str)
@pytest.mark.parametrize("score", [score for score in SCORES if score not in ("all", "sinks")])
def test_chunked_takes_every_score(score, normalizer):
    assert_within_budget(
        chunked.run, make_problem("causal", score, normalizer=normalizer, needs_lse=False), torch.float32
    )


@pytest.mark.parametrize("limit", [1, 7 * 128, 1 << 13])
def test_the_size_of_a_box_is_no_part_of_the_meaning(monkeypatch, limit):
    call = make_problem("mask", "alibi by row", normalizer=fv.entmax(1.5), needs_lse=False, dropout=0.2, seed=3)
    whole = chunked.run(call).out
    monkeypatch.setattr(chunked, "_ROWS", limit)
    monkeypatch.setattr(chunked, "_KEYS", 128)
    near(chunked.run(call).out, whole, 8)


@pytest.mark.parametrize("normalizer", [*SMOOTH.values(), fv.entmax(1.25), fv.entmax(1.8)], ids=str)
def test_the_definition_has_two_derivatives(normalizer):
    leaves = tensors(3, 5, gradients=True)
    mask = random_mask(3, 5, 0.6)

    def call(q, k, v):
        return fv.attention(q, k, v, mask, normalizer=normalizer, backend="reference")

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@every
def test_pull_is_the_derivative_of_weights(normalizer):
    x = rows().masked_fill(rows() < -1, -math.inf).requires_grad_()
    weights, gradient = normalizer.weights(x), random(17, 5, 23, seed=9)
    pulled = normalizer.pull(weights.detach(), gradient)
    if normalizer is fv.hardmax:
        assert not pulled.any()
    else:
        near(pulled, torch.autograd.grad(weights, x, gradient)[0])


@pytest.mark.parametrize("normalizer", SIMPLEX.values(), ids=str)
@pytest.mark.parametrize("size", [0, 1e-3, 1, 1e3])
def test_rows_are_on_the_simplex_wherever_the_scores_are(normalizer, size):
    for keys in (1, 2, 997):
        x = random(7, keys) * size
        weights = normalizer.weights(x)
        assert (weights >= 0).all()
        near(weights.sum(-1), torch.ones(7))
        near(normalizer.weights(x + 3), weights, 4096 if size else 64)


def test_entmax_lies_between_softmax_and_sparsemax():
    x = rows()
    assert (fv.entmax(1.0001).weights(x) - x.softmax(-1)).abs().max() < 1e-3
    assert fv.entmax(2) is not None
    assert fv.entmax(2) == fv.sparsemax
    zeros = [int((fv.entmax(alpha).weights(x) == 0).sum()) for alpha in (1.001, 1.25, 1.5, 1.75, 2)]
    assert zeros == sorted(zeros)
    assert zeros[0] < zeros[-1]


def test_hardmax_is_the_limit_of_a_large_scale_and_the_first_of_equals():
    q, k, v = tensors(QUERIES, KEYS)
    near(fv.attention(q, k, v, normalizer=fv.hardmax), fv.attention(q, k, v, scale=1e6))
    same = torch.ones_like(q)
    near(
        fv.attention(same, torch.ones_like(k), v, normalizer=fv.hardmax),
        v[:, :, :1].repeat_interleave(2, 1).expand(-1, -1, QUERIES, -1),
    )


@every
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_row_without_a_key_gives_zero_and_takes_no_gradient(normalizer, backend):
    leaves = tensors(QUERIES, KEYS, gradients=True)
    out = fv.attention(*leaves, fv.causal, query_start=-4, normalizer=normalizer, backend=backend)
    assert (out[:, :, :4] == 0).all()
    assert (out[:, :, 4:] != 0).any(-1).all()
    assert all(x is None or x.isfinite().all() for x in gradients((out,), leaves))
    none = fv.attention(leaves[0], leaves[1][:, :, :0], leaves[2][:, :, :0], normalizer=normalizer, backend=backend)
    assert none.shape == (BATCH, HEADS, QUERIES, VALUE_DIM)
    assert (none == 0).all()


@every
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_hidden_keys_never_matter_and_a_nan_in_a_query_reaches_its_row(normalizer, backend, bad):
    q, k, v = tensors(QUERIES, KEYS)
    options = {"normalizer": normalizer, "backend": backend}
    clean = fv.attention(q, k, v, fv.causal, query_start=0, **options)
    k[:, :, 7], v[:, :, 7] = bad, bad
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    found = fv.attention(*leaves, fv.causal, query_start=0, **options)
    near(found[:, :, :7].detach(), clean[:, :, :7], 8)
    unseen = fv.attention(*leaves, fv.prefix(7), **options)
    assert all(x is None or x.isfinite().all() for x in gradients((unseen,), leaves))
    broken = q.detach().clone()
    broken[:, 1, 3] = math.nan
    found = fv.attention(broken, k.detach(), v.detach(), fv.prefix(7), **options)
    assert found[:, 1, 3].isnan().all()
    found[:, 1, 3] = 0
    assert not found.isnan().any()


def test_softmax_plus_one_is_a_sink_of_logit_zero():
    q, k, v = tensors(QUERIES, KEYS)
    options = {"score": fv.softcap(3.0), "query_start": -2}
    scaled = fv.weights(q, k, v, fv.causal, **options, normalizer=fv.softmax_plus_one)
    terms = (3 * (q @ k.repeat_interleave(2, 1).mT / math.sqrt(DIM) / 3).tanh()).exp()
    terms = terms * fv.causal.dense(QUERIES, KEYS, query_start=-2)
    near(scaled, terms / (1 + terms.sum(-1, keepdim=True)))
    out, lse = fv.attention_with_lse(q, k, v, fv.causal, **options, normalizer=fv.softmax_plus_one)
    near(out, scaled @ v.repeat_interleave(2, 1))
    near(lse, (1 + terms.sum(-1)).log())
    assert fv.explain(q.float(), k.float(), v.float(), normalizer=fv.softmax_plus_one).chosen == "native"


def test_sigmoid_over_parts_of_the_keys_adds_up():
    q, k, v = tensors(QUERIES, KEYS)
    parts = [
        fv.attention(q, k[:, :, some], v[:, :, some], normalizer=fv.sigmoid) for some in (slice(5), slice(5, None))
    ]
    near(parts[0] + parts[1], fv.attention(q, k, v, normalizer=fv.sigmoid))


@every
def test_what_is_seen_of_it_is_what_is_computed(normalizer):
    q, k, v = tensors(QUERIES, KEYS)
    shares = fv.weights(q, k, v, fv.causal, normalizer=normalizer)
    near(fv.weights(q, k, v, fv.causal, normalizer=normalizer, rows=[-1, 2]), shares[:, :, [-1, 2]])
    looked = inspection.looked(problem(q, k, v, fv.causal, normalizer=normalizer), 4)
    near(looked.weights, shares.gather(-1, looked.indices))
    near(looked.received, shares.sum(2))
    assert looked.lse.isnan().all()


@every
def test_the_fast_ones_refuse_it_and_auto_takes_chunked(normalizer):
    q, k, v = tensors(QUERIES, KEYS, dtype=torch.float32)
    choice = fv.explain(q, k, v, normalizer=normalizer)
    assert choice.chosen == "chunked"
    for name in ("sdpa", "native", "flex"):
        assert f"computes softmax, not {normalizer}" in choice.refusals[name]
        with pytest.raises(Unsupported, match=f"{name}: .*computes softmax, not"):
            fv.attention(q, k, v, normalizer=normalizer, backend=name)
    assert parse(repr(normalizer)) == normalizer
    assert isinstance(normalizer, Normalizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalizer": "softmax"}, "the normalizer is str: wanted None"),
        ({"normalizer": fv.entmax}, "the normalizer is entmax: wanted None .* entmax\\(alpha\\)"),
        ({"normalizer": torch.softmax}, "the normalizer is softmax"),
        ({"normalizer": fv.sparsemax, "score": fv.sinks(torch.zeros(HEADS))}, "sparsemax has none: drop the sinks"),
        (
            {"normalizer": fv.softmax_plus_one, "score": fv.sinks(torch.zeros(HEADS))},
            "is a sink of logit 0, and sinks.* drop one",
        ),
    ],
    ids=["name", "function", "torch", "sinks", "two sinks"],
)
def test_bad_normalizers_get_a_sentence(options, message):
    with pytest.raises(InvalidInput, match=message):
        problem(*tensors(3, 5), **options)


@every
def test_a_log_sum_exp_is_softmax_s_alone(normalizer):
    with pytest.raises(InvalidInput, match="has no log-sum-exp: call attention instead"):
        fv.attention_with_lse(*tensors(3, 5), normalizer=normalizer)


@pytest.mark.parametrize("alpha", [1, 0.5, 2.5, "1.5", True, math.nan])
def test_an_alpha_out_of_range(alpha):
    with pytest.raises(InvalidInput, match="entmax's α is"):
        fv.entmax(alpha)


def test_inside_a_graph():
    def call(q, k, v):
        return fv.attention(q, k, v, fv.causal, normalizer=fv.entmax(1.5))

    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        leaves = tensors(QUERIES, KEYS, gradients=True)
        found = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
        near(found, call(*leaves))
        for mine, true in zip(gradients((found,), leaves), gradients((call(*leaves),), leaves), strict=True):
            near(mine, true)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
        torch._dynamo.reset()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of this process from /proc")
def test_memory_is_linear_in_the_length():
    import subprocess

    code = """
import resource, torch, foveate as fv
torch.set_num_threads(1)
def peak(n):
    q, k, v = (torch.randn(1, 4, n, 8).requires_grad_() for _ in range(3))
    fv.attention(q, k, v, normalizer=fv.sparsemax).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
few = peak(256)
print((peak(4096) - few) / 2**10)
"""
    more = float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, timeout=300).stdout
    )
    assert more < 128, f"{more:.0f} MiB more; one matrix of weights has 256"
    assert reference.refuses(problem(*tensors(3, 5), normalizer=fv.sparsemax)) == []
