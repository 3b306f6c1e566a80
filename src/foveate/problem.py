"""One call of attention, checked once: every implementation may trust it."""

from __future__ import annotations

import math
import numbers
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.eager import is_transformed
from foveate.errors import InvalidInput
from foveate.normalizers import Normalizer, Rowwise, SoftmaxPlusOne
from foveate.pattern.algebra import And, Pattern
from foveate.pattern.custom import as_pattern
from foveate.pattern.positional import causal
from foveate.positions import Extent, Pairs, grid
from foveate.score import Score, bias
from foveate.score import sinks as sinks_of
from foveate.values import dense, describe, dropout_of, integers, is_listed, scale_of, whole

_FURTHEST = 1 << 61  # so that sums of a few positions are numbers of 64 bits
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Problem:
    """q `[B, Hq, Nq, D]`, k `[B, Hk, Nk, D]`, v `[B, Hk, Nk, Dv]`, Hq a multiple of Hk; all else has been resolved."""

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Pattern | None
    score: Score | None
    scale: float
    query_start: int | Tensor
    dropout: float
    seed: int | Tensor | None
    needs_lse: bool
    normalizer: Rowwise | None = None

    @property
    def group(self) -> int:
        """How many query heads read the same key head."""
        return self.q.shape[1] // max(self.k.shape[1], 1)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, query heads, queries, keys)."""
        return self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2]

    @property
    def is_transformed(self) -> bool:
        """Whether something is at work that sees no operator."""
        return is_transformed()

    def tensors(self) -> list[Tensor]:
        """Every tensor of the call."""
        found = [self.q, self.k, self.v]
        for part in (self.pattern, self.score):
            found += part.tensors() if part is not None else []
        return found + [x for x in (self.query_start, self.seed) if isinstance(x, Tensor)]

    @property
    def needs_gradient(self) -> bool:
        """Whether autograd will ask for any gradient of this call."""
        tensors = (self.q, self.k, self.v, *(self.score.tensors() if self.score else ()))
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def pairs(self, box: tuple[slice, slice, slice, slice] | None = None) -> Pairs:
        """The positions of all (batch, head, row, key) of the call, or of a box of it."""
        return grid(*self.shape, self.query_start, self.q.device, box)


@dataclass(frozen=True)
class Result:
    """out `[B, Hq, Nq, Dv]` in q's dtype; lse `[B, Hq, Nq]`, natural logarithm, float32 or wider, or None."""

    out: Tensor
    lse: Tensor | None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, sums stay in the dtype they were given: autocast has cast q, k, v, and is to cast nothing else."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores, sums and log-sum-exps are held: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Tensor | None = None,
    *,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
    normalizer: Normalizer | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    needs_lse: bool = False,
) -> Problem:
    """Check a call with four-dimensional q, k, v and resolve its defaults; raises `InvalidInput` in one sentence."""
    q, k, v = autocast(q, k, v)
    check_tensors(q, k, v)
    batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    start = _check_start(query_start, q, keys)
    if pattern is not None:
        pattern = as_pattern(pattern)
    if isinstance(score, Tensor):
        score = bias(score)
    if score is not None and not isinstance(score, Score):
        raise InvalidInput(f"the score is a {type(score).__name__}: wanted a score or a float tensor")
    score, rowwise = _check_normalizer(normalizer, score, q, needs_lse)
    if isinstance(pattern, And) and not isinstance(start, Tensor) and start >= keys - 1:
        pattern = pattern.without(causal)  # hides nothing from queries that stand at the last key or behind it
    last = None if isinstance(start, Tensor) else start + queries
    extent = Extent(batch, heads, queries, keys, last, q.device)
    for part in (pattern, score):
        reasons = part.misfits(extent) if part is not None else []
        if reasons:
            raise InvalidInput("; ".join(reasons))
    dropout = dropout_of(dropout)
    if seed is not None:
        seed = whole(seed, "seed", -(2**63), 2**63 - 1, "a whole number of 64 bits, or None")
    if scale is None:
        scale = 1 / math.sqrt(q.shape[3]) if q.shape[3] else 1.0
    return Problem(q, k, v, pattern, score, scale_of(scale), start, dropout, seed, needs_lse, rowwise)


def batched_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Tensor | None = None,
    score: Score | Tensor | None = None,
    scale: float | None = None,
    query_start: int | Tensor | None = None,
    normalizer: Normalizer | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    *,
    needs_lse: bool = False,
) -> tuple[Problem, bool]:
    """The checked problem, and whether the call had a batch dimension."""
    batched = not all(isinstance(x, Tensor) and x.dim() == 3 for x in (q, k, v))
    if not batched:
        q, k, v = q[None], k[None], v[None]
    call = problem(
        q, k, v, pattern, score=score, scale=scale, query_start=query_start, normalizer=normalizer,
        dropout=dropout, seed=seed, needs_lse=needs_lse,
    )  # fmt: skip
    return call, batched


