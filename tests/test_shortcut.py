"""A call like one before it is neither checked nor decided again, and nobody can tell."""

import itertools
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from torch import Tensor

import foveate as fv
from foveate.dispatch import call_cache
from foveate.dispatch.choose import observe

PATTERNS = [None, fv.causal, fv.causal & fv.window(3), fv.window(left=1, right=2)]


def qkv(
    queries: int = 7, keys: int = 7, heads: int = 4, dim: int = 8, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries * keys)
    sizes = (heads, queries), (2, keys), (2, keys)
    return [torch.randn(3, h, n, dim, generator=generator).to(dtype) for h, n in sizes]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    call_cache.forget()
    jaxtyping.config.update("jaxtyping_disable", True)  # what users have: the checks of shapes are the library's own
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_it_is_taken_from_the_second_call_on(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    first = fv.attention(q, k, v, fv.causal)
    monkeypatch.setattr("foveate.functional.dispatch", None)
    assert torch.equal(fv.attention(q, k, v, fv.causal), first)
    assert torch.equal(fv.attention(q + 0, k + 0, v + 0, fv.causal), first)
    with pytest.raises(TypeError):
        fv.attention(q, k, v)


def test_calls_that_differ_are_not_mixed_up() -> None:
    dtypes = torch.float32, torch.float64
    cases = list(itertools.product(PATTERNS, (None, 0, 2), (None, 0.3), (1, 5, 7), dtypes))
    for pattern, start, scale, queries, dtype in [*cases, *cases]:
        q, k, v = qkv(queries, dtype=dtype)
        wanted = fv.attention(q, k, v, pattern, query_start=start, scale=scale, backend="reference")
        found = fv.attention(q, k, v, pattern, query_start=start, scale=scale)
        torch.testing.assert_close(found, wanted)


def test_what_was_right_does_not_excuse_what_is_wrong() -> None:
    q, k, v = qkv()
    fv.attention(q, k, v)
    for wrong in ((q, k, v[:, :, :5]), (q, k.double(), v), (q, k[..., :4], v), (q[:, :3], k, v), (q, k, None)):
        with pytest.raises(fv.InvalidInput):
            fv.attention(*wrong)
    with pytest.raises(fv.InvalidInput):
        fv.attention(q, k, v, scale="1")  # type: ignore[arg-type]
    with pytest.raises(fv.InvalidInput):
        fv.attention(q, k, v, backend="fastest")


def test_a_tensor_in_the_pattern_is_looked_at_each_time() -> None:
    q, k, v = qkv()
    lengths = torch.tensor([7, 7, 7])
    fv.attention(q, k, v, fv.padding(lengths))
    lengths.fill_(2)
    found = fv.attention(q, k, v, fv.padding(lengths))
    torch.testing.assert_close(found, fv.attention(q, k[:, :, :2], v[:, :, :2]))


def test_gradients_come_and_go() -> None:
    q, k, v = qkv()
    fv.attention(q, k, v)
    q.requires_grad_()
    for _ in range(2):
        (grad,) = torch.autograd.grad(fv.attention(q, k, v).sum(), q)
        (wanted,) = torch.autograd.grad(fv.attention(q, k, v, backend="reference").sum(), q)
        torch.testing.assert_close(grad, wanted)
        with torch.no_grad():
            assert not fv.attention(q, k, v).requires_grad


def test_transforms_and_autocast_and_observers_still_work() -> None:
    q, k, v = qkv()
    plain = fv.attention(q, k, v)
    mapped = torch.func.vmap(lambda x: fv.attention(x, k, v, backend="reference"))(q[None])
    torch.testing.assert_close(mapped[0], plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert fv.attention(q, k, v).dtype == torch.bfloat16
    seen = []
    stop = observe(seen.append)
    fv.attention(q, k, v)
    stop()
    assert len(seen) == 1
    torch.testing.assert_close(torch.compile(fv.attention, fullgraph=True, backend="eager")(q, k, v), plain)


def test_it_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_cache, "_MOST", 4)
    for keys in range(1, 20):
        fv.attention(*qkv(1, keys))
    assert len(call_cache._decided) <= 4
