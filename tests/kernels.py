"""The compiled kernels one by one, and what tests ask of each."""

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.problem import Problem, Result
from foveate.softmax import native

KERNELS: list[str] = native._native.kernels()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on(kernel: str = "", threads: int = 1) -> Callable[[Problem], Result]:
    """The implementation on a named kernel ("" = the best one) and so many threads."""
    return lambda call: Result(*native._run(call, kernel, threads))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def derived(result: Result, leaves: list[Tensor]) -> list[Tensor]:
    """out, lse, and the gradients of a fixed random sum of both."""
    assert result.lse is not None
    d_out, d_lse = (normal(*x.shape, seed=seed).to(x.dtype) for seed, x in ((3, result.out), (5, result.lse)))
    total = (result.out * d_out).sum() + (result.lse.masked_fill(result.lse.isinf(), 0) * d_lse).sum()
    return [result.out.detach(), result.lse.detach(), *torch.autograd.grad(total, leaves)]


def same_bits(found: list[Tensor], true: list[Tensor]) -> bool:
    """Whether two lists of results are equal to the bit (NaN of any kind are equal here)."""
    return all(torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) for a, b in zip(found, true, strict=True))
