"""Calls of PyTorch's attention, right ones of every shape and kind, and what the tests of `accelerate()` share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import foveate as fv
from foveate.integrations import fast_path, fused
from foveate.integrations.torch import _STATE

SDPA = F.scaled_dot_product_attention
INF = float("inf")


def prefer(monkeypatch: pytest.MonkeyPatch, *, ours: bool) -> None:
    """Whatever our kernels can compute they do, be it slower; or nothing, be it faster."""
    monkeypatch.setattr(fused, "leads_forward", lambda *_: ours)
    monkeypatch.setattr(fused, "leads_backward", lambda *_: ours)
    monkeypatch.setattr(fast_path, "_FEW", 0 if ours else 1 << 62)


def made(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(
    batch: int = 2, heads: int = 6, queries: int = 67, keys: int = 131, dim: int = 16, *, key_heads: int | None = None,
    value_dim: int | None = None, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    key_heads, value_dim = key_heads or heads, value_dim or dim
    return (
        made(batch, heads, queries, dim, seed=1, dtype=dtype),
        made(batch, key_heads, keys, dim, seed=2, dtype=dtype),
        made(batch, key_heads, keys, value_dim, seed=3, dtype=dtype),
    )


def hidden(*shape: int, seed: int = 4) -> Tensor:
    """A boolean mask with a row that sees nothing, where it has rows."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    if shape[-2] > 1:
        mask[..., 3, :] = False
    return mask


def padded(batch: int, keys: int) -> Tensor:
    lengths = torch.arange(1, batch + 1) * keys // (batch + 1)
    return (torch.arange(keys) < lengths[:, None])[:, None, None]


