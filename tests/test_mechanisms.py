"""The table of mechanisms tells the truth: every call is made and every claim tried, also of what cannot be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate as fv
from foveate.dispatch import NAMES, implementation, observe
from foveate.mechanisms import MECHANISMS, Mechanism
from foveate.problem import Problem

N, D = 24, 8
named = pytest.mark.parametrize("one", MECHANISMS, ids=lambda one: one.name)


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
        "vector": normal(D), "sink": normal(4), "rates": -normal(4).exp(), "weight": normal(D, D),
        "E": normal(5, N), "F": normal(5, N),
    }  # fmt: skip


def called(one: Mechanism, held: dict[str, Any], more: str = "", start: int = 0) -> Any:
    """What the call of the table gives, with more arguments behind its own."""
    favor = fv.favor(D, 16, generator=torch.Generator().manual_seed(3))
    room = {"fv": fv, "favor": favor, "draw": torch.Generator().manual_seed(5), "start": start, **held}
    return eval(one.call[:-1] + more + ")", room)


def out_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@named
def test_it_is_causal_as_it_says(one: Mechanism) -> None:
    held = given()
    before = out_of(called(one, held))
    for name, value in given().items():
        if value.dim() >= 3 and value.shape[2] == N and name != "received":  # what earlier queries gave is given
            held[name] = torch.cat([value[:, :, :-3], value[:, :, 2:5]], 2)
    changed = (out_of(called(one, held)) - before)[:, :, :-3].abs().max()
    assert (changed < 1e-9) == one.causal


@named
def test_queries_of_another_length_fit_as_it_says(one: Mechanism) -> None:
    short = {name: value[:, :, -7:] for name, value in given().items() if name in ("q", "center", "q_index", "w_index")}
    more = ", causal=False" if one.decode == "state" else ""
    if not one.cross:
        with pytest.raises((fv.InvalidInput, TypeError)):
            called(one, given() | short | {"x": None}, more)
        return
    assert out_of(called(one, given() | short, more)).shape == (2, 4, 7, D)


@named
def test_gradients_arrive_where_it_says(one: Mechanism) -> None:
    held = given()
    inputs = {name: held[name].requires_grad_() for name in ("q", "k", "v", "x") if re.search(rf"\b{name}\b", one.call)}
    if "unit" in one.call:
        inputs["k"] = held["k"].requires_grad_()
        held["unit"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
    result = called(one, held)
    loss = (out_of(result) * given()["v"].flip(1)).sum()
    arrived = _arrived(loss, inputs)
    assert arrived == ({"v"} if one.gradients in ("v", "by reward") else set(inputs))
    if one.gradients == "by reward":
        assert _arrived(result.log_prob.sum(), inputs) == {"q", "k"}


def _arrived(loss: Tensor, inputs: dict[str, Tensor]) -> set[str]:
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, retain_graph=True)
    return {name for name, grad in zip(inputs, found, strict=True) if grad is not None and grad.abs().max() > 0}


@pytest.mark.parametrize("one", [one for one in MECHANISMS if one.decode == "cache"], ids=lambda one: one.name)
def test_steps_with_a_cache_are_the_whole(one: Mechanism) -> None:
    whole = out_of(called(one, given()))
    for t in (8, 13, N - 1):
        held = given(t + 1)
        last = {name: held[name][:, :, t:] for name in ("q", "center", "q_index", "w_index")}
        assert torch.allclose(out_of(called(one, held | last)), whole[:, :, t : t + 1], atol=1e-9), t


@pytest.mark.parametrize("one", [one for one in MECHANISMS if one.decode == "state"], ids=lambda one: one.name)
def test_a_state_carries_on(one: Mechanism) -> None:
    whole, last = called(one, given())
    _, state = called(one, given(11))
    rest = {name: value[:, :, 11:] for name, value in given().items() if value.dim() >= 3 and value.shape[2] == N}
    out, after = called(one, given() | rest | {"state": state}, ", state=state", start=11)
    assert torch.allclose(out, whole[:, :, 11:], atol=1e-9)
    assert torch.allclose(after.s, last.s, atol=1e-9)


@pytest.mark.parametrize("one", [one for one in MECHANISMS if one.backends], ids=lambda one: one.name)
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


@named
def test_its_layer_and_its_page_are_there(one: Mechanism) -> None:
    assert one.layer is None or isinstance(getattr(fv.nn, one.layer), type)
    assert one.page is None or (Path(__file__).parent.parent / "docs" / "mechanisms" / one.page).is_file()
    assert re.fullmatch(r"\d{4}\.\d{4,5}|https://\S+", one.link)


def test_names_are_told_apart() -> None:
    assert len({one.name for one in MECHANISMS}) == len(MECHANISMS)


def test_every_function_that_attends_is_in_the_table() -> None:
    calls = " ".join(one.call for one in MECHANISMS)
    attending = [name for name in fv.__all__ if name.endswith("_attention") or name in fv._HOME["foveate.linear_forms"]]
    others = {"paged_attention"}  # where keys lie, not who attends to whom
    assert [name for name in attending if f"fv.{name}(" not in calls and name not in others] == []
