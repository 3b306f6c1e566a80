"""The rest of the family on a GPU that is not there: no device is mixed, and nobody waits for a number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, everyone_looks, fake_cuda
from torch import Tensor

import foveate as fv
from foveate.linear.problem import linear_problem
from foveate.softmax import sdpa

BATCH, HEADS, KEY_HEADS, LENGTH, DIM = 2, 4, 2, 37, 16


@pytest.fixture(autouse=True)
def _looked_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sdpa, "asked", lambda *_: ())  # on a machine without a driver PyTorch does not answer
    with fake_cuda():
        everyone_looks(monkeypatch)
        yield


def _on_card(*shape: int, **more: Any) -> Tensor:
    return torch.empty(shape, device=CUDA, **more)


def _qkv(heads: int = HEADS, key_heads: int = KEY_HEADS) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_on_card(BATCH, h, LENGTH, DIM, requires_grad=True) for h in (heads, key_heads, key_heads))
    return q, k, v


def _whole_numbers(*shape: int) -> Tensor:
    return _on_card(*shape, dtype=torch.int64)


LINEAR: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "normalized": lambda: {"feature": fv.elu_plus_one, "normalize": True},
    "by step": lambda: {"decay": _on_card(BATCH, KEY_HEADS, LENGTH)},
    "by channel": lambda: {"decay": _on_card(BATCH, KEY_HEADS, LENGTH, DIM)},
    "delta": lambda: {"delta_rule": True, "beta": _on_card(BATCH, KEY_HEADS, LENGTH)},
    "documents": lambda: {"documents": _whole_numbers(BATCH, LENGTH)},
    "packed": lambda: {"documents": fv.documents(cu_seqlens=_whole_numbers(4))},
}


@pytest.mark.parametrize("backend", ["recurrence", "chunked"])
@pytest.mark.parametrize("kind", LINEAR)
def test_linear_attention(kind: str, backend: str) -> None:
    out, state = fv.linear_attention(*_qkv(), backend=backend, **LINEAR[kind]())
    assert out.device == state.s.device == CUDA


PATTERNS: dict[str, Callable[[], fv.Pattern | None]] = {
    "everything": lambda: None,
    "causal": lambda: fv.causal,
    "window": lambda: fv.causal & fv.window(9),
    "lengths": lambda: fv.padding(_whole_numbers(BATCH)),
    "packed": lambda: fv.causal & fv.documents(cu_seqlens=_whole_numbers(4)),
}
CALLS: dict[str, Callable[[Any], Any]] = {
    "attention": lambda pattern: fv.attention(*_qkv(), pattern),
    "with lse": lambda pattern: fv.attention_with_lse(*_qkv(), pattern)[1],
    "with dropout": lambda pattern: fv.attention(*_qkv(), pattern, dropout=0.1),
    "sparsemax": lambda pattern: fv.attention(*_qkv(), pattern, normalizer=fv.sparsemax),
    "additive": lambda pattern: fv.additive_attention(*_qkv(), _on_card(DIM), pattern),
    "hashed": lambda pattern: fv.lsh_attention(*_qkv(KEY_HEADS)[:2], pattern, chunk=8),
    "weights": lambda pattern: fv.weights(*_qkv(), pattern),
    "straight through": lambda pattern: fv.straight_through(*_qkv(), pattern).out,
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", CALLS)
def test_softmax_and_what_is_like_it(name: str, pattern: str) -> None:
    assert CALLS[name](PATTERNS[pattern]()).device == CUDA


FACTORIZED: dict[str, Callable[[], Tensor]] = {
    "dilated": lambda: fv.dilated_attention(*_qkv(), 3),
    "strided": lambda: fv.strided_attention(*_qkv(), 5),
    "fixed": lambda: fv.fixed_attention(*_qkv(), 5),
    "linformer": lambda: fv.linformer_attention(*_qkv(), _on_card(KEY_HEADS, 7, LENGTH)),
    "nystrom": lambda: fv.nystrom_attention(*_qkv(), landmarks=5),
}


@pytest.mark.parametrize("name", FACTORIZED)
def test_factors(name: str) -> None:
    assert FACTORIZED[name]().device == CUDA


def _paged(pattern: fv.Pattern | None) -> Tensor:
    pages = _on_card(9, KEY_HEADS, 8, DIM)
    table, lengths = _whole_numbers(BATCH, 3), _whole_numbers(BATCH)
    return fv.paged_attention(_on_card(BATCH, HEADS, 1, DIM), pages, pages, table, lengths, pattern)


@pytest.mark.parametrize("pattern", [None, fv.causal & fv.window(5)], ids=repr)
def test_pages(pattern: fv.Pattern | None) -> None:
    assert _paged(pattern).device == CUDA


def test_rows_and_choices() -> None:
    out = _on_card(BATCH, HEADS, LENGTH, DIM)
    assert fv.merge_by_rows(out, out[:, :, :3], _whole_numbers(3)).device == CUDA
    assert fv.sampled_attention(*_qkv(), fv.causal, choices=_whole_numbers(BATCH, HEADS, LENGTH)).out.device == CUDA


def test_documents_in_a_layer() -> None:
    with CUDA:
        layer = fv.nn.GatedDeltaNet(DIM, HEADS)
    out = layer(_on_card(BATCH, LENGTH, DIM), documents=_whole_numbers(BATCH, LENGTH))
    assert (out[0] if isinstance(out, tuple) else out).device == CUDA


@pytest.mark.parametrize(("what", "wrong"), [("decay", "a decay is above 0"), ("beta", "a beta is below 0 or above 2")])
def test_the_device_is_told_what_the_host_does_not_wait_for(
    what: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[torch.device, str]] = []
    monkeypatch.setattr(torch, "_assert_async", lambda is_right, said: told.append((is_right.device, said)))
    linear_problem(*_qkv(), delta_rule=True, **{what: _on_card(BATCH, KEY_HEADS, LENGTH)})
    ((device, said),) = told
    assert device == CUDA
    assert wrong in said
