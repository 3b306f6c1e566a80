"""FlexAttention, compiled by torch, with its block mask built from our summary.

Its mask function looks the pair up in the summary's bits, so one compiled kernel serves every pattern: a new mask is
new data, not new code. Forward on a CPU, forward and backward on CUDA.

Keys hidden from one row but visible to another do matter here if their value holds NaN or inf.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import shutil
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from foveate.pattern.memory import summarise
from foveate.pattern.summary import Summary
from foveate.positions import Pairs, starts
from foveate.primitives import laid_out_as, without_unseen
from foveate.problem import Problem, Result, accumulator
from foveate.score import Bias

_TILE = 128


def refuses(problem: Problem, *, compiled: bool = True) -> list[str]:
    """Every reason for which FlexAttention cannot compute this; uncompiled, it is bound to fewer."""
    q = problem.q
    if torch.compiler.is_compiling():
        return ["its block mask depends on data, which a compiled graph does not have"]
    reasons = []
    if problem.normalizer is not None:
        reasons.append(f"computes softmax, not {problem.normalizer}")
    if q.device.type not in ("cpu", "cuda"):
        reasons.append(f"q is on {q.device.type} (takes cpu and cuda)")
    if q.device.type == "cpu" and problem.needs_gradient:
        reasons.append("q is on cpu and a gradient is needed")
    if compiled and q.device.type == "cpu":
        if _needs_lse(problem):
            reasons.append("q is on cpu and the log-sum-exp is needed, by the caller or for sinks")
        if not _has_compiler():
            reasons.append("it compiles C++ at run time and there is no g++ or clang++")
    if compiled and q.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        reasons.append("triton is missing")
    if q.dtype == torch.float64:
        reasons.append("dtype is float64 (takes float32, bfloat16, float16)")
    if problem.dropout:
        reasons.append("it has no dropout")
    if any(size == 0 for size in (*q.shape, problem.k.shape[2], problem.v.shape[3])):
        reasons.append("a dimension is empty")
    return reasons


def run(problem: Problem, *, compiled: bool = True) -> Result:
    """Compute it; uncompiled (n×n memory, any torch) for tests of the meaning."""
    summary = _summary(problem)
    q, k, v = problem.q, problem.k, problem.v
    for seen in _seen(problem, summary):
        k, v = without_unseen(k, seen), without_unseen(v, seen)
    attend = _compiled() if compiled else _module().flex_attention
    needs_lse = _needs_lse(problem)
    answer = attend(
        q,
        k,
        v,
        score_mod=_score_mod(problem),
        block_mask=None if summary is None else _block_mask(summary),
        scale=problem.scale,
        enable_gqa=problem.group > 1,
        return_aux=_module().AuxRequest(lse=True) if needs_lse else None,
    )
    if not needs_lse:
        return Result(laid_out_as(problem.q, answer), None)
    out, lse = answer[0], answer[1].lse.to(accumulator(q.dtype))
    if problem.score is not None and problem.score.sinks is not None:
        # A sink only enlarges the denominator: exp(lse) becomes exp(lse) + exp(sink).
        logits = problem.score.sinks.logits.to(lse.dtype)[None, :, None]
        with_sink = torch.logaddexp(lse, logits)
        share = torch.where(with_sink == -math.inf, 0, (lse - with_sink.masked_fill(with_sink == -math.inf, 0)).exp())
        out, lse = (out * share[..., None]).to(out.dtype), with_sink
    return Result(laid_out_as(problem.q, out), lse)


@functools.cache
def _has_compiler() -> bool:
    return bool(shutil.which("g++") or shutil.which("clang++"))


def _seen(problem: Problem, summary: Summary | None) -> Iterator[Tensor]:
    """Which keys the pattern and each bias leave to some row, where that is not all of them."""
    found = [] if summary is None else [summary.keys_seen()]
    if problem.score is not None:
        found += [term.seen() for term in problem.score.biases if isinstance(term, Bias)]
    yield from (seen for seen in found if not bool(seen.all()))


def _needs_lse(problem: Problem) -> bool:
    return problem.needs_lse or (problem.score is not None and problem.score.sinks is not None)


def _module() -> Any:
    from torch.nn.attention import flex_attention

    return flex_attention


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_module().flex_attention, dynamic=False)


def _summary(problem: Problem) -> Summary | None:
    if problem.pattern is None:
        return None
    return summarise(problem.pattern, *problem.shape, problem.query_start, _TILE)


def _score_mod(problem: Problem) -> Callable[..., Tensor] | None:
    score = problem.score
    if score is None or not (score.softcap or score.biases):
        return None
    batch, _, queries, keys = problem.shape
    start = starts(problem.query_start, batch, queries, keys, problem.q.device)
    varies = start.shape[0] > 1
    first = start[0]

    def score_mod(value: Tensor, b: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        query = row + (start[b] if varies else first)
        return score.apply(value, Pairs(b, head, row, query, key, keys))

    return score_mod


_BLOCK_MASKS: weakref.WeakKeyDictionary[Summary, Any] = weakref.WeakKeyDictionary()


def _block_mask(summary: Summary) -> Any:
    """FlexAttention's BlockMask of a summary, kept as long as the summary is."""
    if summary not in _BLOCK_MASKS:
        _BLOCK_MASKS[summary] = _make_block_mask(summary)
    return _BLOCK_MASKS[summary]


def _make_block_mask(summary: Summary) -> Any:
    """Our tiles as FlexAttention lists them: counts and column indices, partial and full ones apart."""
    rows, columns = summary.offsets.shape[2] - 1, -(-summary.keys // _TILE)
    shape = (summary.batch, summary.heads, rows, columns)
    device = summary.columns.device
    batch, head, row = summary.rows()
    empty, full_tile = -2, -1
    place = torch.full(shape, empty, dtype=torch.int32, device=device)
    place[batch, head, row, summary.columns] = summary.partial.int()
    bits = summary.bits if summary.bits.shape[0] else summary.bits.new_zeros(1, *summary.bits.shape[1:])
    by_batch, by_head = summary.batch > 1, summary.heads > 1

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        tile = place[b if by_batch else b * 0, h if by_head else h * 0, query // _TILE, key // _TILE]
        byte = bits[tile.clamp(min=0), query % _TILE, key % _TILE // 8]
        # int32: FlexAttention's compiler has no shift of bytes by a tensor.
        bit = ((byte.to(torch.int32) >> (key % 8).to(torch.int32)) & 1).to(torch.bool)
        return torch.where(tile >= 0, bit, tile == full_tile)

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        dense = torch.zeros(shape, dtype=torch.int32, device=device)
        dense[batch[chosen], head[chosen], row[chosen], summary.columns[chosen]] = 1
        return dense.sum(-1, dtype=torch.int32), torch.argsort(dense, dim=-1, descending=True, stable=True).int()

    partial, full = listed(summary.partial >= 0), listed(summary.partial < 0)
    return _module().BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=_TILE, mask_mod=mask_mod, seq_lengths=(summary.queries, summary.keys)
    )
