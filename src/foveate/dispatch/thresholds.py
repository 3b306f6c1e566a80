"""Where our CPU kernels take no longer than PyTorch's, as measured: a table for each kind of processor.

`auto` and `accelerate()` ask it. Below its limits they leave a call to PyTorch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.problem import Problem

try:
    from foveate import _native
except ImportError:
    _native = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Lead:
    """From where on our kernels take no longer than PyTorch's, in one dtype.

    `queries`, `gradient`: so many queries, forward and backward. `products`: of q with k in a call of
    `foveate.attention`, which costs more than PyTorch's own around them. `shared`, `alone`: a few queries read so many
    numbers of k (key heads · keys · dim), in heads that share them or each its own; None: never.
    """

    queries: int
    gradient: int
    products: int
    shared: int
    alone: int | None = None


# With instructions for bfloat16, on a CPU with AMX. benchmarks/results/xeon-amx/softmax.json has rows from 64 queries
# on, of decoding (32 heads on 8 of 128, from 1 << 21 numbers on), and of training in float32 and bfloat16. What it has
# no row for was timed by its clock: float16, 8 to 64 queries, heads of 128 and 256, gradients of 32 queries on one
# core, fewer numbers against PyTorch's kernel with the heads of a group as queries on two.
_WITH_PAIRS = {
    torch.float32: Lead(queries=64, gradient=64, products=1 << 23, shared=1 << 18, alone=1 << 18),
    torch.bfloat16: Lead(queries=64, gradient=32, products=1 << 23, shared=1 << 18),
    torch.float16: Lead(queries=16, gradient=32, products=1 << 23, shared=1 << 18, alone=1 << 18),
}
# Without, on a CPU with plain AVX-512, where PyTorch's bfloat16 is slow; the same of benchmarks/results/xeon-avx512.
_WITHOUT_PAIRS = {
    torch.float32: Lead(queries=16, gradient=64, products=1 << 22, shared=1 << 21, alone=1 << 21),
    torch.bfloat16: Lead(queries=8, gradient=16, products=1 << 19, shared=1 << 19, alone=1 << 16),
    torch.float16: Lead(queries=32, gradient=16, products=1 << 21, shared=1 << 22, alone=1 << 20),
}
_DECODING = 4  # queries; memory limits so few


def lead(dtype: torch.dtype) -> Lead:
    """The limits of this machine."""
    return (_WITH_PAIRS if has_pairs() else _WITHOUT_PAIRS)[dtype]


def leads_forward(q: Tensor, k: Tensor) -> bool:
    """Whether q and k alone say that our kernel takes no longer than PyTorch's fused one."""
    (_, heads, queries, _), (batch, key_heads, keys, dim) = q.shape, k.shape
    limits = lead(q.dtype)
    if queries <= _DECODING:
        least = limits.alone if heads == key_heads else limits.shared
        return least is not None and batch * key_heads * keys * dim >= least
    return queries >= limits.queries


def leads_backward(q: Tensor) -> bool:
    """Whether our gradients take no longer than PyTorch's."""
    return q.shape[2] >= lead(q.dtype).gradient


def leads(problem: Problem) -> bool:
    """Whether a call of `foveate.attention` gains by these kernels, where PyTorch's fused one could take it."""
    if _native is None or problem.q.dtype not in _WITH_PAIRS:
        return False
    if torch.compiler.is_compiling():  # a graph serves every length
        return True
    batch, heads, queries, keys = problem.shape
    products = batch * heads * queries * keys * problem.q.shape[3]
    if queries > _DECODING and products < lead(problem.q.dtype).products:
        return False
    return leads_forward(problem.q, problem.k)


@functools.cache
def has_pairs() -> bool:
    """Whether the kernel of this machine multiplies bfloat16 as it is."""
    return bool(_native.chosen() in ("amx", "avx512bf16"))
