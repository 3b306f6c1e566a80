"""A selection is a pattern: who is listed is seen, at a cost that follows the lists, and all else is as ever."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from calls import BATCH, GROUP, HEADS, KEY_HEADS, near, random, tensors
from torch import Tensor

import foveate as fv
from foveate import InvalidInput

QUERIES, KEYS = 11, 13
BACKENDS = ("reference", "chunked")


def listed(*shape: int, count: int = KEYS, seed: int = 3) -> Tensor:
    """Random indices with some −1 and some repeated."""
    indices = torch.randint(-1, count, shape, generator=torch.Generator().manual_seed(seed))
    indices[..., -1] = indices[..., 0]
    return indices


def matrix(indices: Tensor, block: int = 1, queries: int = QUERIES, keys: int = KEYS) -> Tensor:
    """The boolean matrix that indices stand for, pair by pair."""
    seen = torch.zeros(BATCH, HEADS, queries, keys, dtype=torch.bool)
    batch, heads, rows, _ = indices.shape
    for b in range(BATCH):
        for h in range(HEADS):
            for row in range(queries):
                for one in indices[b % batch, h // (HEADS // heads), row % rows].tolist():
                    if one >= 0:
                        seen[b, h, row, one * block : (one + 1) * block] = True
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [1, KEY_HEADS, HEADS])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_attention_gradients_and_weights_are_those_of_the_matrix(backend: str, heads: int, batch: int) -> None:
    q, k, v = tensors(QUERIES, KEYS, gradients=True)
    for block, rows in ((1, QUERIES), (3, QUERIES), (5, 1)):
        indices = listed(batch, heads, rows, 4, count=-(-KEYS // block))
        selection, mask = (
            fv.causal & fv.selected(indices, block=block),
            fv.causal & fv.from_mask(matrix(indices, block)),
        )
        found, true = (
            fv.attention_with_lse(q, k, v, pattern, backend=name)
            for pattern, name in ((selection, backend), (mask, "reference"))
        )
        share = random(*found[0].shape)
        for mine, theirs in zip(
            (*found, *torch.autograd.grad((found[0] * share).sum(), (q, k, v))),
            (*true, *torch.autograd.grad((true[0] * share).sum(), (q, k, v))),
            strict=True,
        ):
            near(mine, theirs)
        near(fv.weights(q, k, v, selection), fv.weights(q, k, v, mask))
        assert torch.equal(
            fv.weights(q, k, v, selection, rows=[5, 2]) != 0, (fv.weights(q, k, v, mask) != 0)[:, :, [5, 2]]
        )


@pytest.mark.parametrize("block", [1, 4])
def test_selecting_everything_is_dense(block: int) -> None:
    q, k, v = tensors(QUERIES, KEYS)
    everything = torch.arange(-(-KEYS // block)).expand(1, 1, 1, -1)
    for backend in BACKENDS:
        near(fv.attention(q, k, v, fv.selected(everything, block=block), backend=backend), fv.attention(q, k, v))


def test_order_repeats_and_none_make_no_difference() -> None:
    q, k, v = tensors(QUERIES, KEYS)
    indices = listed(BATCH, KEY_HEADS, QUERIES, 4)
    more = torch.cat([torch.full_like(indices, -1), indices.flip(3), indices[..., :2]], 3)
    for backend in BACKENDS:
        found, same = (fv.attention(q, k, v, fv.selected(some), backend=backend) for some in (indices, more))
        assert torch.equal(found, same)


def test_a_shared_table_is_that_of_each_query_head_of_the_group() -> None:
    indices = listed(BATCH, KEY_HEADS, QUERIES, 4)
    each = indices.repeat_interleave(GROUP, 1)
    shape = {"batch": BATCH, "heads": HEADS}
    assert torch.equal(
        fv.selected(indices).dense(QUERIES, KEYS, **shape), fv.selected(each).dense(QUERIES, KEYS, **shape)
    )
    for head in range(HEADS):
        drawn = fv.selected(indices).picture(QUERIES, KEYS, head=head, heads=HEADS)
        assert drawn == fv.selected(each).picture(QUERIES, KEYS, head=head)


def test_nothing_selected_is_zero_and_minus_infinity() -> None:
    q, k, v = tensors(QUERIES, KEYS, gradients=True)
    for indices in (torch.full((1, 1, QUERIES, 3), -1), torch.zeros(1, 1, QUERIES, 0, dtype=torch.int64)):
        for backend in BACKENDS:
            out, lse = fv.attention_with_lse(q, k, v, fv.selected(indices), backend=backend)
            assert (out == 0).all()
            assert (lse == -torch.inf).all()
            assert all((x == 0).all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_indices_of_any_width(dtype: torch.dtype) -> None:
    q, k, v = tensors(QUERIES, KEYS)
    indices = listed(1, 1, QUERIES, 4)
    for backend in BACKENDS:
        found, same = (
            fv.attention(q, k, v, fv.selected(some), backend=backend) for some in (indices, indices.to(dtype))
        )
        assert torch.equal(found, same)


def test_an_index_changed_in_place_is_seen() -> None:
    q, k, v = tensors(QUERIES, KEYS)
    indices = listed(1, 1, QUERIES, 4)
    pattern = fv.selected(indices)
    before = fv.attention(q, k, v, pattern, backend="chunked")
    indices.fill_(7)
    near(fv.attention(q, k, v, pattern, backend="chunked"), v[:, :, 7:8].repeat_interleave(GROUP, 1).expand_as(before))


def test_it_is_watched_like_any_pattern() -> None:
    q, k, v = tensors(QUERIES, KEYS)
    indices = listed(BATCH, KEY_HEADS, QUERIES, 4)
    for dtype in (torch.float64, torch.float32):  # the second by the CPU kernels
        with fv.watch() as seen:
            fv.attention(*(x.to(dtype) for x in (q, k, v)), fv.selected(indices))
        looked, mask = seen.looked(0, 5), matrix(indices)
        assert torch.equal(looked.watchers, mask.sum(2))
        assert torch.equal(looked.indices.where(looked.weights > 0, -1).sort(3).values[..., -1:], last(mask))
        torch.testing.assert_close(looked.received.double(), fv.weights(q, k, v, mask).sum(2), atol=1e-5, rtol=0)


def last(mask: Tensor) -> Tensor:
    """The last key that each row sees, −1 for none."""
    return torch.where(mask, torch.arange(mask.shape[3]), -1).amax(3, keepdim=True)


def test_a_compiled_graph_takes_new_lists() -> None:
    jaxtyping.config.update("jaxtyping_disable", True)

    def call(q: Tensor, indices: Tensor) -> Tensor:
        return fv.attention(q, q, q, fv.causal & fv.selected(indices, block=2), backend="chunked")

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 14, 21):
        q = torch.randn(1, 2, length, 4)
        indices = torch.randint(-1, length // 2, (1, 1, length, 3))
        torch.testing.assert_close(compiled(q, indices), call(q, indices))
    with pytest.raises(InvalidInput, match="lists 99"):
        compiled(q, torch.full((1, 1, 21, 3), 99))
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


WRONG = {
    "a key past the last": (torch.full((1, 1, QUERIES, 2), KEYS), 1, ["lists 13", "13 keys", "0 to 12", "−1 for none"]),
    "a key below none": (torch.full((1, 1, QUERIES, 2), -2), 1, ["lists -2", "0 to 12"]),
    "a block past the last": (torch.full((1, 1, QUERIES, 2), 3), 5, ["lists 3", "3 blocks of 5 keys", "0 to 2"]),
    "rows of another call": (torch.zeros(1, 1, QUERIES + 1, 2).long(), 1, ["12 rows", "11 queries"]),
    "another batch": (torch.zeros(3, 1, QUERIES, 2).long(), 1, ["3 batch rows", "batch is 2"]),
    "heads that are no groups": (torch.zeros(1, 4, QUERIES, 2).long(), 1, ["4 heads", "6 query heads", "group"]),
    "no heads": (torch.zeros(1, 0, QUERIES, 2).long(), 1, ["0 heads", "6 query heads"]),
    "another device": (torch.zeros(1, 1, QUERIES, 2).long().to("meta"), 1, ["meta", "cpu"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_lists_that_do_not_fit_are_refused_before_anything_is_computed(what: str) -> None:
    indices, block, says = WRONG[what]
    q, k, v = tensors(QUERIES, KEYS)
    for pattern in (fv.selected(indices, block=block), fv.causal & ~fv.selected(indices, block=block)):
        with pytest.raises(InvalidInput) as caught:
            fv.attention(q, k, v, pattern)
        assert all(word in str(caught.value) for word in says), str(caught.value)


def test_what_is_no_list_is_refused() -> None:
    for wrong, says in (
        (torch.zeros(1, 1, 2, 3), "float32 1×1×2×3"),
        (torch.zeros(2, 3).long(), "4 dimension"),
        (torch.zeros(1, 1, 2, 3).byte(), "int8"),
        ([[1]], "4 dimension"),
    ):
        with pytest.raises(InvalidInput, match=says):
            fv.selected(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="block of selected is 0"):
        fv.selected(torch.zeros(1, 1, 2, 3).long(), block=0)


def test_a_bare_mask_mod_of_shared_lists_wants_the_number_of_heads() -> None:
    pattern = fv.selected(listed(1, KEY_HEADS, QUERIES, 2))
    zero = torch.zeros((), dtype=torch.int64)
    with pytest.raises(InvalidInput, match="mask_mod"):
        pattern(zero, zero, zero, zero)


@pytest.mark.parametrize(("block", "tile"), [(12, 4), (9, 6), (5, 8), (1, 3), (13, 2)])
def test_the_last_block_may_reach_over_the_end(block: int, tile: int) -> None:
    indices = torch.full((1, 1, QUERIES, 1), -(-KEYS // block) - 1)
    for pattern in (fv.selected(indices, block=block), fv.selected(indices, block=block) | fv.prefix(0)):
        summary = pattern.summary(QUERIES, KEYS, tile=tile)
        assert summary.visible_pairs() == int(matrix(indices, block)[0, 0].sum())
        assert torch.equal(summary.keys_seen()[0, 0], matrix(indices, block)[0, 0, 0])


@pytest.mark.parametrize(("block", "k"), [(1, 8), (64, 2)])
def test_a_summary_follows_the_lists_and_not_the_pairs(block: int, k: int) -> None:
    """32,768 positions near the diagonal: the boolean matrix would take 1 GiB."""
    n = 32_768
    near_by = (torch.arange(n)[:, None] // block - torch.arange(k)).clamp(min=0).view(1, 1, n, k)
    pattern = fv.causal & fv.selected(near_by, block=block)
    summary = pattern.summary(n, n, tile=64)
    assert summary.nbytes < 16 << 20
    assert summary.visible_pairs() < n * k * block
