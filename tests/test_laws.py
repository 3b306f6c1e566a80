"""One meaning: every implementation × pattern × score × dtype × layout equals the float64 reference, or refuses."""

import pytest
import torch
from budget import assert_within_budget
from torch import Tensor

import foveate as fv
from foveate.dispatch.choose import implementation
from foveate.problem import Problem, Result, problem
from foveate.softmax import chunked, flex, reference, sdpa

BATCH, GROUP, KEY_HEADS, QUERIES, KEYS, DIM = 2, 3, 2, 131, 149, 7
HEADS = GROUP * KEY_HEADS
LENGTHS = torch.tensor([149, 83])


def _ids() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-1, 4, (BATCH, KEYS + 11), generator=generator).sort(1).values


PATTERNS = {
    "everything": None,
    "causal": fv.causal,
    "window": fv.window(17),
    "causal window": fv.causal & fv.window(17),
    "dilated": fv.window(5, step=3),
    "chunks": fv.causal & fv.chunks(37),
    "neighborhood": fv.neighborhood(3, 11, start=2) | fv.global_tokens([0]),
    "prefix": fv.causal | fv.prefix(23),
    "documents": fv.causal & fv.documents(_ids()),
    "packed": fv.documents(cu_seqlens=torch.tensor([0, 41, 97, 131])),
    "padding": fv.padding(LENGTHS),
    "left padding": fv.causal & fv.padding(torch.arange(KEYS) >= torch.tensor([[0], [61]])),
    "longformer": fv.longformer(22, [0, 71]),
    "bigbird": fv.bigbird(13, random=2, seed=5),
    "random blocks": fv.random_blocks(2, 11, seed=1),
    "streaming": fv.streaming(3, 19),
    "mask": fv.from_mask(torch.rand(BATCH, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(5)) > 0.7),
    "selected": fv.selected(
        torch.randint(-1, KEYS, (BATCH, KEY_HEADS, QUERIES, 13), generator=torch.Generator().manual_seed(6))
    ),
    "selected blocks": fv.causal
    & fv.selected(torch.randint(-1, 12, (1, HEADS, QUERIES, 3), generator=torch.Generator().manual_seed(7)), block=13),
    "rule": fv.rule(lambda batch, head, query, key: (query + key * (head + 1)) % 3 == batch % 2),
    "nothing": ~fv.prefix(KEYS),
    "complement": ~fv.window(9),
}


def _scores(score: str) -> fv.Score | None:
    generator = torch.Generator().manual_seed(11)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hiding = random(1, HEADS, QUERIES, KEYS)
    hiding[:, :, :, 31] = -torch.inf
    hiding[:, 1, 5] = -torch.inf
    made = {
        "none": lambda: None,
        "alibi": lambda: fv.alibi(random(HEADS).abs() / 20),
        "alibi by row": lambda: fv.alibi(random(BATCH, HEADS).abs() / 20),
        "distances": lambda: fv.relative_bias(random(41, HEADS)),
        "t5": lambda: fv.relative_bias(random(32, HEADS), 128),
        "t5 decoder": lambda: fv.relative_bias(random(32, HEADS), 128, bidirectional=False),
        "bias": lambda: fv.bias(hiding),
        "bias by key": lambda: fv.bias(random(BATCH, 1, 1, KEYS)),
        "softcap": lambda: fv.softcap(1.3),
        "sinks": lambda: fv.sinks(random(HEADS)),
        "all": lambda: (
            fv.sinks(random(HEADS))
            + fv.bias(hiding)
            + fv.alibi(random(HEADS).abs() / 20)
            + fv.relative_bias(random(32, HEADS), 128)
            + fv.softcap(2.1)
        ),
    }
    return made[score]()


SCORES = (
    "none",
    "alibi",
    "alibi by row",
    "distances",
    "t5",
    "t5 decoder",
    "bias",
    "bias by key",
    "softcap",
    "sinks",
    "all",
)


def make_problem(
    pattern: str, score: str, *, dim: int = DIM, value_dim: int = 5, needs_lse: bool = True, **more: object
) -> Problem:
    generator = torch.Generator().manual_seed(13)
    q, k, v = (
        torch.randn(BATCH, heads, length, dim, generator=generator, dtype=torch.float64)
        for heads, length, dim in ((HEADS, QUERIES, dim), (KEY_HEADS, KEYS, dim), (KEY_HEADS, KEYS, value_dim))
    )
    return problem(q, k, v, PATTERNS[pattern], score=_scores(score), needs_lse=needs_lse, **more)  # type: ignore[arg-type]


def _flex(call: Problem) -> Result:
    return flex.run(call, compiled=False)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pattern", ["everything", "causal", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_chunked_computes_every_score(pattern: str, score: str, dtype: torch.dtype) -> None:
    assert_within_budget(chunked.run, make_problem(pattern, score), dtype)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("start", [None, 0, -40, 200, torch.tensor([5, -20])], ids=str)
