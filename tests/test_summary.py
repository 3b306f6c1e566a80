"""The summary by tiles says what the dense matrix says, in memory that follows the tiles that are not empty."""

import itertools
import subprocess
import sys

import pytest
import torch
from drawing import LEAVES, Call, calls, leaves, trees
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import foveate as fv
from foveate.pattern.algebra import Tiles
from foveate.pattern.packed_mask import summarise_matrix
from foveate.pattern.quadtree import build

SLOWLY = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "derandomize": True, "database": None}
EMPTY, PARTIAL, FULL = 0, 1, 2
MEBIBYTE = 1 << 20
LONG = 131_072


def painted(summary, batch, heads):
    """The boolean matrix, out of the summary's entries alone."""
    rows, tile = summary.offsets.shape[2] - 1, summary.tile
    columns = -(-summary.keys // tile)
    canvas = torch.zeros(summary.batch, summary.heads, rows, columns, tile, tile, dtype=torch.bool)
    for b, h, row, column, place in zip(*summary.rows(), summary.columns, summary.partial, strict=True):
        assert not canvas[b, h, row, column].any(), "a tile is listed twice"
        canvas[b, h, row, column] = summary.masks(place[None])[0] if place >= 0 else True
    whole = canvas.transpose(3, 4).reshape(summary.batch, summary.heads, rows * tile, columns * tile)
    return whole[:, :, : summary.queries, : summary.keys].expand(batch, heads, -1, -1)


def kinds_of(dense, tile):
    """Which tiles of a dense matrix are empty, partial or full."""
    *_, queries, keys = dense.shape
    room = (0, -keys % tile, 0, -queries % tile)
    some = torch.nn.functional.pad(dense, room).unfold(2, tile, tile).unfold(3, tile, tile).any((-1, -2))
    whole = torch.nn.functional.pad(dense, room, value=True).unfold(2, tile, tile).unfold(3, tile, tile).all((-1, -2))
    return some.byte() * PARTIAL + (some & whole).byte()


def assert_says_what_dense_says(pattern, call, tile):
    dense = pattern.dense(call.queries, call.keys, **call.shape)
    summary = pattern.summary(call.queries, call.keys, tile=tile, **call.shape)
    assert torch.equal(painted(summary, call.batch, call.heads), dense)
    assert torch.equal(summary.kinds().expand(call.batch, call.heads, -1, -1), kinds_of(dense, tile))
    assert torch.equal(summary.keys_seen().expand(call.batch, call.heads, -1), dense.any(2))
    copies = call.batch * call.heads // (summary.batch * summary.heads)
    assert summary.visible_pairs() * copies == int(dense.sum())
    assert summary.density() == pytest.approx(dense.double().mean().item(), abs=1e-15)
    assert pattern.density(call.queries, call.keys, **call.shape) == pytest.approx(summary.density(), abs=1e-15)


@settings(max_examples=120, **SLOWLY)
@given(st.data(), calls(), st.integers(2, 32))
def test_summary_equals_dense_for_any_composition(data, call, tile):
    assert_says_what_dense_says(data.draw(trees(call)), call, tile)


@pytest.mark.parametrize("name", LEAVES)
@settings(max_examples=8, **SLOWLY)
@given(st.data(), calls(67), st.integers(2, 32))
def test_summary_equals_dense_for_every_leaf(name, data, call, tile):
    assert_says_what_dense_says(data.draw(leaves(call, name)), call, tile)


@pytest.mark.parametrize("name", LEAVES)
def test_a_summary_that_drops_every_tile(name):
    """The tiles that are asked about may be none at all."""

    @settings(max_examples=3, **SLOWLY)
    @given(st.data(), calls(9))
    def check(data, call):
        leaf = data.draw(leaves(call, name))
        assert_says_what_dense_says(fv.prefix(0) & leaf, call, 2)
        assert_says_what_dense_says(~(leaf | fv.prefix(99)), call, 2)

    check()


FEW_KEYS = st.just(Call(2, 3, 19, 7, None))  # the first queries stand before the first key


@pytest.mark.parametrize("name", LEAVES)
@settings(max_examples=12, **SLOWLY)
@given(st.data(), calls() | FEW_KEYS, st.integers(0, 999))
def test_bounds_are_never_wrong(name, data, call, seed):
    """A tile without `may` has no visible pair, a tile with `must` no hidden one: for any rectangle at all."""
    assert_bounds_are_right(data.draw(leaves(call, name)), call, seed)


@pytest.mark.parametrize("name", LEAVES)
@settings(max_examples=3, **SLOWLY)
@given(st.data(), FEW_KEYS)
def test_queries_before_the_first_key(name, data, call):
    pattern = data.draw(leaves(call, name))
    assert_bounds_are_right(pattern, call, 0)
    assert_says_what_dense_says(pattern, call, 2)


def assert_bounds_are_right(pattern, call, seed):
    dense = pattern.dense(call.queries, call.keys, **call.shape)
    generator = torch.Generator().manual_seed(seed)

    def below(end, count=200):
        return torch.randint(0, end, (count,), generator=generator)

    b, h = below(call.batch), below(call.heads)
    row, row_end = torch.stack([below(call.queries), below(call.queries)]).sort(0).values
    key, key_end = torch.stack([below(call.keys), below(call.keys)]).sort(0).values
    row_end, key_end = row_end + 1, key_end + 1
    start = call.keys - call.queries if call.start is None else call.start
    shift = torch.as_tensor(start).expand(call.batch)[b]
    may, must = pattern.bounds(Tiles(b, h, row, row_end, row + shift, row_end + shift, key, key_end, call.keys))
    corner = torch.nn.functional.pad(dense.long().cumsum(2).cumsum(3), (1, 0, 1, 0))
    count = (
        corner[b, h, row_end, key_end] - corner[b, h, row, key_end]
        - corner[b, h, row_end, key] + corner[b, h, row, key]
    )  # fmt: skip
    assert (count[~may] == 0).all()
    assert (count[must] == ((row_end - row) * (key_end - key))[must]).all()
    assert (may | ~must).all()


@pytest.mark.parametrize("queries", [1, 127, 128, 129, 257])
@pytest.mark.parametrize("name", ["causal", "documents", "global_tokens boolean", "random_blocks", "padding keep"])
@settings(max_examples=1, **SLOWLY)
@given(st.data())
def test_tiles_of_128_at_their_edges(queries, name, data):
    call = data.draw(calls()).__class__(2, 3, queries, 256, None)
    assert_says_what_dense_says(data.draw(leaves(call, name)), call, 128)


def test_a_summary_of_nothing():
    for sizes in ((0, 5), (5, 0), (0, 0)):
        summary = fv.causal.summary(*sizes, tile=4)
        assert summary.columns.numel() == 0
        assert summary.density() == 0.0
        assert summary.visible_pairs() == 0


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        (fv.causal & fv.window(256), 8),
        (fv.streaming(4, 1024), 12),
        (fv.causal & fv.chunks(512), 4),
        (fv.window(128, step=2), 16),
        (fv.causal & fv.documents(cu_seqlens=torch.arange(0, LONG + 1, 1024)), 8),
        (fv.longformer(256, (0,)), 24),
    ],
    ids=repr,
)
def test_memory_follows_what_is_not_empty(pattern, most):
    summary = pattern.summary(LONG, LONG)
    parts = (summary.offsets, summary.columns, summary.partial, summary.bits)
    assert sum(part.nbytes for part in parts) < most * MEBIBYTE


