"""Runs of keys and lists of tiles say what the dense matrix says."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from test_laws import PATTERNS
from torch import Tensor

import foveate as fv
from foveate import Pattern
from foveate.pattern.interval import ends, is_interval, span
from foveate.pattern.kv_blocks import TILE, Listing, list_runs, list_summary
from foveate.positions import grid, starts

BATCH, HEADS, LONGEST = 2, 3, 20
CPU = torch.device("cpu")


def _lengths(draw: random.Random) -> Tensor:
    return torch.tensor([draw.randint(0, LONGEST) for _ in range(BATCH)])


def _offsets(draw: random.Random) -> Tensor:
    return torch.tensor([0] + [draw.randint(0, 9) for _ in range(draw.randint(0, 5))]).cumsum(0)


def _dense(pattern: Pattern, queries: int, keys: int, start: int | Tensor | None, heads: int = 1) -> Tensor:
    """As an implementation sees it: what fits a call was checked before."""
    pairs = grid(BATCH, heads, queries, keys, keys - queries if start is None else start, CPU)
    return pattern.visible(pairs).expand(BATCH, heads, queries, keys)


FROM_THE_FIRST: list[Callable[[random.Random], Pattern]] = [
    lambda draw: fv.causal,
    lambda draw: fv.prefix(draw.randint(0, LONGEST)),
    lambda draw: fv.prefix(_lengths(draw)),
    lambda draw: fv.window(right=draw.randint(0, 5)),
    lambda draw: fv.causal & fv.padding(_lengths(draw)),
]
RUNS: list[Callable[[random.Random], Pattern]] = [
    *FROM_THE_FIRST,
    lambda draw: fv.window(draw.randint(1, 9)),
    lambda draw: fv.window(left=draw.randint(0, 5)),
    lambda draw: fv.chunks(draw.randint(1, 9)),
    lambda draw: fv.padding(_lengths(draw)),
    lambda draw: fv.documents(cu_seqlens=_offsets(draw)),
    lambda draw: draw.choice(FROM_THE_FIRST)(draw) | draw.choice(FROM_THE_FIRST)(draw),
]


@pytest.mark.parametrize("seed", range(5))
def test_every_query_sees_the_run_between_the_ends(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(200):
        pattern = draw.choice(RUNS)(draw)
        for _ in range(draw.randint(0, 2)):
            pattern = pattern & draw.choice(RUNS)(draw)
        queries, keys = draw.randint(1, LONGEST), draw.randint(1, LONGEST)
        start = draw.choice([None, draw.randint(-9, 30), torch.tensor([draw.randint(-5, 20) for _ in range(BATCH)])])
        first = starts(start, BATCH, queries, keys, CPU)
        low, high = ends(pattern, first[:, None] + torch.arange(queries), keys)
        key = torch.arange(keys)
        dense = _dense(pattern, queries, keys, start)[:, 0]
        assert is_interval(pattern)
        assert torch.equal(((key >= low[..., None]) & (key < high[..., None])).expand_as(dense), dense), pattern
        if not isinstance(start, Tensor):
            _assert_spans(pattern, keys - queries if start is None else start, dense)


def _assert_spans(pattern: Pattern, start: int, dense: Tensor) -> None:
    low, high = span(pattern, start, *dense.shape[1:])
    seen = dense.any(1).any(0).nonzero().flatten().tolist()
    if not pattern.tensors():  # not one key more
        assert seen == list(range(low, high)), pattern
    assert not seen or (low <= seen[0] and seen[-1] < high), pattern


@pytest.mark.parametrize(
    "pattern",
    [fv.window(3, step=2), fv.streaming(2, 5), ~fv.causal, fv.window(2) | fv.prefix(3), fv.chunks(3) | fv.causal,
     fv.padding(torch.ones(2, 5, dtype=torch.bool)), fv.documents(torch.zeros(5, dtype=torch.int64))],
    ids=repr,
)  # fmt: skip
def test_what_may_have_gaps_is_no_interval(pattern: Pattern) -> None:
    assert not is_interval(pattern)
    assert not is_interval(fv.causal & pattern)


def _told(listing: Listing, queries: int, keys: int) -> Tensor:
    """The matrix `[batch, heads, queries, keys]` as FlexAttention has it: partial tiles by pair, full ones whole."""
    rows, columns = listing.partial[1].shape[2:]
    kinds = [torch.zeros(BATCH, HEADS, rows, columns, dtype=torch.bool) for _ in range(2)]
    for kind, (counts, which) in zip(kinds, (listing.partial, listing.full), strict=True):
        for b in range(BATCH):
            for h in range(HEADS):
                own = b % counts.shape[0], h % counts.shape[1]
                for row in range(rows):
                    listed = which[own][row, : counts[own][row]].tolist()
                    assert len(set(listed)) == len(listed)
                    kind[b, h, row, listed] = True
    partial, full = (kind.repeat_interleave(TILE, 2).repeat_interleave(TILE, 3) for kind in kinds)
    assert not (partial & full).any()
    at = (torch.arange(n) for n in (BATCH, HEADS, queries, keys))
    places = (x.view([-1 if axis == n else 1 for axis in range(4)]) for n, x in enumerate(at))
    told = listing.tells(listing.tables, listing.steps, *places)
    cut = slice(None), slice(None), slice(queries), slice(keys)
    return full[cut] | (partial[cut] & told)


def _assert_lists(listing: Listing, dense: Tensor) -> None:
    assert torch.equal(_told(listing, *dense.shape[2:]), dense)
    seen = torch.ones(()).bool() if listing.seen is None else listing.seen
    assert torch.equal(seen.expand(BATCH, HEADS, dense.shape[3]), dense.any(2))
    by_column = listing.by_column
    for (counts, which), (turned, rows) in zip(
        (listing.partial, listing.full), (by_column[:2], by_column[2:]), strict=True
    ):
        listed = {
            (b, h, row, column)
            for b, h, row in _places(counts)
            for column in which[b, h, row, : counts[b, h, row]].tolist()
        }
        assert listed == {
            (b, h, row, column)
            for b, h, column in _places(turned)
            for row in rows[b, h, column, : turned[b, h, column]].tolist()
        }


def _places(counts: Tensor) -> list[list[int]]:
    return torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist()


SIZES = [(131, 149), (1, 149), (300, 7), (389, 389), (128, 256)]


@pytest.mark.parametrize(("queries", "keys"), SIZES)
@pytest.mark.parametrize(
    "pattern",
    [fv.causal, fv.window(17), fv.causal & fv.window(200), fv.chunks(37), fv.padding(torch.tensor([149, 83])),
     fv.causal | fv.prefix(140), fv.causal & fv.documents(cu_seqlens=torch.tensor([0, 41, 97, 131])), fv.prefix(0)],
    ids=repr,
)  # fmt: skip
def test_lists_of_runs_say_what_dense_says(pattern: Pattern, queries: int, keys: int) -> None:
    low, high = ends(pattern, (torch.arange(queries) + keys - queries)[None], keys)
    _assert_lists(list_runs(low, high, keys, all_seen=False), _dense(pattern, queries, keys, None, HEADS))


@pytest.mark.parametrize("name", ["streaming", "bigbird", "dilated", "rule", "nothing", "left padding"])
def test_lists_of_a_summary_say_what_dense_says(name: str) -> None:
    pattern = PATTERNS[name]
    assert pattern is not None
    for queries, keys in [(131, 149), (1, 149)]:
        summary = pattern.summary(queries, keys, batch=BATCH, heads=HEADS)
        _assert_lists(list_summary(summary), pattern.dense(queries, keys, batch=BATCH, heads=HEADS))
