"""Tensors that are not what lies at their address: subclasses, signs not yet written, masks of odd bytes, batches.

transformers#41819 (sinks as a DTensor beside plain q, k, v), pytorch#54789 (True that is not the byte 1).
"""

import warnings

import jaxtyping
import numpy as np
import pytest
import torch
from calls import BATCH, HEADS, KEY_HEADS
from torch.testing._internal.two_tensor import TwoTensor

import foveate as fv
from foveate import InvalidInput, Unsupported
from foveate.eager import is_eager, is_known, is_plain
from foveate.inspection import looked
from foveate.linear.problem import LinearState
from foveate.problem import problem

LENGTH = 131
BACKENDS = ("auto", "native", "chunked", "reference", "sdpa")
LINEAR = ("auto", "native", "chunked", "recurrence")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(dim=16):
    return (
        draw(BATCH, HEADS, LENGTH, dim),
        draw(BATCH, KEY_HEADS, LENGTH, dim, seed=1),
        draw(BATCH, KEY_HEADS, LENGTH, dim, seed=2),
    )


def plain(x):
    return x.a if isinstance(x, TwoTensor) else x


def twice(x):
    return TwoTensor(x, x)


def negative(x):
    """The same numbers, their sign not yet written."""
    other = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert other.is_neg()
    assert torch.equal(other, x)
    return other


def whole(high, *shape, seed=3):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


