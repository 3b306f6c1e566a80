"""One rule for what may be given: NumPy's numbers are numbers, and where integers or booleans belong, lists will do."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

import foveate as fv
from foveate import inspection
from foveate.problem import problem

B, H, NQ, NK, D = 2, 3, 5, 7, 11


@pytest.fixture(autouse=True)
def _as_a_user_calls_it():
    """Without the type checker of the tests, which would be first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def inputs() -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(B, H, n, D, generator=draw, dtype=torch.float64) for n in (NQ, NK, NK)]


NUMBERS: dict[str, tuple[Callable[[object], object], int | float]] = {
    "window": (fv.window, 3), "left": (lambda n: fv.window(left=n), 2), "right": (lambda n: fv.window(right=n), 2),
    "step": (lambda n: fv.window(3, step=n), 2), "chunks": (fv.chunks, 3), "prefix": (fv.prefix, 3),
    "every": (fv.every, 3), "every's last": (lambda n: fv.every(3, n), 2), "pooled": (fv.pooled, 3),
    "neighborhood": (lambda n: fv.neighborhood(2, n), 3), "start": (lambda n: fv.neighborhood(2, 3, start=n), 1),
    "random_blocks": (lambda n: fv.random_blocks(n, n, n), 2), "blockwise": (lambda n: fv.blockwise(fv.causal, n), 2),
    "streaming": (lambda n: fv.streaming(n, n), 2), "longformer": (fv.longformer, 4), "bigbird": (fv.bigbird, 2),
    "strided": (fv.strided, 3), "fixed": (fv.fixed, 3), "global_tokens": (lambda n: fv.global_tokens([n]), 2),
    "alibi_slopes": (lambda n: fv.alibi_slopes(n).tolist(), 6),
    "max_distance": (lambda n: fv.relative_bias(TABLE, n), 9),
    "softcap": (fv.softcap, 2.5), "entmax": (fv.entmax, 1.25),
    "scale": (lambda n: fv.attention(*inputs(), scale=n).tolist(), 0.25),
    "dropout": (lambda n: fv.attention(*inputs(), dropout=n, seed=3, backend="reference").tolist(), 0.25),
    "seed": (lambda n: fv.attention(*inputs(), dropout=0.5, seed=n, backend="reference").tolist(), -3),
    "query_start": (lambda n: fv.attention(*inputs(), fv.causal, query_start=n).tolist(), 1),
    "temperature": (lambda n: fv.straight_through(*inputs(), temperature=n).out.tolist(), 0.5),
    "soft_share": (lambda n: fv.sampled_attention(*inputs(), soft_share=n).out.shape, 0.5),
    "local width": (lambda n: fv.local_attention(*inputs(), torch.ones(B, H, NQ), width=n).tolist(), 2),
    "sigma": (lambda n: fv.local_attention(*inputs(), torch.ones(B, H, NQ), width=2, sigma=n).tolist(), 0.5),
    "landmarks": (lambda n: fv.nystrom_attention(*inputs(), landmarks=n).tolist(), 3),
    "linear scale": (lambda n: fv.linear_attention(*square(), scale=n)[0].tolist(), 0.5),
    "base": (lambda n: fv.rope(inputs()[0][..., :10], torch.arange(NQ), base=n).tolist(), 100.0),
    "turned": (lambda n: fv.rope(inputs()[0], torch.arange(NQ), dim=n).tolist(), 4),
    "YaRN": (lambda n: fv.rotary.YaRN(n, 64), 2.0),
    "k": (lambda n: inspection.looked(watched(), n).indices.tolist(), 2),
    "heads": (lambda n: sizes(fv.nn.MultiHeadAttention(12, n)), 3),
    "dim": (lambda n: sizes(fv.nn.SelfAttention(n, 3)), 12),
    "drop": (lambda n: fv.nn.SelfAttention(12, 3, dropout=n).dropout, 0.25),
}  # fmt: skip
TABLE = torch.zeros(8, H)


def square() -> list[Tensor]:
    return inputs()[1:] + inputs()[2:]


def watched() -> object:
    with fv.watch() as seen:
        fv.attention(*inputs())
    return seen.calls[0]


def sizes(layer: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in layer.named_parameters()}


