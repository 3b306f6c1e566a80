"""The way to a GPU without one: fake CUDA tensors mix no devices, and raise where the host would wait for a number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, everyone_looks, fake_cuda, moved, really
from test_laws import PATTERNS, SCORES, make_problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention

from foveate.pattern.block_mask import Summary
from foveate.pattern.block_mask_cache import summarise
from foveate.pattern.interval import is_interval
from foveate.pattern.kv_blocks import Listing, list_summary
from foveate.problem import Problem
from foveate.softmax import chunked, flex

INTERVALS = [name for name, pattern in PATTERNS.items() if pattern is not None and is_interval(pattern)]


@pytest.fixture
def mode() -> Iterator[FakeTensorMode]:
    with fake_cuda() as found:
        yield found


@pytest.fixture
def summaries(mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Where a summary is asked for, the real one of the pattern named here, on the CPU.

    What is moved from there to the card is fake already: PyTorch moves a real tensor by a real copy, if it can.
    """
    asked: dict[str, Any] = {"pattern": None, "times": 0}

    def real(_: object, *more: Any) -> Any:
        asked["times"] += 1
        start = more[4]
        return summarise(asked["pattern"], *more[:4], None if isinstance(start, Tensor) else start, more[5])

    def listed(summary: Summary) -> Listing:
        found = really(list_summary)(summary)
        pairs = (tuple(map(mode.from_tensor, pair)) for pair in (found.partial, found.full, found.tables))
        seen = None if found.seen is None else mode.from_tensor(found.seen)
        return Listing(*pairs, mode.from_tensor(found.steps), found.tells, seen)

    def with_fake_bits(*arguments: Any) -> Summary:
        found: Summary = really(real)(*arguments)
        return replace(found, bits=mode.from_tensor(found.bits))

    monkeypatch.setattr(flex, "summarise", really(real))
    monkeypatch.setattr(flex, "list_summary", listed)
    monkeypatch.setattr("foveate.pattern.serialize.summarise", with_fake_bits)
    return asked


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What came to FlexAttention's operator: past the checks of devices and shapes."""
    calls: list[tuple[Any, ...]] = []

    def operator(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
        calls.append((q, k, v, *more))
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        return q.new_empty(*q.shape[:3], v.shape[3]), lse, lse

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "flex_attention_hop", operator)
    return calls


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in _tensors(part)] if isinstance(value, tuple | list) else []


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_flex_gets_to_its_operator(
    pattern: str, score: str, mode: FakeTensorMode, summaries: dict[str, Any], reached: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    summaries["pattern"] = PATTERNS[pattern]
    with torch.utils._python_dispatch._disable_current_modes():
        call = make_problem(pattern, score)
    there = moved(mode, call)
    everyone_looks(monkeypatch)
    result = flex.run(there, compiled=False)
    ((_, _, _, score_mod, mask, *_),) = reached
    assert {x.device for x in _tensors(reached[0])} == {CUDA}
    assert result.out.device == CUDA
    at = [torch.zeros(1, dtype=torch.int32, device=CUDA)] * 4  # the functions mix no devices either
    assert mask[-1](*at).device == CUDA
    assert score_mod(torch.zeros(1, device=CUDA), *at).device == CUDA
    assert (summaries["times"] == 0) == (PATTERNS[pattern] is None or pattern in INTERVALS)


@pytest.mark.parametrize("score", ["none", "all"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_chunked_stays_on_the_card(
    pattern: str, score: str, mode: FakeTensorMode, summaries: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    summaries["pattern"] = PATTERNS[pattern]
    with torch.utils._python_dispatch._disable_current_modes():
        call = make_problem(pattern, score)
    there = moved(mode, call)
    everyone_looks(monkeypatch)
    assert {x.device for x in _both_passes(there, monkeypatch)} == {CUDA}
    assert (summaries["times"] == 0) == (PATTERNS[pattern] is None or pattern in INTERVALS)


def _both_passes(call: Problem, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, ...]:
    """All that chunked's operators give, computed as they do inside, which a fake tensor would not show."""
    given: list[tuple[Any, ...]] = []
    inside, back = chunked._forward_op._init_fn, chunked._backward_op._init_fn

    def forward(*arguments: Any) -> Any:
        given.append(arguments)
        return inside(*arguments)

    monkeypatch.setattr(chunked, "_forward_op", forward)
    chunked.run(call)
    out, lse, over = inside(*given[0])
    return out, lse, over, *back(out, lse, out, over, *given[0])
