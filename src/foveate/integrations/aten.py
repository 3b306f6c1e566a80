"""`scaled_dot_product_attention` on Foveate's CPU kernels, entered where aten itself dispatches.

    entry of aten                                   who comes here
    scaled_dot_product_attention                    eager calls that need no gradient, of any rank
    _scaled_dot_product_flash_attention_for_cpu     what PyTorch's own choice leads to: training, compiled graphs
    _scaled_dot_product_flash_attention_for_cpu_backward    the gradient of that
    _native_multi_head_attention                    nn.MultiheadAttention and nn.Transformer in eval: `fast_path`

No kernel of PyTorch's is replaced. The first entry is a formula without a kernel for the CPU, so ours is its only one;
the others get a kernel at `BackendSelect`, the step right above the CPU's. What we do not take goes on to where it
would have gone. Checks and their errors, autocast, autograd, torch.func, traces and modes act above all this, as ever.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad

from foveate.integrations import fast_path
from foveate.integrations.fused import EMPTY, SLOWER, added, compute, gradients, plan, refusal_of_gradients
from foveate.primitives import group, ungroup

# Told of every call: "forward" or "backward", and why PyTorch computes it, which is empty where Foveate does.
Tell = Callable[[str, str], None]

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

_MULTI_HEAD = torch.ops.aten._native_multi_head_attention.default

_BELOW = torch._C._dispatch_keyset_full_after(DispatchKey.BackendSelect)
_PLAIN = functools.reduce(
    lambda keys, key: keys.add(key),
    (DispatchKey.BackendSelect, DispatchKey.ADInplaceOrView, DispatchKey.AutogradCPU, DispatchKey.AutocastCPU),
    DispatchKeySet(DispatchKey.CPU),
).raw_repr()
_NESTED = DispatchKeySet(DispatchKey.NestedTensorCPU).raw_repr()
_UNUSUAL = ~_PLAIN  # the bits of subclasses, transforms, traces, modes and other devices
_CHOICE_FUSED = 1  # of `torch._fused_sdp_choice`


class Entries:
    """Our kernels at aten's entries, process-wide, from the making on; `tell` is told of every call while `on`.

    They have the signatures that aten gives them; the first argument is what dispatch has seen.
    """

    def __init__(self, tell: Tell) -> None:
        self.on = True
        self.tell = tell
        self._library = torch.library.Library("aten", "IMPL")
        for key in ("CPU", "AutogradCPU"):
            self._library.impl(_SDPA, self.attention, key, with_keyset=True)
        self._library.impl(_FUSED, self.fused, "BackendSelect", with_keyset=True)
        self._library.impl(_FUSED_BACKWARD, self.fused_backward, "BackendSelect", with_keyset=True)
        self._library.impl(_MULTI_HEAD, self.multi_head, "BackendSelect", with_keyset=True)

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
        ready = None
        if not why:
            ready, why = plan(*_with_four_dimensions(q, k, v, attn_mask), dropout_p, is_causal, grouped=enable_gqa)
        if ready is None and why is not SLOWER:
            out = _formula(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            if why is EMPTY or not _comes_to_fused(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa):
                self.tell("forward", why)  # else `fused` told
            return out
        fused = _comes_to_fused(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        self.tell("forward", why)
        if ready is None:
            if not fused:
                return _formula(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            mask = attn_mask if attn_mask is None else added(attn_mask)
            folds = q.dim() == 4 and not is_causal and (mask is None or (mask.dim() == 4 and mask.shape[1:3] == (1, 1)))
            theirs: Tensor = _FUSED._op_dk(
                DispatchKey.CPU, group(q, k) if folds else q, k, v, dropout_p, is_causal,
                attn_mask=mask, scale=scale,
            )[0]  # fmt: skip
            return ungroup(theirs, q) if folds else theirs
        # PyTorch's fused kernel keeps the layout of q; its formula makes a contiguous result.
        out = torch.empty_like(q) if fused else q.new_empty(*q.shape[:-1], v.shape[-1])
        compute(ready, scale, out if out.dim() == 4 else out.view(*ready.q.shape[:3], v.shape[-1]))
        return out

    def fused(
        self, keys: DispatchKeySet, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
        *, attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(out, log-sum-exp) in the layouts of aten's kernel; a row that sees no key has 0 in both, as there."""
        if not self.on or keys.raw_repr() & _UNUSUAL:
            return self._next_forward(keys, q, k, v, dropout_p, is_causal, attn_mask, scale)
        mask = attn_mask if attn_mask is None or attn_mask.dim() == 4 else attn_mask[None, None]
        ready, why = plan(q, k, v, mask, dropout_p, is_causal, grouped=True)
        if ready is not None and v.shape[3] != q.shape[3]:
            ready, why = None, "aten's fused entry takes one head size"
        self.tell("forward", why)
        if ready is None:
            return self._next_forward(keys, q, k, v, dropout_p, is_causal, attn_mask, scale)
        out = torch.empty_like(q)
        found = compute(ready, scale, out)
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
            why = refusal_of_gradients(q, k, v, mask, dropout_p, is_causal, logsumexp)
            self.tell("backward", why)
            if not why:
                found = gradients(grad_out, out, logsumexp, q, k, v, mask, is_causal, scale)
                dq, dk, dv = map(_heads_inside, found)
                return dq, dk, dv
        theirs: tuple[Tensor, Tensor, Tensor] = _FUSED_BACKWARD.redispatch(
            keys & _BELOW, grad_out, q, k, v, out, logsumexp, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
        return theirs

    def multi_head(
        self, keys: DispatchKeySet, query: Tensor, key: Tensor, value: Tensor, width: int, heads: int,
        in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor, mask: Tensor | None = None,
        need_weights: bool = True, average_weights: bool = True, mask_type: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(out, weights): projections around a call of `attention`, which tells of it, where no weights are asked."""
        weights = in_weight, in_bias, out_weight, out_bias
        if self.on and not keys.raw_repr() & _UNUSUAL & ~_NESTED:
            why = fast_path.refusal(query, key, value, width, heads, weights, mask, need_weights, mask_type)
            if not why:
                return fast_path.computed(_attend, query, key, value, heads, weights, mask, mask_type), None
            self.tell("forward", why)
        theirs: tuple[Tensor, Tensor | None] = _MULTI_HEAD.redispatch(
            keys & _BELOW, query, key, value, width, heads, *weights, mask, need_weights, average_weights, mask_type
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


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    out: Tensor = _SDPA(q, k, v, mask, 0.0, causal)
    return out


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


def _only_pytorch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """Why a call has to go PyTorch's whole way, whatever our kernels can; empty if it need not."""
    if not (torch._C._get_flash_sdp_enabled() and torch._C._get_math_sdp_enabled()):
        return "a path of PyTorch's is switched off"
    if not (q.numel() and v.numel()):
        return EMPTY
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


def _heads_inside(x: Tensor) -> Tensor:
    """The same `[batch, heads, length, …]`, laid out as `[batch, length, heads, …]`."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2).copy_(x)
