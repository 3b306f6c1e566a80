"""Foveate's own CPU kernels: exact attention whose cost follows the tiles that are not empty, forward and backward.

No compiler is needed at run time. Keys hidden from a row never matter, and q, k, v are read where they are: grouped
heads without a repeated k or v, any strides with a unit last one. `native/` holds the C++.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.eager import is_eager
from foveate.errors import InvalidInput, unsupported
from foveate.pattern.band import Reach, reach
from foveate.pattern.gather import Lists
from foveate.pattern.serialize import cannot_cross, listed, tiles, written
from foveate.positions import Pairs
from foveate.positions import starts as starts_of
from foveate.primitives import readable, room_for_out
from foveate.problem import Problem, Result, without_autocast
from foveate.score import Bias, Score
from foveate.score import parse as parse_score
from foveate.slicewise import slicewise
from foveate.values import extremes

try:
    from foveate import _native
except ImportError:
    _native = None  # type: ignore[assignment]

if _native is not None:
    # The kernels work on torch's own threads, where torch brings GCC's OpenMP: no second pool fights for the cores.
    _native.share_threads_of("libgomp.so.1")

TILE = 64
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_LIMIT = -1
_KEPT, _SUNK = 4, 2  # numbers that the kernel keeps of a row, and which of them is the share of its sink
_FAR = 1 << 61  # further than any key is: positions are added to a limit in 64 bits

NO_LISTS: tuple[int, ...] = (0, 0, 0, 0, 0, 1, 1, 8, 0)  # of chosen keys: every key is a candidate


def refuses(problem: Problem) -> list[str]:
    """Every reason for which the kernels cannot compute this."""
    q = problem.q
    reasons = []
    if _native is None:
        reasons.append("the compiled kernels are missing: install a C++ compiler and foveate again")
    if problem.normalizer is not None:
        reasons.append(f"computes softmax, not {problem.normalizer}")
    if q.device.type not in ("cpu", "meta"):
        reasons.append(f"q is on {q.device.type} (takes cpu)")
    if q.dtype not in _DTYPES:
        reasons.append(f"dtype is {str(q.dtype).removeprefix('torch.')} (takes float32, bfloat16, float16)")
    if problem.is_transformed:
        reasons.append('it has no vmap and no forward derivative: backend="reference" has')
    if problem.score is not None and sum(isinstance(term, Bias) for term in problem.score.biases) > 1:
        reasons.append("takes one bias tensor")
    if reach(problem.pattern) is not None:
        return reasons
    return reasons + cannot_cross(problem.pattern, q)


def run(problem: Problem) -> Result:
    """Hand the problem to the operator as tensors and strings, which is all that a graph can hold."""
    return Result(*_run(problem))


class _Arguments(NamedTuple):
    """What crosses into the operators beside q, k and v.

    Without a `pattern` string a query sees the keys from `left` before to `right` behind it (−1: no limit), of batch
    row b the first lengths[b]. `starts` and `drawn`, if they are there, go before `start` and `seed`.
    """

    held: Sequence[Tensor]
    tensors: Sequence[Tensor]
    starts: Tensor | None
    lengths: Tensor | None
    drawn: Tensor | None
    start: int
    left: int
    right: int
    pattern: str
    score: str
    scale: float
    dropout: float
    seed: int
    kernel: str
    threads: int

    def beside(self) -> list[Tensor]:
        """Every tensor of them."""
        return [*self.held, *self.tensors, *(x for x in (self.starts, self.lengths, self.drawn) if x is not None)]


def _run(problem: Problem, kernel: str = "", threads: int = 0) -> tuple[Tensor, Tensor]:
    """On a named kernel ("" = the best one) and so many threads (0 = as torch), so that tests reach every kernel."""
    arguments = _arguments(problem, kernel, threads)
    if not is_eager(problem.q, problem.k, problem.v, *arguments.beside()):
        out, lse, _ = _forward_op(problem.q, problem.k, problem.v, *arguments)
    elif problem.needs_gradient:  # nothing has to see an operator, which costs more than a short call
        tensors = (problem.q, problem.k, problem.v)
        out, lse = _Differentiated.apply(*tensors, arguments, *arguments.tensors)  # type: ignore[no-untyped-call]
    else:
        out, lse, _ = _forward(problem.q, problem.k, problem.v, arguments)
    return out, lse


def _arguments(problem: Problem, kernel: str, threads: int) -> _Arguments:
    score, tensors = problem.score.spec() if problem.score is not None else ("", [])
    starts = problem.query_start if isinstance(problem.query_start, Tensor) else None
    start = 0 if isinstance(problem.query_start, Tensor) else problem.query_start
    simple = reach(problem.pattern)
    held: Sequence[Tensor] = ()
    if simple is not None:
        pattern, lengths, (left, right) = "", simple.lengths, _sides(simple)
    else:
        pattern, held = written(problem.pattern, *problem.shape, problem.query_start, TILE)
        lengths, left, right = None, _NO_LIMIT, _NO_LIMIT
    drawn = problem.seed if isinstance(problem.seed, Tensor) else None
    seed = problem.seed if isinstance(problem.seed, int | torch.SymInt) else 0
    return _Arguments(
        held, tensors, starts, lengths, drawn, start, left, right, pattern, score, problem.scale, problem.dropout,
        seed, kernel, threads,
    )  # fmt: skip


ALL_TILES, NO_BIAS = (0, 0, 0, 0, 1, 1), (0, 0, 0, 0, 0)


def bare(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, reach_at: tuple[int, int, int, int, int],
    tiles_at: tuple[int, int, int, int, int, int] = ALL_TILES, bias: tuple[int, int, int, int, int] = NO_BIAS,
) -> tuple[Any, ...]:  # fmt: skip
    """What `_native.forward` takes of readable tensors, where nothing changes the scores but a bias tensor.

    `reach_at`: where the starts of the batch rows lie (0: nowhere), the start of all, where their lengths lie, and how
    far a query sees to the left and to the right.
    """
    batch, heads, queries, dim = q.shape
    _, key_heads, keys, value_dim = v.shape
    return (
        _DTYPES[q.dtype], _matrix(q), _matrix(k), _matrix(v), _matrix(out), (lse.data_ptr(), 0),
        (batch, heads, key_heads, queries, keys, dim, value_dim), scale, (0, 0, 0), 0.0, (0, 0, 0), bias, 0, 0, 0.0,
        reach_at, tiles_at, NO_LISTS, "", torch.get_num_threads(),
    )  # fmt: skip


def direct(problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """What `run` comes to for q, k, v like these, where no gradient is needed and a reach says all that is hidden."""
    simple, start, scale = reach(problem.pattern), problem.query_start, problem.scale
    if problem.score is not None or problem.dropout or problem.needs_gradient or isinstance(start, Tensor):
        return None
    if simple is None or simple.lengths is not None or not problem.q.numel() or not problem.v.numel():
        return None
    reach_at = 0, start, 0, *_sides(simple)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = readable(q), readable(k), readable(v)
        out, lse = room_for_out(q, v.shape[3]), _floats(q.shape[:3])  # named: the kernel writes to both
        _native.forward(*bare(q, k, v, out, lse, scale, reach_at))
        return out

    return call


def _floats(shape: Sequence[int]) -> Tensor:
    """Room for float32 on the CPU, whatever PyTorch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cpu")


