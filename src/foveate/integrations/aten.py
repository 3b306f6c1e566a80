"""`scaled_dot_product_attention` on Foveate's CPU kernels, entered where aten itself dispatches.

    entry of aten                                   who comes here
    scaled_dot_product_attention                    eager calls that need no gradient, of any rank
    _scaled_dot_product_flash_attention_for_cpu     what PyTorch's own choice leads to: training, compiled graphs
    _scaled_dot_product_flash_attention_for_cpu_backward    the gradient of that

No kernel of PyTorch's is replaced. The first entry is a formula without a kernel for the CPU, so ours is its only one;
the others get a kernel at `BackendSelect`, the step right above the CPU's. What we do not take goes on to where it
would have gone. Checks and their errors, autocast, autograd, torch.func, traces and modes act above all this, as ever.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad

from foveate.pattern.matrix import TILE, summarise_matrix
from foveate.pattern.memory import summarise
from foveate.pattern.positional import causal as causal_pattern
from foveate.pattern.summary import Summary
from foveate.score import bias as bias_score
from foveate.softmax import chunked

try:
    from foveate import _native
except ImportError:
    _native = None  # type: ignore[assignment]

# Told of every call: "forward" or "backward", and why PyTorch computes it, which is empty where Foveate does.
Tell = Callable[[str, str], None]

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

_BELOW = torch._C._dispatch_keyset_full_after(DispatchKey.BackendSelect)
_PLAIN = functools.reduce(
    lambda keys, key: keys.add(key),
    (DispatchKey.BackendSelect, DispatchKey.ADInplaceOrView, DispatchKey.AutogradCPU, DispatchKey.AutocastCPU),
    DispatchKeySet(DispatchKey.CPU),
).raw_repr()
_UNUSUAL = ~_PLAIN  # the bits of subclasses, transforms, traces, modes and other devices

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CHOICE_FUSED = 1  # of `torch._fused_sdp_choice`
_NOTHING, _HIDDEN = (torch.tensor(x, dtype=torch.float32, device="cpu") for x in (0.0, -math.inf))
_FEW_PAIRS = 4096  # below, finding the tiles that a mask leaves empty takes longer than it saves
_LOWEST = -2e38  # the kernel multiplies by log₂e: the least float32 would become −inf, which hides
_EMPTY = "an empty tensor"
_SLOWER = "PyTorch's kernel is as fast or faster"


def slower(dtype: torch.dtype, queries: int, computed: float, *, biased: bool) -> bool:
    """Whether PyTorch's forward kernel takes no longer than ours; `computed` is the part of the tiles that is needed.

    Measured on two cores with AVX-512 and AMX against PyTorch 2.13: for now ours gains by the tiles that it skips.
    """
    return biased or dtype == torch.bfloat16 or queries < 256 or computed > 0.75


def slower_backward(dtype: torch.dtype, queries: int) -> bool:
    """Whether PyTorch's backward kernel takes no longer than ours: always, as long as ours is a chunked formula."""
    return True


def missing() -> bool:
    """Whether the package was installed without its compiled kernels."""
    return _native is None


