"""The linear family, the selections and FAVOR+ equal the plain PyTorch that their authors publish.

fla's `naive.py` files and performer-pytorch are read from where they are installed, each file by itself: their packages
want a GPU's compiler, or modules that Python has no more. Both work in float32.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch.nn.functional import normalize

import foveate as fv
from foveate.linear.features import Favor

BACKENDS = ("native", "chunked", "recurrence")
B, H, K, V = 2, 3, 5, 7


@contextmanager
def pretended(names: tuple[str, ...]) -> Iterator[None]:
    """These modules can be imported, and hold nothing but versions that compare."""
    known = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: MagicMock(LooseVersion=Version) for name in names})
    try:
        yield
    finally:
        for name, module in known.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def read(distribution: str, path: str, *missing: str) -> Any:
    """A file of an installed package as a module of its own."""
    place = importlib.metadata.distribution(distribution).locate_file(path)
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), str(place))
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    with pretended(missing):
        spec.loader.exec_module(module)
    return module


def naive(name: str, *missing: str) -> Any:
    return read("fla-core", f"fla/ops/{name}/naive.py", *missing)


def performer() -> Any:
    missing = ("local_attention", "axial_positional_embedding", "performer_pytorch", "performer_pytorch.reversible",
               "distutils", "distutils.version")  # fmt: skip
    return read("performer-pytorch", "performer_pytorch/performer_pytorch.py", *missing)


def inputs(steps: int, *, channels: bool = False, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k of length 1, v, decay, beta, and a state to begin with."""
    draw = torch.Generator().manual_seed(steps + seed)
    q, k = (normalize(torch.randn(B, H, steps, K, generator=draw), dim=-1) for _ in range(2))
    v = torch.randn(B, H, steps, V, generator=draw)
    decay = -torch.rand(B, H, steps, K, generator=draw) if channels else -torch.rand(B, H, steps, generator=draw)
    beta = torch.rand(B, H, steps, generator=draw)
    return q, k, v, decay, beta, torch.randn(B, H, K, V, generator=draw)


def turned(*tensors: Tensor) -> list[Tensor]:
    """`[B, H, T, …]` as fla's `[B, T, H, …]`, or back."""
    return [x.transpose(1, 2) for x in tensors]


def _linear(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    out, last = naive("linear_attn").naive_recurrent_linear_attn(
        *turned(q, k, v), initial_state=s, output_final_state=True
    )
    return out.transpose(1, 2), last


def _gla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    out, last = naive("gla").naive_recurrent_gla(*turned(q, k, v, decay), initial_state=s, output_final_state=True)
    return out.transpose(1, 2), last


def _simple_gla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    out, last = naive("simple_gla").naive_recurrent_simple_gla(*turned(q, k, v, decay), initial_state=s)
    return out.transpose(1, 2), last


def _delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return naive("delta_rule").delta_rule_recurrence(q, k, v, beta, initial_state=s)


def _gated_delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    out, last = naive("gated_delta_rule").naive_recurrent_gated_delta_rule(
        *turned(q, k, v, beta, decay), initial_state=s, output_final_state=True
    )
    return out.transpose(1, 2), last


def _kda(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    out, last = naive("kda").naive_recurrent_kda(
        *turned(q, k, v, decay, beta), initial_state=s, output_final_state=True
    )
    return out.transpose(1, 2), last


FORMS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Any], bool]] = {
    "linear": (_linear, lambda q, k, v, decay, beta, **more: fv.linear_attention(q, k, v, **more), False),
    "gated linear": (_gla, lambda q, k, v, decay, beta, **more: fv.gated_linear(q, k, v, decay, **more), True),
    "one decay a step": (
        _simple_gla, lambda q, k, v, decay, beta, **more: fv.linear_attention(q, k, v, decay=decay, **more), False
    ),
    "delta": (_delta, lambda q, k, v, decay, beta, **more: fv.delta(q, k, v, beta, **more), False),
    "gated delta": (_gated_delta, fv.gated_delta, False),
    "kimi delta": (_kda, fv.kimi_delta, True),
}  # fmt: skip


