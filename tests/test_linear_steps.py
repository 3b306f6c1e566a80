"""A single step like one before it is neither checked nor decided again, and nobody can tell."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from test_linear import BATCH, DIM, GATES, KEY_HEADS, VALUE_DIM, call, given_state
from test_native_linear import narrowed
from torch import Tensor

import foveate as fv
from foveate.linear import step_cache


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    step_cache.forget()
    jaxtyping.config.update("jaxtyping_disable", True)  # what users have: the checks of shapes are the library's own
    yield
    step_cache.forget()
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def step(gate: str = "by step", dtype: torch.dtype = torch.float32, **options: bool) -> dict[str, object]:
    return narrowed(call(1, gate, **options) | {"state": given_state()}, dtype)


def test_it_is_taken_from_the_second_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = step()
    first, state = fv.linear_attention(**arguments)
    monkeypatch.setattr("foveate.linear.functional.dispatch_linear", None)
    out, last = fv.linear_attention(**arguments)
    assert torch.equal(out, first)
    assert torch.equal(last.s, state.s)
    moved = {name: x + 0 if isinstance(x, Tensor) else x for name, x in arguments.items()}
    assert torch.equal(fv.linear_attention(**moved)[0], first)
    with pytest.raises(TypeError):
        fv.linear_attention(**arguments | {"scale": 2.0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_every_form_is_the_recurrence_again(gate: str, dtype: torch.dtype) -> None:
    for delta_rule in (False, True, False):
        for beta in (False, True):
            arguments = step(gate, dtype, delta_rule=delta_rule, beta=beta)
            true, last = fv.linear_attention(**arguments, backend="recurrence")
            for _ in range(3):
                found, state = fv.linear_attention(**arguments)
                assert (found.dtype, found.shape) == (true.dtype, true.shape)
                torch.testing.assert_close(found, true)
                torch.testing.assert_close(state.s, last.s)


def test_what_was_right_does_not_excuse_what_is_wrong() -> None:
    arguments = step()
    for _ in range(2):
        fv.linear_attention(**arguments)
    decay, beta, k = arguments["decay"], arguments["beta"], arguments["k"]
    wrongs: list[tuple[dict[str, object], str]] = [
        ({"decay": decay.abs()}, "decay goes up to"), ({"beta": beta + 2}, "beta goes"), ({"beta": -beta}, "beta goes"),
        ({"k": k[..., :3]}, "wanted"), ({"k": k.double()}, "one dtype"), ({"decay": decay[:, :2]}, "wanted"),
        ({"state": fv.LinearState(arguments["state"].s[:, :, :3], None)}, "state.s is"),
        ({"state": arguments["state"].s}, "state is a Tensor"), ({"scale": "1"}, "scale is"),
        ({"backend": "best"}, "best"),
    ]  # fmt: skip
    for wrong, words in wrongs:
        with pytest.raises(fv.InvalidInput, match=words):
            fv.linear_attention(**arguments | wrong)
    beta = torch.full_like(beta, 3.0)  # without the delta rule a beta may be anything
    fv.linear_attention(**arguments | {"beta": beta, "delta_rule": False})
    fv.linear_attention(**arguments | {"beta": beta, "delta_rule": False})


def test_a_nan_is_no_wrong_decay() -> None:
    arguments = step("by channel")
    for _ in range(2):
        decay = arguments["decay"].clone()
        decay[0, 1, 0, 2] = torch.nan
        out, _ = fv.linear_attention(**arguments | {"decay": decay})
        assert out[0, 2:4].isnan().all()
        assert out.isfinite().sum() == out.numel() - 2 * VALUE_DIM


def test_gradients_transforms_graphs_and_autocast_still_work() -> None:
    arguments = step()
    plain, state = fv.linear_attention(**arguments)
    fv.linear_attention(**arguments)
    leaf = arguments["state"].s.clone().requires_grad_()
    out, last = fv.linear_attention(**arguments | {"state": fv.LinearState(leaf, None)})
    assert torch.autograd.grad(out.sum() + last.s.sum(), leaf)[0].any()
    with torch.no_grad():
        assert not fv.linear_attention(**arguments | {"state": fv.LinearState(leaf, None)})[0].requires_grad
    q = arguments["q"]
    mapped = torch.func.vmap(lambda x: fv.linear_attention(**arguments | {"q": x})[0])(q[None])
    torch.testing.assert_close(mapped[0], plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert fv.linear_attention(**arguments)[0].dtype == torch.bfloat16
    compiled = torch.compile(
        lambda x: fv.linear_attention(**arguments | {"q": x})[0], fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q), plain)
    with torch.device("meta"):  # where tensors are made that nobody says the place of
        out, last = fv.linear_attention(**arguments)
    assert torch.equal(out, plain)
    assert torch.equal(last.s, state.s)


def test_tensors_that_have_to_be_copied_take_the_long_way() -> None:
    arguments = step("by channel")
    s = arguments["state"].s.mT.contiguous().mT
    wide = arguments["decay"].double()
    true, last = fv.linear_attention(**arguments)
    for odd in ({"state": fv.LinearState(s, None)}, {"decay": wide}, {"q": arguments["q"].mT.contiguous().mT}):
        for _ in range(2):
            out, state = fv.linear_attention(**arguments | odd)
            torch.testing.assert_close(out, true)
            torch.testing.assert_close(state.s, last.s)
    assert len(step_cache._plans) == 1


def test_decoding_is_a_chain_of_steps() -> None:
    whole = narrowed(call(40, "by channel"))
    state = fv.LinearState(torch.zeros(BATCH, KEY_HEADS, DIM, VALUE_DIM), None)
    true, last = fv.linear_attention(**whole, state=state, backend="chunked")
    rows = []
    for t in range(40):
        part = {name: x[:, :, t : t + 1] if isinstance(x, Tensor) else x for name, x in whole.items()}
        row, state = fv.linear_attention(**part, state=state)
        rows.append(row)
    torch.testing.assert_close(torch.cat(rows, 2), true, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.s, last.s, atol=1e-5, rtol=1e-5)


def test_it_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cache, "_MOST", 4)
    for dim in range(1, 20):
        q, state = torch.randn(1, 1, 1, dim), fv.LinearState(torch.zeros(1, 1, dim, dim), None)
        fv.linear_attention(q, q, q, state=state)
    assert len(step_cache._plans) <= 4