class Entries:
    """Our kernels at aten's entries, process-wide, from the making on; `tell` is told of every call while `on`.

    The three have the signatures that aten gives them; the first argument is what dispatch has seen.
    """

    def __init__(self, tell: Tell) -> None:
        self.on = True
        self.tell = tell
        self._library = torch.library.Library("aten", "IMPL")
        for key in ("CPU", "AutogradCPU"):
            self._library.impl(_SDPA, self.attention, key, with_keyset=True)
        self._library.impl(_FUSED, self.fused, "BackendSelect", with_keyset=True)
        self._library.impl(_FUSED_BACKWARD, self.fused_backward, "BackendSelect", with_keyset=True)

    def leave(self) -> None:
        """Take the kernels out. No other thread may be in a call: dispatch does not wait for it, and would crash."""
        self._library._destroy()

    def attention(
        self, keys: DispatchKeySet, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Compute at once what needs no gradient; else PyTorch checks, chooses, and comes to `fused` if it may."""
        if not self.on or keys.raw_repr() & _UNUSUAL or forward_ad._current_level >= 0:
            return _formula(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        why = _only_pytorch(q, k, v, attn_mask)
        plan = None
        if not why:
            plan, why = _plan(*_with_four_dimensions(q, k, v, attn_mask), dropout_p, is_causal, grouped=enable_gqa)
        if plan is None and why is not _SLOWER:
            out = _formula(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            if why is _EMPTY or not _comes_to_fused(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa):
                self.tell("forward", why)  # else `fused` told
            return out
        fused = _comes_to_fused(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        self.tell("forward", why)
        if plan is None:
            if not fused:
                return _formula(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            mask = attn_mask if attn_mask is None else _added(attn_mask)
            theirs: Tensor = _FUSED._op_dk(
                DispatchKey.CPU, q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale
            )[0]  # fmt: skip
            return theirs
        # PyTorch's fused kernel keeps the layout of q; its formula makes a contiguous result.
        out = torch.empty_like(q) if fused else q.new_empty(*q.shape[:-1], v.shape[-1])
        _compute(plan, scale, out if out.dim() == 4 else out.view(*plan.q.shape[:3], v.shape[-1]))
        return out

    def fused(
        self, keys: DispatchKeySet, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
        *, attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(out, log-sum-exp) in the layouts of aten's kernel; a row that sees no key has 0 in both, as there."""
        if not self.on or keys.raw_repr() & _UNUSUAL:
            return self._next_forward(keys, q, k, v, dropout_p, is_causal, attn_mask, scale)
        mask = attn_mask if attn_mask is None or attn_mask.dim() == 4 else attn_mask[None, None]
        plan, why = _plan(q, k, v, mask, dropout_p, is_causal, grouped=True)
        if plan is not None and v.shape[3] != q.shape[3]:
            plan, why = None, "aten's fused entry takes one head size"
        self.tell("forward", why)
        if plan is None:
            return self._next_forward(keys, q, k, v, dropout_p, is_causal, attn_mask, scale)
        out = torch.empty_like(q)
        found = _compute(plan, scale, out)
        if attn_mask is not None:
            found.masked_fill_(found == -math.inf, 0)
        return out, _heads_inside(found)

    def fused_backward(
        self, keys: DispatchKeySet, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
        dropout_p: float, is_causal: bool, *, attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The gradients of q, k and v, each laid out as `[batch, length, heads, dim]`, as by aten's kernel."""
        why = ""
        if self.on and not keys.raw_repr() & _UNUSUAL:
            mask = attn_mask if attn_mask is None or attn_mask.dim() == 4 else attn_mask[None, None]
            why = refusal(q, k, v, mask, dropout_p, is_causal, grouped=True)
            why = why or (_SLOWER if slower_backward(q.dtype, q.shape[2]) else "")
            self.tell("backward", why)
            if not why:
                found = _gradients(grad_out, out, logsumexp, q, k, v, mask, is_causal, scale)
                dq, dk, dv = map(_heads_inside, found)
                return dq, dk, dv
        theirs: tuple[Tensor, Tensor, Tensor] = _FUSED_BACKWARD.redispatch(
            keys & _BELOW, grad_out, q, k, v, out, logsumexp, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
        return theirs

    @staticmethod
    def _next_forward(
        keys: DispatchKeySet, q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, mask: Tensor | None,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        theirs: tuple[Tensor, Tensor] = _FUSED.redispatch(
            keys & _BELOW, q, k, v, dropout, causal, attn_mask=mask, scale=scale
        )
        return theirs


def _formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None,
    grouped: bool,
) -> Tensor:  # fmt: skip
    """PyTorch's whole way: its checks, its choice, its kernels."""
    out: Tensor = _SDPA._op_dk(
        DispatchKey.CompositeImplicitAutograd, q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped
    )
    return out


def _comes_to_fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None,
    grouped: bool,
) -> bool:  # fmt: skip
    """Whether PyTorch's choice for a call that is right is its fused kernel."""
    choice = torch._fused_sdp_choice(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped)
    return bool(choice == _CHOICE_FUSED)


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
        return _EMPTY
    if mask is not None:
        if causal or mask.dim() != 4 or mask.dtype not in (torch.bool, torch.float32, dtype):
            return "a mask of unusual shape or dtype"
        full = (*shape[:3], k.shape[2])
        if any(size not in (1, whole) for size, whole in zip(mask.shape, full, strict=True)):
            return "a mask of unusual shape or dtype"
    return ""


def _only_pytorch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """Why a call has to go PyTorch's whole way, whatever our kernels can; empty if it need not."""
    if not (torch._C._get_flash_sdp_enabled() and torch._C._get_math_sdp_enabled()):
        return "a path of PyTorch's is switched off"
    if not (q.numel() and v.numel()):
        return _EMPTY
    if torch.is_grad_enabled():
        if mask is not None and mask.requires_grad:
            return "the mask needs a gradient"
        if q.requires_grad or k.requires_grad or v.requires_grad:
            return "dropout, or shapes that PyTorch has no fused kernel for, and a gradient is needed"
    return ""


def _with_four_dimensions(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same call as `[batch, heads, length, dim]` and a mask beside it; as it was where that is not possible."""
    rank = q.dim()
    if rank == 4 and (mask is None or mask.dim() == 4):
        return q, k, v, mask
    if rank < 2 or not rank == k.dim() == v.dim() or not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        return q, k, v, mask
    if mask is not None:
        if not (2 if rank == 4 else 1) <= mask.dim() <= min(rank, 4) or (rank > 4 and mask.dim() == 4):
            return q, k, v, mask
        mask = mask[(None,) * (4 - mask.dim())]
    if rank != 4:
        q, k, v = (x[(None,) * (4 - rank)] if rank < 4 else x.flatten(0, -4) for x in (q, k, v))
    return q, k, v, mask


@dataclass(frozen=True, slots=True)
class _Seen:
    """What of the scores counts, as the kernel takes it: the tiles in rows, a bias, and what keeps both alive."""

    tiles: tuple[int, int, int, int, int, int]
    bias: tuple[int, int, int, int, int]
    computed: float  # the part of all tiles
    alive: tuple[Tensor, ...]


_ALL_TILES, _NO_BIAS = (0, 0, 0, 0, 1, 1), (0, 0, 0, 0, 0)
_EVERYTHING = _Seen(_ALL_TILES, _NO_BIAS, 1.0, ())


@dataclass(frozen=True, slots=True)
class _Plan:
    """A call that our kernel computes: q, k, v with four dimensions, the last one dense."""

    q: Tensor
    k: Tensor
    v: Tensor
    seen: _Seen


def _plan(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, *, grouped: bool
) -> tuple[_Plan | None, str]:
    """What to compute, or None and why it is left to PyTorch."""
    why = refusal(q, k, v, mask, dropout, causal, grouped=grouped)
    if why:
        return None, why
    queries, keys = q.shape[2], k.shape[2]
    if slower(q.dtype, queries, 0.0, biased=False):  # whatever the mask will turn out to be
        return None, _SLOWER
    seen = _causal(queries, keys) if causal else _EVERYTHING if mask is None else _by_mask(mask, queries, keys)
    if slower(q.dtype, queries, seen.computed, biased=seen.bias is not _NO_BIAS):
        return None, _SLOWER
    return _Plan(_dense_rows(q), _dense_rows(k), _dense_rows(v), seen), ""


@functools.lru_cache(maxsize=64)
def _causal(queries: int, keys: int) -> _Seen:
    """PyTorch's causal mask, which is top-left: the first query stands at the first key."""
    if queries == 1 and keys == 1:
        return _EVERYTHING
    return _in_tiles(summarise(causal_pattern, 1, 1, queries, keys, 0, TILE))


def _by_mask(mask: Tensor, queries: int, keys: int) -> _Seen:
    """A mask that only hides becomes tiles, of which the empty ones cost nothing; any other one is a bias."""
    if 0 in mask.stride():  # a dimension that was expanded holds one entry
        mask = mask[tuple(slice(0, 1 if step == 0 else None) for step in mask.stride())]
    if keys > TILE and queries * keys > _FEW_PAIRS:
        visible = mask if mask.dtype == torch.bool else _only_hides(mask)
        if visible is not None:
            return _in_tiles(summarise_matrix(visible, queries, keys))
    added = _added(mask).float()
    if added.amin() < _LOWEST:
        added = added.masked_fill((added < _LOWEST) & (added != -math.inf), _LOWEST)
    b, h, row, key = (0 if size == 1 else step for size, step in zip(added.shape, added.stride(), strict=True))
    return _Seen(_ALL_TILES, (added.data_ptr(), b, h, row, key), 1.0, (added,))


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
    rows = summary.batch * summary.heads * (summary.offsets.shape[2] - 1)
    computed = len(summary.columns) / (rows * -(-summary.keys // TILE))
    return _Seen((offsets, columns, partial, bits, summary.batch, summary.heads), _NO_BIAS, computed, parts)


def _compute(plan: _Plan, scale: float | None, out: Tensor) -> Tensor:
    """Fill out `[B, H, Nq, Dv]` and return the log-sum-exp `[B, H, Nq]`; the only caller of the forward kernel."""
    q, k, v, seen = plan.q, plan.k, plan.v, plan.seen
    batch, heads, queries, dim = q.shape
    _, key_heads, keys, value_dim = v.shape
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device="cpu")
    _native.forward(
        _DTYPES[q.dtype], _matrix(q), _matrix(k), _matrix(v), _matrix(out), lse.data_ptr(),
        (batch, heads, key_heads, queries, keys, dim, value_dim), 1 / math.sqrt(dim) if scale is None else scale,
        0.0, (0, 0, 0), seen.bias, 0, seen.tiles, "", torch.get_num_threads(),
    )  # fmt: skip
    return lse


def _gradients(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool,
    scale: float | None,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k and v; the only place that names what computes them."""
    score, tensors = ("", []) if mask is None else bias_score(_added(mask)).spec()
    found: list[Tensor] = chunked._backward_op(
        d_out, torch.zeros_like(lse), out, lse, q, k, v, [], tensors, None, 0, "causal" if causal else "", score,
        1 / math.sqrt(q.shape[3]) if scale is None else scale, 0.0, 0,
    )  # fmt: skip
    return found[:3]


def _added(mask: Tensor) -> Tensor:
    """A mask as what it adds to the scores."""
    return torch.where(mask, _NOTHING, _HIDDEN) if mask.dtype == torch.bool else mask


def _heads_inside(x: Tensor) -> Tensor:
    """The same `[batch, heads, length, …]`, laid out as `[batch, length, heads, …]`."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2).copy_(x)


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _matrix(x: Tensor) -> tuple[int, int, int, int]:
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch, head, row
