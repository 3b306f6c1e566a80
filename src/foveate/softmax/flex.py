"""FlexAttention, compiled by torch, with the tiles of an interval or of our summary for its block mask.

What a mask says are numbers in tensors, never code: see `pattern/kv_blocks.py`. Lengths are symbols of the compiled
kernel, so that it serves every length and every mask of its kind. Forward on a CPU, forward and backward on CUDA.

Keys hidden from one row but visible to another do matter here if their value holds NaN or inf.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import shutil
import types
import warnings
import weakref
from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.eager import is_eager
from foveate.pattern.algebra import Pattern
from foveate.pattern.block_mask import Summary
from foveate.pattern.block_mask_cache import summarise
from foveate.pattern.interval import ends, is_interval, span
from foveate.pattern.kv_blocks import TILE, Listing, Tells, list_runs, list_summary
from foveate.positions import Pairs, starts
from foveate.primitives import laid_out_as, without_unseen
from foveate.problem import Problem, Result, accumulator
from foveate.score import Bias, hidden_or_added

_LEAST = 16  # Triton multiplies no narrower matrices
_REMEMBERED = 1 << 34  # pairs: the lists of their tiles take 8 MiB
_DECODED = 128  # query heads of one key head that its kernel for one query takes


def refuses(problem: Problem, *, compiled: bool = True) -> list[str]:
    """Every reason for which FlexAttention cannot compute this; uncompiled, it is bound to fewer."""
    q, kind = problem.q, problem.q.device.type
    if torch.compiler.is_compiling():
        return ["its block mask depends on data, which a compiled graph does not have"]
    reasons = []
    if problem.normalizer is not None:
        reasons.append(f"computes softmax, not {problem.normalizer}")
    if kind not in ("cpu", "cuda"):
        reasons.append(f"q is on {kind} (takes cpu and cuda)")
    if kind == "cpu" and problem.needs_gradient:
        reasons.append("q is on cpu and a gradient is needed")
    if q.dtype == torch.float64:
        reasons.append("dtype is float64 (takes float32, bfloat16, float16)")
    if problem.dropout:
        reasons.append("it has no dropout")
    if any(size == 0 for size in (*q.shape, problem.k.shape[2], problem.v.shape[3])):
        reasons.append("a dimension is empty")
    return reasons + (_not_compiled(problem) if compiled else [])


def _not_compiled(problem: Problem) -> list[str]:
    """Every reason for which its compiler takes less."""
    kind, size = problem.q.device.type, min(problem.q.shape[3], problem.v.shape[3])
    reasons = []
    if kind == "cpu" and _needs_lse(problem):
        reasons.append("q is on cpu and the log-sum-exp is needed, by the caller or for sinks")
    if kind == "cpu" and not _has_compiler():
        reasons.append("it compiles C++ at run time and there is no g++ or clang++")
    if kind == "cuda" and importlib.util.find_spec("triton") is None:
        reasons.append("triton is missing")
    if kind == "cuda" and size < _LEAST:
        reasons.append(f"head size {size} has no kernel on cuda (takes {_LEAST} and more)")
    if _is_fake(problem.q):
        reasons.append("q has no data, and it is compiled for what has")
    if problem.is_transformed:
        reasons.append('it has no vmap and no forward derivative: backend="reference" has')
    return reasons or _used_up(problem)


def _is_fake(q: Tensor) -> bool:
    return isinstance(q, torch._subclasses.FakeTensor)


def run(problem: Problem, *, compiled: bool = True) -> Result:
    """Compute it; uncompiled (n×n memory, any torch) for tests of the meaning."""
    mask = _mask(problem)
    q, k, v = (x.resolve_neg() for x in (problem.q, problem.k, problem.v))  # the kernel reads what lies at the address
    if mask is not None:
        k, v = mask.of(k), mask.of(v)
    score, places = problem.score, None
    terms: list[Any] = [] if _is_usual(problem) else [_Times(torch.full((1,), problem.scale, device=k.device))]
    if score is not None:
        for term in (score.softcap, *score.biases):
            if isinstance(term, Bias):
                seen = term.seen() if mask is None else mask.within(term.seen())
                k, v = without_unseen(k, seen), without_unseen(v, seen)
            if term is not None:
                terms.append(_Flat(term) if compiled and isinstance(term, Bias) and k.device.type == "cpu" else term)
    if terms:
        places = _places(problem, mask)
    arguments = (
        q, k, v, None if mask is None else mask.lists(problem.needs_gradient), tuple(terms), places,
        problem.scale if _is_usual(problem) else 1.0, _needs_lse(problem), _options(problem),
    )  # fmt: skip
    # Without a gradient there is one kernel less, and no log-sum-exp to be written.
    with nullcontext() if problem.needs_gradient else torch.no_grad():
        out, lse = _kernel(problem)(*arguments) if compiled else _uncompiled(*arguments)
    if lse is None:
        return Result(laid_out_as(problem.q, out), None)
    lse = lse.to(accumulator(out.dtype))
    if score is not None and score.sinks is not None:
        # A sink only enlarges the denominator: exp(lse) becomes exp(lse) + exp(sink).
        with_sink = torch.logaddexp(lse, score.sinks.logits.to(lse.dtype)[None, :, None])
        share = torch.where(with_sink == -math.inf, 0, (lse - with_sink.masked_fill(with_sink == -math.inf, 0)).exp())
        out, lse = (out * share[..., None]).to(out.dtype), with_sink
    return Result(laid_out_as(problem.q, out), lse)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, lists: _Lists | None, terms: tuple[Any, ...], places: tuple[Tensor, Tensor] | None,
    scale: float, needs_lse: bool, options: dict[str, Any] | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(out, log-sum-exp): what is compiled."""
    flex = _module()
    score_mod = block_mask = None
    if places is not None:
        start, first_key = places

        def score_mod(value: Tensor, b: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            at = Pairs(b, head, row, row + start[b], key + first_key[0])
            for term in terms:
                value = term.apply(value, at)
            return value

    if lists is not None:
        tiles, transposed, tables, steps, tells = lists

        def mask_mod(b: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            return tells(tables, steps, b, head, row, key)

        block_mask = flex.BlockMask((q.shape[2], k.shape[2]), *tiles, *transposed, (TILE, TILE), mask_mod)
    answer = flex.flex_attention(
        q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=options, return_aux=flex.AuxRequest(lse=True) if needs_lse else None,
    )  # fmt: skip
    return (answer[0], answer[1].lse) if needs_lse else (answer, None)


def _uncompiled(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """Without PyTorch's word that this is not compiled, which is meant here, and nowhere else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
        return _attend(*arguments)


_Tensors = tuple[Tensor | None, ...]
_Lists = tuple[_Tensors, _Tensors, tuple[Tensor, Tensor], Tensor, Tells]


@dataclass(frozen=True, eq=False)
class _Mask:
    """The tiles of a pattern over the keys [first, end), outside of which no row sees any."""

    listing: Listing
    first: int
    end: int

    def of(self, x: Tensor) -> Tensor:
        """Keys or values as far as some row sees them."""
        x, seen = x[:, :, self.first : self.end], self.listing.seen
        return x if seen is None else without_unseen(x, seen)

    def within(self, seen: Tensor) -> Tensor:
        """`[batch, heads, keys]` of all keys, for those of the mask."""
        return seen if seen.shape[2] == 1 else seen[:, :, self.first : self.end]

    def lists(self, transposed: bool) -> _Lists:
        """As FlexAttention takes them, by column too where there is a backward pass."""
        listing = self.listing
        by_column = listing.by_column if transposed else (None,) * 4
        return (*listing.partial, *listing.full), by_column, self.tables, listing.steps, listing.tells

    @functools.cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        one, other = self.listing.tables
        return _roomy(one), _roomy(other)


def _mask(problem: Problem) -> _Mask | None:
    pattern, start, (_, _, queries, keys) = problem.pattern, problem.query_start, problem.shape
    if pattern is None:
        return None
    eager, device = is_eager(problem.q, problem.k, problem.v), problem.q.device
    if is_interval(pattern):
        plain = eager and isinstance(start, int) and not pattern.tensors()
        remembered = plain and queries * keys <= _REMEMBERED
        return (_remembered if remembered else _of_interval)(pattern, start, queries, keys, device)
    summary = summarise(pattern, *problem.shape, start, TILE)
    known = _MASKS.setdefault(summary, {}) if eager else {}
    if device not in known:
        known[device] = _Mask(list_summary(summary).to(device), 0, keys)
    return known[device]


_MASKS: weakref.WeakKeyDictionary[Summary, dict[torch.device, _Mask]] = weakref.WeakKeyDictionary()


def _of_interval(
    pattern: Pattern, query_start: int | Tensor, queries: int, keys: int, device: torch.device
) -> _Mask:  # fmt: skip
    """The mask of an interval, without a look at any tensor."""
    first, end = (0, keys) if isinstance(query_start, Tensor) else span(pattern, query_start, queries, keys)
    all_seen = first < end and not pattern.tensors() and not isinstance(query_start, Tensor)
    if first >= end:
        first, end = 0, keys
    start = starts(query_start, 1, queries, keys, device)
    low, high = ends(pattern, start[:, None] + torch.arange(queries, device=device), keys)
    low, high = (x.clamp(first, end) - first for x in (low, high))
    return _Mask(list_runs(low, high, end - first, all_seen=all_seen), first, end)


_remembered = functools.lru_cache(maxsize=8)(_of_interval)


def _places(problem: Problem, mask: _Mask | None) -> tuple[Tensor, Tensor]:
    """Where the first query of each batch row stands, and which key is the first."""
    batch, _, queries, keys = problem.shape
    start = starts(problem.query_start, batch, queries, keys, problem.q.device).expand(batch).contiguous()
    return _roomy(start), torch.full((1,), 0 if mask is None else mask.first, device=start.device)


def _roomy(table: Tensor) -> Tensor:
    """On a CPU with zeros behind it, up to one of a few sizes: there a table's size must be a number to the compiler.

    It replaces the names of its own sizes in the text of a mask or score function, and others that begin alike.
    """
    if table.device.type != "cpu":
        return table
    size = 1 << 20  # bytes
    while size < table.nbytes:
        size *= 4
    padded: Tensor = torch.nn.functional.pad(table, (0, size // table.element_size() - table.numel()))
    torch._dynamo.mark_static(padded)
    return padded


def _is_usual(problem: Problem) -> bool:
    """Whether the scale is that of its head size: a number of the kernel. Another one is data, as all masks are."""
    return problem.scale == 1 / math.sqrt(problem.q.shape[3])


class _Times:
    """A factor as a term."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def apply(self, scores: Tensor, at: Pairs) -> Tensor:
        return scores * self.factor[0]


class _Flat:
    """A bias as such a table."""

    def __init__(self, term: Bias) -> None:
        full = term.full()
        strides = [0 if size == 1 else step for size, step in zip(full.shape, full.stride(), strict=True)]
        extent = 1 + sum((size - 1) * step for size, step in zip(full.shape, strides, strict=True))
        self.table = _roomy(full.as_strided((extent,), (1,)))
        self.steps = torch.tensor(strides)

    def apply(self, scores: Tensor, at: Pairs) -> Tensor:
        steps = self.steps
        bias = self.table[at.batch * steps[0] + at.head * steps[1] + at.row * steps[2] + at.key * steps[3]]
        return hidden_or_added(scores, bias)


def _needs_lse(problem: Problem) -> bool:
    return problem.needs_lse or (problem.score is not None and problem.score.sinks is not None)


@functools.cache
def _has_compiler() -> bool:
    return bool(shutil.which("g++") or shutil.which("clang++"))


def _module() -> Any:
    from torch.nn.attention import flex_attention

    return flex_attention


def _options(problem: Problem) -> dict[str, Any] | None:
    """Its kernel for short queries where that is sure to be right; else the one for all.

    For grouped heads it was compiled for no more than 128 rows (torch 2.13), and in torch 2.9 it computes no more rows
    than the first call had that it was compiled for.
    """
    if problem.q.device.type == "cpu" or (problem.q.shape[2] == 1 and problem.group <= _DECODED):
        return None
    has_backends = "BACKEND" in _module().FlexKernelOptions.__annotations__
    return {"BACKEND": "TRITON"} if has_backends else {"FORCE_USE_FLEX_ATTENTION": True}


class _Kernel:
    """`_attend` compiled for one kind of calls, and how often it was."""

    def __init__(self) -> None:
        # PyTorch counts by code object, and past its limit it would run what is not compiled: fullgraph raises instead.
        code = _attend.__code__.replace(co_name=f"_attend_{len(_KERNELS)}")
        function = types.FunctionType(code, _attend.__globals__, code.co_name)
        self.count = 0
        self.attend = torch.compile(function, backend=self._compile, fullgraph=True)

    def _compile(self, graph: Any, inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self.count += 1
        # Every place that is read is inside its table: nothing has to be looked at on the way.
        return compile_fx(graph, inputs, config_patches={"assert_indirect_indexing": False})

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, lists: _Lists | None, terms: tuple[Any, ...], *more: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The same with lengths that are symbols, so that it is compiled once for all of them."""
        q, k, v = (_varying(x.view_as(x), 2) for x in (q, k, v))
        terms = tuple(_varying_bias(term) if isinstance(term, Bias) else term for term in terms)
        if lists is not None:
            tiles, transposed, tables, _, _ = lists
            for x in (*tiles, *transposed):
                if x is not None:
                    _varying(x, *range(2, x.dim()))
            if q.device.type != "cpu":
                tables = (_varying(tables[0], 0), _varying(tables[1], 0))
        found: tuple[Tensor, Tensor | None] = self.attend(q, k, v, lists, terms, *more)
        return found


def _varying(x: Tensor, *dims: int) -> Tensor:
    """Tell the compiler that these sizes are symbols, and that two of them being equal means nothing."""
    torch._dynamo.maybe_mark_dynamic(x, [dim for dim in dims if x.shape[dim] > 1])
    return x


def _varying_bias(term: Bias) -> Bias:
    full = term.full()
    return Bias(_varying(full.view_as(full), 2, 3))


_KERNELS: dict[Hashable, _Kernel] = {}


def _kind(problem: Problem) -> Hashable:
    """What makes a kernel of its own of a call; lengths, layouts, batches and masks do not."""
    q, pattern, score = problem.q, problem.pattern, problem.score
    words, tensors = ("", []) if score is None else score.spec()
    # One query is a constant of the kernel, and on CUDA fewer than a tile of them are another one.
    length = 1 if q.shape[2] == 1 else 2 if q.is_cuda and q.shape[2] < TILE else 3
    return (
        q.device, q.dtype, q.shape[1], problem.k.shape[1], q.shape[3], problem.v.shape[3], length,
        None if pattern is None else is_interval(pattern), words, tuple(x.shape for x in tensors if x.dim() == 2),
        _needs_lse(problem), problem.needs_gradient, _is_usual(problem),
    )  # fmt: skip


def _kernel(problem: Problem) -> _Kernel:
    kind = _kind(problem)
    return _KERNELS.get(kind) or _KERNELS.setdefault(kind, _Kernel())


def _used_up(problem: Problem) -> list[str]:
    """Why it must not be compiled once more: past its limits PyTorch would stop, or compute an n×n matrix."""
    if not _KERNELS:
        return []
    known, limits = _KERNELS.get(_kind(problem)), torch._dynamo.config
    if known is not None and known.count >= limits.recompile_limit:
        return [
            f"PyTorch compiled it {known.count} times for calls of this kind, and torch._dynamo.config.recompile_limit "
            f"is {limits.recompile_limit}"
        ]
    every = sum(kernel.count for kernel in _KERNELS.values())
    if known is None and every >= limits.accumulated_recompile_limit:
        return [
            f"PyTorch compiled it {every} times in this process, and torch._dynamo.config.accumulated_recompile_limit "
            f"is {limits.accumulated_recompile_limit}"
        ]
    return []