def _sides(simple: Reach) -> tuple[int, int]:
    """How far a reach goes to the left and to the right."""
    left, right = (_NO_LIMIT if side is None else min(side, _FAR) for side in (simple.left, simple.right))
    return left, right


class _Call:
    """One call of a kernel: the addresses that it reads, and the tensors behind them, which have to live so long."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, given: _Arguments, pages: Pages | None = None) -> None:
        batch, heads, queries, dim = q.shape
        keys = k.shape[2] if pages is None else pages.capacity
        self.alive = [readable(q), readable(k), readable(v)]
        self.sizes = (batch, heads, k.shape[1], queries, keys, dim, v.shape[3])
        self.dtype = _DTYPES[q.dtype]
        self.given = given
        self.position = given.start if given.starts is None else given.starts
        self.score = parse_score(given.score, [x.detach() for x in given.tensors]) if given.score else None
        self.distances = self._distances()
        bias = next((x for x in self.score.biases if isinstance(x, Bias)), None) if self.score else None
        self.bias = None if bias is None else bias.full().float()
        sinks = None if self.score is None or self.score.sinks is None else self.score.sinks.logits
        self.pages = (0, 0, 0) if pages is None else (self._hold(pages.table), pages.table.shape[1], pages.size)
        self.sinks = 0 if sinks is None else self._hold(sinks.float())
        self.outside = torch.zeros(1, dtype=torch.int32, device="cpu")

    def _hold(self, x: Tensor) -> int:
        """The address of a contiguous tensor, which lives as long as this does."""
        self.alive.append(x.contiguous())
        return self.alive[-1].data_ptr()

    def lists(self, gradients: Sequence[bool] = ()) -> Lists | None:
        """The keys that every query chose, if the pattern is that and the kernel gathers; None: tiles are as good.

        It has no dropout and no bias tensor, and no `gradients` of what depends on distance.
        """
        given, (batch, heads, _, queries, keys) = self.given, self.sizes[:5]
        terms = self.score.biases if self.score else ()
        wanted = any(wish for term, wish in zip(terms, gradients, strict=False) if hasattr(term, "collect"))
        if self.bias is not None or given.dropout or wanted or self.pages[0] or keys >= 1 << 31:
            return None
        return listed(given.pattern, given.held, batch, heads, queries, keys, self.position)

    def arguments(
        self, out: Tensor, lse: Tensor, rest: Tensor | None = None, lists: Lists | None = None
    ) -> tuple[Any, ...]:
        """What `_native.forward` and its kin take first."""
        q, k, v = self.alive[:3]
        given, bias, distances = self.given, self.bias, self.distances
        batch, heads, _, queries, keys = self.sizes[:5]
        tiles_at = ALL_TILES
        limits, chosen_at = (given.lengths, given.left, given.right), NO_LISTS
        if lists is not None:
            limits, chosen_at = self._chosen(lists)
        elif given.pattern:
            summary = tiles(given.pattern, given.held, batch, heads, queries, keys, self.position, TILE)
            assert summary is not None
            parts = (summary.offsets, summary.columns, summary.partial, summary.bits)
            tiles_at = (*map(self._hold, parts), summary.batch, summary.heads)  # type: ignore[assignment]
        reach_at = (
            0 if given.starts is None else self._hold(given.starts.long().expand(batch)), given.start,
            0 if limits[0] is None else self._hold(limits[0].long()), *limits[1:],
        )  # fmt: skip
        return (
            self.dtype, _matrix(q), _matrix(k), _matrix(v), _matrix(out),
            (lse.data_ptr(), 0 if rest is None else rest.data_ptr()), self.sizes, given.scale,
            self.pages, 0.0 if self.score is None or self.score.softcap is None else self.score.softcap.cap,
            (0, 0, 0) if distances is None else (distances.data_ptr(), *_steps(distances, 2)),
            NO_BIAS if bias is None else (bias.data_ptr(), *_steps(bias, 4)),
            self.sinks, given.seed if given.drawn is None else int(given.drawn), given.dropout, reach_at, tiles_at,
            chosen_at, given.kernel, given.threads or torch.get_num_threads(),
        )  # fmt: skip

    def _chosen(self, lists: Lists) -> tuple[tuple[Tensor | None, int, int], tuple[int, ...]]:
        """(lengths, left, right), and where the lists are."""
        self.alive += [lists.indices, self.outside]
        table = lists.indices
        sides = (_NO_LIMIT if side is None else min(side, _FAR) for side in (lists.reach.left, lists.reach.right))
        return (lists.reach.lengths, *sides), (  # type: ignore[return-value]
            table.data_ptr() or self.outside.data_ptr(), *_steps(table, 3), table.shape[3], lists.block, table.shape[1],
            table.element_size(), self.outside.data_ptr(),
        )  # fmt: skip

    def check_lists(self) -> None:
        """Raise `InvalidInput` if a list holds a number that is no key's; the kernel has read nothing there."""
        if self.outside:
            raise InvalidInput(
                f"{self.given.pattern} lists what is not there beside {self.sizes[4]} keys: wanted −1 for none"
            )

    def _distances(self) -> Tensor | None:
        """Every bias that depends on distance alone, summed: `[batch or 1, heads, queries + keys − 1 + a tile]`.

        Entry keys − 1 + row − key is the bias of that row and key, so that rows in the lanes read neighbours.
        """
        terms = [term for term in self.score.biases if not isinstance(term, Bias)] if self.score else []
        if not terms:
            return None
        at = self.along_distances()
        total = _zeros((1, self.sizes[1], at.query.shape[2], 1))
        for term in terms:
            total = term.apply(total, at)
        return total.squeeze(3).contiguous()

    def along_distances(self) -> Pairs:
        """The pairs of those entries: key 0, and rows from keys − 1 before the first one on."""
        batch, heads, _, queries, keys = self.sizes[:5]
        first = starts_of(self.position, batch, queries, keys, torch.device("cpu")).view(-1, 1, 1, 1)
        back = first + torch.arange(1 - keys, queries + TILE, device="cpu").view(1, 1, -1, 1)
        return Pairs(
            batch=torch.arange(batch, device="cpu").view(-1, 1, 1, 1),
            head=torch.arange(heads, device="cpu").view(1, -1, 1, 1), row=back,
            query=back, key=torch.zeros(1, 1, 1, 1, dtype=torch.int64, device="cpu"), keys=keys,
        )  # fmt: skip


