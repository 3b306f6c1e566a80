"""Dropout is Philox of (seed, batch, head, query, key) alone: the same everywhere, forward and backward."""

import jaxtyping
import pytest
import torch
from calls import BATCH, DIM, HEADS, KEY_HEADS, gradients, near, tensors
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx

import foveate as fv
from foveate.primitives import dropout_mask

BACKENDS = ("reference", "chunked")
both = pytest.mark.parametrize("backend", BACKENDS)

# Random123's published vectors for philox4x32-10: counter, key, answer.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


def kept(q, k, backend, **options):
    """Which weights are kept: with the identity for values the output is the matrix of weights."""
    keys = k.shape[2]
    v = torch.eye(keys, dtype=q.dtype).expand(*k.shape[:2], keys, keys)
    return fv.attention(q, k, v, backend=backend, **options)


@pytest.mark.parametrize(("counter", "key", "answer"), VECTORS)
def test_known_answers(counter, key, answer):
    """A word is kept at the rate word / 2³² and dropped at the next one, which pins all of its 32 bits."""
    (block, query, head, batch), (low, high) = map(torch.tensor, words(counter)), words(key)
    for n, word in enumerate(words(answer)):
        place = batch, head, query, block * 4 + n
        for seed in (high << 32 | low, (high << 32 | low) - (1 << 64)):  # as an unsigned and as a signed number
            assert dropout_mask(seed, word / 2**32, *place)
            assert not dropout_mask(seed, (word + 1) / 2**32, *place)


def test_the_same_mask_in_every_implementation():
    q, k, v = inputs = tensors(131, 257, gradients=True)
    results = []
    for backend in BACKENDS:
        outputs = fv.attention_with_lse(q, k, v, fv.causal | fv.chunks(7), dropout=0.4, seed=-3, backend=backend)
        results.append((*outputs, *gradients(outputs, inputs)))
    for found, true in zip(*results, strict=True):
        near(found, true)


@both
def test_kept_weights_are_scaled_and_the_log_sum_exp_is_not_touched(backend):
    q, k, v = tensors(7, 11)
    whole, dropped = kept(q, k, backend), kept(q, k, backend, dropout=0.25, seed=5)
    near(dropped[dropped != 0], whole[dropped != 0] / 0.75)
    lse = [fv.attention_with_lse(q, k, v, dropout=rate, seed=5, backend=backend)[1] for rate in (0.0, 0.25)]
    assert torch.equal(*lse)


@pytest.mark.parametrize("rate", [0.03, 0.5, 0.9])
def test_the_share_that_is_kept(rate):
    q, k, _ = tensors(127, 251)
    share = (kept(q, k, "reference", dropout=rate, seed=1) != 0).double()
    spread = (rate * (1 - rate)) ** 0.5
    for axis in ((2, 3), (0, 1, 3), (0, 1, 2)):  # over all, and for every query and every key
        count = share.numel() / share.mean(axis).numel()
        assert ((share.mean(axis) - (1 - rate)).abs() < 5 * spread / count**0.5).all()


def test_the_expectation_is_attention_without_dropout():
    q, k, v = tensors(3, 5)
    draws = torch.stack([fv.attention(q, k, v, dropout=0.3, seed=seed, backend="reference") for seed in range(400)])
    error = (draws.mean(0) - fv.attention(q, k, v)).abs()
    assert (error < 5 * draws.std(0) / 400**0.5).all()


@both
def test_a_function_of_the_seed(backend):
    q, k, v = tensors(7, 11)

    def attend(seed):
        return fv.attention(q, k, v, dropout=0.5, seed=seed, backend=backend)

    assert torch.equal(attend(3), attend(3))
    assert not torch.equal(attend(3), attend(4))
    assert not torch.equal(attend(3), attend(3 + (1 << 32)))
    torch.manual_seed(0)
    first, second = attend(None), attend(None)
    torch.manual_seed(0)
    assert torch.equal(attend(None), first)
    assert not torch.equal(first, second)


@both
def test_no_dropout_draws_nothing(backend):
    q, k, v = tensors(3, 5)
    before = torch.get_rng_state()
    near(fv.attention(q, k, v, seed=9, backend=backend), fv.attention(q, k, v, backend=backend), 0)
    assert torch.equal(before, torch.get_rng_state())


@both
def test_batch_rows_heads_and_queries_differ(backend):
    q, k = torch.zeros(BATCH, HEADS, 5, DIM).double(), torch.zeros(BATCH, KEY_HEADS, 61, DIM).double()
    rows = (kept(q, k, backend, dropout=0.5, seed=0) != 0).flatten(0, 2)
    assert len(rows.unique(dim=0)) == len(rows)


