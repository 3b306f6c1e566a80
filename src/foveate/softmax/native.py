"""Foveate's own CPU kernels: exact forward attention whose cost follows the tiles that are not empty.

No compiler is needed at run time. Keys hidden from a row never matter, and q, k, v are read where they are: grouped
heads without a repeated k or v, any strides with a unit last one. `native/` holds the C++.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.pattern.crossing import cannot_cross, tiles, written
from foveate.positions import Pairs
from foveate.positions import starts as starts_of
from foveate.problem import Problem, Result
from foveate.score import Bias, Score
from foveate.score import parse as parse_score

try:
    from foveate import _native
except ImportError:
    _native = None  # type: ignore[assignment]

_TILE = 64
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def refuses(problem: Problem) -> list[str]:
    """Every reason for which the kernels cannot compute this."""
    q = problem.q
    reasons = []
    if _native is None:
        reasons.append("the compiled kernels are missing: install a C++ compiler and foveate again")
    if q.device.type not in ("cpu", "meta"):
        reasons.append(f"q is on {q.device.type} (takes cpu)")
    if q.dtype not in _DTYPES:
        reasons.append(f"dtype is {str(q.dtype).removeprefix('torch.')} (takes float32, bfloat16, float16)")
    if problem.needs_gradient:
        reasons.append("a gradient is needed, and it has no backward pass yet")
    if problem.is_transformed:
        reasons.append('it has no vmap and no forward derivative: backend="reference" has')
    if problem.dropout:
        reasons.append("takes no dropout yet")
    if problem.score is not None and sum(isinstance(term, Bias) for term in problem.score.biases) > 1:
        reasons.append("takes one bias tensor")
    return reasons + cannot_cross(problem.pattern, q)


def run(problem: Problem) -> Result:
    """Hand the problem to the operator as tensors and strings, which is all that a graph can hold."""
    return Result(*_run(problem, kernel="", threads=0))


def _run(problem: Problem, kernel: str, threads: int) -> tuple[Tensor, Tensor]:
    """On a named kernel ("" = the best one) and so many threads (0 = as torch), so that tests reach every kernel."""
    pattern, held = written(problem.pattern, *problem.shape, problem.query_start, _TILE)
    score, tensors = problem.score.spec() if problem.score is not None else ("", [])
    varies = isinstance(problem.query_start, Tensor)
    out: tuple[Tensor, Tensor] = _forward_op(
        problem.q, problem.k, problem.v, held, tensors,
        problem.query_start if varies else None, 0 if varies else problem.query_start,
        pattern, score, problem.scale, kernel, threads,
    )  # fmt: skip
    return out


@torch.library.custom_op("foveate::native_forward", mutates_args=(), device_types="cpu")
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, held: Sequence[Tensor], tensors: Sequence[Tensor], starts: Tensor | None,
    start: int, pattern: str, score: str, scale: float, kernel: str, threads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, queries, dim = q.shape
    keys, value_dim = k.shape[2], v.shape[3]
    out = torch.empty(batch, heads, queries, value_dim, dtype=q.dtype)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32)
    if not out.numel() and not lse.numel():
        return out, lse
    position = start if starts is None else starts
    # Whatever is made here has to live until the call returns: the kernel gets addresses.
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    terms = parse_score(score, [x.detach() for x in tensors]) if score else Score()
    distances = _distances(terms, position, batch, heads, queries, keys)
    bias = next((term.full().float() for term in terms.biases if isinstance(term, Bias)), None)
    logits = None if terms.sinks is None else terms.sinks.logits.float().contiguous()
    listed, alive = (0, 0, 0, 0, 1, 1), []
    summary = tiles(pattern, held, batch, heads, queries, keys, position, _TILE)
    if summary is not None:
        parts = (summary.offsets, summary.columns, summary.partial, summary.bits)
        alive = [part.contiguous() for part in parts]
        listed = (*(x.data_ptr() for x in alive), summary.batch, summary.heads)  # type: ignore[assignment]
    _native.forward(
        _DTYPES[q.dtype], _matrix(q), _matrix(k), _matrix(v), _matrix(out), lse.data_ptr(),
        (batch, heads, k.shape[1], queries, keys, dim, value_dim), scale,
        0.0 if terms.softcap is None else terms.softcap.cap,
        (0, 0, 0) if distances is None else (distances.data_ptr(), *_steps(distances, 2)),
        (0, 0, 0, 0, 0) if bias is None else (bias.data_ptr(), *_steps(bias, 4)),
        0 if logits is None else logits.data_ptr(),
        listed, kernel, threads or torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


@_forward_op.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, held: Sequence[Tensor], tensors: Sequence[Tensor], starts: Tensor | None,
    start: int, pattern: str, score: str, scale: float, kernel: str, threads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _distances(score: Score, start: int | Tensor, batch: int, heads: int, queries: int, keys: int) -> Tensor | None:
    """Every bias that depends on distance alone, summed: `[batch or 1, heads, queries + keys − 1 + a tile]`.

    Entry keys − 1 + row − key is the bias of that row and key, so that rows in the lanes read neighbours.
    """
    terms = [term for term in score.biases if not isinstance(term, Bias)]
    if not terms:
        return None
    first = starts_of(start, batch, queries, keys, torch.device("cpu")).view(-1, 1, 1, 1)
    back = first + torch.arange(1 - keys, queries + _TILE).view(1, 1, -1, 1)
    at = Pairs(
        batch=torch.arange(batch).view(-1, 1, 1, 1), head=torch.arange(heads).view(1, -1, 1, 1), row=back, query=back,
        key=torch.zeros(1, 1, 1, 1, dtype=torch.int64), keys=keys,
    )  # fmt: skip
    total = torch.zeros(1, heads, back.shape[2], 1)
    for term in terms:
        total = term.apply(total, at)
    return total.squeeze(3).contiguous()


def _steps(x: Tensor, count: int) -> list[int]:
    """The strides of the first dimensions, 0 where one entry stands for all."""
    return [0 if x.shape[n] == 1 else x.stride(n) for n in range(count)]


def _matrix(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)