def _forward(
    q: Tensor, k: Tensor, v: Tensor, given: _Arguments, pages: Pages | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, log-sum-exp, four numbers of every row from which the backward pass makes its weights again)."""
    out = room_for_out(q, v.shape[3])
    lse, rest = _floats(q.shape[:3]), _floats((*q.shape[:3], _KEPT))
    if out.numel() or lse.numel():
        call = _Call(q, k, v, given, pages)  # named, so that what it holds lives until the kernel is done
        _native.forward(*call.arguments(out, lse, rest, call.lists()))
        call.check_lists()
    return out, lse, rest


def _backward(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, rest: Tensor, q: Tensor, k: Tensor, v: Tensor,
    given: _Arguments,
    wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k, v and of those tensors of the score that are wanted (the others are zeros)."""
    dq, dk, dv = (_zeros(x.shape) for x in (q, k, v))
    # One entry of a slope or a table collects from a whole matrix.
    d_tensors = [_zeros(x.shape, torch.float64) for x in given.tensors]
    if lse.numel():
        call = _Call(q, k, v, given)
        d_out, out = readable(d_out), readable(out)
        terms = dict(zip(_holders(call.score), zip(d_tensors, wanted, strict=True), strict=True))
        bias = next((term for term in terms if isinstance(term, Bias) and terms[term][1]), None)
        d_bias = None if bias is None else _zeros(bias.full().shape)
        by_distance = [
            term for term in terms if terms[term][1] and not isinstance(term, Bias) and hasattr(term, "collect")
        ]
        d_distances = None
        if by_distance and call.distances is not None:
            d_distances = _zeros(call.distances.shape, torch.float64)
        d_lse, lists = d_lse.float().contiguous(), call.lists(wanted)
        # By tiles what was gathered: sums in another order, so that what was kept of them is of no use.
        kept = None if any(wanted) and lists is None and call.lists() is not None else rest.contiguous()
        _native.backward(
            *call.arguments(out, lse.contiguous(), kept, lists), _matrix(d_out),
            d_lse.data_ptr(), (dq.data_ptr(), dk.data_ptr(), dv.data_ptr()),
            (0, 0, 0, 0, 0) if d_bias is None else (d_bias.data_ptr(), *d_bias.shape),
            (0, 1) if d_distances is None else (d_distances.data_ptr(), d_distances.shape[0]),
        )  # fmt: skip
        if bias is not None and d_bias is not None:
            terms[bias][0].copy_(d_bias.view(terms[bias][0].shape))
        if d_distances is not None:
            for term in by_distance:
                term.collect(d_distances[..., None], call.along_distances(), terms[term][0])
        if call.score is not None and call.score.sinks is not None and terms[call.score.sinks][1]:
            taken = (d_out.double() * out.double()).sum(-1) - d_lse
            terms[call.score.sinks][0].sub_((rest[..., _SUNK] * taken).sum((0, 2)))
    pairs = [*zip((dq, dk, dv), (q, k, v), strict=True), *zip(d_tensors, given.tensors, strict=True)]
    return [gradient.to(x.dtype) for gradient, x in pairs]