@both
def test_the_gradient_is_that_of_the_same_mask(backend):
    q, k, v = (x[:1, :, :3].detach().requires_grad_() for x in tensors(3, 5))
    assert gradcheck(
        lambda *x: fv.attention_with_lse(*x, fv.causal, dropout=0.4, seed=2, backend=backend), (q, k, v), fast_mode=True
    )


WITHOUT_SEED = ("auto", "native", "chunked", "reference")


def dropped(backend):
    return lambda q: fv.attention(q, q, q, fv.causal, dropout=0.4, backend=backend)


@pytest.fixture
def _no_shape_checks():
    """The tracer cannot follow the run-time checks of shapes, which only tests switch on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


@pytest.mark.usefixtures("_no_shape_checks")
@pytest.mark.parametrize("backend", WITHOUT_SEED)
def test_a_graph_draws_a_seed_at_every_run_and_its_gradient_has_the_same(backend):
    call = dropped(backend)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    q = torch.randn(2, 3, 70, 8, requires_grad=True)
    for _ in range(2):
        results = []
        for each in (call, compiled):
            torch.manual_seed(7)
            out = each(q)
            results.append((out, *torch.autograd.grad(out.square().sum(), q)))
        for found, true in zip(*results, strict=True):
            torch.testing.assert_close(found, true)
    assert not torch.equal(compiled(q), compiled(q))


@pytest.mark.usefixtures("_no_shape_checks")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["export", "trace", "make_fx"])
@pytest.mark.parametrize("backend", WITHOUT_SEED)
def test_a_recorded_call_draws_a_seed_at_every_run(backend, how):
    class Layer(torch.nn.Module):
        def forward(self, q):
            return dropped(backend)(q)

    q = torch.randn(2, 3, 70, 8)
    recorded = {
        "export": lambda: torch.export.export(Layer(), (q,)).module(),
        "trace": lambda: torch.jit.trace(Layer(), (q,), check_trace=False),
        "make_fx": lambda: make_fx(Layer())(q),
    }[how]()
    assert not torch.equal(recorded(q), recorded(q))


@pytest.mark.parametrize("backend", WITHOUT_SEED)
def test_dropout_of_tensors_without_data(backend):
    with torch._subclasses.FakeTensorMode():
        assert dropped(backend)(torch.randn(2, 3, 70, 8)).shape == (2, 3, 70, 8)
    with torch.device("meta"):
        assert dropped(backend)(torch.randn(2, 3, 70, 8)).is_meta
        assert not dropped(backend)(torch.randn(2, 3, 70, 8, device="cpu")).is_meta


@pytest.mark.usefixtures("_no_shape_checks")
@pytest.mark.parametrize("layer", ["SelfAttention", "Encoder"])
def test_layers_with_dropout_compile_and_export_whole(layer):
    make = {
        "SelfAttention": lambda: fv.nn.SelfAttention(16, 4, dropout=0.3),
        "Encoder": lambda: fv.nn.Encoder.from_torch(
            torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.3, batch_first=True), 2)
        ),
    }[layer]
    module, x = make().train(), torch.randn(2, 7, 16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(x), compiled(x))
    exported = torch.export.export(module, (x,)).module()
    assert not torch.equal(exported(x), exported(x))


@pytest.mark.usefixtures("_no_shape_checks")
@pytest.mark.slow
@pytest.mark.parametrize("seed", [5, -7, 2**40 + 3, 2**63 - 1, -(2**63)])
def test_the_random_words_are_right_in_a_compiled_graph(seed):
    """Inductor folds products of 32-bit words into narrower numbers, and divides where a number was shifted."""
    q = torch.randn(2, 3, 19, 8)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda q, seed: fv.attention(q, q, q, dropout=0.4, seed=seed, backend="reference"), dynamic=dynamic
        )
        torch.testing.assert_close(
            compiled(q, seed), fv.attention(q, q, q, dropout=0.4, seed=seed, backend="reference")
        )


def test_each_row_of_vmap_draws_its_own_or_all_the_same():
    q = torch.randn(3, 3, 19, 8)
    same = torch.vmap(dropped("reference"), randomness="same")(q[:1].expand(4, -1, -1, -1))
    different = torch.vmap(dropped("reference"), randomness="different")(q[:1].expand(4, -1, -1, -1))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