# Every place for a tensor beside q, k and v: what is made of it, and the tensor.
PLACES = {
    "sinks": (lambda x: {"pattern": fv.causal, "score": fv.sinks(x)}, draw(HEADS)),
    "bias": (lambda x: {"score": x}, draw(HEADS, LENGTH, LENGTH)[None]),
    "slopes": (lambda x: {"pattern": fv.causal, "score": fv.alibi(x)}, draw(HEADS).abs()),
    "table": (lambda x: {"score": fv.relative_bias(x)}, draw(7, HEADS)),
    "lengths": (lambda x: {"pattern": fv.padding(x)}, torch.tensor([5, 70])),
    "keep": (lambda x: {"pattern": fv.padding(x)}, whole(2, BATCH, LENGTH) == 1),
    "mask": (lambda x: {"pattern": x}, whole(2, LENGTH, LENGTH) == 1),
    "not mask": (lambda x: {"pattern": ~fv.from_mask(x) & fv.causal}, whole(2, LENGTH, LENGTH) == 1),
    "ids": (lambda x: {"pattern": fv.documents(x) & fv.causal}, torch.arange(LENGTH) // 17),
    "offsets": (lambda x: {"pattern": fv.documents(cu_seqlens=x)}, torch.tensor([0, 13, 70, LENGTH])),
    "indices": (lambda x: {"pattern": fv.selected(x)}, whole(LENGTH, BATCH, HEADS, LENGTH, 5)),
    "start": (lambda x: {"pattern": fv.causal, "query_start": x}, torch.tensor([3, -40])),
}
floats = [name for name, (_, x) in PLACES.items() if x.is_floating_point()]


INPUTS = inputs()


def attend(options, backend="auto"):
    return fv.attention(*INPUTS, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_subclass_beside_plain_tensors_is_computed(place, backend):
    make, x = PLACES[place]
    try:
        true = attend(make(x), backend)
    except Unsupported:
        with pytest.raises(Unsupported):
            attend(make(twice(x)), backend)
        return
    torch.testing.assert_close(plain(attend(make(twice(x)), backend)), true)


@pytest.mark.parametrize("place", PLACES)
def test_what_was_looked_at_counts_a_subclass_too(place):
    make, x = PLACES[place]
    true, found = (looked(problem(*inputs(), **make(given)), 4) for given in (x, twice(x)))
    for name in ("weights", "rest", "received", "lse", "entropy"):
        torch.testing.assert_close(plain(getattr(found, name)), getattr(true, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", floats)
def test_a_sign_that_is_not_yet_written_counts(place, backend):
    make, x = PLACES[place]
    try:
        true = attend(make(x), backend)
    except Unsupported:
        return  # what it refuses does not depend on signs, as the test above shows
    torch.testing.assert_close(attend(make(negative(x)), backend), true)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", range(3))
def test_the_signs_of_q_k_v_and_of_a_gradient_count(which, backend):
    tensors = [x.requires_grad_() for x in inputs(1)]  # with one dimension the last stride need not be 1
    given = [negative(x.detach()).requires_grad_() if n == which else x for n, x in enumerate(tensors)]
    grad = draw(BATCH, HEADS, LENGTH, 1, seed=9)
    if backend == "sdpa" and given[which].stride(3) != 1:
        with pytest.raises(Unsupported, match="last stride"):
            fv.attention(*given, backend=backend)
        return
    true, found = (fv.attention(*each, backend=backend) for each in (tensors, given))
    torch.testing.assert_close(found, true)
    for mine, theirs in zip(
        torch.autograd.grad(found, given, negative(grad)), torch.autograd.grad(true, tensors, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_zeros_that_are_not_yet_written(backend):
    tensors = [x.requires_grad_() for x in inputs()]
    out = fv.attention(*tensors, fv.causal, backend=backend)
    for gradient in torch.autograd.grad(out, tensors, torch._efficientzerotensor(out.shape)):
        assert (gradient == 0).all()


LINEAR_PLACES = {
    "decay": lambda f: {"decay": f(-draw(BATCH, KEY_HEADS, LENGTH).abs())},
    "by channel": lambda f: {"decay": f(-draw(BATCH, KEY_HEADS, LENGTH, 16).abs())},
    "beta": lambda f: {"beta": f(draw(BATCH, KEY_HEADS, LENGTH).sigmoid())},
    "state": lambda f: {"state": LinearState(f(draw(BATCH, KEY_HEADS, 16, 16)), None)},
}


@pytest.mark.parametrize("kind", [twice, negative])
@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.parametrize("place", LINEAR_PLACES)
@pytest.mark.parametrize("steps", [1, LENGTH])
def test_linear_attention_counts_them_too(place, backend, kind, steps):
    def call(f):
        q, k, v = (x[:, :, :steps] for x in inputs())
        options = {name: x if name == "state" else x[:, :, :steps] for name, x in LINEAR_PLACES[place](f).items()}
        options = {"state": LinearState(torch.zeros(BATCH, KEY_HEADS, 16, 16), None), **options}
        return fv.linear_attention(q, k, v, backend=backend, **options)[0]

    for _ in range(2):  # a single step is remembered
        torch.testing.assert_close(plain(call(kind)), plain(call(lambda x: x)))


def test_linear_attention_counts_the_documents_of_a_subclass():
    ids = torch.arange(LENGTH) // 17
    true, found = (fv.linear_attention(*inputs(), documents=each)[0] for each in (ids, twice(ids)))
    torch.testing.assert_close(plain(found), true)


@pytest.mark.parametrize("which", ["table", "lengths", "key_pages"])
def test_pages_count_them_too(which):
    tensors = {
        "q": draw(2, HEADS, 3, 16), "key_pages": draw(5, KEY_HEADS, 7, 16, seed=1),
        "value_pages": draw(5, KEY_HEADS, 7, 16, seed=2), "table": torch.tensor([[4, 1], [0, 3]]),
        "lengths": torch.tensor([9, 5]),
    }  # fmt: skip
    true = fv.paged_attention(*tensors.values())
    tensors[which] = twice(tensors[which])
    torch.testing.assert_close(plain(fv.paged_attention(*tensors.values())), true)


def test_a_distributed_tensor_is_an_error_or_right():
    """What gpt-oss has under tensor parallelism: PyTorch refuses to mix it with plain tensors, and so it stays."""
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.experimental import implicit_replication

    dist.init_process_group("fake", store=torch.testing._internal.distributed.fake_pg.FakeStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        sinks = distribute_tensor(draw(HEADS), mesh, [Replicate()])
        with pytest.raises(RuntimeError, match="mixed"):
            attend({"pattern": fv.causal, "score": fv.sinks(sinks)})
        assert implicit_replication
    finally:
        dist.destroy_process_group()


def with_bytes(mask, byte):
    """The same mask over memory of NumPy's, in which True is another byte than 1."""
    other = torch.from_numpy((mask.numpy().astype(np.uint8) * byte).view(np.bool_))
    assert other.shape == mask.shape
    return other


@pytest.mark.parametrize("byte", [2, 128, 255])
@pytest.mark.parametrize("backend", ["auto", "native", "chunked", "reference"])
@pytest.mark.parametrize("place", ["keep", "mask", "not mask"])
@pytest.mark.parametrize("length", [64, 128])  # whole words of a row are read where it has a multiple of 64 keys
def test_true_is_any_byte_but_0(length, place, backend, byte):
    make, x = PLACES[place]
    x = x[..., :length] if place == "keep" else x[:length, :length]
    q, k, v = (x[:, :, :length] for x in inputs())
    true, found = (fv.attention(q, k, v, backend=backend, **make(mask)) for mask in (x, with_bytes(x, byte)))
    assert torch.equal(found, true)


def test_accelerate_reads_any_byte_but_0_as_true():
    mask = whole(2, 2, 1, 128, 128) == 1
    q, k, v = (draw(2, 3, 128, 16, seed=n).requires_grad_() for n in range(3))
    results = []
    for each in (mask, with_bytes(mask, 255)):
        with fv.accelerate() as acceleration:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, each)
            results.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
        assert acceleration.report().foveate
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("old", [True, False], ids=["is_grads_batched", "torch.vmap"])
@pytest.mark.parametrize("backend", [*BACKENDS, *(f"linear {name}" for name in LINEAR)])
def test_gradients_of_many_outputs_at_once(backend, old):
    tensors = [x[:, :, :19].detach().requires_grad_() for x in inputs()]
    if backend.startswith("linear"):
        decay = (-draw(KEY_HEADS).abs()).requires_grad_()
        out, _ = fv.linear_attention(*tensors, decay=decay, backend=backend.removeprefix("linear "))
        leaves = (*tensors, decay)
    elif backend == "sdpa":
        out, leaves = fv.attention(*tensors, fv.causal, backend=backend), tensors
    else:
        sinks = draw(HEADS).requires_grad_()
        out, leaves = fv.attention(*tensors, fv.causal, score=fv.sinks(sinks), backend=backend), (*tensors, sinks)
    given = draw(3, *out.shape, seed=4)
    if old:
        found = torch.autograd.grad(out, leaves, given, is_grads_batched=True, retain_graph=True)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that PyTorch has no batching rule for its own kernel
            found = torch.vmap(lambda each: torch.autograd.grad(out, leaves, each, retain_graph=True))(given)
    for n, each in enumerate(given):
        for mine, theirs in zip(found, torch.autograd.grad(out, leaves, each, retain_graph=True), strict=True):
            torch.testing.assert_close(mine[n], theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_jacobian_at_once(backend):
    q, k, v = (x[:1, :1, :5] for x in inputs(3))
    true, found = (
        torch.autograd.functional.jacobian(
            lambda q: fv.attention(q, k, v, fv.causal, backend=backend), q, vectorize=vectorize
        )
        for vectorize in (False, True)
    )
    torch.testing.assert_close(found, true)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "native", "chunked"])
def test_forward_derivatives_are_refused_with_our_reasons(backend):
    q, k, v = inputs()
    with pytest.raises(Unsupported, match="no forward derivative"):
        torch.func.jvp(lambda q: fv.attention(q, k, v, fv.causal, backend=backend), (q,), (q,))


@pytest.mark.parametrize("place", PLACES)
def test_vmap_over_what_patterns_and_scores_hold(place):
    make, x = PLACES[place]
    many = torch.stack([x, x.flip(0) if place != "offsets" else x])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that searchsorted copies what vmap has laid out
        found = torch.vmap(lambda each: attend(make(each), "reference"))(many)
    for mine, each in zip(found, many, strict=True):
        torch.testing.assert_close(mine, attend(make(each), "reference"))


def layouts(batch, heads, length, dim):
    yield "heads outside", draw(batch, heads, length, dim)
    yield "heads inside", draw(batch, length, heads, dim).transpose(1, 2)
    yield "batch inside", draw(length, batch, heads, dim).permute(1, 2, 0, 3)
    yield "a third of q, k, v", draw(batch, length, 3, heads, dim)[:, :, 0].transpose(1, 2)
    yield "expanded", draw(batch, 1, length, dim).expand(batch, heads, length, dim)
    yield "transposed", draw(batch, heads, dim, length).mT


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("length", "dim", "value_dim"), [(7, 16, 16), (300, 16, 16), (70, 16, 8), (1, 8, 8)])
def test_a_result_is_laid_out_as_q_is_whatever_runs(length, dim, value_dim, trains):
    k, v = draw(2, 2, length, dim, seed=1), draw(2, 2, length, value_dim, seed=2)
    for name, q in layouts(2, 4, length, dim):
        dense = torch.empty_like(q[..., 0])  # dense, its dimensions in q's order
        want = [step * value_dim for step, size in zip(dense.stride(), dense.shape, strict=True) if size > 1]
        for backend in BACKENDS:
            for _ in range(2):  # the second call is remembered
                try:
                    out = fv.attention(q.detach().requires_grad_(trains), k, v, fv.causal, backend=backend)
                except Unsupported:
                    continue
                found = [step for step, size in zip(out.stride(), (*dense.shape,), strict=False) if size > 1]
                assert found == want, (name, backend)
                assert out.stride(3) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_computed_can_be_changed_in_place(backend):
    """A view out of an autograd function could not be; heads brought together and a gate are what a layer does."""
    tensors = [x.requires_grad_() for x in inputs()]
    true = fv.attention(*tensors, fv.causal, backend="reference").transpose(1, 2).flatten(2).mul(3).relu()
    found = fv.attention(*tensors, fv.causal, backend=backend).transpose(1, 2).flatten(2).mul_(3).relu_()
    for mine, theirs in zip(*(torch.autograd.grad(out.sum(), tensors) for out in (found, true)), strict=True):
        torch.testing.assert_close(mine, theirs)
    out = fv.attention(*tensors, fv.causal, backend=backend)
    out.mul_(3)  # itself too, as long as no gradient is asked for: it is what the backward pass reads


@pytest.fixture
def _no_shape_checks():
    """The run-time checks of shapes, which only tests switch on, ask for sizes that a nested tensor has not."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_no_shape_checks")
def test_tensors_that_lie_otherwise_are_refused_with_what_to_do():
    q, k, v = inputs()
    warnings.simplefilter("ignore")  # that nested tensors are a prototype
    jagged = torch.nested.nested_tensor([q[0].mT, q[1].mT], layout=torch.jagged)
    with pytest.raises(InvalidInput, match=r"q is a nested tensor: .*documents\(cu_seqlens=\)"):
        fv.attention(jagged, jagged, jagged)
    for call in (
        lambda x: fv.attention(x, x, x),
        lambda x: fv.attention(q, k, x),
        lambda x: fv.linear_attention(x, x, x),
        lambda x: fv.attention(q, k, v, score=x),
        lambda x: fv.weights(x, x, x),
        lambda x: fv.merge([(x, q[..., 0]), (x, q[..., 0])]),
        lambda x: fv.merge_by_gates([x, x], q[..., :2]),
        lambda x: fv.rope(x, torch.arange(LENGTH)),
        lambda x: fv.additive_attention(x, x, x, torch.ones(16)),
    ):
        for other in (q.to_sparse(), q.to_mkldnn(), torch.nested.nested_tensor([q[0], q[1]])):
            with pytest.raises(InvalidInput, match=r"wanted a dense one|is a nested tensor"):
                call(other)
    for make in (fv.from_mask, fv.padding):
        with pytest.raises(InvalidInput, match="wanted a dense one"):
            make((whole(2, BATCH, LENGTH) == 1).to_sparse())
    with pytest.raises(InvalidInput, match="x is a nested tensor"):
        fv.nn.SelfAttention(16, 4)(torch.nested.nested_tensor([q[0, 0], q[1, 0]]))


def test_what_counts_as_plain_and_as_known():
    x = draw(3, 4)
    for one in (x, torch.nn.Parameter(x), x[::2], torch.randn(3, device="cpu")):
        assert is_plain(one)
        assert is_eager(one)
        assert is_known(one)
    for one in (twice(x), x.to("meta"), x.to_sparse(), x.to_mkldnn(), x.as_subclass(type("Mine", (torch.Tensor,), {}))):
        assert not is_plain(one)
    assert not is_plain(negative(x))
    assert is_known(negative(x))
    assert not is_known(x.to("meta"))
    assert not is_known(x[:0])
    with torch._subclasses.FakeTensorMode() as mode:
        assert not is_known(mode.from_tensor(x))
        assert not is_eager(mode.from_tensor(x))
    torch.vmap(
        lambda each: (None if not is_plain(each) and not is_known(each) else pytest.fail("is batched"), each)[1]
    )(x)
