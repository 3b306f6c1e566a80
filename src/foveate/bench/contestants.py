"""One function for each way to compute a row: ours through the public call, each peer as its own users write it.

- native, auto: `foveate.attention`, by name and by choice
- avx2: our kernel for machines without AVX-512
- looked: `foveate.inspection.looked`: the eight largest weights of each row, and what each key received
- sdpa: PyTorch's scaled_dot_product_attention: plain, causal, or with grouped heads
- sdpa mask: the same, with the pattern as a boolean matrix
- folded: the same for decoding, with the heads of a group as queries: no mask, no repeated keys
- eager: softmax(q·kᵀ)·v in three calls of PyTorch
- flex: FlexAttention, compiled, with a block mask that was made beforehand
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.bench.rows import Row
from foveate.errors import unknown_name, unsupported
from foveate.functional import attention
from foveate.inspection import looked
from foveate.pattern.algebra import Pattern
from foveate.pattern.positional import causal
from foveate.positions import Pairs

Turn = Callable[[], tuple[Tensor, ...]]
_Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

OURS = ("native", "auto", "avx2", "looked")
PEERS = ("sdpa", "sdpa mask", "folded", "eager", "flex")
TOP = 8  # weights of each row that `looked` lists
_EAGER_BYTES = 1 << 30  # of scores; beyond, eager is left out
_MASK_BYTES = 1 << 30  # of a boolean matrix


def prepare(name: str, row: Row, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> Turn:
    """What one turn of a contestant computes: (out,), or (out, dQ, dK, dV), or what `looked` gives.

    Raises `Unsupported` where it cannot. What a user makes once, a mask or a compiled kernel, is made here.
    """
    if name == "looked":
        return _looked(row, q, k, v)
    attend = _attend(name, row, q, k, v)
    if not row.gradients:
        return lambda: (attend(q, k, v),)

    def both() -> tuple[Tensor, ...]:
        out = attend(q, k, v)
        return (out, *torch.autograd.grad(out, (q, k, v), upstream))

    return both


def _attend(name: str, row: Row, q: Tensor, k: Tensor, v: Tensor) -> _Attend:
    match name:
        case "native" | "auto":
            return lambda q, k, v: attention(q, k, v, row.pattern, backend=name)
        case "avx2":
            return _kernel("avx2", row, q, k, v)
        case "sdpa":
            return _sdpa(row)
        case "sdpa mask":
            return _sdpa_mask(row)
        case "folded":
            return _folded
        case "eager":
            return _eager(row)
        case "flex":
            return _flex(row)
    raise unknown_name("contestant", name, OURS + PEERS)


def _kernel(kernel: str, row: Row, q: Tensor, k: Tensor, v: Tensor) -> _Attend:
    from foveate.softmax import native

    reasons = native.refuses(row.problem(q, k, v))
    if not reasons:
        from foveate import _native

        if kernel not in _native.kernels():
            reasons = [f"this machine has no {kernel}"]
    if reasons:
        raise unsupported({"native": reasons})
    return lambda q, k, v: native._run(row.problem(q, k, v), kernel=kernel, threads=0)[0]


def _looked(row: Row, q: Tensor, k: Tensor, v: Tensor) -> Turn:
    def turn() -> tuple[Tensor, ...]:
        seen = looked(row.problem(q, k, v), k=TOP)
        return seen.indices, seen.weights, seen.rest, seen.received, seen.lse

    return turn


def _sdpa(row: Row) -> _Attend:
    if row.pattern not in (None, causal):
        raise unsupported({"sdpa": [f"has no {row.pattern!r} without a mask"]})
    is_causal, grouped = row.pattern is not None, row.heads != row.key_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=grouped)

    return attend


def _sdpa_mask(row: Row) -> _Attend:
    pattern = row.pattern
    assert pattern is not None
    heads = row.heads if row.block else 1  # blocks are drawn for each head
    if heads * row.queries * row.keys > _MASK_BYTES:
        raise unsupported({"sdpa": ["the mask takes more than 1 GiB"]})
    mask = pattern.dense(row.queries, row.keys, heads=heads).contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    return attend


def _folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, _, dim = q.shape
    rows = q.view(batch, k.shape[1], heads // k.shape[1], dim)
    return torch.nn.functional.scaled_dot_product_attention(rows, k, v).view(q.shape)


def _eager(row: Row) -> _Attend:
    if 4 * row.batch * row.heads * row.queries * row.keys > _EAGER_BYTES:
        raise unsupported({"eager": ["its scores take more than 1 GiB"]})
    scale = 1 / math.sqrt(row.dim)
    hidden = None if row.pattern is None else ~row.pattern.dense(row.queries, row.keys)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT) * scale
        return (scores if hidden is None else scores.masked_fill(hidden, -math.inf)).softmax(-1) @ v

    return attend


def _flex(row: Row) -> _Attend:
    if not (shutil.which("g++") or shutil.which("clang++")):
        raise unsupported({"flex": ["it compiles C++ at run time and there is no g++ or clang++"]})
    from torch.nn.attention.flex_attention import create_block_mask

    pattern = row.pattern
    assert pattern is not None
    # Its own users write a random pattern as a table of blocks: drawing again for each pair would be slower.
    rule = _block_table(pattern, row) if row.block else pattern.mask_mod(0, row.keys)
    heads = row.heads if row.block else None
    mask = create_block_mask(rule, None, heads, row.queries, row.keys, device="cpu")
    attend = _compiled_flex()
    return lambda q, k, v: attend(q, k, v, block_mask=mask)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _block_table(pattern: Pattern, row: Row) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A mask_mod that reads one boolean for each head and pair of blocks."""
    size = row.block
    head = torch.arange(row.heads).view(1, -1, 1, 1)
    query, key = (torch.arange(0, row.keys, size).view(1, 1, *shape) for shape in ((-1, 1), (1, -1)))
    at = Pairs(torch.zeros(1, 1, 1, 1, dtype=torch.int64), head, query, query, key, row.keys, heads=row.heads)
    blocks = row.keys // size
    table = pattern.visible(at).broadcast_to(1, row.heads, blocks, blocks)[0].contiguous()
    return lambda b, h, query, key: table[h, query // size, key // size]
