"""What records a call, or runs it without data, decides nothing by the data that it happened to see."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from families import FAMILIES, build, left_padded, right_padded
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import foveate as fv
from foveate.models import gpt2, llama


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)  # the tracers cannot follow the run-time checks of shapes
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Logits(nn.Module):
    """A model of transformers, called with tensors alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, kept: Tensor) -> Tensor:
        more = {"decoder_input_ids": ids} if self.network.config.is_encoder_decoder else {}
        return self.network(input_ids=ids, attention_mask=kept, use_cache=False, **more).logits  # type: ignore[no-any-return]


class Own(nn.Module):
    """A model of our own, called with tensors alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, kept: Tensor) -> Tensor:
        return self.model(ids, fv.padding(kept.bool()))  # type: ignore[no-any-return]


SIZES = {"dim": 48, "layers": 2, "heads": 6, "hidden": 59}
OWN: dict[str, Callable[[], nn.Module]] = {
    "our gpt2": lambda: gpt2.LanguageModel(gpt2.Config(97, 64, **SIZES)),
    "our llama": lambda: llama.LanguageModel(llama.Config(97, **SIZES, key_heads=2, window=5)),
}
HF = ["bert", "gpt2", "llama", "mistral", "gemma2", "gpt_oss", "llama4", "t5"]


def model(name: str) -> nn.Module:
    if name in OWN:
        torch.manual_seed(3)
        return Own(OWN[name]()).eval()
    network = build(name)
    fv.patch(network)
    return Logits(network).eval()


def texts(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, and two masks: of ones, and with padding."""
    given = right_padded() if name == "bert" else left_padded()
    return given["input_ids"], torch.ones_like(given["attention_mask"]), given["attention_mask"]