def near(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORMS)
def test_outputs_states_and_gradients_are_those_of_fla(name: str, backend: str) -> None:
    theirs, ours, channels = FORMS[name]
    leaves = [x.requires_grad_() for x in inputs(67, channels=channels)]
    draw = torch.Generator().manual_seed(1)
    out, last = theirs(*leaves)
    found, state = ours(*leaves[:5], state=fv.LinearState(leaves[5], None), backend=backend)
    near(found, out)
    near(state.s, last)
    arrived = [torch.randn(x.shape, generator=draw) for x in (out, last)]
    for mine, true in zip(
        torch.autograd.grad((found, state.s), leaves, arrived, allow_unused=True),
        torch.autograd.grad((out, last), leaves, arrived, allow_unused=True),
        strict=True,
    ):
        assert (mine is None) == (true is None)
        if mine is not None and true is not None:
            near(mine, true)


def test_linear_attention_is_normalized_as_by_fla() -> None:
    q, k, v, *_ = inputs(67)
    q, k = q.abs(), k.abs()
    wanted, _ = naive("linear_attn").naive_recurrent_linear_attn(*turned(q, k, v), normalize=True)
    near(fv.linear_attention(q, k, v, normalize=True)[0], wanted.transpose(1, 2))


def test_retention_has_the_decays_of_fla() -> None:
    q, k, v, *_ = inputs(67)
    near(fv.retention(q, k, v)[0], naive("retention").naive_retention(q, k, v))


def test_attention_to_selected_blocks_is_that_of_fla() -> None:
    draw = torch.Generator().manual_seed(0)
    steps, size, count = 67, 8, 3
    q = torch.randn(B, 6, steps, K, generator=draw)
    k, v = (torch.randn(B, 2, steps, dim, generator=draw) for dim in (K, V))
    blocks = torch.rand(B, 2, steps, steps // size + 1, generator=draw).argsort(-1)[..., :count]
    own = torch.arange(steps).view(1, 1, -1, 1) // size
    blocks = torch.cat([blocks.masked_fill(blocks == own, -1), own.expand(B, 2, -1, 1)], -1)  # each once
    module = naive("nsa", "fla", "fla.ops", "fla.ops.utils", "fla.ops.utils.pooling", "flash_attn")
    wanted = module.naive_nsa_selection(*turned(q, k, v, blocks), block_size=size).transpose(1, 2)
    near(fv.attention(q, k, v, fv.causal & fv.selected(blocks, block=size)), wanted)


def test_attention_to_what_the_indexer_chose_is_that_of_fla() -> None:
    draw = torch.Generator().manual_seed(0)
    steps, heads, top = 67, 4, 9
    q = torch.randn(B, 6, steps, K, generator=draw)
    k, v = (torch.randn(B, 2, steps, dim, generator=draw) for dim in (K, V))
    asked, key = torch.randn(B, heads, steps, 11, generator=draw), torch.randn(B, 1, steps, 11, generator=draw)
    w = torch.randn(B, heads, steps, generator=draw)
    module = naive("dsa")
    indices = module.naive_dsa_indexer(*turned(asked), key[:, 0], *turned(w), topk=top, activation="relu")
    with pytest.warns(UserWarning, match="the lightning indexer is skipped"):  # that one leaves the ReLU out
        wanted = module.naive_dsa(*turned(q, k, v), *turned(asked), key[:, 0], *turned(w), indices=indices, topk=top)
    chosen = fv.selection.lightning(asked, key, w, fv.causal, top_k=top)
    near(fv.attention(q, k, v, chosen), wanted.transpose(1, 2))


def test_favor_is_the_kernel_of_performer_pytorch() -> None:
    """Which takes the largest score off before its exponential, and adds an epsilon unless it is told not to."""
    q, k, v, *_ = inputs(67)
    theirs = performer()
    torch.manual_seed(0)
    directions = theirs.gaussian_orthogonal_random_matrix(11, K)
    features = [
        theirs.softmax_kernel(x, projection_matrix=directions, is_query=first, eps=0.0)
        for x, first in ((q, True), (k, False))
    ]
    phi = Favor(directions)
    near(fv.performer(q, k, v, phi, causal=False)[0], theirs.linear_attention(*features, v))
    near(fv.performer(q, k, v, phi)[0], theirs.causal_linear_attention_noncuda(*features, v, eps=0.0))
