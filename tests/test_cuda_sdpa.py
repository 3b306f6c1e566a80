"""Which of PyTorch's kernels run a call on CUDA is PyTorch's answer, replaced here: the n × n one never does."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from torch import Tensor
from torch.backends import cuda

import foveate as fv
from foveate.problem import Problem, problem
from foveate.softmax import sdpa

KERNELS = ("flash", "efficient", "cudnn")
ANSWERS = [*chain.from_iterable(combinations(KERNELS, n) for n in range(4))]
KINDS = ("everything", "causal", "decoding", "padding", "mask", "bias")


@pytest.fixture(autouse=True)
def _on_cuda() -> Iterator[None]:
    with fake_cuda():
        yield


def _problem(kind: str, queries: int = 37) -> Problem:
    queries = 1 if kind == "decoding" else queries
    q, k, v = (torch.empty(2, h, n, 64, device=CUDA, dtype=torch.bfloat16) for h, n in ((4, queries), (2, 37), (2, 37)))
    patterns = {
        "causal": fv.causal,
        "decoding": fv.causal,
        "padding": fv.padding(torch.empty(2, dtype=torch.int64, device=CUDA)),
        "mask": fv.from_mask(torch.empty(37, 37, dtype=torch.bool, device=CUDA)),
    }
    score = fv.bias(torch.empty(37, 37, device=CUDA, dtype=torch.bfloat16)) if kind == "bias" else None
    return problem(q, k, v, patterns.get(kind), score=score)


def _enabled() -> set[str]:
    on = {"flash": cuda.flash_sdp_enabled(), "efficient": cuda.mem_efficient_sdp_enabled(),
          "cudnn": cuda.cudnn_sdp_enabled(), "math": cuda.math_sdp_enabled()}  # fmt: skip
    return {name for name, is_on in on.items() if is_on}


@pytest.mark.parametrize("answer", ANSWERS, ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_pytorch_would_run_is_let_run(
    kind: str, answer: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[set[str]] = []

    def attend(q: Tensor, *_: Any, **__: Any) -> Tensor:
        ran.append(_enabled())
        return torch.empty_like(q)

    monkeypatch.setattr(sdpa, "asked", lambda *_: answer)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    masked = kind in ("padding", "mask", "bias")
    allowed = set(answer) - ({"cudnn"} if masked else set())  # NaN gradients: pytorch/pytorch#196678
    before, call = _enabled(), _problem(kind)
    reasons = sdpa.refuses(call)
    if allowed:
        assert reasons == []
        assert sdpa.run(call).out.device == CUDA
        assert ran == [allowed]
        assert _enabled() == before
    else:
        (reason,) = reasons
        assert ("cuDNN" if answer else "n×n matrix") in reason


@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_is_asked_about_the_very_call(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    questions: list[tuple[Any, ...]] = []
    given: list[tuple[Any, ...]] = []

    def asked(*call: Any) -> tuple[str, ...]:
        questions.append(call)
        return KERNELS

    def attend(*call: Any, is_causal: bool, **_: Any) -> Tensor:
        given.append((*call, is_causal))
        return torch.empty_like(call[0])

    monkeypatch.setattr(sdpa, "asked", asked)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    call = _problem(kind)
    sdpa.run(call)
    assert [_shown(x) for x in questions[-1]] == [_shown(x) for x in given[0]]


def _shown(x: object) -> object:
    return (x.shape, x.dtype, x.device, x.stride()) if isinstance(x, Tensor) else x


@pytest.mark.skipif(torch.version.cuda is not None, reason="a build for CUDA asks the card")
def test_the_question_is_one_that_this_pytorch_understands() -> None:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        q, k = torch.randn(1, 4, 32, 64), torch.randn(1, 2, 32, 64)
        assert sdpa.asked(q, k, k, torch.ones(32, 32, dtype=torch.bool), False) == ()  # on a CPU always


def test_a_graph_asks_with_tensors_like_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    questions: list[tuple[Any, ...]] = []
    monkeypatch.setattr(sdpa, "asked", lambda *call: (questions.append(call), KERNELS)[1])
    assert sdpa._asked_for_graph(CUDA, torch.float16, None, 8, 2, 64, 64, True, False, True) == ()  # no card is known
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sdpa._asked_for_graph(CUDA, torch.float16, torch.bool, 8, 2, 64, 32, True, False, True) == KERNELS
    ((q, k, v, mask, causal),) = questions
    assert (q.shape[1], k.shape[1], q.shape[3], v.shape[3], mask.dtype, causal) == (8, 2, 64, 32, torch.bool, True)
    assert q.shape[2] != k.shape[2]
    assert q.requires_grad