def test_density_of_a_long_window_is_exact():
    pairs = sum(range(1, 257)) + 256 * (LONG - 256)
    assert (fv.causal & fv.window(256)).density(LONG, LONG) == pairs / LONG**2


def test_peak_memory_of_a_long_summary():
    program = """if True:
        import resource, foveate as fv
        pattern = fv.causal & fv.window(256)
        pattern.summary(300, 300).visible_pairs()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pattern.summary(131_072, 131_072).visible_pairs()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(run.stdout) * unit < 64 * MEBIBYTE


def test_a_repeated_summary_is_remembered_and_a_changed_tensor_is_not():
    ids = torch.zeros(1, 64, dtype=torch.long)
    first = fv.documents(ids).summary(64, 64, tile=8)
    assert fv.documents(ids).summary(64, 64, tile=8) is first
    ids[:, 32:] = 1
    second = fv.documents(ids).summary(64, 64, tile=8)
    assert (first.density(), second.density()) == (1.0, 0.5)


def test_a_start_changed_in_place_is_seen():
    start = torch.tensor([0, 3])
    before = fv.causal.density(5, 7, batch=2, query_start=start)
    start += 1
    assert fv.causal.density(5, 7, batch=2, query_start=start) == pytest.approx(before + 8 / 70, abs=1e-15)


def test_memory_of_dead_functions_is_not_served():
    """Two rules may get the same address one after the other."""
    for size in range(1, 40):
        assert fv.rule(lambda b, h, q, k, size=size: k + 0 * q < size).density(3, 40) == size / 40


def test_what_does_not_differ_is_summarised_once() -> None:
    matrix = torch.rand(8, 8) > 0.5
    for pattern in (
        fv.from_mask(torch.ones(64, 64).tril().bool()),
        fv.blocks(matrix, 8),
        fv.documents(torch.arange(64) // 9),
        fv.global_tokens(torch.rand(1, 64) > 0.9),
    ):
        summary = pattern.summary(64, 64, batch=5, heads=3, tile=16)
        assert (summary.batch, summary.heads) == (1, 1), pattern


def test_many_blocks_and_many_global_tokens_cost_what_is_visible() -> None:
    """131,072 positions: a block-diagonal matrix, and 300 global tokens, in seconds and not in n² steps."""
    n = 131_072
    assert fv.blocks(torch.eye(n // 64, dtype=torch.bool), 64).density(n, n) == 64 / n
    few, many = list(range(0, 2100, 7)), 300
    seen = fv.global_tokens(few).summary(4096, 4096)
    assert len(few) == many
    assert seen.density() == pytest.approx(1 - (1 - many / 4096) ** 2)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0, "triangle"], ids=str)
def test_a_matrix_is_packed_into_the_summary_that_is_built_pair_by_pair(share: float | str) -> None:
    """To the bit: empty, full and partial tiles, the edges of the call, and dimensions of one entry."""
    draw = torch.Generator().manual_seed(13)
    for sizes in ((1, 1, 64, 64), (2, 3, 131, 197), (1, 2, 1, 128), (2, 1, 192, 7), (3, 1, 65, 63)):
        for broadcast in itertools.product((False, True), repeat=4):
            shape = [1 if one else size for one, size in zip(broadcast, sizes, strict=True)]
            mask = torch.rand(shape, generator=draw) < (0.9 if isinstance(share, str) else share)
            if isinstance(share, str):
                mask = mask | torch.ones(shape[2:], dtype=torch.bool).tril(-70)
            _, _, queries, keys = sizes
            packed = summarise_matrix(mask, queries, keys)
            built = build(fv.from_mask(mask), *sizes, torch.zeros(1, dtype=torch.int64), 64)
            for name in ("queries", "keys", "tile"):
                assert getattr(packed, name) == getattr(built, name)
            for name in ("offsets", "columns", "partial", "bits"):
                assert torch.equal(getattr(packed, name), getattr(built, name)), name


def test_a_matrix_may_begin_at_any_byte() -> None:
    flags = torch.rand(3 + 64 * 64, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = flags[3:].view(1, 1, 64, 64)
    assert torch.equal(summarise_matrix(mask, 64, 64).bits, summarise_matrix(mask.clone(), 64, 64).bits)
