"""docs/capabilities.md: what each implementation refuses, asked of the implementations themselves."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import foveate as fv
from foveate.dispatch.choose import NAMES, choose, implementation
from foveate.problem import problem
from making.filling import filled

Call = Callable[[Callable[..., Tensor]], dict[str, Any]]

# Every feature as the arguments of a call; `x` makes a tensor of a shape. 2 batch rows, 4 heads, 64 positions, dim 16.
FEATURES: dict[str, Call] = {
    "everyone to everyone": lambda x: {},
    "`causal`, as many queries as keys": lambda x: {"pattern": fv.causal},
    "`causal`, one query and a cache": lambda x: {"q": x(2, 4, 1, 16), "pattern": fv.causal},
    "`causal`, several queries and a cache": lambda x: {"q": x(2, 4, 5, 16), "pattern": fv.causal},
    "`query_start` that differs in the batch": lambda x: {
        "pattern": fv.causal,
        "query_start": x(2, dtype=torch.int64),
    },
    "`causal & window`": lambda x: {"pattern": fv.causal & fv.window(16)},
    "`documents`": lambda x: {"pattern": fv.documents(x(2, 64, dtype=torch.int64))},
    "`padding`": lambda x: {"pattern": fv.padding(x(2, dtype=torch.int64))},
    "`causal & padding`": lambda x: {"pattern": fv.causal & fv.padding(x(2, dtype=torch.int64))},
    "any other named pattern": lambda x: {"pattern": fv.bigbird(16)},
    "`rule(fn)`": lambda x: {"pattern": fv.rule(lambda b, h, q, k: q >= k)},
    "a boolean mask": lambda x: {"pattern": x(64, 64, dtype=torch.bool)},
    "`bias`, or a float mask": lambda x: {"score": fv.bias(x(64, 64))},
    "`bias` with a gradient": lambda x: {"score": fv.bias(x(64, 64, requires_grad=True))},
    "`causal` with `bias`": lambda x: {"pattern": fv.causal, "score": fv.bias(x(64, 64))},
    "`alibi`": lambda x: {"score": fv.alibi(x(4))},
    "`relative_bias`": lambda x: {"score": fv.relative_bias(x(9, 4))},
    "`softcap`": lambda x: {"score": fv.softcap(50.0)},
    "`sinks`": lambda x: {"score": fv.sinks(x(4))},
    "`normalizer=softmax_plus_one`": lambda x: {"normalizer": fv.softmax_plus_one},
    "any other `normalizer`": lambda x: {"normalizer": fv.sparsemax},
    "`dropout`": lambda x: {"dropout": 0.1, "seed": 1},
    "log-sum-exp (`attention_with_lse`)": lambda x: {"needs_lse": True},
    "grouped heads": lambda x: {"k": x(2, 2, 64, 16), "v": x(2, 2, 64, 16)},
    "grouped heads with a boolean mask": lambda x: {
        "k": x(2, 2, 64, 16),
        "v": x(2, 2, 64, 16),
        "pattern": x(64, 64, dtype=torch.bool),
    },
    "v of another width than q and k": lambda x: {"v": x(2, 4, 64, 24)},
    "any strides": lambda x: {"q": x(2, 4, 16, 64).mT},
    "no keys at all": lambda x: {"k": x(2, 4, 0, 16), "v": x(2, 4, 0, 16)},
    "gradients": lambda x: {"q": x(2, 4, 64, 16, requires_grad=True)},
    "float64": lambda x: {name: x(2, 4, 64, 16, dtype=torch.float64) for name in "qkv"},
    "bfloat16": lambda x: {name: x(2, 4, 64, 16, dtype=torch.bfloat16) for name in "qkv"},
    "float16": lambda x: {name: x(2, 4, 64, 16, dtype=torch.float16) for name in "qkv"},
    "inside `torch.compile`": lambda x: {"pattern": fv.causal},
    "`rule(fn)` inside `torch.compile`": lambda x: {"pattern": fv.rule(lambda b, h, q, k: q >= k)},
}

Refusals = dict[str, list[str]]


def capabilities() -> str:
    """The page of what each implementation refuses."""
    # The page is about a machine with a compiler and a processor that multiplies bfloat16.
    with (
        mock.patch("shutil.which", return_value="g++"),
        mock.patch("foveate.dispatch.thresholds.has_pairs", return_value=True),
    ):
        cpu = {name: _refusals(name, torch.zeros) for name in FEATURES}
    with (
        FakeTensorMode(),
        mock.patch("importlib.util.find_spec", return_value=object()),
        mock.patch("foveate.softmax.flex._is_fake", return_value=False),
        mock.patch("foveate.softmax.sdpa.asked", _newer_card),
        mock.patch("torch.cuda.is_available", return_value=True),
    ):

        def fake(*shape: int, **more: Any) -> Tensor:
            return torch.empty(*shape, device="cuda", **more)

        # A rule cannot be asked of tensors without data: what it needs of a GPU is what any other pattern needs.
        cuda = {name: _refusals(name, fake) for name in FEATURES if not name.startswith("`rule")}
    reasons = "\n".join(_reasons({"a CPU": cpu, "CUDA": cuda}))
    return filled("capabilities.md", cpu=_table(cpu), cuda=_table(cuda), reasons=reasons)


def _newer_card(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[str, ...]:
    """What PyTorch 2.13 answers on a card that has all of its kernels, by the rules in its source."""
    grouped, narrow = q.shape[1] != k.shape[1], q.dtype in (torch.bfloat16, torch.float16)
    found = ["flash"] if narrow and mask is None and not (causal and q.shape[2] != k.shape[2]) else []
    return (*found, *(["efficient"] if q.dtype != torch.float64 and not grouped else []))


def _refusals(name: str, make: Callable[..., Tensor]) -> Refusals:
    """The reasons of every implementation, and under "auto" what it takes."""
    plain: dict[str, Any] = {each: make(2, 4, 64, 16) for each in "qkv"}
    call = problem(**(plain | FEATURES[name](make)))
    with mock.patch("torch.compiler.is_compiling", return_value="torch.compile" in name):
        found = {each: implementation(each).refuses(call) for each in NAMES}
        try:
            return {**found, "auto": [choose(call).chosen]}
        except fv.Unsupported:
            return {**found, "auto": ["none"]}


def _table(found: dict[str, Refusals]) -> str:
    lines = ["| | " + " | ".join(NAMES) + " | auto |", "|:--|" + ":-:|" * len(NAMES) + ":--|"]
    for feature, refusals in found.items():
        cells = ["–" if refusals[name] else "✓" for name in NAMES]
        lines.append(f"| {feature} | {' | '.join(cells)} | {refusals['auto'][0]} |")
    return "\n".join(lines)


def _reasons(found: dict[str, dict[str, Refusals]]) -> Iterator[str]:
    """For each implementation its refusals: the feature, and the reason as it is given."""
    for name in NAMES:
        listed: dict[str, list[str]] = {}
        for where, features in found.items():
            for feature, refusals in features.items():
                if refusals[name]:
                    reason = "; ".join(refusals[name])
                    listed.setdefault(f"{feature}: {html.escape(reason, quote=False)}", []).append(where)
        if not listed:
            yield f"**{name}** refuses nothing.\n"
            continue
        yield f"**{name}** refuses\n"
        for line, places in listed.items():
            yield f"- {line}" + ("" if len(places) == len(found) else f" (on {places[0]})")
        yield ""