def _holders(score: Score | None) -> list[Any]:
    """The terms of a score that hold a tensor, in the order of `Score.spec`."""
    if score is None:
        return []
    return [*score.biases, *([score.sinks] if score.sinks else [])]


@torch.library.custom_op("foveate::native_forward", mutates_args=(), device_types="cpu")
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, held: Sequence[Tensor], tensors: Sequence[Tensor], starts: Tensor | None,
    lengths: Tensor | None, drawn: Tensor | None, start: int, left: int, right: int, pattern: str, score: str,
    scale: float, dropout: float, seed: int, kernel: str, threads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward(q, k, v, _Arguments(
        held, tensors, starts, lengths, drawn, start, left, right, pattern, score, scale, dropout, seed, kernel, threads
    ))  # fmt: skip


@_forward_op.register_fake
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse, rest = (q.new_empty((*q.shape[:3], *more), dtype=torch.float32) for more in ((), (_KEPT,)))
    return room_for_out(q, v.shape[3]), lse, rest


@torch.library.custom_op("foveate::native_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, rest: Tensor, wanted: Sequence[bool],
    q: Tensor, k: Tensor, v: Tensor, held: Sequence[Tensor], tensors: Sequence[Tensor], starts: Tensor | None,
    lengths: Tensor | None, drawn: Tensor | None, start: int, left: int, right: int, pattern: str, score: str,
    scale: float, dropout: float, seed: int, kernel: str, threads: int,
) -> list[Tensor]:  # fmt: skip
    return _backward(d_out, d_lse, out, lse, rest, q, k, v, _Arguments(
        held, tensors, starts, lengths, drawn, start, left, right, pattern, score, scale, dropout, seed, kernel, threads
    ), wanted)  # fmt: skip