def test_chunked_computes_every_pattern_from_every_start(pattern: str, start: int | Tensor | None) -> None:
    if pattern == "documents" and start is not None:
        start = 29 if isinstance(start, int) else torch.tensor([29, 0])  # ids are given for 160 positions
    assert_within_budget(chunked.run, make_problem(pattern, "all", query_start=start), torch.float32)


@pytest.mark.parametrize("pattern", ["everything", "documents", "bigbird", "rule"])
def test_chunked_drops_the_weights_that_the_reference_drops(pattern: str) -> None:
    call = make_problem(pattern, "all", dropout=0.3, seed=2**40 + 7)
    assert_within_budget(chunked.run, call, torch.float32)


def _fused(pattern: str, score: str, value_dim: int = DIM) -> Problem:
    return make_problem(pattern, score, value_dim=value_dim, needs_lse=False, query_start=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("pattern", "score"),
    [("everything", "none"), ("causal", "none"), ("padding", "none"), ("mask", "none"), ("everything", "bias"),
     ("everything", "bias by key")],
)  # fmt: skip
def test_sdpa_equals_the_reference_where_it_does_not_refuse(pattern: str, score: str, dtype: torch.dtype) -> None:
    call = _fused(pattern, score)
    assert sdpa.refuses(call) == []
    # Its gradient of a bias is refused, so gradients are compared where there is no bias.
    assert_within_budget(sdpa.run, call, dtype, gradients=score == "none")


@pytest.mark.parametrize("pattern", sorted(set(PATTERNS) - {"everything", "causal", "padding", "mask"}))
def test_sdpa_refuses_what_would_need_a_matrix(pattern: str) -> None:
    assert any("would need a mask" in reason for reason in sdpa.refuses(_fused(pattern, "none")))


@pytest.mark.parametrize("score", [name for name in SCORES if name not in ("none", "bias", "bias by key")])
def test_sdpa_refuses_the_scores_it_does_not_have(score: str) -> None:
    assert any(reason.startswith("takes no ") for reason in sdpa.refuses(_fused("everything", score)))


@pytest.mark.parametrize("score", ["none", "alibi", "t5", "softcap", "sinks", "all"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_flex_means_the_same(pattern: str, score: str) -> None:
    call = make_problem(pattern, score)
    assert flex.refuses(call, compiled=False) == ["dtype is float64 (takes float32, bfloat16, float16)"]
    assert_within_budget(_flex, call, torch.float32, gradients=False)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["none", "alibi", "t5", "bias", "softcap"])
@pytest.mark.parametrize("pattern", ["everything", "causal", "causal window", "documents", "padding", "bigbird"])
def test_compiled_flex_means_the_same(pattern: str, score: str) -> None:
    call = make_problem(pattern, score, needs_lse=False)
    assert_within_budget(flex.run, call, torch.float32, gradients=False)


@pytest.mark.parametrize("name", ["chunked", "sdpa", "flex"])
@pytest.mark.parametrize("layout", ["heads last", "dim first", "every second", "expanded", "negative storage offset"])
def test_any_strides_mean_the_same(name: str, layout: str) -> None:
    plain = make_problem("everything", "none", value_dim=DIM, needs_lse=False)

    def strided(x: Tensor) -> Tensor:
        match layout:
            case "heads last":
                return x.transpose(1, 2).contiguous().transpose(1, 2)
            case "dim first":
                return x.mT.contiguous().mT
            case "every second":
                return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]
            case "expanded":
                return x[:1].expand_as(x)
            case _:
                return torch.cat([torch.full_like(x, torch.nan), x], 2)[:, :, x.shape[2] :]

    q, k, v = (strided(x.float()) for x in (plain.q, plain.k, plain.v))
    call = problem(q, k, v)
    truth = reference.run(problem(*(x.double().contiguous() for x in (q, k, v)))).out
    if name == "sdpa" and layout in ("dim first", "every second"):
        assert implementation(name).refuses(call) == ["the last stride of q, k or v is not 1"]
        return
    found = _flex(call) if name == "flex" else implementation(name).run(call)
    torch.testing.assert_close(found.out.double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dim", [1, 5, 6, 59, 64, 111])
@pytest.mark.parametrize("name", ["chunked", "sdpa"])
def test_every_head_size(name: str, dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(2, heads, n, dim, generator=generator) for heads, n in ((6, 31), (3, 43), (3, 43)))
    assert_within_budget(implementation(name).run, problem(q, k, v), torch.float32)


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_and_large_scores(scale: float, dtype: torch.dtype) -> None:
    call = make_problem("causal", "none")
    call = problem(call.q * scale, call.k * scale, call.v * scale, fv.causal, needs_lse=True)
    assert_within_budget(chunked.run, call, dtype)