@pytest.mark.parametrize("what", NUMBERS)
def test_a_number_of_numpy_is_that_number(what: str) -> None:
    """The value itself and what it prints: a repr is what an operator is told, and np.int64(3) is no literal."""
    make, value = NUMBERS[what]
    kinds = (np.int64, np.int32, np.int16) if isinstance(value, int) else (np.float32, np.float64, np.float16)
    torch.manual_seed(0)
    true = make(value)
    for kind in kinds:
        torch.manual_seed(0)
        found = make(kind(value))
        assert found == true
        assert repr(found) == repr(true)


@pytest.mark.parametrize("what", NUMBERS)
def test_a_bool_a_word_and_a_tensor_are_no_numbers(what: str) -> None:
    """A tensor scalar least of all, query_start aside: looking at it waits for a GPU and breaks a graph."""
    make, value = NUMBERS[what]
    for wrong in (True, np.True_, "3", None if what not in MAY_BE_NONE else "None", torch.tensor(value)):
        if isinstance(wrong, Tensor) and what == "query_start":
            assert make(wrong) == make(value)
            continue
        with pytest.raises(fv.InvalidInput) as caught:
            make(wrong)
        if isinstance(wrong, Tensor) and what not in ("scale", "linear scale", "global_tokens"):
            assert ".item()" in str(caught.value)


MAY_BE_NONE = {"window", "left", "right", "max_distance", "scale", "seed", "query_start", "sigma", "linear scale",
               "turned"}  # fmt: skip


def attend(pattern: object = None, **options: object) -> Tensor:
    return fv.attention(*inputs(), pattern, **options)


IDS, STARTS, OFFSETS = [0, 0, 1, 1, -1, 2, 2], [1, 2], [0, 3, 3, 7]
KEEP = [[True] * 4 + [False] * 3, [False] * 2 + [True] * 5]
PLACES = [[0, 2, 4, -1, 6]] * B
LISTED: dict[str, tuple[Callable[[object], object], list[object]]] = {
    "ids": (lambda x: attend(fv.documents(x)), IDS),
    "ids by batch": (lambda x: attend(fv.documents(x)), [IDS, IDS[::-1]]),
    "ids of both": (lambda x: attend(fv.documents(x, IDS)), IDS[:NQ]),
    "key ids": (lambda x: attend(fv.documents(IDS[:NQ], x)), IDS),
    "offsets": (lambda x: attend(fv.documents(cu_seqlens=x)), OFFSETS),
    "lengths": (lambda x: attend(fv.padding(x)), [7, 3]),
    "keep": (lambda x: attend(fv.padding(x)), KEEP),
    "keep as numbers": (lambda x: attend(fv.padding(x)), [[int(one) for one in row] for row in KEEP]),
    "prefix": (lambda x: attend(fv.causal | fv.prefix(x)), [3, 1]),
    "global tokens": (lambda x: attend(fv.global_tokens(x)), [0, 4]),
    "global tokens by batch": (lambda x: attend(fv.global_tokens(x)), KEEP),
    "selected": (lambda x: attend(fv.selected(x)), [[[[0, 3]] * NQ]]),
    "blocks": (lambda x: attend(fv.blocks(x, 4)), [[True, False], [True, True]]),
    "mask": (lambda x: attend(fv.from_mask(x)), [[True] * 5 + [False] * 2] * NQ),
    "mask as it is": (attend, [[True] * 5 + [False] * 2] * NQ),
    "query_start": (lambda x: attend(fv.causal, query_start=x), STARTS),
    "rows": (lambda x: fv.weights(*inputs(), rows=x), [4, 0]),
    "columns": (lambda x: fv.weights(*inputs(), columns=x), [6, 0]),
    "choices": (lambda x: fv.sampled_attention(*inputs(), choices=x).out, [PLACES[:1] * H] * B),
    "merged rows": (lambda x: fv.merge_by_rows(inputs()[1], inputs()[0], x), PLACES),
    "positions": (lambda x: fv.rope(inputs()[0], x, dim=4), [3, 1, 4, 1, 5]),
    "documents": (lambda x: fv.linear_attention(*square(), documents=x)[0], IDS),
    "table": (lambda x: fv.paged_attention(inputs()[0].float(), PAGES, PAGES, x, [7, 5]), [[2, 0], [1, 3]]),
    "page lengths": (lambda x: fv.paged_attention(inputs()[0].float(), PAGES, PAGES, [[2, 0], [1, 3]], x), [7, 5]),
    "nn positions": (lambda x: fv.nn.Sinusoidal(4)(torch.zeros(1, 5, 4), x), [3, 1, 4, 1, 5]),
    "axes": (lambda x: fv.nn.AxialRotary(8)(torch.ones(1, H, 3, 8), x), [[0, 1, 2], [2, 0, 1]]),
    "memory": (lambda x: LUONG(torch.ones(B, 2, 4), torch.ones(B, NK, 4), x), [7, 3]),
}  # fmt: skip
PAGES = torch.randn(4, H, 4, D, generator=torch.Generator().manual_seed(4))
LUONG = fv.nn.LuongAttention(4, 4, score="dot")


