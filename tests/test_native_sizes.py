"""Any head size from 1 to 512, that of the values another one, by every way through the kernels; offsets past 2³¹."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import test_native_looked
import test_paged
import torch
from budget import Budget
from kernels import DTYPES, KERNELS, normal, on
from torch import Tensor

import foveate as fv
from foveate.errors import Unsupported
from foveate.problem import Problem, problem
from foveate.softmax import native

FEW = (1, 2, 5, 15, 16, 17, 33, 63, 64, 65, 130, 257, 511, 512)
ALL = [pytest.param(dim, marks=() if dim in FEW else pytest.mark.slow) for dim in range(1, 513)]


def of_values(dim: int) -> int:
    """Another size from 1 to 512 for every size: 331 has no factor in common with 512."""
    return 1 + dim * 331 % 512


def sized(dim: int, queries: int, pattern: fv.Pattern | None = None) -> Problem:
    q, k = normal(1, 2, queries, dim), normal(1, 1, 67, dim, seed=1)
    return problem(q, k, normal(1, 1, 67, of_values(dim), seed=2), pattern, needs_lse=True)


CHOSEN = torch.randint(-1, 67, (1, 1, 7, 19), generator=torch.Generator().manual_seed(3))
WAYS = {
    "many queries": lambda dim: sized(dim, 66, fv.causal),
    "the next token": lambda dim: sized(dim, 1),
    "chosen keys": lambda dim: sized(dim, 7, fv.selected(CHOSEN)),
}


@pytest.mark.parametrize("dim", ALL)
@pytest.mark.parametrize("way", WAYS)
def test_every_head_size(way: str, dim: int) -> None:
    """Of keys and of values, forward and backward."""
    for dtype in DTYPES:
        budget = Budget(WAYS[way](dim), dtype, gradients=way != "the next token", few=True)  # one of 23,000
        for kernel in KERNELS:
            budget.check(on(kernel))


@pytest.mark.parametrize("dim", ALL)
def test_every_head_size_in_pages(dim: int) -> None:
    for dtype in DTYPES:
        budget = Budget(test_paged.few(16, 1, 1, dim, None, None), dtype, gradients=False)
        for kernel in KERNELS:
            budget.check(test_paged.in_pages(16, kernel))


@pytest.mark.parametrize("dim", ALL)
def test_every_head_size_is_looked_at(dim: int) -> None:
    test_native_looked.agrees(sized(dim, 66, fv.causal), DTYPES[dim % 3], 3)


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Tensor]:
    """More than 2³³ entries, of which only those that are touched take memory: a file with holes."""
    place = tmp_path / "sparse"
    with place.open("wb") as file:
        file.truncate(9 << 32)
    yield torch.from_file(str(place), shared=True, size=9 << 30, dtype=torch.float32)
    place.unlink()


def apart(far: Tensor, x: Tensor, axis: int, start: int) -> Tensor:
    """The same numbers, with such steps along one axis that its end lies more than 2³² entries behind its start."""
    strides = list(x.contiguous().stride())
    strides[axis] = (1 << 32) // max(1, x.shape[axis] - 1) + 3
    return far.as_strided(x.shape, strides, start).copy_(x)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "heads", "rows"])
def test_offsets_past_two_to_the_31(far: Tensor, axis: int) -> None:
    """q, k, v and the gradient of the output, by every way; a bias too, whose offsets are its own."""
    shapes = ((2, 4, 70, 8), (2, 2, 75, 8), (2, 2, 75, 6), (2, 4, 70, 6))
    near = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    *inputs, d_out = (apart(far, x, axis, 10_000 * (n + 1)) for n, x in enumerate(near))
    plain, bias = normal(2, 4, 70, 75, seed=5), apart(far, normal(2, 4, 70, 75, seed=5), axis, 100_000)
    lists = fv.selected(torch.randint(-1, 75, (1, 2, 70, 9), generator=torch.Generator().manual_seed(3)))
    for kernel in KERNELS:
        for pattern, score in ((fv.causal, True), (lists, False)):
            found = []
            for tensors, added, gradient in ((inputs, bias, d_out), (near[:3], plain, near[3])):
                leaves = [x.detach().requires_grad_() for x in tensors]
                out = on(kernel)(problem(*leaves, pattern, score=fv.bias(added) if score else None)).out
                found.append([out, *torch.autograd.grad(out, leaves, gradient)])
            assert all(torch.equal(*pair) for pair in zip(*found, strict=True)), kernel
        few = [x[:, :, -1:] for x in (inputs[0], near[0])]  # the next token
        given = (few[0], *inputs[1:]), (few[1], *near[1:3])
        assert torch.equal(*(on(kernel)(problem(*tensors)).out for tensors in given)), kernel
        looked = [native.looked(problem(*tensors, fv.causal), 3, kernel) for tensors in (inputs, near[:3])]
        assert all(torch.equal(*pair) for pair in zip(*looked, strict=True)), kernel


def test_pages_past_two_to_the_31(far: Tensor) -> None:
    q, key_pages, value_pages = normal(2, 4, 1, 8), normal(5, 2, 16, 8, seed=1), normal(5, 2, 16, 6, seed=2)
    table, lengths = torch.tensor([[4, 0], [2, 3]]), torch.tensor([20, 32])
    wide = apart(far, key_pages, 0, 10_000), apart(far, value_pages, 0, 20_000)
    found = [
        fv.paged_attention(q, *pages, table, lengths, backend="native") for pages in (wide, (key_pages, value_pages))
    ]
    assert torch.equal(*found)


def test_more_keys_than_an_index_can_say_are_not_looked_at() -> None:
    q, k = normal(1, 1, 1, 1), normal(1).expand(1, 1, 1 << 31, 1)
    with pytest.raises(Unsupported, match="looks at fewer than 2³¹ keys, and there are 2147483648"):
        native.looked(problem(q, k, k, fv.causal & fv.window(3)), 2)