def longer(ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([ids.flip(0)[:, :6], ids], 1), torch.cat([kept[:, :1].expand(-1, 6), kept], 1)


def same_text(found: Tensor, truth: Tensor, kept: Tensor) -> bool:
    real = kept.bool()
    return bool((found - truth)[real].abs().max() <= 1e-5 * truth[real].abs().max())


def traced(network: nn.Module, *given: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit says that it is old, and of every size that it keeps as a number
        return torch.jit.trace(network, given, check_trace=False)


@pytest.mark.parametrize("name", [*HF, *OWN])
def test_a_trace_of_a_mask_of_ones_holds_for_padding_and_for_longer_texts(name: str) -> None:
    network, (ids, ones, padded) = model(name), texts(name)
    with torch.no_grad():
        graph = traced(network, ids, ones)
        for given in ((ids, padded), longer(ids, padded)):
            assert same_text(graph(*given), network(*given), given[1])


@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "our llama"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_graph_of_operators_of_a_mask_of_ones_holds_for_padding(name: str, pre_dispatch: bool) -> None:
    network, (ids, ones, padded) = model(name), texts(name)
    with torch.no_grad():
        graph = make_fx(network, pre_dispatch=pre_dispatch)(ids, ones)
        assert same_text(graph(ids, padded), network(ids, padded), padded)


@pytest.mark.parametrize(
    "name", [name for name in [*HF, *OWN] if name != "gpt_oss"]
)  # whose experts are bfloat16 there
def test_sizes_are_known_without_data(name: str) -> None:
    network, (ids, _, padded) = model(name), texts(name)
    with torch.no_grad():
        truth = network(ids, padded)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            found = network(fake.from_tensor(ids), fake.from_tensor(padded))
        if name != "t5":  # which looks at the numbers of its own inputs
            nowhere = copy.deepcopy(network).to("meta")(ids.to("meta"), padded.to("meta"))
            assert (nowhere.shape, nowhere.dtype, nowhere.device.type) == (truth.shape, truth.dtype, "meta")
    assert (found.shape, found.dtype) == (truth.shape, truth.dtype)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mistral", "gemma2", "t5"])
def test_a_file_of_onnx_would_hold_no_operator_of_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.onnx.is_in_onnx_export", lambda: True)
    network, (ids, ones, padded) = model(name), texts(name)
    with torch.no_grad():
        graph = traced(network, ids, ones)
        assert "foveate::" not in str(graph.inlined_graph)
        assert "aten::mT" not in str(graph.inlined_graph)  # which has no counterpart there
        for given in ((ids, padded), longer(ids, padded)):
            assert same_text(graph(*given), network(*given), given[1])


PATTERNS: dict[str, Callable[[Tensor], fv.Pattern | None]] = {
    "everyone": lambda kept: None,
    "causal": lambda kept: fv.causal,
    "window": lambda kept: fv.causal & fv.window(3),
    "padding": fv.padding,
    "lengths": lambda kept: fv.padding(kept.sum(1)),
    "matrix": lambda kept: fv.causal & fv.from_mask(kept[:, None, None]),
    "documents": lambda kept: fv.documents((~kept).long()),
    "global": lambda kept: fv.causal & fv.window(2) | fv.global_tokens(~kept),
}


@pytest.mark.parametrize("backend", ["auto", "native", "sdpa", "chunked", "reference"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_traced_call_holds_for_other_numbers_and_other_lengths(name: str, backend: str) -> None:
    torch.manual_seed(3)

    def attend(q: Tensor, k: Tensor, kept: Tensor) -> Tensor:
        return fv.attention(q, k, k, PATTERNS[name](kept), query_start=0, backend=backend)

    def call(length: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
        kept = torch.ones(2, length, dtype=torch.bool)
        kept[1, length - hidden :] = False
        return torch.randn(2, 6, length, 8), torch.randn(2, 2, length, 8), kept

    first = call(17, 0)
    try:
        attend(*first)
    except fv.Unsupported:
        return  # nothing to trace; what is refused is a test of its own
    graph = traced(attend, *first)  # type: ignore[arg-type]
    for length, hidden in itertools.product((17, 23), (0, 5)):
        given = call(length, hidden)
        torch.testing.assert_close(graph(*given), attend(*given))


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_a_traced_call_finds_the_place_of_its_queries_anew(backend: str) -> None:
    """One query at the last key, of a text that has grown since."""

    def step(q: Tensor, k: Tensor) -> Tensor:
        return fv.attention(q, k, k, fv.causal & fv.window(3), backend=backend)

    graph = traced(step, torch.randn(1, 2, 1, 8), torch.randn(1, 2, 7, 8))  # type: ignore[arg-type]
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 13, 8)
    torch.testing.assert_close(graph(q, k), step(q, k))


def test_a_layer_without_a_mask_finds_the_place_of_its_queries_anew() -> None:
    from foveate.integrations.transformers.attention_interface import attention
    from foveate.integrations.transformers.switching import PLAN, Plan

    layer = nn.Module()
    setattr(layer, PLAN, Plan(fv.window(3), gives_weights=True))

    def step(q: Tensor, k: Tensor) -> Tensor:
        return attention(layer, q, k, k, None)[0]

    graph = traced(step, torch.randn(1, 2, 1, 8), torch.randn(1, 2, 7, 8))  # type: ignore[arg-type]
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 13, 8)
    torch.testing.assert_close(graph(q, k), step(q, k))


def test_offsets_of_texts_that_cannot_be_compared_are_taken_apart() -> None:
    from foveate.integrations.transformers.attention_interface import attention

    layer = nn.Module()

    def packed(q: Tensor, k: Tensor, ends: Tensor, others: Tensor) -> Tensor:
        return attention(layer, q, k, k, None, is_causal=False, cu_seq_lens_q=ends, cu_seq_lens_k=others)[0]

    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    same = torch.tensor([0, 4, 9])
    graph = traced(packed, q, k, same, same.clone())  # type: ignore[arg-type]
    for others in (same, torch.tensor([0, 2, 9])):
        torch.testing.assert_close(graph(q, k, same, others), packed(q, k, same, others))


def test_global_tokens_of_a_traced_layer_may_be_others() -> None:
    torch.manual_seed(3)
    attention = fv.nn.LongformerAttention(24, 3, window=2).eval().requires_grad_(False)
    x = torch.randn(2, 11, 24)
    chosen = torch.zeros(3, 2, 11, dtype=torch.bool)
    chosen[1, :, 0] = chosen[2, 0, 3:7] = chosen[2, 1, 5] = True

    def layer(x: Tensor, chosen: Tensor) -> Tensor:
        return attention(x, global_tokens=chosen)  # type: ignore[no-any-return]

    with torch.no_grad():
        graph = traced(layer, x, chosen[1])  # type: ignore[arg-type]
        for one in chosen:
            torch.testing.assert_close(graph(x, one), layer(x, one))
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert layer(fake.from_tensor(x), fake.from_tensor(chosen[2])).shape == x.shape


def test_positions_that_a_trace_would_keep_are_refused() -> None:
    def attend(q: Tensor, places: Tensor) -> Tensor:
        return fv.attention(q, q, q, fv.window(2) | fv.global_tokens(places))

    with pytest.raises(
        fv.InvalidInput, match=r"would keep the numbers of today: give a boolean tensor \[batch, length"
    ):
        traced(attend, torch.randn(1, 2, 7, 8), torch.tensor([0, 3]))  # type: ignore[arg-type]


def test_every_family_is_named_here() -> None:
    assert set(HF) < set(FAMILIES)
