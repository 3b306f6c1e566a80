"""Thousands of random calls: sizes around the edges of tiles, odd heads and groups, strides, everything at once."""

import itertools
from typing import TypeVar

import pytest
import torch
from budget import complaint
from kernels import DTYPES, KERNELS, on
from torch import Tensor

import foveate as fv
from foveate.problem import Problem, problem

T = TypeVar("T")
LENGTHS = 1, 2, 7, 16, 17, 63, 64, 65, 127, 128, 129, 130, 193
DIMS = 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 48, 59, 64, 65, 80, 96, 111, 127, 128, 129, 257, 512


class Draw:
    """A generator of random calls.

    Where every row sees one key and no more, the gradient of a score is 0 and plain torch finds it without any error,
    so there is no budget: with `several`, most rows see several keys.
    """

    def __init__(self, seed: int, *, several: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.several = several

    def pick(self, *choices: T) -> T:
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def matrix(self, *shape: int) -> Tensor:
        """One of any layout that has a use."""
        batch, heads, length, dim = shape
        match self.pick("plain", "heads last", "inside", "expanded", "dim first", "apart"):
            case "heads last":
                return self.normal(batch, length, heads, dim).transpose(1, 2)
            case "inside":
                return self.normal(batch, heads, length + 2, dim + 3)[:, :, 1 : length + 1, 1 : dim + 1]
            case "expanded":
                return self.normal(1, heads, length, dim).expand(shape)
            case "dim first":
                return self.normal(batch, heads, dim, length).mT
            case "apart":
                return self.normal(batch, heads, length, 2, dim)[:, :, :, 1]
            case _:
                return self.normal(*shape)

    def pattern(self, batch: int, heads: int, queries: int, keys: int) -> fv.Pattern | None:
        lengths = torch.randint(7 if self.several else 0, keys + 1, (batch,), generator=self.generator)
        mask = torch.rand(batch, 1, queries, keys, generator=self.generator) > self.pick(
            0.02, 0.3, 0.6 if self.several else 0.98
        )
        least = 9 if self.several else 1
        return self.pick(
            None,
            fv.causal,
            fv.causal & fv.window(self.pick(least, 64, 65)),
            fv.window(left=self.pick(least - 1, 63), right=5),
            fv.window(right=self.pick(0, 1, 64)),
            fv.padding(lengths),
            fv.causal & fv.padding(lengths),
            fv.window(10 * least, step=3),
            fv.from_mask(mask),
            fv.causal & fv.chunks(33),
            fv.streaming(2, 40),
        )

    def score(self, batch: int, heads: int, queries: int, keys: int) -> fv.Score | None:
        terms = [
            fv.alibi(self.normal(heads).abs() / (90 if self.several else 9)),
            fv.relative_bias(self.normal(self.pick(3, 33), heads)),
            fv.bias(
                self.normal(
                    *(self.pick(1, n) for n in (batch, heads, queries)), keys if self.several else self.pick(1, keys)
                )
            ),
            fv.softcap(self.pick(0.9, 7.0)),
            fv.sinks(self.normal(heads)),
        ]
        chosen = [term for term in terms if self.pick(True, False, False, False)]
        return sum(chosen[1:], chosen[0]) if chosen else None

    def call(self) -> Problem:
        batch, key_heads, group = self.pick(1, 2, 3), self.pick(1, 2), self.pick(1, 1, 2, 5)
        queries, keys = self.pick(*LENGTHS), self.pick(*LENGTHS[3 if self.several else 0 :], 321)
        dim, value_dim = self.pick(*DIMS), self.pick(*DIMS)
        sizes = batch, key_heads * group, queries, keys
        starts = torch.randint(-70, 200, (batch,), generator=self.generator)
        return problem(
            self.matrix(batch, key_heads * group, queries, dim),
            self.matrix(batch, key_heads, keys, dim),
            self.matrix(batch, key_heads, keys, value_dim),
            self.pattern(*sizes),
            score=self.score(*sizes),
            scale=self.pick(None, None, -(dim**-0.5)) if self.several else self.pick(None, 0.2, -0.2),
            query_start=None if self.several else self.pick(None, 0, -9, starts),
            dropout=self.pick(0.0, 0.0, 0.0, 0.4),
            seed=int(torch.randint(2**62, (), generator=self.generator)),
            needs_lse=True,
        )


def sweep(dtype: torch.dtype, cases: int, first: int, gradients: bool) -> None:
    kernels = itertools.cycle(KERNELS)
    for seed in range(first, first + cases):
        draw = Draw(seed, several=gradients)
        call, kernel, threads = draw.call(), next(kernels), draw.pick(1, 2)
        alike = draw.pick((), (), (3,), (1, 2), (0, 1, 2, 3))  # strides of 0 in the gradient of the output
        words = complaint(on(kernel, threads), call, dtype, gradients=gradients, alike=alike)
        assert not words, f"case {seed} on {kernel}, {threads} threads, alike along {alike}, {call}: {words}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sweep_forward(dtype: torch.dtype) -> None:
    sweep(dtype, 150, 10_000, gradients=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sweep_of_gradients(dtype: torch.dtype) -> None:
    sweep(dtype, 50, 20_000, gradients=True)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_sweep_forward(dtype: torch.dtype, part: int) -> None:
    sweep(dtype, 400, 30_000 + 400 * part, gradients=False)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_sweep_of_gradients(dtype: torch.dtype, part: int) -> None:
    sweep(dtype, 120, 40_000 + 120 * part, gradients=True)