@_backward_op.register_fake
def _backward_fake(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, rest: Tensor, wanted: Sequence[bool],
    q: Tensor, k: Tensor, v: Tensor, held: Sequence[Tensor], tensors: Sequence[Tensor], *given: Any,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, *tensors)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, held, tensors, *given = inputs
    ctx.counts = len(held), len(tensors)
    ctx.present = [x is not None for x in given[:3]]
    ctx.rest = given[3:]
    ctx.wanted = [x.requires_grad for x in tensors]
    ctx.save_for_backward(*output, q, k, v, *held, *tensors, *(x for x in given[:3] if x is not None))


def _remembered(ctx: Any) -> tuple[tuple[Tensor, ...], _Arguments]:
    """(out, log-sum-exp, what else was kept of the rows, q, k, v), and what else there was."""
    held, tensors = ctx.counts
    everything = ctx.saved_tensors  # asked for once, or a checkpoint refuses
    saved, more = everything[:6], list(everything[6:])
    extra = iter(more[held + tensors :])
    optional: list[Any] = [next(extra) if present else None for present in ctx.present]
    return saved, _Arguments(more[:held], more[held : held + tensors], *optional, *ctx.rest)


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor, d_rest: Tensor) -> tuple[Any, ...]:
    saved, given = _remembered(ctx)
    with without_autocast(d_out.device):
        dq, dk, dv, *d_tensors = _backward_op(d_out, d_lse, *saved[:3], ctx.wanted, *saved[3:], *given)
    return dq, dk, dv, [None] * len(given.held), d_tensors, *[None] * (len(ctx.present) + len(ctx.rest))


def _no_second_derivative(ctx: Any, *gradients: object) -> None:
    raise unsupported({"native": ['has no second derivative: use backend="reference", which has']})


class _Differentiated(torch.autograd.Function):
    """(out, log-sum-exp) and their derivative where no one has to see an operator: in half the time around a kernel."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, given: _Arguments, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        found = _forward(q, k, v, given)
        _remember(ctx, (q, k, v, *given), found)
        return found[:2]

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        (out, lse, rest, q, k, v), given = _remembered(ctx)
        # For a second derivative, of which the operator says that there is none; or batched, or not yet written out.
        if torch.is_grad_enabled() or not is_eager(d_out, d_lse):
            dq, dk, dv, *d_tensors = _backward_op(d_out, d_lse, out, lse, rest, ctx.wanted, q, k, v, *given)
        else:
            with without_autocast(q.device):
                dq, dk, dv, *d_tensors = _backward(d_out, d_lse, out, lse, rest, q, k, v, given, ctx.wanted)
        return dq, dk, dv, None, *d_tensors


_forward_op.register_autograd(_differentiate, setup_context=_remember)
_backward_op.register_autograd(_no_second_derivative, setup_context=lambda ctx, inputs, output: None)
slicewise(_backward_op)


class Pages(NamedTuple):
    """Keys and values in pages `[pages, key heads, size, dim]`; page table[b, i] has row b's keys from i · size on."""

    key_pages: Tensor
    value_pages: Tensor
    table: Tensor

    @property
    def size(self) -> int:
        """How many keys a page holds."""
        return self.key_pages.shape[2]

    @property
    def capacity(self) -> int:
        """How many keys a batch row can have."""
        return self.table.shape[1] * self.size

    def check_lengths(self, lengths: Tensor) -> None:
        """Raise `InvalidInput` if a length is longer than the pages."""
        low, high = extremes(lengths)
        if low < 0 or high > self.capacity:
            raise InvalidInput(
                f"lengths is {lengths.tolist()}: wanted 0 to {self.capacity}, as many keys as {self.table.shape[1]} "
                f"pages of {self.size} hold"
            )

    def check(self, lengths: Tensor) -> None:
        """Raise `InvalidInput` if a length is longer than the pages, or a page that it needs is not there.

        The host does not wait for a GPU: that one is told to stop instead.
        """
        count, places = self.key_pages.shape[0], self.table.shape[1]
        needed = torch.arange(places, device=self.table.device) * self.size < lengths[:, None]
        outside = needed & ((self.table < 0) | (self.table >= count))
        if lengths.is_cuda:
            fit = ((lengths >= 0) & (lengths <= self.capacity)).all() & ~outside.any()
            torch._assert_async(fit, "a length is longer than its pages hold, or needs a page that is not there")
            return
        self.check_lengths(lengths)
        if bool(outside.any()):
            row, place = outside.nonzero()[0].tolist()
            raise InvalidInput(
                f"table[{row}, {place}] is {int(self.table[row, place])}: wanted a page from 0 to {count - 1}, for the "
                f"length {int(lengths[row])}"
            )


