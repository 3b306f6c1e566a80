"""Who may attend to whom, said a second time: one plain-Python sentence for each pattern, to test the patterns with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import foveate as fv
from foveate import Pattern

BATCH, HEADS = 2, 3
LENGTH = 17  # of tables by position: longer than anything that is asked of them

# (batch, head, row of q, position of the query, key, number of keys) → may it attend?
Sees = Callable[[int, int, int, int, int, int], bool]
Pair = tuple[int, int, int, int]

IDS = [
    [0, 0, 1, 1, 1, -1, 2, 2, -7, 0, 3, 3, 3, 3, 4, 4, 4],
    [5, 5, 5, 5, -1, -1, 6, 7, 7, 7, 7, 7, 7, 9, 9, 9, 9],
]
OFFSETS = [0, 2, 2, 5, 7]  # the second document is empty, and positions from 7 on belong to none
KEEP = [
    [False, False, True, True, True, True, False, True, True],
    [True, True, False, True, True, True, True, True, False],
]
GLOBAL = [[n in (0, 5) for n in range(LENGTH)], [n in (3,) for n in range(LENGTH)]]
LENGTHS = [3, 6]
_random = torch.Generator().manual_seed(11)
GRID = torch.rand(BATCH, HEADS, 9, 9, generator=_random) < 0.4
MASK = torch.rand(BATCH, HEADS, 9, 9, generator=_random) < 0.4
CHOSEN = torch.randint(-9, 9, (BATCH, HEADS, 9, 4), generator=_random).clamp(min=-1)  # some are none
CHOSEN[..., 3] = CHOSEN[..., 0]  # and one is listed twice


@dataclass(frozen=True)
class Case:
    """A pattern for calls of one size, and the sentence that it stands for."""

    make: Callable[[int, int], Pattern]  # (queries, keys) →
    sees: Sees
    fits_below: int = 10  # the table behind it covers calls of fewer queries and keys than this


def at(table: list, position: int, otherwise: object = None) -> object:
    """What a table holds for a position: nothing for one outside."""
    return table[position] if 0 <= position < len(table) else otherwise


def same(first: object, second: object) -> bool:
    """Whether two ids name the same document."""
    return first is not None and first == second and first >= 0  # type: ignore[operator]


def document(position: int, keys: int) -> int:
    """The number of the packed document that covers a position of a text cut to `keys`, −1 for none."""
    cut = [min(end, keys) for end in OFFSETS]
    return next((n for n, (a, b) in enumerate(pairwise(cut)) if a <= position < b), -1)


def odd_rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query * 3 + key * 2 + head + batch) % 5 < 2


CASES: dict[str, Case] = {
    "causal": Case(lambda n, m: fv.causal, lambda b, h, i, q, k, m: k <= q),
    "window(1)": Case(lambda n, m: fv.window(1), lambda b, h, i, q, k, m: k == q),
    "window(3)": Case(lambda n, m: fv.window(3), lambda b, h, i, q, k, m: abs(q - k) <= 2),
    "window(3, step=2)": Case(lambda n, m: fv.window(3, step=2), lambda b, h, i, q, k, m: q - k in (-4, -2, 0, 2, 4)),
    "window(left, right)": Case(lambda n, m: fv.window(left=3, right=1), lambda b, h, i, q, k, m: q - 3 <= k <= q + 1),
    "window(left)": Case(lambda n, m: fv.window(left=2), lambda b, h, i, q, k, m: k >= q - 2),
    "window(right)": Case(lambda n, m: fv.window(right=0), lambda b, h, i, q, k, m: k <= q),
    "window(step)": Case(lambda n, m: fv.window(left=5, right=4, step=3), lambda b, h, i, q, k, m: q - k in (-3, 0, 3)),
    "chunks(3)": Case(lambda n, m: fv.chunks(3), lambda b, h, i, q, k, m: q // 3 == k // 3),
    "neighborhood": Case(
        lambda n, m: fv.neighborhood(2, 3),
        lambda b, h, i, q, k, m: q >= 0 and abs(q // 3 - k // 3) <= 1 and abs(q % 3 - k % 3) <= 1,
    ),
    "neighborhood(start)": Case(
        lambda n, m: fv.neighborhood(1, 2, start=3) | fv.neighborhood(3, 4, start=1),
        lambda b, h, i, q, k, m: (
            q == k >= 3
            or (min(q, k) >= 1 and abs((q - 1) // 4 - (k - 1) // 4) <= 2 and abs((q - 1) % 4 - (k - 1) % 4) <= 2)
        ),
    ),
    "every(3)": Case(lambda n, m: fv.every(3), lambda b, h, i, q, k, m: k in (2, 5, 8)),
    "every(4, 2)": Case(lambda n, m: fv.every(4, 2), lambda b, h, i, q, k, m: k in (2, 3, 6, 7)),
    "strided": Case(
        lambda n, m: fv.strided(3), lambda b, h, i, q, k, m: q - k in (0, 1, 2) or q - k in range(3, 99, 3)
    ),
    "fixed": Case(
        lambda n, m: fv.fixed(3, 2),
        lambda b, h, i, q, k, m: k <= q and (k // 3 == q // 3 or k in (1, 2, 4, 5, 7, 8)),
    ),
    "prefix(2)": Case(lambda n, m: fv.prefix(2), lambda b, h, i, q, k, m: k < 2),
    "prefix(0)": Case(lambda n, m: fv.prefix(0), lambda b, h, i, q, k, m: False),
    "prefix(tensor)": Case(lambda n, m: fv.prefix(torch.tensor([1, 4])), lambda b, h, i, q, k, m: k < (1, 4)[b]),
    "documents(ids)": Case(
        lambda n, m: fv.documents(torch.tensor(IDS)),
        lambda b, h, i, q, k, m: same(at(IDS[b], q), IDS[b][k]),
        LENGTH + 1,
    ),
    "documents(ids 1-D)": Case(
        lambda n, m: fv.documents(torch.tensor(IDS[1], dtype=torch.int32)),
        lambda b, h, i, q, k, m: same(at(IDS[1], q), IDS[1][k]),
        LENGTH + 1,
    ),
    "documents(pairs)": Case(
        lambda n, m: fv.documents(torch.tensor(IDS)[:, :n], torch.tensor(IDS)[:1, -m:]),
        lambda b, h, i, q, k, m: same(IDS[b][i], IDS[0][LENGTH - m + k]),
        LENGTH + 1,
    ),
    "documents(offsets)": Case(
        lambda n, m: fv.documents(cu_seqlens=torch.tensor(OFFSETS, dtype=torch.int32).clamp(max=m)),
        lambda b, h, i, q, k, m: same(document(q, m), document(k, m)),
    ),
    "padding(lengths)": Case(
        lambda n, m: fv.padding(torch.tensor(LENGTHS).clamp(max=m)), lambda b, h, i, q, k, m: k < LENGTHS[b]
    ),
    "padding(keep)": Case(lambda n, m: fv.padding(torch.tensor(KEEP)[:, :m]), lambda b, h, i, q, k, m: KEEP[b][k]),
    "global_tokens": Case(lambda n, m: fv.global_tokens([0, 2]), lambda b, h, i, q, k, m: q in (0, 2) or k in (0, 2)),
    "global_tokens(last)": Case(lambda n, m: fv.global_tokens((-1,)), lambda b, h, i, q, k, m: m - 1 in (q, k)),
    "global_tokens(tensor)": Case(
        lambda n, m: fv.global_tokens(torch.tensor([1, 4])), lambda b, h, i, q, k, m: q in (1, 4) or k in (1, 4)
    ),
    "global_tokens(boolean)": Case(
        lambda n, m: fv.global_tokens(torch.tensor(GLOBAL)),
        lambda b, h, i, q, k, m: bool(at(GLOBAL[b], q, False) or GLOBAL[b][k]),
        LENGTH + 1,
    ),
    "blocks 2-D": Case(
        lambda n, m: fv.blocks(GRID[0, 0], 2),
        lambda b, h, i, q, k, m: q >= 0 and bool(GRID[0, 0, q // 2, k // 2]),
        18,
    ),
    "blocks 4-D": Case(
        lambda n, m: fv.blocks(GRID, 3), lambda b, h, i, q, k, m: q >= 0 and bool(GRID[b, h, q // 3, k // 3]), 27
    ),
    "blockwise(causal)": Case(lambda n, m: fv.blockwise(fv.causal, 2), lambda b, h, i, q, k, m: k // 2 <= q // 2),
    "blockwise(window | global)": Case(
        lambda n, m: fv.blockwise(fv.window(1) | fv.global_tokens((0, -1)), 2),
        lambda b, h, i, q, k, m: q // 2 == k // 2 or bool({q // 2, k // 2} & {0, (m - 1) // 2}),
    ),
    "rule": Case(lambda n, m: fv.rule(odd_rule), lambda b, h, i, q, k, m: (q * 3 + k * 2 + h + b) % 5 < 2),
    "from_mask 2-D": Case(
        # As many queries as texts: a mask of two dimensions could be of either, so here it says which.
        lambda n, m: fv.from_mask(MASK[1, 1:2, :n, :m] if n == BATCH else MASK[1, 1, :n, :m]),
        lambda b, h, i, q, k, m: bool(MASK[1, 1, i, k]),
    ),
    "from_mask heads": Case(
        lambda n, m: fv.from_mask(MASK[:1, :, :n, :m]), lambda b, h, i, q, k, m: bool(MASK[0, h, i, k])
    ),
    "from_mask 4-D": Case(
        lambda n, m: fv.from_mask(MASK[:, :, :n, :m]), lambda b, h, i, q, k, m: bool(MASK[b, h, i, k])
    ),
    "pooled(1)": Case(lambda n, m: fv.pooled(1), lambda b, h, i, q, k, m: k <= q),
    "pooled(3, 2)": Case(lambda n, m: fv.pooled(3, 2), lambda b, h, i, q, k, m: 2 * k + 2 <= q),
    "selected": Case(
        lambda n, m: fv.selected(CHOSEN[:, :1, :n].clamp(max=m - 1)),
        lambda b, h, i, q, k, m: k in CHOSEN[b, 0, i].clamp(max=m - 1).tolist(),
    ),
    "selected by heads": Case(
        lambda n, m: fv.selected(CHOSEN[:1, :, :n].clamp(max=m - 1).int()),
        lambda b, h, i, q, k, m: k in CHOSEN[0, h, i].clamp(max=m - 1).tolist(),
    ),
    "selected blocks": Case(
        lambda n, m: fv.causal & fv.selected((CHOSEN[:, :1, :1] // 3).clamp(min=-1, max=(m - 1) // 3), block=3),
        lambda b, h, i, q, k, m: k <= q and k // 3 in (CHOSEN[b, 0, 0] // 3).clamp(max=(m - 1) // 3).tolist(),
    ),
    "streaming": Case(lambda n, m: fv.streaming(1, 2), lambda b, h, i, q, k, m: k <= q and (k < 1 or q - k < 2)),
    "longformer": Case(lambda n, m: fv.longformer(4, (1,)), lambda b, h, i, q, k, m: abs(q - k) <= 2 or 1 in (q, k)),
    "bigbird": Case(
        lambda n, m: fv.bigbird(2, window_blocks=3, random=0),
        lambda b, h, i, q, k, m: abs(q // 2 - k // 2) <= 1 or bool({q // 2, k // 2} & {0, (m - 1) // 2}),
    ),
    "causal & window": Case(lambda n, m: fv.causal & fv.window(2), lambda b, h, i, q, k, m: k in (q - 1, q)),
    "causal | prefix": Case(lambda n, m: fv.causal | fv.prefix(2), lambda b, h, i, q, k, m: k <= q or k < 2),
    "~causal": Case(lambda n, m: ~fv.causal, lambda b, h, i, q, k, m: k > q),
}


def expected(case: Case, queries: int, keys: int, start: int | list[int] | None = None) -> set[Pair]:
    """The set of (batch, head, row, key) that may attend."""
    first = [keys - queries if start is None else start] * BATCH if not isinstance(start, list) else start
    return {
        (b, h, i, k)
        for b in range(BATCH)
        for h in range(HEADS)
        for i in range(queries)
        for k in range(keys)
        if case.sees(b, h, i, first[b] + i, k, keys)
    }


def attended(pattern: Pattern | Tensor, queries: int, keys: int, backend: str, start: object = None) -> set[Pair]:
    """The same set out of a real call: with the identity for values, the output is the matrix of weights."""
    draw = torch.Generator().manual_seed(queries * 31 + keys)
    q = torch.randn(BATCH, HEADS, queries, 5, dtype=torch.float64, generator=draw)
    k = torch.randn(BATCH, 1, keys, 5, dtype=torch.float64, generator=draw)
    v = torch.eye(keys, dtype=torch.float64).expand(BATCH, 1, keys, keys)
    out = fv.attention(q, k, v, pattern, query_start=start, backend=backend)
    return pairs(out != 0)


def pairs(mask: Tensor) -> set[Pair]:
    """Where a boolean [batch, heads, queries, keys] is True."""
    return set(map(tuple, mask.nonzero().tolist()))  # type: ignore[arg-type]
