"""Exact attention in O(N · chunk) memory, forward and backward, in plain PyTorch on any device.

Rows are computed a tile at a time over segments of their visible keys; a running maximum keeps the sum exact,
and the backward pass computes the weights again from the saved maximum and total instead of storing them. A rounded
log-sum-exp would cost as many of their digits as it has before its point.

    forward   top, total, sum  ←  rescaled by exp(old top − new top), plus this segment
    backward  dS = P ∘ (dO·vᵀ − Σ dO ∘ O + d lse),  P = exp(S − top) / total

Other normalizers than softmax need all visible keys of a row at once: O(N · rows at once) memory, forward and backward.

Tiles that the pattern leaves empty are never touched. Rabe & Staats 2021, "Self-attention Does Not Need O(n²)
Memory": https://arxiv.org/abs/2112.05682
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from foveate.errors import unsupported
from foveate.normalizers import Rowwise
from foveate.normalizers import parse as parse_normalizer
from foveate.pattern.algebra import Pattern
from foveate.pattern.block_mask import Summary
from foveate.pattern.catalogue import parse as parse_pattern
from foveate.pattern.interval import is_interval, span
from foveate.pattern.serialize import SUMMARY, cannot_cross, tiles, written
from foveate.positions import Pairs, grid
from foveate.primitives import dropout_mask, group, raw_scores, room_for_out, ungroup, weigh
from foveate.problem import Problem, Result, accumulator, without_autocast
from foveate.score import Score
from foveate.score import parse as parse_score
from foveate.slicewise import slicewise

_TILE = 128  # rows at once, and the grain at which empty tiles are skipped
_KEYS = 2048  # keys at once: a segment's scores stay in the cache
_SCORES = 1 << 24  # scores at once, over all heads: 64 MiB in float32
_ROWS = 1 << 20  # the same where a normalizer passes over whole rows a dozen times: they stay in the cache

Box = tuple[slice, slice, slice, slice]
Segments = list[tuple[slice, list[tuple[slice, Tensor]]]]


def refuses(problem: Problem) -> list[str]:
    """What cannot cross into an operator: a rule in a compiled graph, and the transforms of torch.func."""
    reasons = []
    if problem.is_transformed:
        reasons.append('it has no vmap and no forward derivative: backend="reference" has')
    return reasons + cannot_cross(problem.pattern, problem.q)


def run(problem: Problem) -> Result:
    """Hand the problem to the operator as tensors and strings, which is all that a graph can hold."""
    pattern, held = written(problem.pattern, *problem.shape, problem.query_start, _TILE)
    score, tensors = problem.score.spec() if problem.score is not None else ("", [])
    varying, drawn = isinstance(problem.query_start, Tensor), isinstance(problem.seed, Tensor)
    out, lse, _ = _forward_op(
        problem.q, problem.k, problem.v, held, tensors,
        problem.query_start if varying else None, problem.seed if drawn else None,
        0 if varying else problem.query_start, pattern, score, problem.scale, problem.dropout,
        0 if drawn or problem.seed is None else problem.seed,
        "" if problem.normalizer is None else repr(problem.normalizer),
    )  # fmt: skip
    return Result(out, None if problem.normalizer is not None else lse)


@dataclass(frozen=True)
class _Call:
    """What both passes share: the tensors, the tiles, and the scores of one box of pairs.

    Of the pattern there is its `summary`, or itself as an `interval`, or neither where all is visible.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    summary: Summary | None
    interval: Pattern | None
    score: Score | None
    start: int | Tensor
    scale: float
    dropout: float
    seed: int | Tensor
    normalizer: Rowwise | None
    finite: bool

    @property
    def group(self) -> int:
        return max(1, self.q.shape[1] // max(self.k.shape[1], 1))

    def rows(self) -> Iterator[tuple[Box, Segments]]:
        """Each box of rows that share their tiles, with its segments of keys and the masks of partial tiles."""
        heads, queries, keys = self.q.shape[1], self.q.shape[2], self.k.shape[2]
        if self.summary is None:
            for row in range(0, queries, 2 * _TILE):
                rows = slice(row, min(row + 2 * _TILE, queries))
                first, end = self._span(rows)
                whole: Segments = [(slice(at, min(at + _KEYS, end)), []) for at in range(first, end, _KEYS)]
                for part in self._batches():
                    yield (part, slice(0, heads), rows, slice(0, keys)), whole
            return
        summary = self.summary
        offsets, columns, partial = (x.tolist() for x in (summary.offsets, summary.columns, summary.partial))
        for b in range(summary.batch):
            for h in range(summary.heads):
                for row, (first, end) in enumerate(pairwise(offsets[b][h])):
                    rows = slice(row * _TILE, min((row + 1) * _TILE, queries))
                    segments = self._segments(columns[first:end], partial[first:end], rows)
                    for part in self._batches() if summary.batch == 1 else [slice(b, b + 1)]:
                        some = slice(h, h + 1) if summary.heads > 1 else slice(0, heads)
                        yield (part, some, rows, slice(0, keys)), segments

    def _span(self, rows: slice) -> tuple[int, int]:
        """The keys that these rows may see, as far as it is known without a look at any tensor."""
        keys = self.k.shape[2]
        if self.interval is None or isinstance(self.start, Tensor):
            return 0, keys
        return span(self.interval, self.start + rows.start, rows.stop - rows.start, keys)

    def _batches(self) -> list[slice]:
        """The batch in parts, so that a box holds a bounded number of scores."""
        batch, heads = self.q.shape[:2]
        step = max(1, _SCORES // (heads * 2 * _TILE * min(self.k.shape[2], _KEYS) + 1))
        return [slice(at, min(at + step, batch)) for at in range(0, batch, step)]

    def _segments(self, columns: list[int], partial: list[int], rows: slice) -> Segments:
        """Neighbouring tiles together, at most `_KEYS` keys each, and where in a segment a mask applies."""
        assert self.summary is not None
        keys, bound = self.k.shape[2], _KEYS // _TILE
        segments: Segments = []
        at = 0
        while at < len(columns):
            end = at + 1
            while end < len(columns) and columns[end] == columns[end - 1] + 1 and end - at < bound:
                end += 1
            first, last = columns[at] * _TILE, min((columns[end - 1] + 1) * _TILE, keys)
            places = [n for n in range(at, end) if partial[n] >= 0]
            masks = []
            if places:
                bits = self.summary.masks(torch.tensor([partial[n] for n in places], device=self.k.device))
                for n, mask in zip(places, bits, strict=True):
                    left = columns[n] * _TILE - first
                    right = min(left + _TILE, last - first)
                    masks.append((slice(left, right), mask[: rows.stop - rows.start, : right - left]))
            segments.append((slice(first, last), masks))
            at = end
        return segments

    def whole_rows(self) -> Iterator[tuple[Box, Segments]]:
        """The boxes of `rows` that see a key, cut by batch and key head so that all keys of a box fit at once."""
        for (b, h, rows, keys), segments in self.rows():
            width = (rows.stop - rows.start) * sum(part.stop - part.start for part, _ in segments)
            heads = min(h.stop - h.start, self.group * max(1, _ROWS // (width * self.group + 1)))
            step = max(1, _ROWS // (width * heads + 1))
            if segments:
                for first in range(b.start, b.stop, step):
                    for head in range(h.start, h.stop, heads):
                        some = slice(head, min(head + heads, h.stop))
                        yield (slice(first, min(first + step, b.stop)), some, rows, keys), segments

    def row(self, box: Box, segments: Segments) -> tuple[Tensor, Tensor, Tensor | None]:
        """(scores as they are normalised, after the soft-cap, what dropout multiplies) of all keys that a box sees."""
        boxes = [(*box[:3], keys) for keys, _ in segments]
        parts = [self.scores(part, masks) for part, (_, masks) in zip(boxes, segments, strict=True)]
        kept = [mask for mask in map(self.kept, boxes) if mask is not None]
        scores, capped = (torch.cat(some, -1) for some in zip(*parts, strict=True))
        return scores, capped, torch.cat(kept, -1) if kept else None

    def at(self, box: Box) -> Pairs:
        """The positions of the pairs of a box."""
        batch, heads, queries, _ = self.q.shape
        return grid(batch, heads, queries, self.k.shape[2], self.start, self.q.device, box)

    def key_heads(self, heads: slice) -> slice:
        """The key heads that these query heads read."""
        return slice(heads.start // self.group, -(-heads.stop // self.group))

    def scores(self, box: Box, masks: list[tuple[slice, Tensor]]) -> tuple[Tensor, Tensor]:
        """(scores as they are normalised, scores after the soft-cap) of a box, `[b, h, rows, keys]`."""
        b, h, rows, keys = box
        wide = accumulator(self.q.dtype)
        q = self.q[b, h, rows].to(wide)
        k = self.k[b, self.key_heads(h), keys].to(wide)
        scores = ungroup(group(q, k) @ k.mT, q) if self.finite else raw_scores(q, k)
        scores = scores.mul_(self.scale)
        capped = scores
        if self.score is not None:
            at = self.at(box)
            if self.score.softcap is not None:
                capped = scores = self.score.softcap.apply(scores, at)
            for term in self.score.biases:
                scores = term.apply(scores, at)
        if masks and scores is capped and self.score is not None and self.score.softcap is not None:
            scores = scores.clone()  # the slope of the cap is asked of what no mask has touched
        for place, mask in masks:
            scores[..., place].masked_fill_(~mask, -math.inf)
        if self.interval is not None:
            scores = scores.masked_fill(~self.interval.visible(self.at(box)), -math.inf)
        return scores, capped

    def kept(self, box: Box) -> Tensor | None:
        """What dropout multiplies the weights of a box with."""
        if not self.dropout:
            return None
        at = self.at(box)
        mask = dropout_mask(self.seed, self.dropout, at.batch, at.head, at.query, at.key)
        return mask.to(accumulator(self.q.dtype)) / (1 - self.dropout)

    def sinks(self, heads: slice) -> Tensor | None:
        if self.score is None or self.score.sinks is None:
            return None
        return self.score.sinks.logits[heads].to(accumulator(self.q.dtype)).view(1, -1, 1, 1)


def _call(
    q: Tensor, k: Tensor, v: Tensor, held: Sequence[Tensor], tensors: Sequence[Tensor], starts: Tensor | None,
    drawn: Tensor | None, start: int, pattern: str, score: str, scale: float, dropout: float, seed: int,
    normalizer: str,
) -> _Call:  # fmt: skip
    position = start if starts is None else starts
    parsed = parse_score(score, tensors) if score else None
    rowwise = parse_normalizer(normalizer) if normalizer else None
    summary, interval = _visible(pattern, held, q, k, position)
    finite = q.device.type == "cpu" and all(_is_finite(x) for x in (q, k, v))
    seed_of = seed if drawn is None else drawn
    return _Call(q, k, v, summary, interval, parsed, position, scale, dropout, seed_of, rowwise, finite)


def _visible(
    pattern: str, held: Sequence[Tensor], q: Tensor, k: Tensor, start: int | Tensor
) -> tuple[Summary | None, Pattern | None]:
    """(summary, None), or (None, interval) where the host would have to wait for what the summary says."""
    if (
        q.device.type != "cpu"
        and pattern
        and pattern != SUMMARY
        and is_interval(interval := parse_pattern(pattern, held))
    ):
        return None, interval
    summary = tiles(pattern, held, q.shape[0], q.shape[1], q.shape[2], k.shape[2], start, _TILE)
    if summary is not None and summary.bits.device != q.device:  # its lists stay where they are: the host reads them
        summary = replace(summary, bits=summary.bits.to(q.device))
    return summary, None


@torch.library.custom_op("foveate::chunked_forward", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, held: Sequence[Tensor], tensors: Sequence[Tensor], starts: Tensor | None,
    drawn: Tensor | None, start: int, pattern: str, score: str, scale: float, dropout: float, seed: int,
    normalizer: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = _call(q, k, v, held, tensors, starts, drawn, start, pattern, score, scale, dropout, seed, normalizer)
    wide = accumulator(q.dtype)
    out = room_for_out(q, v.shape[3]).zero_()
    lse = torch.full(q.shape[:3], -math.inf, dtype=wide, device=q.device)
    over = torch.zeros(2, *q.shape[:3], 1, dtype=wide, device=q.device)  # the maximum of every row, and its total
    if call.normalizer is not None:
        for box, segments in call.whole_rows():
            scores, _, kept = call.row(box, segments)
            weights = call.normalizer.weights(scores)
            values = torch.cat([v[box[0], call.key_heads(box[1]), keys] for keys, _ in segments], 2).to(wide)
            given = group(weights if kept is None else weights * kept, values)
            out[box[:3]] = ungroup(given @ values if call.finite else weigh(given, values), scores).to(q.dtype)
        return out, lse, over
    for (b, h, rows, _), segments in call.rows():
        here = (b.stop - b.start, h.stop - h.start, rows.stop - rows.start, 1)
        sinks = call.sinks(h)
        top = torch.full(here, -math.inf, dtype=wide, device=q.device) if sinks is None else sinks.expand(here).clone()
        total = torch.full_like(top, 0 if sinks is None else 1)
        if sinks is not None:
            total = total.masked_fill(top == -math.inf, 0)
        summed = torch.zeros(*here[:3], v.shape[3], dtype=wide, device=q.device)
        for keys, masks in segments:
            box = (b, h, rows, keys)
            scores, _ = call.scores(box, masks)
            raised = torch.maximum(top, scores.amax(-1, keepdim=True))
            base = raised.masked_fill(raised == -math.inf, 0)
            shrink = (top - base).exp_()
            weights = (scores - base).exp_()
            total = total * shrink + weights.sum(-1, keepdim=True)
            kept = call.kept(box)
            values = v[b, call.key_heads(h), keys].to(wide)
            given = group(weights if kept is None else weights * kept, values)
            # A fresh product, then one addition: the running sum is not rounded once for every key.
            summed = summed * shrink + ungroup(given @ values if call.finite else weigh(given, values), summed)
            top = raised
        empty = total == 0
        total = total.masked_fill(empty, 1)
        out[b, h, rows] = (summed / total).to(q.dtype)
        lse[b, h, rows] = (total.log() + top.masked_fill(empty, -math.inf)).squeeze(-1)
        over[0, b, h, rows], over[1, b, h, rows] = top.masked_fill(empty, 0), total
    return out, lse, over


@_forward_op.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, held: Sequence[Tensor], tensors: Sequence[Tensor], starts: Tensor | None,
    drawn: Tensor | None, start: int, pattern: str, score: str, scale: float, dropout: float, seed: int,
    normalizer: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lse, over = (q.new_empty(shape, dtype=accumulator(q.dtype)) for shape in (q.shape[:3], (2, *q.shape[:3], 1)))
    return room_for_out(q, v.shape[3]), lse, over


@torch.library.custom_op("foveate::chunked_backward", mutates_args=())
def _backward_op(
    d_out: Tensor, d_lse: Tensor, out: Tensor, over: Tensor,
    q: Tensor, k: Tensor, v: Tensor, held: Sequence[Tensor], tensors: Sequence[Tensor], starts: Tensor | None,
    drawn: Tensor | None, start: int, pattern: str, score: str, scale: float, dropout: float, seed: int,
    normalizer: str,
) -> list[Tensor]:  # fmt: skip
    call = _call(q, k, v, held, tensors, starts, drawn, start, pattern, score, scale, dropout, seed, normalizer)
    wide = accumulator(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    # One entry of a slope or a table collects from a whole matrix: float64 where there is any.
    fine = wide if q.device.type == "mps" else torch.float64
    d_tensors = [torch.zeros(x.shape, dtype=fine, device=x.device) for x in tensors]
    if call.normalizer is not None:
        _rowwise_backward(call, call.normalizer, d_out.to(wide), dq, dk, dv, d_tensors)
        return [gradient.to(x.dtype) for gradient, x in zip((dq, dk, dv, *d_tensors), (q, k, v, *tensors), strict=True)]
    # Σ dO ∘ O is what the softmax takes back from every score of a row; the gradient of lse gives it.
    given_lse = d_lse.to(wide)[..., None]
    top, total = over
    # The total divides what is given to a row, and not its many weights.
    taken = ((d_out.to(wide) * out.to(wide)).sum(-1, keepdim=True) - given_lse) / total
    d_values = d_out.to(wide) / total
    single = total == 1  # one key has all the weight: of its score's gradient only that of the log-sum-exp is left
    waits = q.device.type != "cpu"  # for a look at a number: there every row is treated as if it might be one
    some_single = waits or bool(single.any())
    biases = _tensors_of_terms(call.score, d_tensors)
    for (b, h, rows, _), segments in call.rows():
        heads = call.key_heads(h)
        here = (b, h, rows)
        ones = single[here] if some_single and (waits or bool(single[here].any())) else None
        q_rows, d_rows = _clean(q[here].to(wide), call.finite), d_values[here]
        sinks = call.sinks(h)
        if sinks is not None:
            share = (sinks - top[here]).exp()
            biases["sinks"][h] -= (share * taken[here]).to(fine).sum((0, 2, 3))
        for keys, masks in segments:
            box = (b, h, rows, keys)
            scores, capped = call.scores(box, masks)
            weights = (scores - top[here]).exp_().masked_fill_(scores == -math.inf, 0)
            k_rows, v_rows = (_clean(x[b, heads, keys].to(wide), call.finite) for x in (k, v))
            d_weights = ungroup(group(d_rows, v_rows) @ v_rows.mT, q_rows)
            kept = call.kept(box)
            given = weights if kept is None else weights * kept
            dv[b, heads, keys] += group(given, v_rows).mT @ group(d_rows, v_rows)
            if kept is not None:
                d_weights = d_weights * kept
            d_scores = (d_weights - taken[here]).mul_(weights).masked_fill_(weights == 0, 0)
            if ones is not None:
                d_scores = d_scores.where(~ones, weights * given_lse[here])
            _collect(call, d_scores, box, biases, fine)
            d_scores = _uncap(call, d_scores, capped, weights)
            d_scores = group(d_scores.mul_(scale), k_rows)
            dq[here] += ungroup(d_scores @ k_rows, q_rows)
            dk[b, heads, keys] += d_scores.mT @ group(q_rows, k_rows)
    pairs = [*zip((dq, dk, dv), (q, k, v), strict=True), *zip(d_tensors, tensors, strict=True)]
    return [gradient.to(x.dtype) for gradient, x in pairs]


@_backward_op.register_fake
def _backward_fake(
    d_out: Tensor, d_lse: Tensor, out: Tensor, over: Tensor,
    q: Tensor, k: Tensor, v: Tensor, held: Sequence[Tensor], tensors: Sequence[Tensor], starts: Tensor | None,
    drawn: Tensor | None, start: int, pattern: str, score: str, scale: float, dropout: float, seed: int,
    normalizer: str,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, *tensors)]


def _rowwise_backward(
    call: _Call, normalizer: Rowwise, d_out: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, d_tensors: list[Tensor]
) -> None:
    """The backward pass of what needs all keys of a row at once; it adds to dq, dk, dv and d_tensors."""
    fine = d_tensors[0].dtype if d_tensors else d_out.dtype
    biases = _tensors_of_terms(call.score, d_tensors)
    for box, segments in call.whole_rows():
        b, h, rows, _ = box
        heads = call.key_heads(h)
        scores, capped, kept = call.row(box, segments)
        weights = normalizer.weights(scores)
        given = weights if kept is None else weights * kept
        q_rows, d_rows = _clean(call.q[b, h, rows].to(d_out.dtype), call.finite), d_out[b, h, rows]
        k_rows, v_rows = (
            torch.cat([_clean(x[b, heads, keys].to(d_out.dtype), call.finite) for keys, _ in segments], 2)
            for x in (call.k, call.v)
        )
        d_weights = ungroup(group(d_rows, v_rows) @ v_rows.mT, q_rows)
        d_scores = normalizer.pull(weights, d_weights if kept is None else d_weights * kept)
        d_values = group(given, v_rows).mT @ group(d_rows, v_rows)
        widths = [keys.stop - keys.start for keys, _ in segments]
        for (keys, _), part in zip(segments, d_scores.split(widths, -1), strict=True):
            _collect(call, part, (b, h, rows, keys), biases, fine)
        d_scores = group(_uncap(call, d_scores, capped, weights).mul_(call.scale), k_rows)
        dq[b, h, rows] += ungroup(d_scores @ k_rows, q_rows)
        d_keys = d_scores.mT @ group(q_rows, k_rows)
        for (keys, _), d_k, d_v in zip(segments, d_keys.split(widths, 2), d_values.split(widths, 2), strict=True):
            dk[b, heads, keys] += d_k
            dv[b, heads, keys] += d_v


def _collect(call: _Call, d_scores: Tensor, box: Box, totals: dict[str, Tensor], fine: torch.dtype) -> None:
    """Add what the gradient of a box of scores means for the tensor of each bias."""
    if call.score is not None and call.score.biases:
        at = call.at(box)
        for place, term in enumerate(call.score.biases):
            term.collect(d_scores.to(fine), at, totals[str(place)])


def _uncap(call: _Call, d_scores: Tensor, capped: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the scores before the soft-cap; where a weight is 0 the slope may be NaN."""
    if call.score is None or call.score.softcap is None:
        return d_scores
    return (d_scores * (1 - (capped / call.score.softcap.cap) ** 2)).masked_fill_(weights == 0, 0)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, held, tensors, *given = inputs
    ctx.counts = len(held), len(tensors)
    ctx.present = [x is not None for x in given[:2]]
    ctx.rest = given[2:]
    ctx.save_for_backward(*output, q, k, v, *held, *tensors, *(x for x in given[:2] if x is not None))


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor, d_over: Tensor) -> tuple[object, ...]:
    held, tensors = ctx.counts
    out, _, over, q, k, v, *more = ctx.saved_tensors
    extra = iter(more[held + tensors :])
    optional = [next(extra) if present else None for present in ctx.present]
    with without_autocast(q.device):
        dq, dk, dv, *d_tensors = _backward_op(
            d_out, d_lse, out, over, q, k, v, more[:held], more[held : held + tensors], *optional, *ctx.rest
        )
    return dq, dk, dv, [None] * held, d_tensors, *[None] * (len(optional) + len(ctx.rest))


def _no_second_derivative(ctx: Any, *gradients: object) -> None:
    raise unsupported({"chunked": ['has no second derivative: use backend="reference", which has']})


_forward_op.register_autograd(_differentiate, setup_context=_remember)
_backward_op.register_autograd(_no_second_derivative, setup_context=lambda ctx, inputs, output: None)
slicewise(_backward_op)


def _is_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite: the extremes tell, and carry NaN."""
    return x.numel() == 0 or all(math.isfinite(float(end)) for end in x.aminmax())


def _clean(x: Tensor, finite: bool) -> Tensor:
    return x if finite else x.where(x.isfinite(), 0)


def _tensors_of_terms(score: Score | None, totals: list[Tensor]) -> dict[str, Tensor]:
    """The gradient of each term's tensor: biases by their place, then the sinks; every such term holds one."""
    if score is None:
        return {}
    names = [str(place) for place in range(len(score.biases))] + (["sinks"] if score.sinks else [])
    return dict(zip(names, totals, strict=True))
