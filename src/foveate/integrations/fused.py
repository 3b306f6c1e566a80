"""What our CPU kernels take of PyTorch's attention calls, and its computation.

From tensors to the compiled kernels in as little Python as there can be: a short call lasts some microseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.dispatch.thresholds import leads_backward, leads_forward
from foveate.pattern.block_mask import Summary
from foveate.pattern.packed_mask import TILE, summarise_matrix
from foveate.primitives import readable
from foveate.softmax.native import _DTYPES, ALL_TILES, NO_BIAS, _matrix, bare

try:
    from foveate import _native
except ImportError:
    _native = None  # type: ignore[assignment]

EMPTY = "an empty tensor"
SLOWER = "PyTorch's kernel is as fast or faster"

_NOTHING, _HIDDEN = (torch.tensor(x, dtype=torch.float32, device="cpu") for x in (0.0, -math.inf))
_LARGE = 64  # a log-sum-exp beyond which the order of sums shows in the weights, as in native/bases.hpp
_FEW_PAIRS = 4096  # below, finding the tiles that a mask leaves empty takes longer than it saves


def missing() -> bool:
    """Whether the package was installed without its compiled kernels."""
    return _native is None


def refusal(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, *, grouped: bool
) -> str:
    """Why our kernels leave a call to PyTorch, of whatever it will say about it; empty if they take it.

    What is wrong with a call is PyTorch's to say, so every wrong call is among the refused.
    """
    if dropout != 0:
        return "dropout draws from PyTorch's own random stream"
    dtype, shape = q.dtype, q.shape
    if dtype not in _DTYPES or not dtype == k.dtype == v.dtype:
        return f"dtype {str(dtype).removeprefix('torch.')}"
    if len(shape) != 4 or not shape == k.shape == v.shape:
        if not len(shape) == k.dim() == v.dim() == 4:
            return "numbers of dimensions that differ"
        heads, key_heads = shape[1], k.shape[1]
        if k.shape[:3] != v.shape[:3] or k.shape[0] != shape[0] or k.shape[3] != shape[3]:
            return "shapes that are broadcast or wrong"
        if heads != key_heads and not (grouped and key_heads and heads % key_heads == 0):
            return "shapes that are broadcast or wrong"
    if not (q.numel() and v.numel()):
        return EMPTY
    if mask is not None:
        if causal or mask.dim() != 4 or mask.dtype not in (torch.bool, torch.float32, dtype):
            return "a mask of unusual shape or dtype"
        full = (*shape[:3], k.shape[2])
        if any(size not in (1, whole) for size, whole in zip(mask.shape, full, strict=True)):
            return "a mask of unusual shape or dtype"
    return ""


def refusal_of_gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, lse: Tensor
) -> str:
    """Why the gradients of a call are left to PyTorch; empty if `gradients` computes them."""
    why = refusal(q, k, v, mask, dropout, causal, grouped=True)
    if why or leads_backward(q):
        return why
    # PyTorch sums a score in its own order: of large ones it would make other weights than our forward pass, or NaN.
    return "" if leads_forward(q, k) and float(lse.abs().amax()) > _LARGE else SLOWER


@dataclass(frozen=True, slots=True)
class _Seen:
    """What of the scores counts, as the kernel takes it: the tiles in rows, a bias, and what keeps both alive."""

    tiles: tuple[int, int, int, int, int, int]
    right: int  # how far behind its own place a row sees; −1: no limit
    bias: tuple[int, int, int, int, int]
    alive: tuple[Tensor, ...]


_EVERYTHING = _Seen(ALL_TILES, -1, NO_BIAS, ())


@dataclass(frozen=True, slots=True)
class Plan:
    """A call that our kernel computes: q, k, v with four dimensions, the last one dense."""

    q: Tensor
    k: Tensor
    v: Tensor
    seen: _Seen


def plan(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, *, grouped: bool
) -> tuple[Plan | None, str]:
    """What to compute, or None and why it is left to PyTorch."""
    why = refusal(q, k, v, mask, dropout, causal, grouped=grouped)
    if why:
        return None, why
    if not leads_forward(q, k):
        return None, SLOWER
    return Plan(readable(q), readable(k), readable(v), _seen(mask, causal, q.shape[2], k.shape[2])), ""


def _seen(mask: Tensor | None, causal: bool, queries: int, keys: int) -> _Seen:
    if causal:  # top-left: the first query stands at the first key
        return _Seen(ALL_TILES, 0, NO_BIAS, ())
    return _EVERYTHING if mask is None else _by_mask(mask, queries, keys)


def _by_mask(mask: Tensor, queries: int, keys: int) -> _Seen:
    """A mask that only hides becomes tiles, of which the empty ones cost nothing; any other one is a bias."""
    if 0 in mask.stride():  # a dimension that was expanded holds one entry
        mask = mask[tuple(slice(0, 1 if step == 0 else None) for step in mask.stride())]
    if keys > TILE and queries * keys > _FEW_PAIRS:
        visible = mask if mask.dtype == torch.bool else _only_hides(mask)
        if visible is not None:
            return _in_tiles(summarise_matrix(visible, queries, keys))
    bias = added(mask).float()
    b, h, row, key = (0 if size == 1 else step for size, step in zip(bias.shape, bias.stride(), strict=True))
    return _Seen(ALL_TILES, -1, (bias.data_ptr(), b, h, row, key), (bias,))


def _only_hides(mask: Tensor) -> Tensor | None:
    """Where a float mask is 0, if it is −inf everywhere else; None for a real bias, which its first row gives away."""
    visible = None
    for part in (mask[:, :, :1], mask):
        visible = part == 0
        if not bool((visible | (part == -math.inf)).all()):
            return None
    return visible


def _in_tiles(summary: Summary) -> _Seen:
    parts = tuple(x.contiguous() for x in (summary.offsets, summary.columns, summary.partial, summary.bits))
    offsets, columns, partial, bits = (x.data_ptr() for x in parts)
    return _Seen((offsets, columns, partial, bits, summary.batch, summary.heads), -1, NO_BIAS, parts)


def compute(plan: Plan, scale: float | None, out: Tensor) -> Tensor:
    """Fill out `[B, H, Nq, Dv]` and return the log-sum-exp `[B, H, Nq]`."""
    lse = torch.empty(plan.q.shape[:3], dtype=torch.float32, device="cpu")
    _native.forward(*_call(plan, scale, out, lse))
    return lse


def gradients(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool,
    scale: float | None,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    call = Plan(readable(q), readable(k), readable(v), _seen(mask, causal, q.shape[2], k.shape[2]))
    d_out, out, lse = readable(d_out), readable(out), lse.contiguous()
    found = [torch.zeros(x.shape, dtype=torch.float32, device="cpu") for x in (q, k, v)]
    dq, dk, dv = (x.data_ptr() for x in found)
    _native.backward(*_call(call, scale, out, lse), _matrix(d_out), 0, (dq, dk, dv), (0, 0, 0, 0, 0), (0, 1))
    return [x.to(q.dtype) for x in found]


def _call(plan: Plan, scale: float | None, out: Tensor, lse: Tensor) -> tuple[object, ...]:
    """What the kernels take first, as `foveate.softmax.native` says it."""
    q, k, v, seen = plan.q, plan.k, plan.v, plan.seen
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    return bare(q, k, v, out, lse, scale, (0, 0, 0, -1, seen.right), seen.tiles, seen.bias)


def added(mask: Tensor) -> Tensor:
    """A mask as what it adds to the scores."""
    return torch.where(mask, _NOTHING, _HIDDEN) if mask.dtype == torch.bool else mask