def run_paged(problem: Problem, pages: Pages, lengths: Tensor, kernel: str = "") -> Result:
    """A problem whose k and v only say their shapes: they lie in pages, which are read where they are."""
    given = _arguments(problem, kernel, 0)._replace(lengths=lengths)  # no page past a length is touched
    run = _paged if is_eager(problem.q, *pages, *given.beside()) else _paged_op
    return Result(*run(problem.q, pages.key_pages, pages.value_pages, pages.table, *given))  # type: ignore[arg-type]


def _paged(
    q: Tensor, key_pages: Tensor, value_pages: Tensor, table: Tensor, held: Sequence[Tensor], tensors: Sequence[Tensor],
    starts: Tensor | None, lengths: Tensor, drawn: Tensor | None, start: int, left: int, right: int, pattern: str,
    score: str, scale: float, dropout: float, seed: int, kernel: str, threads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, log-sum-exp); what the table and the lengths say is checked here, where a graph has numbers too."""
    pages = Pages(key_pages, value_pages, table)
    pages.check(lengths)
    given = _Arguments(
        held, tensors, starts, lengths, drawn, start, left, right, pattern, score, scale, dropout, seed, kernel, threads
    )
    out, lse, _ = _forward(q, key_pages, value_pages, given, pages)
    return out, lse


_paged_op = torch.library.custom_op("foveate::native_paged", _paged, mutates_args=(), device_types="cpu")


@_paged_op.register_fake
def _paged_fake(q: Tensor, key_pages: Tensor, value_pages: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    out, lse, _ = _forward_fake(q, key_pages, value_pages)
    return out, lse


def looked(problem: Problem, top: int, kernel: str = "", threads: int = 0) -> tuple[Tensor, ...]:
    """What each row looked at, in O(N · top) memory: (indices, weights, rest, received, lse, entropy).

    indices and weights `[B, H, Nq, top]`, heaviest first, index −1 where fewer keys were visible; rest, lse and entropy
    `[B, H, Nq]`; received `[B, H, Nk]`.
    """
    batch, heads, queries, keys = problem.shape
    if keys >= 1 << 31:
        raise unsupported({"native": [f"looks at fewer than 2³¹ keys, and there are {keys}"]})
    indices = torch.empty(batch, heads, queries, top, dtype=torch.int64, device="cpu")
    weights = _floats((batch, heads, queries, top))
    rest, lse, entropy = (_floats((batch, heads, queries)) for _ in range(3))
    received = _zeros((batch, heads, keys))
    if lse.numel():
        call = _Call(problem.q.detach(), problem.k.detach(), problem.v.detach(), _arguments(problem, kernel, threads))
        out = problem.q  # nothing is written there
        _native.looked(
            *call.arguments(out, lse), top, indices.data_ptr(), weights.data_ptr(),
            (rest.data_ptr(), entropy.data_ptr(), received.data_ptr()),
        )  # fmt: skip
    return indices, weights, rest, received, lse, entropy


def _steps(x: Tensor, count: int) -> list[int]:
    """The strides of the first dimensions, 0 where one entry stands for all."""
    return [0 if x.shape[n] == 1 else x.stride(n) for n in range(count)]


def _matrix(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)
