"""Native Sparse Attention's first two branches: keys compressed by windows, and blocks chosen by attention to them.

    tokens      0 ──────── 16 ─────── 32 ─────── 48 ─────── 64 ─────── 80
    compressed  [═══ key 0 ═══════════]
                           [═══ key 1 ═══════════]
                                      [═══ key 2 ═══════════]
    blocks      [─────────────── block 0 ───────────────────][───── block 1 …

A block is worth the weight of the compressed keys that cover its tokens, each as often as it covers 16 of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.pattern.algebra import Pattern
from foveate.pattern.positional import causal, pooled
from foveate.pattern.selected import selected
from foveate.positions import grid
from foveate.primitives import normalized, raw_scores
from foveate.problem import accumulator, problem
from foveate.selection.choosing import by_rows, highest, how_many
from foveate.values import describe, whole
from foveate.words import explained


@explained
def compress(
    x: Float[Tensor, "batch heads length dim"],
    *,
    length: int = 32,
    stride: int = 16,
    network: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch heads windows dim"]:
    """One key (or value) for each window of `length` tokens, `stride` apart; what fills no whole window is left out.

    Args:
        network: from `[batch, heads, windows, length, dim]` to `[batch, heads, windows, dim]`; None = the mean.

    Yuan et al. 2025, equation 7: https://arxiv.org/abs/2502.11089

    >>> import torch
    >>> import foveate as fv
    >>> fv.selection.compress(torch.arange(7.0).view(1, 1, 7, 1), length=4, stride=2).flatten()
    tensor([1.5000, 3.5000])
    """
    _check_windows(length, stride)
    if not isinstance(x, Tensor) or x.dim() != 4:
        raise InvalidInput(f"compress was given {describe(x)}: wanted [batch, heads, length, dim]")
    if x.shape[2] < length:
        windows = x.new_empty(*x.shape[:2], 0, length, x.shape[3])
    else:
        windows = x.unfold(2, length, stride).mT
    return windows.mean(3) if network is None else network(windows)


@explained
def select(
    q: Float[Tensor, "batch heads queries dim"],
    compressed: Float[Tensor, "batch key_heads windows dim"],
    *,
    keys: int,
    length: int = 32,
    stride: int = 16,
    block: int = 64,
    top_k: int = 16,
    first: int = 1,
    local: int = 2,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
) -> Pattern:
    """The `top_k` blocks of tokens that a group of query heads gives most attention, as far as `compressed` tells.

    p = softmax(scale · q · compressed keys) is summed over the windows that overlap a block, each by how much of it
    lies inside, and over the query heads of a group. The first blocks and the last ones (the own block and those
    before) are always among the `top_k`.

    Args:
        keys: how many tokens there are.
        length, stride: of the windows that `compress` made `compressed` from; `stride` divides `length` and `block`.
        first, local: how many blocks at the beginning, and how many up to the own one, are forced.
        query_start: the position of the first query among the tokens; None = the last stands at the last.

    Returns:
        `causal & selected(indices, block=block)`, indices int32 `[batch, key heads, queries, top_k]`.

    Raises:
        InvalidInput: sizes that do not divide, a top_k above the number of blocks or below first + local.

    Yuan et al. 2025, equations 8 to 12: https://arxiv.org/abs/2502.11089

    >>> import torch
    >>> import foveate as fv
    >>> q, k = torch.ones(1, 1, 10, 1), torch.tensor([1.0] * 2 + [9.0] * 2 + [1.0] * 6).view(1, 1, 10, 1)
    >>> compressed = fv.selection.compress(k, length=2, stride=1)
    >>> sizes = {"length": 2, "stride": 1, "block": 2, "top_k": 2, "first": 0, "local": 1}
    >>> print(fv.selection.select(q, compressed, keys=10, **sizes).picture(10, 10).splitlines()[-1])
    . . 1 1 . . . . 1 1
    """
    _check_windows(length, stride)
    size = whole(block, "the block size", 1)
    if size % stride:
        raise InvalidInput(f"the block of {size} tokens is no multiple of the stride {stride}: change one of them")
    tokens = whole(keys, "the number of keys", 0)
    windows = max(0, (tokens - length) // stride + 1)
    if isinstance(compressed, Tensor) and compressed.dim() == 4 and compressed.shape[2] != windows:
        raise InvalidInput(
            f"compressed is {describe(compressed)}: {tokens} keys make {windows} windows of {length}, {stride} apart"
        )
    forced = whole(first, "first", 0) + whole(local, "local", 1)
    blocks = -(-tokens // size)
    count = how_many(top_k, blocks, f"blocks of {size} keys")
    if count < min(forced, blocks):
        raise InvalidInput(f"top_k is {count} but {first} first and {local} local blocks are forced: wanted {forced}")
    start = tokens - q.shape[2] if query_start is None else query_start
    call = problem(q, compressed, compressed, pooled(length, stride), scale=scale, query_start=start)
    batch, heads, queries, _ = call.shape
    wide, column = accumulator(q.dtype), torch.arange(blocks, device=q.device)

    def compute(b: slice, rows: slice, held: list[Tensor]) -> Tensor:
        some_q, some_k = held
        box = b, slice(0, heads), rows
        at = call.pairs((*box, slice(0, windows)))
        scores = raw_scores(some_q.to(wide), some_k.to(wide)) * call.scale
        shares = normalized(call, scores, at)[0].unflatten(1, (-1, call.group)).sum(2)
        worth = _by_overlap(shares, length, stride, size, blocks)
        own = (
            grid(batch, 1, queries, tokens, call.query_start, q.device, (b, slice(0, 1), rows, slice(0, 1))).query
            // size
        )
        worth = worth.masked_fill((column < first) | (column > own - local), math.inf)
        return highest(worth.masked_fill(column > own, -math.inf), count)

    chosen = by_rows(compute, [call.q], [call.k], heads * max(windows, blocks))
    return causal & selected(chosen, block=size)


def _check_windows(length: int, stride: int) -> None:
    if whole(length, "the length of a window", 1) % whole(stride, "the stride", 1):
        raise InvalidInput(f"windows of {length} tokens are no multiple of the stride {stride}: change one of them")


def _by_overlap(shares: Tensor, length: int, stride: int, block: int, blocks: int) -> Tensor:
    """Weights of windows as weights of blocks, each window by how many strides of it lie inside the block."""
    before, across = length // stride - 1, block // stride
    padded = torch.nn.functional.pad(shares, (before, blocks * across))
    total = shares.new_zeros(*shares.shape[:3], blocks)
    for offset in range(-before, across):
        inside = min(offset * stride + length, block) - max(offset * stride, 0)
        windows = padded[..., before + offset :: across][..., :blocks]
        total = total + (inside // stride) * windows
    return total
