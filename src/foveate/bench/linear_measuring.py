"""One row of the table of linear attention: computed by all, compared with float64, timed in turn.

- native, chunked, recurrence: `foveate.linear_attention`, by name
- transformers: torch_chunk_gated_delta_rule of Qwen3-Next, or torch_recurrent_gated_delta_rule for one step
- plain: the same form in a few lines of PyTorch, in chunks of 64, or one step
- softmax: our dense causal softmax attention of the same tensors, which is another function and checked as such

The truth is the chunked form in float64. Ours: error ≤ 2 × (error of the chunked form in the row's dtype) +
2·eps·max(1, |truth|max), gradients 3 ×. A peer, whose exponents may be differences of large sums, may be off by 1e-4 of
the largest number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.bench.contestants import Turn
from foveate.bench.linear import LinearRow
from foveate.bench.measuring import repeated, rounded, verdict
from foveate.bench.results import Figure, Measured
from foveate.errors import Unsupported, unknown_name, unsupported
from foveate.functional import attention
from foveate.linear.functional import linear_attention
from foveate.linear.problem import LinearState
from foveate.pattern.catalogue import causal

OURS = ("native", "chunked", "recurrence")
PEERS = ("transformers", "plain", "softmax")
_CHUNK = 64
_ROWS = 64  # of softmax attention that are compared

Tensors = Mapping[str, Tensor]
_Attend = Callable[[Tensors], tuple[Tensor, ...]]


def measure_linear(row: LinearRow, *, runs: int, seconds: float) -> Measured:
    """Everything about one row; the arguments are those of `measuring.measure`."""
    with torch.set_grad_enabled(row.gradients):
        figures, again = _figures(row, runs, seconds)
    return Measured(
        row.section, row.name, row.work, str(row.dtype).removeprefix("torch."), row.batch, row.heads, row.heads,
        row.steps, row.steps, row.dim, None, 1.0, row.sweep, figures,
        [verdict(claim, figures, again) for claim in row.claims], again,
    )  # fmt: skip


def inputs(row: LinearRow) -> dict[str, Tensor]:
    """The tensors of a row and `upstream`, the gradient that arrives at the output; the same numbers each time."""
    draw = torch.Generator().manual_seed(7)
    shape = row.batch, row.heads, row.steps, row.dim
    q, k, v, upstream = (torch.randn(shape, generator=draw) for _ in range(4))
    made = {"q": q, "k": torch.nn.functional.normalize(k, dim=-1), "v": v, "upstream": upstream}
    made = {name: x.to(row.dtype) for name, x in made.items()}
    if row.form != "linear":
        channels = (row.dim,) if row.form == "kimi delta" else ()
        made["decay"] = -torch.rand(*shape[:3], *channels, generator=draw)
        made["beta"] = torch.rand(*shape[:3], generator=draw)
    if row.work == "decode":
        made["state"] = torch.randn(row.batch, row.heads, row.dim, row.dim, generator=draw)
    return made


def _figures(row: LinearRow, runs: int, seconds: float) -> tuple[dict[str, Figure], float | None]:
    given = inputs(row)
    complaint = _Truth(row, given).complaint
    turns: dict[str, Turn] = {}
    figures: dict[str, Figure] = {}
    for name in row.contestants:
        try:
            turn = prepare(name, row, given)
            wrong = _softmax_complaint(row, given, *turn()) if name == "softmax" else complaint(turn(), name in OURS)
        except Unsupported as refusal:
            figures[name] = Figure(refused=str(refusal))
            continue
        if wrong:
            figures[name] = Figure(refused=f"wrong: {wrong}", wrong=name in OURS)
        else:
            turns[name] = turn
    if not turns:
        return figures, None
    found, again = repeated(turns, runs, seconds, PEERS)
    for name, each in found.items():
        middle = statistics.median(each)
        gflops = None if name == "softmax" else rounded(row.operations / middle / 1e9)
        figures[name] = Figure("ms", [rounded(1e3 * run) for run in each], rounded(1e3 * middle), gflops)
    return {name: figures[name] for name in row.contestants}, again


def prepare(name: str, row: LinearRow, given: Tensors) -> Turn:
    """What one turn of a contestant computes: (out, the last state), or out and the gradients of its inputs."""
    attend = _attend(name, row)
    leaves = {n: x.detach().clone().requires_grad_(row.gradients) for n, x in given.items() if n != "upstream"}
    if not row.gradients:
        return lambda: attend(leaves)

    def both() -> tuple[Tensor, ...]:
        out = attend(leaves)[0]
        return (out, *torch.autograd.grad(out, list(leaves.values()), given["upstream"]))

    return both


def _attend(name: str, row: LinearRow) -> _Attend:
    match name:
        case "native" | "chunked" | "recurrence":
            return _ours(name, row)
        case "transformers":
            return _transformers(row)
        case "plain":
            if row.form != "linear":
                raise unsupported({"plain": [f"is written for linear attention, not {row.form}"]})
            return _plain_step if row.work == "decode" else _plain_chunks
        case "softmax":
            return lambda given: (attention(given["q"], given["k"], given["v"], causal, backend="native"),)
    raise unknown_name("contestant", name, OURS + PEERS)


def _ours(backend: str, row: LinearRow) -> _Attend:
    delta_rule = row.form != "linear"

    def attend(given: Tensors) -> tuple[Tensor, ...]:
        state = LinearState(given["state"], None) if "state" in given else None
        out, last = linear_attention(
            given["q"], given["k"], given["v"], decay=given.get("decay"), beta=given.get("beta"),
            delta_rule=delta_rule, state=state, backend=backend,
        )  # fmt: skip
        return out, last.s

    return attend


def _transformers(row: LinearRow) -> _Attend:
    try:
        from transformers.models.qwen3_next import modeling_qwen3_next as peer
    except ImportError as missing:
        raise unsupported({"transformers": ["it is not installed, or has no Qwen3-Next"]}) from missing
    if row.form != "gated delta":
        raise unsupported({"transformers": [f"has no {row.form}"]})
    rule: Any = peer.torch_recurrent_gated_delta_rule if row.work == "decode" else peer.torch_chunk_gated_delta_rule

    def attend(given: Tensors) -> tuple[Tensor, ...]:  # its layout has heads behind steps
        tensors = (given[name].transpose(1, 2) for name in ("q", "k", "v", "decay", "beta"))
        out, last = rule(*tensors, initial_state=given.get("state"), output_final_state=True)
        return out.transpose(1, 2), last

    return attend


def _plain_chunks(given: Tensors) -> tuple[Tensor, ...]:
    q, k, v = given["q"], given["k"], given["v"]
    steps = q.shape[2]
    if steps % _CHUNK:
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, -steps % _CHUNK)) for x in (q, k, v))
    q, k, v = (x.unflatten(2, (-1, _CHUNK)) for x in (q * q.shape[-1] ** -0.5, k, v))
    states = (k.mT @ v).cumsum(2)
    before = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], 2)
    out = q @ before + (q @ k.mT).tril() @ v
    return out.flatten(2, 3)[:, :, :steps], states[:, :, -1]


def _plain_step(given: Tensors) -> tuple[Tensor, ...]:
    state = given["state"] + given["k"].mT * given["v"]
    return (given["q"] * given["q"].shape[-1] ** -0.5) @ state, state


class _Truth:
    """What a row's results should be, and how far each may be off."""

    def __init__(self, row: LinearRow, given: Tensors) -> None:
        wide = {name: x.double() for name, x in given.items()}
        self.wanted = [x.detach() for x in prepare("chunked", row, wide)()]
        rough = prepare("chunked", row, given)()
        self.names = ["out", *([f"d {name}" for name in given if name != "upstream"] if row.gradients else ["state"])]
        self.allowed = []
        for name, mine, true in zip(self.names, rough, self.wanted, strict=True):
            rounding = 2 * torch.finfo(mine.dtype).eps * max(1.0, float(true.abs().max()))
            self.allowed.append((3 if name.startswith("d ") else 2) * _distance(mine, true) + rounding)

    def complaint(self, found: tuple[Tensor, ...], ours: bool) -> str:
        """What is wrong with a result; empty when it is right."""
        for name, mine, true, bound in zip(self.names, found, self.wanted, self.allowed, strict=True):
            off = _distance(mine, true)
            if not ours:
                bound = max(bound, 1e-4 * float(true.abs().max()))
            if not off <= bound:  # NaN is not
                return f"{name} is off by {off:.2g}, allowed {bound:.2g}"
        return ""


def _distance(mine: Tensor, true: Tensor) -> float:
    return float((mine.detach().double() - true).abs().max())


def _softmax_complaint(row: LinearRow, given: Tensors, out: Tensor) -> str:
    """The last rows, which see everything, in float64."""
    some = min(_ROWS, row.steps)
    q, k, v = (given[name].double() for name in "qkv")
    scores = q[:, :, -some:] @ k.mT / math.sqrt(row.dim)
    hidden = torch.ones(some, row.steps, dtype=torch.bool).triu(row.steps - some + 1)
    off = _distance(out[:, :, -some:], scores.masked_fill(hidden, -math.inf).softmax(-1) @ v)
    bound = 64 * torch.finfo(row.dtype).eps
    return "" if off <= bound else f"out is off by {off:.2g}, allowed {bound:.2g}"