@pytest.mark.parametrize("what", LISTED)
def test_a_list_or_an_array_of_integers_or_booleans_is_a_tensor_of_them(what: str) -> None:
    make, value = LISTED[what]
    true = make(torch.tensor(value))
    array = np.array(value)
    for given in (value, tuple(value), array, *([array.astype(np.int32)] if array.dtype.kind == "i" else [])):
        assert torch.equal(make(given), true)


@pytest.mark.parametrize("what", LISTED)
def test_floats_and_tensors_in_a_list_are_refused_where_integers_or_booleans_belong(what: str) -> None:
    make, value = LISTED[what]
    for wrong in (np.array(value, dtype=np.float32), "abc", {"a": 1}):
        with pytest.raises(fv.InvalidInput):
            make(wrong)


def test_an_array_is_copied_so_that_a_pattern_never_changes_unseen() -> None:
    lengths = np.array([7, 3])
    pattern = fv.padding(lengths)
    before = attend(pattern)
    lengths[:] = 1
    assert torch.equal(attend(pattern), before)


@pytest.mark.parametrize("make", [fv.alibi, fv.bias, fv.sinks, fv.relative_bias, fv.nn.AdditiveAttention(4, 4, 4).keys])
def test_what_is_computed_with_is_a_tensor(make: Callable[[object], object]) -> None:
    """Floats have a dtype and a gradient of their own, which a list says nothing about."""
    for wrong in ([0.5, 0.25], np.array([0.5, 0.25])):
        with pytest.raises(fv.InvalidInput, match="wanted"):
            make(wrong)


def test_offsets_that_end_before_the_text_leave_its_tail_to_nobody() -> None:
    out = attend(fv.documents(cu_seqlens=[0, 3, 5]), query_start=2)
    assert torch.equal(out[:, :, 3:], torch.zeros_like(out[:, :, 3:]))
    assert out[:, :, :3].abs().min() > 0


@pytest.mark.parametrize(
    ("make", "wrong", "right"),
    [
        (fv.padding, [9, 3], [7, 3]),
        (fv.padding, [7, -2], [7, 0]),
        (lambda x: fv.documents(cu_seqlens=x), [0, 4, 9], [0, 4, 7]),
    ],
    ids=["past", "below", "offsets"],
)
def test_numbers_that_nobody_may_look_at_mean_what_they_say(
    make: Callable[[Tensor], fv.Pattern], wrong: list[int], right: list[int]
) -> None:
    """A graph, a trace, a transform and a tensor without data are not looked into: nothing breaks, nothing waits."""
    q, k, v = inputs()

    def call(q: Tensor, numbers: Tensor) -> Tensor:
        return fv.attention(q, k, v, make(numbers))

    true = call(q, torch.tensor(right))
    given = torch.tensor(wrong)
    with pytest.raises(fv.InvalidInput):
        call(q, given)
    near = {"rtol": 0, "atol": 1e-12}
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, given), true, **near)

    def grown(numbers: Tensor) -> Tensor:
        return make(numbers).tensors()[0] + 1

    assert torch.func.vmap(grown)(given[None]).equal(given[None] + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of shapes, which a trace keeps
        assert torch.jit.trace(grown, given, check_trace=False)(given + 1).equal(given + 2)
    on_meta = [x.to("meta") for x in (q, k, v, given)]
    assert fv.attention(*on_meta[:3], make(on_meta[3])).shape == true.shape
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (q, k, v, given)]
        assert problem(*fake[:3], make(fake[3])).pattern is not None


def test_explain_notes_more_heads_than_tokens() -> None:
    turned = torch.zeros(B, 13, H, D)
    assert "if it is [batch, length, heads, dim]" in str(fv.explain(turned, turned, turned))
    right = turned.transpose(1, 2)
    assert "heads" not in str(fv.explain(right, right, right))
    assert "heads" not in str(fv.explain(turned[:, :, :1], turned, turned))  # a step of many heads
