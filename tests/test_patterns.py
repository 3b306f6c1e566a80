"""Every pattern shows exactly the pairs that its sentence in `oracle.py` names, and is a value."""

import copy
import subprocess
import sys

import pytest
import torch
from oracle import (
    BATCH,
    CASES,
    CHOSEN,
    GLOBAL,
    HEADS,
    IDS,
    KEEP,
    MASK,
    OFFSETS,
    Case,
    attended,
    expected,
    odd_rule,
    pairs,
)
from torch.nn.attention.flex_attention import create_block_mask, create_mask

import foveate as fv
from foveate import InvalidInput
from foveate.pattern.catalogue import parse
from foveate.problem import problem

BACKENDS = ("reference", "chunked")
WITHOUT_TENSORS = [
    fv.causal, fv.window(1), fv.window(5), fv.window(3, step=2), fv.window(left=4, right=None), fv.window(right=2),
    fv.window(left=6, right=6, step=4), fv.chunks(7), fv.prefix(3), fv.pooled(5), fv.pooled(6, 2),
    fv.global_tokens([0, -1]), fv.random_blocks(2, 5, 3), fv.blockwise(fv.causal & ~fv.window(2), 4),
    fv.streaming(2, 5), fv.longformer(8),
    fv.bigbird(4), ~(fv.causal | fv.prefix(2)), ~fv.causal & (fv.window(3) | fv.prefix(1)),
    fv.causal & fv.window(2) | ~fv.chunks(3), (fv.causal | fv.chunks(2)) & (fv.window(3) | fv.prefix(1)),
]  # fmt: skip
WITH_TENSORS = {
    "documents(<int64 2×17>)": fv.documents(torch.tensor(IDS)),
    "documents(<int64 2×17>, <int64 1×17>)": fv.documents(torch.tensor(IDS), torch.tensor(IDS[:1])),
    "documents(cu_seqlens=<int64 5>)": fv.documents(cu_seqlens=torch.tensor(OFFSETS)),
    "padding(<int32 2>)": fv.padding(torch.tensor([3, 4], dtype=torch.int32)),
    "padding(<bool 2×9>)": fv.padding(torch.tensor(KEEP)),
    "prefix(<int64 2>)": fv.prefix(torch.tensor([3, 4])),
    "global_tokens(<bool 2×17>)": fv.global_tokens(torch.tensor(GLOBAL)),
    "blocks(<bool 9×9>, 4)": fv.blocks(MASK[0, 0], 4),
    "from_mask(<bool 2×3×9×9>)": fv.from_mask(MASK),
    "rule(odd_rule)": fv.rule(odd_rule),
    "selected(<int64 2×3×9×4>)": fv.selected(CHOSEN),
    "causal & ~selected(<int64 2×3×9×4>, block=5)": fv.causal & ~fv.selected(CHOSEN, block=5),
    "causal & (from_mask(<bool 9×9>) | ~rule(odd_rule))": fv.causal & (fv.from_mask(MASK[0, 0]) | ~fv.rule(odd_rule)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_visible_set(name, backend):
    for queries in range(1, 10):
        for keys in range(1, 10):
            found = attended(CASES[name].make(queries, keys), queries, keys, backend)
            assert found == expected(CASES[name], queries, keys), (queries, keys)


@pytest.mark.parametrize("start", [0, 1, 4, -2, [0, 3]], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_query_start_moves_the_queries(name, start):
    given = torch.tensor(start) if isinstance(start, list) else start
    for queries, keys in ((1, 7), (3, 5), (5, 3)):
        pattern = CASES[name].make(queries, keys)
        want = expected(CASES[name], queries, keys, start)
        for backend in BACKENDS:
            assert attended(pattern, queries, keys, backend, given) == want, (queries, keys, backend)
        dense = pattern.dense(queries, keys, query_start=given, batch=BATCH, heads=HEADS)
        assert pairs(dense) == want, (queries, keys, "dense")


@pytest.mark.parametrize("right", CASES)
@pytest.mark.parametrize("left", ["causal", "window(3)", "documents(ids)", "from_mask 4-D", "rule"])
def test_operators_are_those_of_sets(left, right):
    queries, keys = 5, 7
    one, other = CASES[left].make(queries, keys), CASES[right].make(queries, keys)
    a, b = expected(CASES[left], queries, keys), expected(CASES[right], queries, keys)
    everything = expected(Case(CASES["causal"].make, lambda *_: True), queries, keys)

    def shown(pattern):
        return pairs(pattern.dense(queries, keys, batch=BATCH, heads=HEADS))

    assert shown(one & other) == a & b
    assert shown(one | other) == a | b
    assert shown(~other) == everything - b
    assert shown(~(one & other)) == everything - (a & b)


def test_a_boolean_tensor_is_a_mask():
    for backend in BACKENDS:
        assert attended(MASK[:, :, :5, :7], 5, 7, backend) == pairs(MASK[:, :, :5, :7])


class TestRandomBlocks:
    def drawn(self, count, block, keys, seed=0, heads=HEADS, queries=None):
        """The set of key blocks of every (head, query block), after a check that blocks are whole."""
        queries = queries or keys
        dense = fv.random_blocks(count, block, seed).dense(queries, keys, query_start=0, heads=heads)[0]
        found = {}
        for h in range(heads):
            for top in range(0, queries, block):
                rows = dense[h, top : top + block]
                assert (rows == rows[:1]).all()
                blocks = rows[0].split(block)
                assert all(bool(part.all()) == bool(part.any()) for part in blocks)
                found[h, top // block] = frozenset(n for n, part in enumerate(blocks) if part.any())
        return found

    @pytest.mark.parametrize(("count", "block", "keys"), [(0, 3, 11), (1, 3, 11), (2, 5, 31), (3, 4, 16), (5, 2, 23)])
    def test_exactly_count_without_repeats(self, count, block, keys):
        assert {len(blocks) for blocks in self.drawn(count, block, keys).values()} == {count}

    def test_dense_when_count_covers_all(self):
        for count, block, keys in ((4, 3, 11), (9, 3, 11), (1, 11, 11), (1, 64, 11)):
            assert fv.random_blocks(count, block).dense(7, keys).all()

    def test_a_function_of_seed_head_and_block_alone(self):
        many = self.drawn(2, 3, 41)
        assert many == self.drawn(2, 3, 41)
        assert many != self.drawn(2, 3, 41, seed=1)
        assert self.drawn(2, 3, 41, queries=7).items() <= many.items()
        assert self.drawn(2, 3, 41, heads=HEADS + 2).items() >= many.items()
        by_head = [tuple(blocks for (h, _), blocks in many.items() if h == head) for head in range(HEADS)]
        assert len(set(by_head)) == HEADS

    def test_uniform(self):
        blocks, count, heads = 13, 3, 29
        drawn = self.drawn(count, 2, 2 * blocks, heads=heads)
        hits = torch.zeros(blocks)
        for chosen in drawn.values():
            hits[list(chosen)] += 1
        mean = len(drawn) * count / blocks
        chi_squared = ((hits - mean) ** 2 / (mean * (1 - count / blocks))).sum() * (blocks - 1) / blocks
        assert chi_squared < 33  # 12 degrees of freedom: exceeded once in a thousand; the draw is fixed

    def test_attention_shows_it(self):
        pattern = fv.random_blocks(2, 2, 5)
        for backend in BACKENDS:
            assert attended(pattern, 7, 9, backend) == pairs(pattern.dense(7, 9, batch=BATCH, heads=HEADS))


@pytest.mark.parametrize("pattern", WITHOUT_TENSORS, ids=repr)
def test_repr_can_be_pasted_back(pattern):
    pasted = eval(repr(pattern), vars(fv) | {name: getattr(fv, name) for name in fv.__all__})
    assert pasted == pattern
    assert hash(pasted) == hash(pattern)
    assert (pasted.dense(11, 13, heads=2) == pattern.dense(11, 13, heads=2)).all()


@pytest.mark.parametrize("written", WITH_TENSORS)
def test_repr_shows_tensors_by_dtype_and_shape(written):
    assert repr(WITH_TENSORS[written]) == written


@pytest.mark.parametrize("pattern", [*WITHOUT_TENSORS, *WITH_TENSORS.values()], ids=repr)
def test_spec_and_parse_are_inverse(pattern):
    words, held = pattern.spec()
    assert parse(words, held) == pattern
    assert "<" not in words


def test_equality_is_by_value_and_tensors_by_identity():
    ids = torch.tensor(IDS)
    assert fv.documents(ids) == fv.documents(ids)
    assert hash(fv.documents(ids)) == hash(fv.documents(ids))
    assert fv.documents(ids) != fv.documents(ids.clone())
    assert fv.window(2) != fv.window(3)
    assert fv.causal & fv.window(2) != fv.causal | fv.window(2)
    assert (fv.causal & fv.window(2)) & fv.prefix(3) == fv.causal & (fv.window(2) & fv.prefix(3))
    assert ~~fv.causal == fv.causal
    assert len({fv.window(2), fv.window(2), fv.window(3), fv.causal}) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_in_place_change_is_seen(backend):
    ids = torch.tensor(IDS)[:, :9].contiguous()
    pattern = fv.documents(ids)
    before, hashed, twin = attended(pattern, 9, 9, backend), hash(pattern), fv.documents(ids.clone())
    ids[:, 3:] = 0
    assert hash(pattern) != hashed
    assert attended(pattern, 9, 9, backend) != before
    assert attended(pattern, 9, 9, backend) == pairs(pattern.dense(9, 9, batch=BATCH, heads=HEADS))
    assert attended(twin, 9, 9, backend) == before


def test_a_copy_is_the_same_value():
    """What a deep copy, a pickle or another process makes of a pattern counts as that pattern."""
    for pattern in (fv.causal, fv.window(3), fv.global_tokens((0, -1)), fv.causal & fv.window(3)):
        twin = copy.deepcopy(pattern)
        assert twin is not pattern
        assert twin == pattern
        assert twin & pattern == pattern
        assert pattern | twin == pattern
    copied = copy.deepcopy(fv.causal)
    assert (copied & fv.window(3)).without(fv.causal) == fv.window(3)
    q = torch.randn(1, 2, 1, 8)
    k = torch.randn(1, 2, 70, 8)
    patterns = [causal & fv.window(3) for causal in (fv.causal, copied)]
    assert len({problem(q, k, k, pattern).pattern for pattern in patterns}) == 1  # at the last key it hides nothing


def test_patterns_are_immutable():
    for pattern, field in ((fv.window(2), "left"), (fv.causal & fv.prefix(1), "parts"), (fv.chunks(2), "size")):
        with pytest.raises(AttributeError):
            setattr(pattern, field, 1)


@pytest.mark.parametrize("name", CASES)
def test_picture_and_density(name):
    queries, keys = 5, 7
    pattern, want = CASES[name].make(queries, keys), expected(CASES[name], queries, keys)
    for b in range(BATCH):
        lines = [[(b, HEADS - 1, i, k) in want for k in range(keys)] for i in range(queries)]
        text = "\n".join(" ".join("1" if one else "." for one in line) for line in lines)
        assert pattern.picture(queries, keys, batch=b, head=HEADS - 1) == text if b == BATCH - 1 else True
    density = pattern.density(queries, keys, batch=BATCH, heads=HEADS)
    assert density == pytest.approx(len(want) / (BATCH * HEADS * queries * keys), abs=1e-15)


def test_plot_loads_matplotlib_only_when_it_draws():
    program = """if True:
        import sys, foveate as fv
        pattern = fv.causal & fv.window(3)
        pattern.picture(5, 5), pattern.density(5, 5)
        assert "matplotlib" not in sys.modules
        import matplotlib
        matplotlib.use("agg")
        axes = pattern.plot(5, 7)
        assert axes.get_title() == "causal & window(3)", axes.get_title()
        assert axes.get_images()[0].get_array().shape == (5, 7)
        assert pattern.plot(5, 7, ax=axes) is axes
    """
    subprocess.run([sys.executable, "-c", program], check=True)


def bare_function(mask_mod):
    """Four named arguments, which FlexAttention counts, also where the type checker of the tests wraps mask_mod."""
    return lambda batch, head, query, key: mask_mod(batch, head, query, key)


@pytest.mark.parametrize("name", CASES)
def test_a_pattern_is_a_mask_mod_of_flex_attention(name):
    queries, keys = 9, 9
    pattern = CASES[name].make(queries, keys)
    want = pattern.dense(queries, keys, query_start=0, batch=BATCH, heads=HEADS)
    needs_keys = "last" in name or ("global" in name and "blockwise" in name) or name == "bigbird"
    needs_keys = needs_keys or "by heads" in name
    bare = bare_function(pattern.mask_mod(0, keys, HEADS)) if needs_keys else pattern
    assert (create_mask(bare, BATCH, HEADS, queries, keys, device="cpu") == want).all()
    tiles = create_block_mask(bare, BATCH, HEADS, queries, keys, device="cpu", BLOCK_SIZE=2)
    some = torch.nn.functional.pad(want, (0, 1, 0, 1)).unfold(2, 2, 2).unfold(3, 2, 2).any((-1, -2))
    assert (tiles.to_dense().bool() == some).all()
    if needs_keys:
        with pytest.raises(InvalidInput, match="mask_mod"):
            create_mask(pattern, BATCH, HEADS, queries, keys, device="cpu")


@pytest.mark.parametrize("start", [0, 3, [1, 4]], ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if "from_mask" not in name])
def test_mask_mod_shifts_the_queries(name, start):
    queries, keys = 5, 7
    given = torch.tensor(start) if isinstance(start, list) else start
    pattern = CASES[name].make(queries, keys)
    made = create_mask(bare_function(pattern.mask_mod(given, keys, HEADS)), BATCH, HEADS, queries, keys, device="cpu")
    assert pairs(made) == expected(CASES[name], queries, keys, start)