def _check_normalizer(
    normalizer: Normalizer | None, score: Score | None, q: Tensor, needs_lse: bool
) -> tuple[Score | None, Rowwise | None]:
    """(the score, the normalizer that is left): softmax-plus-one is softmax and one more term of the score."""
    if normalizer is None:
        return score, None
    has_sinks = score is not None and score.sinks is not None
    if isinstance(normalizer, SoftmaxPlusOne):
        if has_sinks:
            raise InvalidInput(f"softmax_plus_one is a sink of logit 0, and {score!r} has sinks of its own: drop one")
        one = sinks_of(torch.zeros(q.shape[1], dtype=accumulator(q.dtype), device=q.device))
        return one if score is None else score + one, None
    if not isinstance(normalizer, Rowwise):
        kind = getattr(normalizer, "__name__", type(normalizer).__name__)
        raise InvalidInput(
            f"the normalizer is {kind}: wanted None (which is softmax), softmax_plus_one, sigmoid, sparsemax, "
            "entmax(alpha) or hardmax"
        )
    if has_sinks:
        raise InvalidInput(f"sinks enlarge the denominator of a softmax, and {normalizer} has none: drop the sinks")
    if needs_lse:
        raise InvalidInput(f"{normalizer} has no log-sum-exp: call attention instead of attention_with_lse")
    return score, normalizer


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the dtype of autocast, where that is on; float64 stays, as in PyTorch."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        kinds = ", ".join(type(x).__name__ for x in (q, k, v))
        raise InvalidInput(f"q, k, v are {kinds}: wanted three tensors")
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    return q, k, v


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Whether q, k and v are four-dimensional and fit each other, or `InvalidInput` with what was wanted."""
    dense(q, "q")
    dense(k, "k")
    dense(v, "v")
    wanted = _wanted(q, k, v)
    if wanted:
        given = ", ".join(f"{name} is {describe(x)} on {x.device}" for name, x in zip("qkv", (q, k, v), strict=True))
        raise InvalidInput(f"{given}: wanted {wanted}")


def _wanted(q: Tensor, k: Tensor, v: Tensor) -> str:
    """What q, k and v should be and are not; empty when they are."""
    if not q.dim() == k.dim() == v.dim() == 4:
        return "[batch, heads, length, dim] for each, or all three without the batch"
    if not q.dtype == k.dtype == v.dtype:
        return "one dtype for all three; use .to() or torch.autocast"
    if q.dtype not in _DTYPES:
        return "float64, float32, bfloat16 or float16"
    if not q.device == k.device == v.device:
        return "one device for all three"
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        return "the same batch size"
    if k.shape[1] != v.shape[1]:
        return "as many heads in k as in v"
    if k.shape[2] != v.shape[2]:
        return "as many keys in k as in v"
    if q.shape[3] != k.shape[3]:
        return "the same head size (last dimension) in q and k"
    if q.shape[1] != k.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        turned = " ([batch, length, heads, dim] becomes so by transpose(1, 2))" if q.shape[2] == k.shape[2] else ""
        return f"[batch, heads, length, dim]{turned}, with query heads that are a multiple of the key heads"
    return ""


def _check_start(query_start: int | Tensor | None, q: Tensor, keys: int) -> int | Tensor:
    if query_start is None:
        start = keys - q.shape[2]
        return start.reshape(1) if isinstance(start, Tensor) else start  # in a trace sizes are tensors
    if is_listed(query_start):
        query_start = integers(query_start, "query_start", [1]).to(q.device)
    if isinstance(query_start, Tensor):
        query_start = integers(query_start, "query_start", [0, 1])
        if query_start.dim() == 0:
            query_start = query_start.expand(1)
        if query_start.shape[0] not in (1, q.shape[0]):
            raise InvalidInput(f"query_start is {describe(query_start)}: wanted an int or [batch] = [{q.shape[0]}]")
        if query_start.device != q.device:
            raise InvalidInput(f"query_start is on {query_start.device} but q is on {q.device}: move it")
        return query_start
    if isinstance(query_start, torch.SymInt):
        return query_start
    if isinstance(query_start, bool) or not isinstance(query_start, numbers.Integral):
        raise InvalidInput(f"query_start is {query_start!r}: wanted an int, or integers [batch]")
    query_start = int(query_start)
    if abs(query_start) > _FURTHEST:
        raise InvalidInput(f"query_start is {query_start}: wanted a position between −2⁶¹ and 2⁶¹")
    return query_start
