"""Selections choose what loops choose, tell nothing of what is hidden, and attention over them is attention."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from calls import BATCH, GROUP, HEADS, KEY_HEADS, near, random, tensors
from torch import Tensor

import foveate as fv
from foveate import InvalidInput, Pattern
from foveate.pattern.algebra import And
from foveate.pattern.selected import Selected
from foveate.selection import choosing
from foveate.selection import indexer as indexing

N = 23  # tokens
choose = fv.selection


def lists(pattern: Pattern) -> list[list[list[set[int]]]]:
    """What a selection lists for every batch row, head and query."""
    if isinstance(pattern, And):
        pattern = next(part for part in pattern.parts if isinstance(part, Selected))
    assert isinstance(pattern, Selected)
    return [
        [[{int(one) for one in row if one >= 0} for row in head] for head in entry]
        for entry in pattern.indices.tolist()
    ]


def dense(pattern: Pattern, queries: int = N, keys: int = N) -> Tensor:
    return pattern.dense(queries, keys, batch=BATCH, heads=HEADS)


def best(scores: Tensor, visible: Tensor, top_k: int) -> set[int]:
    """The places of the highest among the visible: the definition."""
    places = [place for place in range(len(scores)) if visible[place]]
    return set(sorted(places, key=lambda place: -float(scores[place]))[:top_k])


class TestTopk:
    @pytest.mark.parametrize("top_k", [1, 5, N])
    @pytest.mark.parametrize("pattern", [None, fv.causal, fv.window(3) | fv.prefix(2)], ids=repr)
    def test_it_is_the_highest_scores(self, pattern: Pattern | None, top_k: int) -> None:
        q, k, _ = tensors(N, N)
        score = fv.alibi(random(HEADS).abs()) + fv.softcap(2.0)
        scores = 2.0 * ((q * 0.7) @ k.repeat_interleave(GROUP, 1).mT / 2.0).tanh()
        scores = scores - random(HEADS).abs()[:, None, None] * (torch.arange(N)[:, None] - torch.arange(N)).abs()
        visible = torch.ones(BATCH, HEADS, N, N, dtype=torch.bool) if pattern is None else dense(pattern)
        found = choose.topk(q, k, pattern, top_k=top_k, score=score, scale=0.7)
        true = [
            [[best(scores[b, h, t], visible[b, h, t], top_k) for t in range(N)] for h in range(HEADS)]
            for b in range(BATCH)
        ]
        assert lists(found) == true
        assert lists(choose.topk_of(scores, pattern, top_k=top_k)) == true

    def test_a_group_captures_as_much_of_its_attention_as_any_list_can(self) -> None:
        q, k, _ = tensors(N, N)
        weights = fv.weights(q, k, k, fv.causal).unflatten(1, (KEY_HEADS, GROUP)).sum(2)
        found = choose.topk(q, k, fv.causal, top_k=4, shared=True)
        assert found.indices.shape == (BATCH, KEY_HEADS, N, 4)
        for b in range(BATCH):
            for h in range(KEY_HEADS):
                for t in range(N):
                    assert lists(found)[b][h][t] == best(weights[b, h, t], dense(fv.causal)[b, 0, t], 4)

    def test_a_group_sees_what_any_of_it_sees(self) -> None:
        q, k, _ = tensors(N, N)
        mask = torch.rand(BATCH, HEADS, N, N, generator=torch.Generator().manual_seed(4)) < 0.3
        every = lists(choose.topk(q, k, mask, top_k=N, shared=True))
        seen = mask.unflatten(1, (KEY_HEADS, GROUP)).any(2)
        for b in range(BATCH):
            for h in range(KEY_HEADS):
                assert every[b][h] == [set(row.nonzero().flatten().tolist()) for row in seen[b, h]]

    def test_every_key_is_dense_attention(self) -> None:
        q, k, v = tensors(N, N)
        for shared in (False, True):
            found = fv.attention(q, k, v, choose.topk(q, k, fv.causal, top_k=N, shared=shared), backend="chunked")
            near(found, fv.attention(q, k, v, fv.causal, backend="reference"))

    def test_decoding_chooses_as_the_whole_does(self) -> None:
        q, k, _ = tensors(N, N)
        whole = lists(choose.topk(q, k, fv.causal, top_k=4))
        for at in (0, 7, N - 1):
            step = lists(
                choose.topk(q[:, :, at : at + 1], k[:, :, : max(at + 1, 4)], fv.causal, top_k=4, query_start=at)
            )
            assert [[rows[0] for rows in heads] for heads in step] == [[rows[at] for rows in heads] for heads in whole]

    def test_starts_may_differ_in_the_batch(self) -> None:
        q, k, _ = tensors(1, N)
        start = torch.tensor([3, 11])
        found = choose.topk(q, k, fv.causal & fv.window(9), top_k=2, query_start=start)
        for b in range(BATCH):
            alone = choose.topk(
                q[b : b + 1], k[b : b + 1], fv.causal & fv.window(9), top_k=2, query_start=int(start[b])
            )
            assert lists(alone)[0] == lists(found)[b]


def test_heavy_hitters_are_the_keys_with_most_attention() -> None:
    q, k, v = tensors(N, N)
    with fv.watch() as seen:
        fv.attention(q, k, v, fv.causal)
    received = seen.looked(0).received
    truth = fv.weights(q, k, v, fv.causal).sum(2)
    near(received, truth)
    everyone = torch.ones(N, dtype=torch.bool)
    assert lists(choose.heavy_hitters(received, top_k=5)) == [
        [[best(truth[b, h], everyone, 5)] for h in range(HEADS)] for b in range(BATCH)
    ]
    together = truth.unflatten(1, (KEY_HEADS, GROUP)).sum(2)
    shared = choose.heavy_hitters(received, top_k=5, key_heads=KEY_HEADS)
    assert lists(shared) == [[[best(together[b, h], everyone, 5)] for h in range(KEY_HEADS)] for b in range(BATCH)]
    later, _, _ = tensors(2, N, seed=4)
    pattern = fv.causal & (shared | fv.window(left=3))
    near(
        fv.attention(later, k, v, pattern, backend="chunked"),
        fv.attention(later, k, v, pattern.dense(2, N, batch=BATCH, heads=HEADS), backend="reference"),
    )


BLOCK = 4
BLOCKS = -(-N // BLOCK)


def moba_by_loops(q: Tensor, k: Tensor, v: Tensor, top_k: int) -> tuple[Tensor, list[list[list[set[int]]]]]:
    """Lu et al. 2025, section 2.2, query by query: gate, own block, one softmax over the union."""
    out, chosen = torch.zeros(BATCH, HEADS, N, v.shape[3], dtype=torch.float64), []
    for b in range(BATCH):
        chosen.append([])
        for h in range(HEADS):
            key, value = k[b, h // GROUP], v[b, h // GROUP]
            chosen[b].append([])
            for t in range(N):
                gates = [
                    math.inf
                    if block == t // BLOCK
                    else float(q[b, h, t] @ key[block * BLOCK : (block + 1) * BLOCK].mean(0))
                    for block in range(t // BLOCK + 1)
                ]
                blocks = set(sorted(range(len(gates)), key=lambda block: -gates[block])[:top_k])
                chosen[b][h].append(blocks)
                keys = [s for s in range(t + 1) if s // BLOCK in blocks]
                weights = (key[keys] @ q[b, h, t] / math.sqrt(q.shape[3])).softmax(0)
                out[b, h, t] = weights @ value[keys]
    return out, chosen


class TestBlocks:
    @pytest.mark.parametrize("top_k", [1, 2, 3, BLOCKS])
    def test_moba_is_its_paper(self, top_k: int) -> None:
        q, k, v = tensors(N, N)
        true, blocks = moba_by_loops(q, k, v, top_k)
        pattern = choose.moba(q, k, block=BLOCK, top_k=top_k)
        assert lists(pattern) == blocks
        for backend in ("reference", "chunked"):
            near(fv.attention(q, k, v, pattern, backend=backend), true)
        module = fv.nn.MoBA(BLOCK, top_k)
        near(module(q, k, v), true)
        if top_k == BLOCKS:
            near(true, fv.attention(q, k, v, fv.causal))

    @pytest.mark.parametrize("own", [False, True])
    @pytest.mark.parametrize("pool", ["mean", "bounds"])
    def test_a_group_chooses_by_the_sum_of_its_scores(self, pool: str, own: bool) -> None:
        q, k, _ = tensors(N, N)
        if own and pool == "bounds":
            return
        found = (
            choose.moba(q, k, block=BLOCK, top_k=2, shared=True)
            if own
            else choose.block_topk(q, k, fv.causal, block=BLOCK, top_k=2, pool=pool, shared=True)
        )
        for b in range(BATCH):
            for h in range(KEY_HEADS):
                for t in range(N):
                    heads = range(h * GROUP, (h + 1) * GROUP)
                    worth = torch.tensor(
                        [sum(worth_of(q[b, g, t], k[b, h], j, pool) for g in heads) for j in range(BLOCKS)]
                    )
                    forced = t // BLOCK if own or ((t + 1) % BLOCK and t < N - 1) else None
                    if forced is not None:
                        worth[forced] = math.inf
                    there = torch.arange(BLOCKS) <= t // BLOCK
                    assert lists(found)[b][h][t] == best(worth, there, 2)

    @pytest.mark.parametrize("pool", ["mean", "bounds"])
    @pytest.mark.parametrize(
        "pattern",
        [
            None,
            fv.causal,
            fv.causal & fv.window(9),
            fv.documents(torch.arange(N) // 7),
            fv.from_mask(torch.rand(BATCH, HEADS, N, N, generator=torch.Generator().manual_seed(2)) < 0.9),
            fv.rule(lambda b, h, q, k: (k // 3 + q + h) % 4 != b),
        ],
        ids=repr,
    )
    def test_blocks_seen_in_part_come_first_and_then_the_highest(self, pattern: Pattern | None, pool: str) -> None:
        q, k, _ = tensors(N, N)
        found = lists(choose.block_topk(q, k, pattern, block=BLOCK, top_k=3, pool=pool))
        seen = torch.ones(BATCH, HEADS, N, N, dtype=torch.bool) if pattern is None else dense(pattern)
        for b in range(BATCH):
            for h in range(HEADS):
                for t in range(N):
                    shown = [seen[b, h, t, j * BLOCK : (j + 1) * BLOCK] for j in range(BLOCKS)]
                    whole = {j for j in range(BLOCKS) if shown[j].all()}
                    part = {j for j in range(BLOCKS) if shown[j].any()} - whole
                    picked = found[b][h][t]
                    assert len(picked) == min(3, len(whole | part))
                    assert picked <= whole | part
                    assert part <= picked or (len(part) > 3 and picked <= part)
                    if part <= picked:
                        worth = torch.tensor([worth_of(q[b, h, t], k[b, h // GROUP], j, pool) for j in range(BLOCKS)])
                        there = torch.tensor([j in whole for j in range(BLOCKS)])
                        assert picked - part == best(worth, there, 3 - len(part))

    def test_the_bounds_are_never_below_a_score(self) -> None:
        q, k, _ = tensors(N, N)
        for j in range(BLOCKS):
            most = (k[0, 0, j * BLOCK : (j + 1) * BLOCK] @ q[0, 0, 5]).max()
            assert worth_of(q[0, 0, 5], k[0, 0], j, "bounds") >= most

    def test_what_hidden_keys_hold_never_matters(self) -> None:
        q, k, _ = tensors(N, N)
        poisoned = k.clone()
        poisoned[:, :, 17:] = torch.nan
        hidden = fv.causal & fv.padding(torch.tensor([17, 17]))
        assert lists(choose.moba(q, k, hidden, block=BLOCK, top_k=3)) == lists(
            choose.moba(q, poisoned, hidden, block=BLOCK, top_k=3)
        )


def worth_of(q: Tensor, k: Tensor, block: int, pool: str) -> float:
    """What one block is worth to one query."""
    keys = k[block * BLOCK : (block + 1) * BLOCK]
    if pool == "mean":
        return float(sum(q @ key for key in keys) / len(keys))
    return float(sum(max(float(q[d] * keys[:, d].min()), float(q[d] * keys[:, d].max())) for d in range(len(q))))


WINDOWS = {"length": 4, "stride": 2}
NSA = {**WINDOWS, "block": 4, "top_k": 4, "first": 1, "local": 2}


def nsa_blocks_by_loops(q: Tensor, windows: Tensor, sizes: dict[str, int], keys: int) -> list[list[list[set[int]]]]:
    """Yuan et al. 2025, equations 8 to 12, token by token."""
    length, stride, block, top_k = (sizes[name] for name in ("length", "stride", "block", "top_k"))
    chosen: list[list[list[set[int]]]] = []
    for b in range(BATCH):
        chosen.append([])
        for h in range(KEY_HEADS):
            chosen[b].append([])
            for t in range(q.shape[2]):
                worth = torch.zeros(-(-keys // block), dtype=torch.float64)
                whole = [i for i in range(windows.shape[2]) if i * stride + length - 1 <= t]
                for g in range(h * GROUP, (h + 1) * GROUP):
                    if whole:
                        p = (windows[b, h, whole] @ q[b, g, t] / math.sqrt(q.shape[3])).softmax(0)
                        for i in whole:
                            for token in range(i * stride, i * stride + length):
                                if token // block < len(worth):
                                    worth[token // block] += p[i] / stride
                own = t // block
                for j in range(len(worth)):
                    if j < sizes["first"] or own - sizes["local"] < j <= own:
                        worth[j] = math.inf
                chosen[b][h].append(best(worth, torch.arange(len(worth)) <= own, top_k))
    return chosen


class TestCompressed:
    @pytest.mark.parametrize("keys", [3, 4, 17, N, 41])
    @pytest.mark.parametrize(
        "sizes",
        [NSA, {**NSA, "block": 8, "top_k": 3}, {**NSA, "length": 6, "block": 2, "top_k": 5}, {**NSA, "length": 2}],
        ids=str,
    )
    def test_blocks_are_those_of_the_paper(self, sizes: dict[str, int], keys: int) -> None:
        q, k, _ = tensors(keys, keys)
        sizes = {**sizes, "top_k": min(sizes["top_k"], -(-keys // sizes["block"]))}
        windows = choose.compress(k, length=sizes["length"], stride=sizes["stride"])
        found = choose.select(q, windows, keys=keys, **sizes)
        assert lists(found) == nsa_blocks_by_loops(q, windows, sizes, keys)

    def test_the_paper_s_sizes_weigh_windows_1_2_2_2_1(self) -> None:
        from foveate.selection.compressed import _by_overlap

        shares = torch.eye(11, dtype=torch.float64).view(1, 1, 11, 11)
        weights = _by_overlap(shares, 32, 16, 64, 3)[0, 0]
        assert weights[:, 1].tolist() == [0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0]
        assert weights[:, 0].tolist() == [2, 2, 2, 1, 0, 0, 0, 0, 0, 0, 0]

    def test_decoding_chooses_as_the_whole_does(self) -> None:
        q, k, _ = tensors(N, N)
        windows = choose.compress(k, **WINDOWS)
        whole = lists(choose.select(q, windows, keys=N, **NSA))
        step = lists(choose.select(q[:, :, 15:17], windows, keys=N, query_start=15, **NSA))
        assert step == [[rows[15:17] for rows in heads] for heads in whole]

    def test_windows(self) -> None:
        x = random(2, 3, 11, 5)
        found = choose.compress(x, length=4, stride=2)
        near(found, torch.stack([x[:, :, i : i + 4].mean(2) for i in (0, 2, 4, 6)], 2))
        near(choose.compress(x, length=4, stride=2, network=lambda windows: windows[..., 0, :]), x[:, :, 0:7:2])
        assert choose.compress(x, length=12, stride=3).shape == (2, 3, 0, 5)


INDEX_HEADS, INDEX_DIM = 5, 3


def indexer(queries: int = N, keys: int = N, *, gradients: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (BATCH, INDEX_HEADS, queries, INDEX_DIM), (BATCH, 1, keys, INDEX_DIM), (BATCH, INDEX_HEADS, queries)
    q, k, w = (random(*shape, seed=11 + n).requires_grad_(gradients) for n, shape in enumerate(shapes))
    return q, k, w


def index_by_loops(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """DeepSeek-AI 2025, equation 1."""
    rows = []
    for b in range(BATCH):
        for t in range(q.shape[2]):
            row = [
                sum(w[b, j, t] * (q[b, j, t] @ k[b, 0, s]).clamp(min=0) for j in range(q.shape[1]))
                for s in range(k.shape[2])
            ]
            rows.append(torch.stack(row))  # type: ignore[arg-type]
    return torch.stack(rows).view(BATCH, 1, q.shape[2], k.shape[2]) / math.sqrt(q.shape[1] * q.shape[3])


def loss_by_loops(guess: Tensor, q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """DeepSeek-AI 2025, equations 3 and 4: row by row, on the seen keys."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b in range(BATCH):
        for t in range(q.shape[2]):
            p = torch.zeros(k.shape[2], dtype=torch.float64)
            for h in range(HEADS):
                at = seen[b, h, t].nonzero().flatten()
                if len(at):
                    p[at] += (k[b, h // GROUP, at] @ q[b, h, t] * scale).softmax(0)
            at = seen[b, :, t].any(0).nonzero().flatten()
            if len(at):
                p = p[at] / p.sum()
                total = total + (p * (p.log() - guess[b, 0, t, at].log_softmax(0))).sum()
                count += 1
    return total / count


def chosen_sets() -> dict[str, Callable[[], Pattern | None]]:
    def lightning_choice() -> Pattern:
        return choose.lightning(*indexer(), fv.causal, top_k=4)

    repeated = torch.randint(-1, N, (BATCH, 1, N, 5), generator=torch.Generator().manual_seed(8))
    return {
        "everything": lambda: None,
        "causal": lambda: fv.causal,
        "selection": lightning_choice,
        "repeated": lambda: fv.selected(torch.cat([repeated, repeated[..., :2]], 3)),
        "blocks": lambda: fv.causal & fv.selected(repeated.clamp(max=5), block=4),
        "selection and more": lambda: lightning_choice() & ~fv.documents(torch.arange(N) // 5),
        "by heads": lambda: fv.from_mask(
            torch.rand(BATCH, HEADS, N, N, generator=torch.Generator().manual_seed(2)) < 0.3
        ),
    }


class TestLightning:
    def test_scores_are_those_of_the_paper(self) -> None:
        near(choose.lightning_scores(*indexer()), index_by_loops(*indexer()))
        near(
            choose.lightning_scores(*indexer(), scale=1.0),
            index_by_loops(*indexer()) * math.sqrt(INDEX_HEADS * INDEX_DIM),
        )

    @pytest.mark.parametrize("pattern", [None, fv.causal, fv.causal & fv.window(4)], ids=repr)
    def test_the_highest_are_chosen(self, pattern: Pattern | None) -> None:
        scores = index_by_loops(*indexer())
        visible = torch.ones(BATCH, 1, N, N, dtype=torch.bool) if pattern is None else dense(pattern)
        found = choose.lightning(*indexer(), pattern, top_k=4)
        assert lists(found) == [[[best(scores[b, 0, t], visible[b, 0, t], 4) for t in range(N)]] for b in range(BATCH)]

    @pytest.mark.parametrize("what", chosen_sets())
    def test_the_loss_and_its_gradient_are_those_of_the_paper(self, what: str) -> None:
        pattern = chosen_sets()[what]()
        q, k, _ = tensors(N, N, gradients=True)
        leaves = indexer(gradients=True)
        seen = torch.ones(BATCH, HEADS, N, N, dtype=torch.bool) if pattern is None else dense(pattern)
        true = loss_by_loops(index_by_loops(*leaves), q.detach(), k.detach(), seen, 0.6)
        found = choose.lightning_loss(*leaves, q, k, pattern, scale=0.6)
        near(found, true)
        for mine, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(true, leaves), strict=True):
            near(mine, theirs)
        again = choose.lightning_loss(*leaves, q, k, pattern, scale=0.6)
        assert torch.autograd.grad(again, (q, k), allow_unused=True) == (None, None)

    @pytest.mark.parametrize("what", ["causal", "selection"])
    def test_gradcheck(self, what: str) -> None:
        q, k, _ = (x[:1] for x in tensors(7, 7))
        leaves = tuple(x[:1].detach().requires_grad_() for x in indexer(7, 7))
        pattern = fv.causal if what == "causal" else choose.lightning(*leaves, fv.causal, top_k=3)
        assert torch.autograd.gradcheck(lambda *x: choose.lightning_loss(*x, q, k, pattern), leaves)

    @pytest.mark.parametrize("what", chosen_sets())
    def test_parts_make_the_whole(self, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def all_of_it() -> tuple[Tensor, ...]:
            leaves = indexer(gradients=True)
            pattern, (q, k, _) = chosen_sets()[what](), tensors(N, N)
            loss = choose.lightning_loss(*leaves, q, k, pattern)
            return loss, *torch.autograd.grad(loss, leaves), choose.lightning_scores(*indexer())

        whole = all_of_it()
        monkeypatch.setattr(indexing, "_ENTRIES", 900)
        monkeypatch.setattr(choosing, "_ENTRIES", 900)
        for mine, theirs in zip(all_of_it(), whole, strict=True):
            near(mine, theirs)

    def test_a_perfect_indexer_has_no_loss(self) -> None:
        q, k, _ = tensors(N, N)
        one = q[:, :1], k[:, :1]
        positive = tuple(x.abs() for x in one)
        found = choose.lightning_loss(
            *positive, torch.ones(BATCH, 1, N, dtype=torch.float64), *positive, fv.causal, index_scale=0.4, scale=0.4
        )
        near(found, torch.zeros((), dtype=torch.float64))

    def test_rows_without_a_key_do_not_count(self) -> None:
        q, k, _ = tensors(N, N)
        some = fv.selected(torch.tensor([3, -1]).repeat(12)[:N].view(1, 1, N, 1))
        every = fv.selected(torch.full((1, 1, N, 1), 3))
        for pattern in (some, every, fv.selected(torch.full((1, 1, N, 1), -1))):
            leaves = indexer(gradients=True)
            loss = choose.lightning_loss(*leaves, q, k, pattern)
            near(loss, torch.zeros((), dtype=torch.float64))  # one key has all of the attention
            assert all(x.isfinite().all() for x in torch.autograd.grad(loss, leaves))

    @pytest.mark.parametrize("what", ["causal", "selection"])
    def test_what_hidden_keys_hold_never_matters(self, what: str) -> None:
        pattern = chosen_sets()[what]()
        assert pattern is not None
        pattern = pattern & fv.padding(torch.tensor([15, 15]))
        results = []
        for poison in (0.0, torch.nan):
            leaves, (q, k, _) = indexer(gradients=True), tensors(N, N)
            k_i, k = leaves[1].detach().clone(), k.clone()
            k_i[:, :, 15:], k[:, :, 15:] = poison, poison
            leaves = (leaves[0], k_i.requires_grad_(), leaves[2])
            loss = choose.lightning_loss(*leaves, q, k, pattern)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
        for mine, theirs in zip(*results, strict=True):
            near(mine, theirs)


SELECTIONS: dict[str, Callable[[Tensor, Tensor], Pattern]] = {
    "topk": lambda q, k: choose.topk(q, k, fv.causal, top_k=4),
    "topk, shared": lambda q, k: choose.topk(q, k, fv.causal, top_k=4, shared=True),
    "lightning": lambda q, k: choose.lightning(q, k[:, :1], q[..., 0], fv.causal, top_k=4),
    "block_topk": lambda q, k: choose.block_topk(q, k, fv.causal, block=4, top_k=2),
    "block_topk, bounds": lambda q, k: choose.block_topk(q, k, fv.causal, block=4, top_k=2, pool="bounds"),
    "moba": lambda q, k: choose.moba(q, k, block=4, top_k=2),
    "select": lambda q, k: choose.select(q, choose.compress(k, **WINDOWS), keys=N, **NSA),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_the_future_is_not_known(name: str) -> None:
    q, k, v = tensors(N, N)
    before = fv.attention(q, k, v, SELECTIONS[name](q, k), backend="chunked")
    for t in (1, 6, 11, 22):
        later = [x.clone() for x in (q, k, v)]
        for x in later:
            x[:, :, t:] = random(*x[:, :, t:].shape, seed=t) * 3
        after = fv.attention(*later, SELECTIONS[name](*later[:2]), backend="chunked")
        assert torch.equal(after[:, :, :t], before[:, :, :t])


@pytest.mark.parametrize("name", SELECTIONS)
def test_parts_of_a_call_choose_as_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = tensors(N, N)
    whole = lists(SELECTIONS[name](q, k))
    monkeypatch.setattr(choosing, "_ENTRIES", 900)
    assert lists(SELECTIONS[name](q, k)) == whole


@pytest.mark.parametrize("name", SELECTIONS)
def test_no_gradient_goes_through_a_choice_and_attention_has_its_own(name: str) -> None:
    q, k, v = tensors(N, N, gradients=True)
    pattern = SELECTIONS[name](q, k)
    share = random(BATCH, HEADS, N, v.shape[3])
    found, true = (
        torch.autograd.grad((fv.attention(q, k, v, who, backend=backend) * share).sum(), (q, k, v))
        for who, backend in ((pattern, "chunked"), (dense(pattern), "reference"))
    )
    for mine, theirs in zip(found, true, strict=True):
        near(mine, theirs)


@pytest.mark.parametrize("name", ["topk", "lightning", "moba"])
def test_gradcheck_through_attention_over_a_choice(name: str) -> None:
    q, k, v = (
        x[:1, :heads, :, :3].detach().requires_grad_() for x, heads in zip(tensors(5, 5), (2, 1, 1), strict=True)
    )
    pattern = {
        "topk": lambda: choose.topk(q, k, fv.causal, top_k=3),
        "lightning": lambda: choose.lightning(q, k[:, :1], q[..., 0], fv.causal, top_k=3),
        "moba": lambda: choose.moba(q, k, block=2, top_k=2),
    }[name]()
    for backend in ("reference", "chunked"):
        assert torch.autograd.gradcheck(lambda *x, to=backend: fv.attention(*x, pattern, backend=to), (q, k, v))


def wrong() -> dict[str, tuple[Callable[[], object], list[str]]]:
    q, k, _ = tensors(N, N)
    index = indexer()
    return {
        "topk above n": (lambda: choose.topk(q, k, top_k=N + 1), ["top_k is 24", "23 keys", "at most 23"]),
        "topk of none": (lambda: choose.topk(q, k, top_k=0), ["top_k is 0", "at least 1"]),
        "topk of half": (lambda: choose.topk(q, k, top_k=2.5), ["2.5", "whole number"]),
        "given scores above n": (lambda: choose.topk_of(q @ q.mT, top_k=N + 1), ["24", "at most 23"]),
        "given scores of three dimensions": (lambda: choose.topk_of(q[0], top_k=1), ["6×23×5", "4 dimension"]),
        "given scores and another pattern": (
            lambda: choose.topk_of(q @ q.mT, torch.ones(3, 5, dtype=torch.bool), top_k=1), ["3×5", "broadcast"]
        ),
        "hitters above n": (lambda: choose.heavy_hitters(q[..., 0], top_k=N + 1), ["24", "at most 23"]),
        "hitters of other groups": (
            lambda: choose.heavy_hitters(q[..., 0], top_k=1, key_heads=4),
            ["key_heads is 4", "multiple"],
        ),
        "moba above n": (
            lambda: choose.moba(q, k, block=4, top_k=7),
            ["top_k is 7", "6 blocks of 4 keys", "at most 6"],
        ),
        "moba of no block": (lambda: choose.moba(q, k, block=0, top_k=1), ["block size is 0", "at least 1"]),
        "an unknown pool": (
            lambda: choose.block_topk(q, k, block=4, top_k=1, pool="max"),
            ["'max'", "'mean'", "'bounds'"],
        ),
        "windows that do not divide": (lambda: choose.compress(k, length=5, stride=2), ["5", "stride 2"]),
        "blocks that do not divide": (
            lambda: choose.select(q, k, keys=N, length=4, stride=2, block=5), ["block of 5", "stride 2"]
        ),
        "windows of another length": (
            lambda: choose.select(q, k, keys=N, length=4, stride=2, block=4, top_k=4),
            ["23 keys make 10 windows of 4"],
        ),
        "too few blocks for those forced": (
            lambda: choose.select(q, choose.compress(k, **WINDOWS), keys=N, **{**NSA, "top_k": 2}),
            ["top_k is 2", "1 first and 2 local", "wanted 3"],
        ),
        "select above n": (
            lambda: choose.select(q, choose.compress(k, **WINDOWS), keys=N, **{**NSA, "top_k": 7}),
            ["top_k is 7", "6 blocks"],
        ),
        "lightning above n": (lambda: choose.lightning(*index, top_k=N + 1), ["24", "at most 23"]),
        "an indexer with many keys": (
            lambda: choose.lightning(q, k, q[..., 0], top_k=2),
            ["[batch, 1, keys, dim]", "2×3×23×5"],
        ),
        "weights of other heads": (lambda: choose.lightning(*index[:2], q[..., 0], top_k=2), ["2×6×23", "[2, 5, 23]"]),
        "an indexer of another length": (
            lambda: choose.lightning_loss(*indexer(N - 1, N), q, k), ["q_i", "the same batch, queries and keys"]
        ),
    }  # fmt: skip


@pytest.mark.parametrize("what", wrong())
def test_bad_calls_are_refused_in_a_sentence(what: str) -> None:
    call, says = wrong()[what]
    with pytest.raises(InvalidInput) as caught:
        call()
    assert all(word in str(caught.value) for word in says), str(caught.value)


LINEAR = (
    "s.topk(q, q, fv.causal, top_k=16)",
    "s.lightning(q, q[:, :1], q[..., 0], fv.causal, top_k=16)",
    "s.moba(q, q, block=32, top_k=2)",
    "s.lightning_loss(q, q[:, :1], q[..., 0], q, q, few).backward()",
)


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
@pytest.mark.parametrize(
    "works",
    [
        LINEAR,
        pytest.param(("s.lightning_loss(q, q[:, :1], q[..., 0], q, q, fv.causal).backward()",), marks=pytest.mark.slow),
    ],
    ids=["selections", "dense loss"],
)
def test_memory_is_linear_in_the_length(works: tuple[str, ...]) -> None:
    """4,096 positions, 2 heads: one matrix of scores would take 128 MiB."""
    program = """if True:
        import pathlib, sys, torch, foveate as fv
        s = fv.selection
        torch.set_num_threads(1)
        def peak():
            return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        for work in sys.argv[1:]:
            for n in (64, 4096):
                q = torch.randn(1, 2, n, 8, requires_grad=True)
                few = fv.selected((torch.arange(n)[:, None] - torch.arange(16)).clamp(min=-1).view(1, 1, n, 16))
                pathlib.Path("/proc/self/clear_refs").write_text("5")
                before = peak()
                eval(work)
            print(peak() - before)
    """
    run = subprocess.run([sys.executable, "-c", program, *works], check=True, capture_output=True, text=True)
    found = dict(zip(works, map(int, run.stdout.split()), strict=True))
    assert {work: size for work, size in found.items() if size >= 100 * 1024} == {}
