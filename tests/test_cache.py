"""The growing cache keeps every key and value exactly, and copies each a bounded number of times."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveate as fv
from foveate.errors import InvalidInput


def pieces(*lengths: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(2, 3, n, 5), torch.randn(2, 3, n, 7)) for n in lengths]


def joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2)


@pytest.mark.parametrize("mode", ["no_grad", "inference", "grad"])
def test_the_pieces_are_the_whole(mode: str) -> None:
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}[mode]
    cache = fv.KeyValueCache(2)
    parts = pieces(11, 1, 1, 0, 47, 3)
    with context():
        earlier = []
        for n, part in enumerate(parts):
            found = cache[1].append(*part)
            assert all(torch.equal(x, y) for x, y in zip(found, joined(parts[: n + 1]), strict=True))
            earlier.append((found, [x.clone() for x in found]))
    assert all(torch.equal(x, y) for found, copies in earlier for x, y in zip(found, copies, strict=True))
    assert (cache[1].length, cache[0].length, cache.length) == (63, 0, 0)


def test_copying_is_amortised() -> None:
    cache = fv.KeyValueCache(1)
    places = set()
    with torch.no_grad():
        for part in pieces(*[1] * 2000):
            places.add(cache[0].append(*part)[0].data_ptr())
    assert len(places) < 16
    assert cache[0]._room is not None
    assert cache[0]._room[0].shape[2] < 1.6 * 2000 + 64


@pytest.mark.parametrize("sizes", [(5,), (5, 1), (5, 1, 1)])
def test_what_is_forgotten_is_written_over_in_our_own_memory_alone(sizes: tuple[int, ...]) -> None:
    layer, parts = fv.KeyValueCache(1)[0], pieces(*sizes)
    copies = [(k.clone(), v.clone()) for k, v in parts]
    for part in parts:
        kept = layer.append(*part)
    shorter = [x[:, :, :4].clone() for x in kept]
    layer.shorten(4)
    (new,) = pieces(2)
    found = layer.append(*new)
    assert layer.length == 6
    for x, old, added in zip(found, shorter, new, strict=True):
        assert torch.equal(x, torch.cat([old, added], 2))
    assert all(
        torch.equal(x, y) for part, copy in zip(parts, copies, strict=True) for x, y in zip(part, copy, strict=True)
    )
    with pytest.raises(InvalidInput, match="length is 7: wanted at most the 6 keys that are kept"):
        layer.shorten(7)


def test_gradients_reach_every_piece_and_only_where_they_are_asked_for() -> None:
    parts = pieces(3, 2, 1)
    leaves = [x.requires_grad_() for part in parts for x in part]
    layer = fv.KeyValueCache(1)[0]
    total = torch.zeros(())
    for part in parts:  # each square keeps what was there for the backward pass
        k, v = layer.append(*part)
        total = total + k.pow(2).sum() + v.pow(2).sum()
    for n, gradient in enumerate(torch.autograd.grad(total, leaves)):
        torch.testing.assert_close(gradient, 2 * (3 - n // 2) * leaves[n].detach())


def test_what_was_cached_under_inference_may_go_on_outside_it() -> None:
    layer, parts = fv.KeyValueCache(1)[0], pieces(3, 2, 1)
    with torch.inference_mode():
        layer.append(*parts[0])
        layer.append(*parts[1])
    assert torch.equal(layer.append(*parts[2])[0], joined(parts)[0])


def test_a_context_is_projected_once() -> None:
    cache, calls = fv.KeyValueCache(2), []

    def project() -> tuple[Tensor, Tensor]:
        calls.append(1)
        return pieces(4)[0]

    first = cache.once(1, project)
    assert cache.once(1, project) is first
    assert cache.once(0, project) is not first
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("k", "said"),
    [
        (torch.zeros(2, 3, 1), "wanted \\[batch, heads, length, dim\\]"),
        (torch.zeros(1, 3, 1, 5), "k is <float32 1×3×1×5>, but the cache holds <float32 2×3×4×5>"),
        (torch.zeros(2, 3, 1, 5, dtype=torch.float64), "k is <float64"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_kept(k: Tensor, said: str) -> None:
    layer = fv.KeyValueCache(1)[0]
    layer.append(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5))
    with pytest.raises(fv.InvalidInput, match=said):
        layer.append(k, torch.zeros_like(k))
    assert layer.length == 4


def test_a_cache_without_layers_is_refused() -> None:
    with pytest.raises(fv.InvalidInput, match="the number of layers is 0"):
        fv.KeyValueCache(0)
