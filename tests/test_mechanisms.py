"""The table of mechanisms tells the truth: every call is made and every claim tried, also of what cannot be."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate as fv
from foveate.dispatch.choose import NAMES, implementation, observe
from foveate.mechanisms.table import MECHANISMS, Mechanism
from foveate.problem import Problem

N, D = 24, 8
WHOLE = {one.name: one for one in MECHANISMS if re.search(r"\((images|targets)\b", one.call)}  # with tests of their own
PARTS = [one for one in MECHANISMS if one.name not in WHOLE]
named = pytest.mark.parametrize("one", PARTS, ids=lambda one: one.name)


def given(n: int = N) -> dict[str, Tensor]:
    """Everything that a call of the table names, for n steps."""
    draw = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    q, k, v, x, decays = (normal(2, 4, N, D) for _ in range(5))
    made = {
        "q": q, "k": k, "v": v, "x": x, "unit": torch.nn.functional.normalize(k, dim=-1),
        "decays": -decays.exp(), "decay": -normal(2, 4, N).exp(), "beta": normal(2, 4, N).sigmoid(),
        "center": 2 + 20 * normal(2, 4, N).sigmoid(), "q_index": normal(2, 3, N, D), "k_index": normal(2, 1, N, D),
        "w_index": normal(2, 3, N), "received": torch.arange(2.0 * N, N, -1).expand(2, 4, N),
    }  # fmt: skip
    made = {name: value[:, :, :n] for name, value in made.items()}
    return made | {
        "tokens": normal(2, N, D)[:, :n],
        "vector": normal(D), "sink": normal(4), "rates": -normal(4).exp(), "weight": normal(D, D),
        "E": normal(5, N), "F": normal(5, N),
    }  # fmt: skip


def called(one: Mechanism, held: dict[str, Any], more: str = "", start: int = 0) -> Any:
    """What the call of the table gives, with more arguments behind its own."""
    favor = fv.favor(D, 16, generator=torch.Generator().manual_seed(3))
    room = {"fv": fv, "favor": favor, "draw": torch.Generator().manual_seed(5), "start": start, **held}
    torch.manual_seed(11)  # of a layer's parameters
    torch.set_default_dtype(held["q"].dtype)
    try:
        return eval(one.call[:-1] + more + ")", room)
    finally:
        torch.set_default_dtype(torch.float32)


def steps_of(value: Tensor) -> int | None:
    """The dimension of a tensor that runs along the text."""
    return value.shape.index(N, 1) if N in value.shape[1:] and value.dim() >= 3 else None


def out_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@named
def test_it_is_causal_as_it_says(one: Mechanism) -> None:
    held = given()
    before = out_of(called(one, held))
    for name, value in given().items():
        along = steps_of(value)
        if along is not None and name != "received":  # what earlier queries gave is given
            held[name] = torch.cat([value.narrow(along, 0, N - 3), value.narrow(along, 2, 3)], along)
    changed = (out_of(called(one, held)) - before).narrow(1 if "(tokens" in one.call else 2, 0, N - 3).abs().max()
    assert (changed < 1e-9) == one.causal


@named
def test_queries_of_another_length_fit_as_it_says(one: Mechanism) -> None:
    short = {name: value[:, :, -7:] for name, value in given().items() if name in ("q", "center", "q_index", "w_index")}
    more = ", causal=False" if one.decode == "state" else ""
    if "(tokens" in one.call:
        assert not one.cross
        assert "context" not in inspect.signature(getattr(fv.nn, one.layer or "").forward).parameters
        return
    if not one.cross:
        with pytest.raises((fv.InvalidInput, TypeError)):
            called(one, given() | short | {"x": None}, more)
        return
    assert out_of(called(one, given() | short, more)).shape == (2, 4, 7, D)


@named
def test_gradients_arrive_where_it_says(one: Mechanism) -> None:
    held = given()
    inputs = {
        name: held[name].requires_grad_()
        for name in ("q", "k", "v", "x", "tokens")
        if re.search(rf"\b{name}\b", one.call)
    }
    if "unit" in one.call:
        inputs["k"] = held["k"].requires_grad_()
        held["unit"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
    result = called(one, held)
    out = out_of(result)
    loss = (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum()
    arrived = _arrived(loss, inputs)
    assert arrived == ({"v"} if one.gradients in ("v", "by reward") else set(inputs))
    if one.gradients == "by reward":
        assert _arrived(result.log_prob.sum(), inputs) == {"q", "k"}


def _arrived(loss: Tensor, inputs: dict[str, Tensor]) -> set[str]:
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, retain_graph=True)
    return {name for name, grad in zip(inputs, found, strict=True) if grad is not None and grad.abs().max() > 0}


@pytest.mark.parametrize(
    "one", [one for one in PARTS if one.decode == "cache" and "(tokens" not in one.call], ids=lambda one: one.name
)
def test_steps_with_a_cache_are_the_whole(one: Mechanism) -> None:
    whole = out_of(called(one, given()))
    for t in (8, 13, N - 1):
        held = given(t + 1)
        last = {name: held[name][:, :, t:] for name in ("q", "center", "q_index", "w_index")}
        assert torch.allclose(out_of(called(one, held | last)), whole[:, :, t : t + 1], atol=1e-9), t


@pytest.mark.parametrize(
    "one", [one for one in PARTS if one.decode == "cache" and "(tokens" in one.call], ids=lambda one: one.name
)
def test_a_layer_steps_with_a_cache(one: Mechanism) -> None:
    whole, cache = called(one, given()), fv.KeyValueCache(layers=1)
    rows = [
        called(one, given() | {"tokens": part, "cache": cache[0]}, ", cache=cache")
        for part in given()["tokens"].split([9, 1, N - 10], 1)
    ]
    assert torch.allclose(torch.cat(rows, 1), whole, atol=1e-9)


@pytest.mark.parametrize("one", [one for one in PARTS if one.decode == "state"], ids=lambda one: one.name)
def test_a_state_carries_on(one: Mechanism) -> None:
    whole, last = called(one, given())
    _, state = called(one, given(11))
    rest = {name: value[:, :, 11:] for name, value in given().items() if steps_of(value) == 2}
    out, after = called(one, given() | rest | {"state": state}, ", state=state", start=11)
    assert torch.allclose(out, whole[:, :, 11:], atol=1e-9)
    assert torch.allclose(after.s, last.s, atol=1e-9)


@pytest.mark.parametrize("one", [one for one in PARTS if one.backends], ids=lambda one: one.name)
def test_it_runs_where_it_says(one: Mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, *_, **__: name)  # a compiler to speak of, for flex
    held = {name: value.float() for name, value in given().items()}
    if one.decode == "state":
        outs = [called(one, held, f', backend="{name}"')[0] for name in one.backends]
        for out in outs[1:]:
            assert torch.allclose(out, outs[0], atol=1e-4)
        return
    seen: list[Problem] = []
    forget = observe(seen.append)
    called(one, held)
    forget()
    assert {name for name in NAMES if not implementation(name).refuses(seen[-1])} == set(one.backends)


def test_the_attentive_decoder_is_what_its_row_says() -> None:
    one, draw = WHOLE["attentive decoder"], torch.Generator().manual_seed(7)
    held: dict[str, Any] = {"q": torch.zeros(0, dtype=torch.float64), "memory": torch.randn(2, 13, 8, generator=draw)}
    held["memory"] = held["memory"].double().requires_grad_()
    held["targets"] = torch.randint(11, (2, 7), generator=draw)
    whole = called(one, held)
    assert one.cross
    assert whole.shape == (2, 7, 11)  # 7 steps look at 13 vectors
    (gradient,) = torch.autograd.grad(whole.sum(), held["memory"])
    assert one.gradients == "all"
    assert (gradient.abs().sum(-1) > 0).all()
    later = held["targets"].clone()
    later[:, 4:] = 10 - later[:, 4:]
    assert one.causal
    assert torch.equal(called(one, held | {"targets": later})[:, :5], whole[:, :5])
    decoder = fv.nn.AttentiveDecoder(11, 8, fv.nn.LuongAttention(8, 8)).double()
    assert one.decode == "state"
    whole, keys = decoder(held["targets"], held["memory"]), decoder.attention.keys(held["memory"])
    read = torch.cat([torch.zeros_like(later[:, :1]), held["targets"][:, :-1]], 1)
    rows, state = [], decoder._state(held["memory"], None)
    for t in range(7):
        _, fed, state = decoder.step(read[:, t : t + 1], held["memory"], None, keys=keys, state=state)
        rows.append(decoder.readout(fed))
    assert torch.allclose(torch.cat(rows, 1), whole, atol=1e-12)


def test_glimpses_are_what_their_row_says() -> None:
    one, draw = WHOLE["glimpses"], torch.Generator().manual_seed(7)
    held = {"q": torch.zeros(0, dtype=torch.float64), "images": torch.randn(2, 1, 17, 13, generator=draw).double()}
    taken = called(one, held | {"images": held["images"].requires_grad_()})
    assert (one.causal, one.cross, one.decode) == (False, False, None)
    assert one.gradients == "by reward"
    assert not taken.locations.requires_grad  # no gradient but that of the choice's probability
    assert _arrived(taken.log_prob.sum(), {"images": held["images"]}) == {"images"}
    assert taken.logits.shape == (2, 5)
    seen = torch.autograd.grad(taken.logits.sum(), held["images"])[0] != 0
    assert 0 < int(seen.sum()) <= 2 * 4 * 4 * 4  # 4 glimpses of 3 × 3 pixels between pixels, whatever the image


@pytest.mark.parametrize("one", MECHANISMS, ids=lambda one: one.name)
def test_its_layer_and_its_page_are_there(one: Mechanism) -> None:
    assert one.layer is None or isinstance(getattr(fv.nn, one.layer), type)
    assert one.page is None or (Path(__file__).parent.parent / "docs" / "mechanisms" / one.page).is_file()
    assert re.fullmatch(r"\d{4}\.\d{4,5}|https://\S+", one.link)


def test_names_are_told_apart() -> None:
    assert len({one.name for one in MECHANISMS}) == len(MECHANISMS)


def test_every_function_that_attends_is_in_the_table() -> None:
    calls = " ".join(one.call for one in MECHANISMS)
    attending = [name for name in fv.__all__ if name.endswith("_attention") or name in fv._HOME["foveate.linear.forms"]]
    others = {"paged_attention"}  # where keys lie, not who attends to whom
    assert [name for name in attending if f"fv.{name}(" not in calls and name not in others] == []