def biased(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return made(*mask.shape, seed=5).masked_fill(~mask, -INF).to(dtype)


def only_hides(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, -INF)


def strided(x: Tensor) -> Tensor:
    """The same numbers, read by steps of two, in another order of dimensions."""
    wide = torch.zeros(x.shape[2], x.shape[0], x.shape[1], 2 * x.shape[3])
    wide = wide.permute(1, 2, 0, 3)[..., ::2]
    return wide.copy_(x)


def fused_layout(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


Call = tuple[tuple[Tensor, ...], dict[str, object]]


CALLS: dict[str, Callable[[], Call]] = {
    "everything": lambda: (qkv(), {}),
    "scale": lambda: (qkv(), {"scale": -0.7}),
    "scale 0": lambda: (qkv(), {"scale": 0.0}),
    "causal": lambda: (qkv(queries=131), {"is_causal": True}),
    "causal, more keys": lambda: (qkv(), {"is_causal": True}),
    "causal, more queries": lambda: (qkv(queries=197, keys=101), {"is_causal": True}),
    "causal, one query": lambda: (qkv(queries=1), {"is_causal": True}),
    "one query": lambda: (qkv(queries=1), {}),
    "one key": lambda: (qkv(keys=1), {}),
    "grouped": lambda: (qkv(key_heads=2), {"enable_gqa": True}),
    "grouped causal": lambda: (qkv(key_heads=3, queries=131), {"enable_gqa": True, "is_causal": True}),
    "grouped mask": lambda: ((*qkv(key_heads=2), hidden(2, 6, 67, 131)), {"enable_gqa": True}),
    "bool, every dimension": lambda: ((*qkv(), hidden(2, 6, 67, 131)), {}),
    "bool, two dimensions": lambda: ((*qkv(), hidden(67, 131)), {}),
    "bool, three dimensions": lambda: ((*qkv(), hidden(6, 67, 131)), {}),
    "bool, of heads": lambda: ((*qkv(), hidden(1, 6, 67, 131)), {}),
    "bool, padding": lambda: ((*qkv(), padded(2, 131)), {}),
    "bool, padding, expanded": lambda: ((*qkv(), padded(2, 131).expand(2, 6, 67, 131)), {}),
    "bool, of rows": lambda: ((*qkv(), hidden(2, 1, 67, 1)), {}),
    "bool, one for all": lambda: ((*qkv(), torch.ones(1, 1, dtype=torch.bool)), {}),
    "bool, transposed": lambda: ((*qkv(), hidden(131, 67).mT), {}),
    "bool, tiles of 64": lambda: ((*qkv(queries=128, keys=192), hidden(2, 1, 128, 192).tril(3)), {}),
    "bool, few pairs": lambda: ((*qkv(queries=7, keys=11), hidden(2, 6, 7, 11)), {}),
    "float, every dimension": lambda: ((*qkv(), biased(hidden(2, 6, 67, 131))), {}),
    "float, two dimensions": lambda: ((*qkv(), biased(hidden(67, 131))), {}),
    "float, padding": lambda: ((*qkv(), biased(padded(2, 131))), {}),
    "float, expanded": lambda: ((*qkv(), biased(hidden(2, 1, 67, 131)).expand(2, 6, 67, 131)), {}),
    "float, transposed": lambda: ((*qkv(), biased(hidden(131, 67)).mT), {}),
    "float, only hides": lambda: ((*qkv(), only_hides(hidden(2, 1, 67, 131))), {}),
    "float, of nn.Transformer": lambda: ((*qkv(), nn.Transformer.generate_square_subsequent_mask(131)[:67]), {}),
    "float, hides, and a bias in the last row": lambda: (
        (*qkv(), only_hides(hidden(67, 131)).index_fill(0, torch.tensor([66]), 0.5)), {}
    ),
    "float, the least number": lambda: (
        (*qkv(), only_hides(hidden(2, 1, 67, 131)).clamp(min=torch.finfo(torch.float32).min)), {}
    ),
    "another value dim": lambda: (qkv(value_dim=23), {}),
    "another value dim, causal": lambda: (qkv(value_dim=5), {"is_causal": True}),
    "three dimensions": lambda: (tuple(x[0] for x in qkv()), {}),
    "three dimensions and a mask": lambda: ((*(x[0] for x in qkv()), hidden(6, 67, 131)), {}),
    "three dimensions, grouped": lambda: (tuple(x[0] for x in qkv(key_heads=2)), {"enable_gqa": True}),
    "two dimensions": lambda: (tuple(x[0, 0] for x in qkv()), {"is_causal": True}),
    "five dimensions": lambda: (tuple(x.unflatten(0, (3, 2)) for x in qkv(batch=6)), {"is_causal": True}),
    "five dimensions and a mask": lambda: (
        (*(x.unflatten(0, (3, 2)) for x in qkv(batch=6)), hidden(6, 67, 131)), {}
    ),
    "five dimensions and a mask of four": lambda: (
        (*(x.unflatten(0, (3, 2)) for x in qkv(batch=6)), hidden(2, 6, 67, 131)), {}
    ),
    "a batch that is broadcast": lambda: ((qkv()[0], *(x[:1] for x in qkv()[1:])), {}),
    "[batch, length, heads, dim]": lambda: (tuple(map(fused_layout, qkv())), {"is_causal": True}),
    "one tensor for three": lambda: (
        made(2, 67, 3, 6, 16, seed=1).permute(2, 0, 3, 1, 4).unbind(0), {"is_causal": True}
    ),
    "steps of two": lambda: (tuple(map(strided, qkv())), {}),
    "keys transposed": lambda: ((qkv()[0], qkv()[1].mT.contiguous().mT, qkv()[2]), {}),
    "expanded": lambda: ((qkv()[0], *(x[:, :1].expand(-1, 6, -1, -1) for x in qkv()[1:])), {}),
    "no batch": lambda: (qkv(batch=0), {}),
    "no query": lambda: (qkv(queries=0), {}),
    "no key": lambda: (qkv(keys=0), {}),
    "no dim": lambda: (tuple(x[..., :0] for x in qkv()), {}),
    "dim 1": lambda: (qkv(dim=1), {"is_causal": True}),
}  # fmt: skip


LEFT_TO_PYTORCH = {  # what our kernels never take
    "five dimensions and a mask of four", "a batch that is broadcast", "no batch", "no query", "no key", "no dim"
}  # fmt: skip


def truth(arguments: tuple[Tensor, ...], options: dict[str, object]) -> Tensor:
    """The formula of PyTorch in float64, on the same numbers."""
    wide = [x.double() if x.is_floating_point() else x for x in arguments]
    with sdpa_kernel(SDPBackend.MATH):
        return SDPA(*wide, **options)  # type: ignore[arg-type]


def assert_as_exact(found: Tensor, theirs: Tensor, exact: Tensor, times: int = 2) -> None:
    """The error may be a multiple (gradients: 3) of PyTorch's own and of the roundings of what is subtracted in it."""
    assert found.shape == theirs.shape
    assert found.dtype == theirs.dtype
    if not found.numel():
        return
    most = max(1.0, exact.abs().max().item())
    allowed = times * (
        (theirs.double() - exact).abs().max().item() + (1 if times == 2 else 3) * torch.finfo(found.dtype).eps * most
    )
    off = (found.double() - exact).abs().max().item()
    assert off <= allowed, f"off by {off:.3g}, allowed {allowed:.3g}"


def calls_go_to_us() -> bool:
    q = made(1, 1, 512, 8, seed=1)
    with fv.accelerate() as acceleration:
        pass
    before = sum(_STATE.active[0].report().foveate.values()) if _STATE.active else 0
    SDPA(q, q, q, is_causal=True)
    assert not acceleration.report().foveate
    return bool(_STATE.active) and sum(_STATE.active[0].report().foveate.values()) == before + 1
