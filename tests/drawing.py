"""What hypothesis draws: sizes, starts, patterns that fit them, and whole trees of patterns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from hypothesis import strategies as st
from oracle import odd_rule
from torch import Tensor

import foveate as fv
from foveate import Pattern

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """The sizes of one call, and where its first query stands (in each batch row, if that is a tensor)."""

    batch: int
    heads: int
    queries: int
    keys: int
    start: int | Tensor | None

    @property
    def last(self) -> int:
        """The highest position of a query or a key, plus 1."""
        start = self.keys - self.queries if self.start is None else self.start
        return max(self.keys, int(torch.as_tensor(start).max()) + self.queries)

    @property
    def shape(self) -> dict[str, object]:
        """As the keywords of `dense` and `summary`."""
        return {"batch": self.batch, "heads": self.heads, "query_start": self.start}


@st.composite
def calls(draw: st.DrawFn, longest: int = 40) -> Call:
    batch, heads = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 3)]))
    queries, keys = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    start = draw(st.none() | st.integers(-3, longest) | st.lists(st.integers(0, 9), min_size=batch, max_size=batch))
    return Call(batch, heads, queries, keys, torch.tensor(start) if isinstance(start, list) else start)


class Choose(Protocol):
    """Who decides what is drawn: hypothesis, which shrinks what fails, or a generator."""

    def integer(self, low: int, high: int) -> int: ...

    def one_of(self, *options: T) -> T: ...


class Hypothetical(Choose):
    """Choices of hypothesis."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def one_of(self, *options: T) -> T:
        return self.draw(st.sampled_from(options))


def small(choose: Choose) -> int:
    return choose.integer(1, 7)


def places(choose: Choose) -> list[int]:
    return [choose.integer(-2, 20) for _ in range(choose.integer(0, 3))]


def leaf_makers() -> dict[str, Callable[[Choose, Call, torch.Generator], Pattern]]:
    """By name, a function of (choices, call, generator) that makes a pattern which fits the call."""

    def ids(call: Call, generator: torch.Generator, length: int, dims: int) -> Tensor:
        shape = (call.batch, length) if dims == 2 else (length,)
        steps = torch.rand(shape, generator=generator) < 0.2
        return torch.where(torch.rand(shape, generator=generator) < 0.1, -1, steps.long().cumsum(-1))

    def offsets(call: Call, generator: torch.Generator) -> Tensor:
        ends = torch.randint(0, 9, (5,), generator=generator).cumsum(0).clamp(max=call.last)
        return torch.cat([torch.zeros(1), ends]).long()

    def flags(shape: tuple[int, ...], generator: torch.Generator, share: float) -> Tensor:
        return torch.rand(shape, generator=generator) < share

    def whole_blocks(choose: Choose, call: Call, generator: torch.Generator) -> Pattern:
        size = small(choose)
        grid = (-(-call.last // size), -(-call.keys // size))
        return fv.blocks(flags((call.heads, *grid), generator, 0.4), size)

    def selection(choose: Choose, call: Call, generator: torch.Generator, block: int) -> Pattern:
        shape = choose.one_of(1, call.batch), choose.one_of(1, call.heads)
        rows, k = choose.one_of(1, call.queries), choose.integer(0, 5)
        return fv.selected(
            torch.randint(-1, -(-call.keys // block), (*shape, rows, k), generator=generator), block=block
        )

    return {
        "causal": lambda d, c, g: fv.causal,
        "window": lambda d, c, g: fv.window(small(d), step=d.integer(1, 3)),
        "window sides": lambda d, c, g: fv.window(left=small(d), right=d.one_of(None, small(d))),
        "chunks": lambda d, c, g: fv.chunks(small(d)),
        "neighborhood": lambda d, c, g: fv.neighborhood(small(d), small(d)),
        "window stride": lambda d, c, g: fv.window(left=d.one_of(None, small(d)), right=small(d), step=small(d)),
        "every": lambda d, c, g: fv.every(*sorted((small(d), small(d)), reverse=True)),
        "prefix": lambda d, c, g: fv.prefix(d.integer(0, 9)),
        "prefix tensor": lambda d, c, g: fv.prefix(torch.randint(0, 9, (c.batch,), generator=g)),
        "documents": lambda d, c, g: fv.documents(ids(c, g, c.last, d.one_of(1, 2))),
        "documents pairs": lambda d, c, g: fv.documents(ids(c, g, c.queries, 2), ids(c, g, c.keys, 1)),
        "documents offsets": lambda d, c, g: fv.documents(cu_seqlens=offsets(c, g)),
        "padding": lambda d, c, g: fv.padding(torch.randint(0, c.keys + 1, (c.batch,), generator=g)),
        "padding keep": lambda d, c, g: fv.padding(flags((c.batch, c.keys), g, 0.8)),
        "global_tokens": lambda d, c, g: fv.global_tokens(places(d)),
        "global_tokens boolean": lambda d, c, g: fv.global_tokens(flags((c.batch, c.last), g, 0.3)),
        "random_blocks": lambda d, c, g: fv.random_blocks(d.integer(0, 3), small(d), d.integer(0, 99)),
        "blocks": whole_blocks,
        "blockwise": lambda d, c, g: fv.blockwise(fv.window(2) & ~fv.chunks(2) | fv.global_tokens((0, -1)), small(d)),
        "rule": lambda d, c, g: fv.rule(odd_rule),
        "from_mask": lambda d, c, g: fv.from_mask(flags((c.batch, 1, c.queries, c.keys), g, 0.3)),
        "pooled": lambda d, c, g: fv.pooled(small(d), small(d)),
        "selected": lambda d, c, g: selection(d, c, g, 1),
        "selected blocks": lambda d, c, g: selection(d, c, g, small(d)),
        "streaming": lambda d, c, g: fv.streaming(small(d), small(d)),
        "longformer": lambda d, c, g: fv.longformer(small(d), (0, -1)),
        "bigbird": lambda d, c, g: fv.bigbird(small(d), random=1),
    }


LEAVES = leaf_makers()


@st.composite
def leaves(draw: st.DrawFn, call: Call, name: str | None = None) -> Pattern:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return LEAVES[name or draw(st.sampled_from(sorted(LEAVES)))](Hypothetical(draw), call, generator)


def trees(call: Call) -> st.SearchStrategy[Pattern]:
    """Patterns composed at random with `&`, `|` and `~`."""

    def grow(inner: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
        pair = st.tuples(inner, inner)
        return pair.map(lambda two: two[0] & two[1]) | pair.map(lambda two: two[0] | two[1]) | inner.map(lambda p: ~p)

    return st.recursive(leaves(call), grow, max_leaves=5)
