"""The compiled kernels of linear attention: on every instruction set, the recurrence in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jaxtyping
import pytest
import torch
from budget_linear import Run, assert_linear_within_budget
from calls import random
from kernels import KERNELS, same_bits
from test_linear import (
    BATCH,
    DIM,
    GATES,
    GROUP,
    HEADS,
    IDS,
    KEY_HEADS,
    VALUE_DIM,
    call,
    given_state,
)
from torch import Tensor

import foveate as fv
from foveate.linear import choose, chunked, native, recurrence
from foveate.linear.problem import LinearProblem, linear_problem

EPS = torch.finfo(torch.float32).eps


def on(kernel: str, threads: int = 1) -> Run:
    return lambda problem: native._run(problem, kernel, threads)


def narrowed(arguments: dict[str, object], dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """The same arguments, rounded: q, k and v to dtype, all others to float32."""
    made: dict[str, object] = {}
    for name, x in arguments.items():
        if isinstance(x, fv.LinearState):
            made[name] = fv.LinearState(*(None if part is None else part.float() for part in x))
        elif isinstance(x, Tensor) and x.is_floating_point():
            made[name] = x.to(dtype if name in ("q", "k", "v") else torch.float32)
        else:
            made[name] = x
    return made


def leaves_of(problem: LinearProblem) -> dict[str, Tensor]:
    names = [name for name in ("q", "k", "v", "decay", "beta", "state") if getattr(problem, name) is not None]
    return {name: getattr(problem, name).detach().clone().requires_grad_() for name in names}


def results(run: Run, problem: LinearProblem, dtype: torch.dtype) -> dict[str, Tensor]:
    """out, the last state and the gradients of a fixed sum of both, computed in a dtype."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in leaves_of(problem).items()}
    out, last = run(replace(problem, **leaves, dtype=dtype))
    total = sum((x * random(*x.shape, seed=5 + n).to(x.dtype)).sum() for n, x in enumerate((out, last)))
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return {"out": out.detach(), "last": last.detach()} | dict(zip(leaves, gradients, strict=True))


def assert_near(found: dict[str, Tensor], true: dict[str, Tensor], times: float) -> None:
    for name, x in true.items():
        assert found[name].shape == x.shape
        if x.numel():
            off = float((found[name].detach().double() - x.detach().double()).abs().max())
            assert off <= times * EPS * max(1.0, float(x.detach().abs().max())), f"{name} is off by {off:.3g}"


def compare(problem: LinearProblem, times: float = 64) -> None:
    """Every kernel against float64: the definition, or where that takes long the chunks (equal: test_linear)."""
    steps = problem.k.shape[2]
    true = results(recurrence.run if steps < 40 else chunked.run, problem, torch.float64)
    for kernel in KERNELS:
        try:
            assert_near(results(on(kernel), problem, torch.float32), true, times)
        except AssertionError as wrong:
            raise AssertionError(f"{kernel}, {steps} steps: {wrong}") from wrong


@pytest.mark.parametrize("delta_rule", [False, True], ids=["plain", "delta"])
@pytest.mark.parametrize("gate", GATES)
def test_every_length_is_the_recurrence(gate: str, delta_rule: bool) -> None:
    for steps in range(1, 131):
        if steps % 8 != 2 * GATES.index(gate) + delta_rule and steps not in (1, 4, 5, 15, 16, 17, 32, 33, 36, 64, 128):
            continue  # every length is met by some form
        arguments = narrowed(call(steps, gate, delta_rule=delta_rule, beta=steps % 2 == 0, seed=steps))
        state = narrowed({"state": given_state(steps)})["state"] if steps % 3 else None
        compare(linear_problem(**arguments, state=state))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("dim", "width"), [(1, 1), (16, 16), (33, 67), (64, 130), (19, 65)])
def test_every_size_is_the_recurrence(gate: str, dim: int, width: int) -> None:
    steps = 71
    keys = random(1, 2, steps, dim, seed=2)
    shapes = {"none": None, "by head": (2,), "by step": (1, 2, steps), "by channel": (1, 2, steps, dim)}
    decay = None if shapes[gate] is None else -random(*shapes[gate], seed=4).exp() / 4
    arguments = narrowed({
        "q": random(1, 6, steps, dim), "k": keys / keys.norm(dim=-1, keepdim=True),
        "v": random(1, 2, steps, width, seed=3), "decay": decay, "beta": random(1, 2, steps, seed=5).sigmoid(),
    })  # fmt: skip
    for delta_rule in (False, True):
        compare(linear_problem(**arguments, delta_rule=delta_rule))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_keeps_within_the_budget_on_every_kernel(dtype: torch.dtype, kernel: str) -> None:
    for gate, delta_rule in (("by step", True), ("by channel", False)):
        arguments, ids = call(73, gate, delta_rule=delta_rule), IDS[0]
        problem = linear_problem(**arguments, state=given_state(), documents=ids)
        assert_linear_within_budget(on(kernel), problem, dtype)


@pytest.mark.parametrize("delta_rule", [False, True], ids=["plain", "delta"])
@pytest.mark.parametrize("gate", GATES)
def test_documents_normalisers_and_everyone(gate: str, delta_rule: bool) -> None:
    arguments, state = narrowed(call(73, gate, delta_rule=delta_rule)), given_state()
    compare(linear_problem(**arguments, **narrowed({"state": state}), documents=IDS))
    compare(linear_problem(**arguments, **narrowed({"state": state}), causal=False))
    if not delta_rule:
        positive = given_state(normalize=True)
        compare(linear_problem(**arguments, **narrowed({"state": positive}), normalize=True, feature=fv.elu_plus_one))


@pytest.mark.parametrize("gate", ["by step", "by channel"])
@pytest.mark.parametrize("strong", [-60.0, -3000.0, -torch.inf])
def test_strong_decays_beside_weak_ones_keep_their_digits(gate: str, strong: float) -> None:
    arguments = narrowed(call(97, gate))
    decay = arguments["decay"] * 0.01
    decay[:, :, ::5] = strong
    arguments["decay"] = decay
    problem = linear_problem(**arguments)
    compare(problem)
    for kernel in KERNELS:
        found = results(on(kernel), problem, torch.float32)["decay"]
        assert found[:, :, ::5].abs().max() <= (0 if strong < -100 else 1e-20)  # not what is left of a difference


def test_weak_decays_hold_over_a_long_text() -> None:
    steps = 8192
    q, k, v = (random(1, 1, steps, 8, seed=n).float() for n in range(3))
    decay = torch.tensor([-(2.0**-12)])
    wide = [x.double() for x in (q, k, v, decay)]
    true = fv.linear_attention(*wide[:3], decay=wide[3], backend="chunked")
    found = fv.linear_attention(q, k, v, decay=decay, backend="native")
    assert (found[1].s - true[1].s).abs().max() < 32 * EPS * true[1].s.abs().max()
    by_channel = decay[None, :, None, None].expand(1, 1, steps, 8)
    found = fv.linear_attention(q, k, v, decay=by_channel, backend="native")
    assert (found[1].s - true[1].s).abs().max() < 32 * EPS * true[1].s.abs().max()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_broken_reaches_no_earlier_row_and_no_other_document(gate: str, broken: float, kernel: str) -> None:
    arguments = narrowed(call(73, gate))
    whole = linear_problem(**arguments, documents=IDS)
    true = results(on(kernel), whole, torch.float32)
    for name in ("k", "v", "beta"):
        hurt = arguments[name].clone()
        hurt[0, 1, 30] = broken
        problem = linear_problem(**arguments | {name: hurt, "delta_rule": False}, documents=IDS)
        found = results(on(kernel), replace(problem, delta_rule=True), torch.float32)
        assert not found["out"][0, GROUP : 2 * GROUP, 30:68].isfinite().all(-1).any()  # until its document ends
        assert found["last"].isfinite().all()
        for part in ("out", "q", "k", "v", "beta", *(["decay"] if gate in ("by step", "by channel") else [])):
            reached = torch.zeros_like(found[part], dtype=torch.bool)
            # Gradients go backwards to the document's first step, 24.
            heads = slice(GROUP, 2 * GROUP) if part in ("out", "q") else slice(1, 2)
            reached[0, heads, (30 if part == "out" else 24) : 68] = True
            near = {part: found[part].masked_fill(reached, 0)}
            assert_near(near, {part: true[part].masked_fill(reached, 0)}, 64)
    query = arguments["q"].clone()
    query[1, 2, 7] = broken
    found_out = native._run(linear_problem(**arguments | {"q": query}, documents=IDS), kernel, 1)[0]
    assert not found_out[1, 2, 7].isfinite().any()
    found_out[1, 2, 7] = true["out"][1, 2, 7]
    assert_near({"out": found_out}, {"out": true["out"]}, 64)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gate", GATES)
def test_a_position_that_is_passed_over_may_hold_anything(gate: str, kernel: str) -> None:
    arguments = narrowed(call(47, gate))
    ids = torch.zeros(47, dtype=torch.int64)
    ids[21:] = 1
    ids[[0, 17, 18, 30, 46]] = -1
    true = linear_problem(**arguments, documents=ids)
    hurt = dict(arguments)
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.dim() > 1:
            hurt[name] = x.clone()
            hurt[name][:, :, ids < 0] = torch.nan
    found, wanted = (results(on(kernel), call, torch.float32) for call in (linear_problem(**hurt, documents=ids), true))
    assert all(x.isfinite().all() for x in found.values())
    assert_near(found, wanted, 64)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("heads", "width"), [(1, 130), (3, 40), (6, 33)])
def test_threads_change_no_bit(gate: str, heads: int, width: int) -> None:
    steps, dim = 150, 24
    k, v = random(1, heads, steps, dim, seed=2).float() / 5, random(1, heads, steps, width, seed=3).float()
    arguments = {"q": random(1, 2 * heads, steps, dim).float(), "k": k, "v": v}
    decay = -random(1, heads, steps, dim, seed=4).float().exp()
    arguments |= {} if gate == "none" else {"decay": decay if gate == "by channel" else decay[..., 0]}
    problem = linear_problem(**arguments, delta_rule=True)
    alone = list(results(on("", 1), problem, torch.float32).values())
    for threads in (2, 3, 7):
        assert same_bits(list(results(on("", threads), problem, torch.float32).values()), alone)


@pytest.mark.parametrize("gate", GATES)
def test_split_and_state_are_the_whole(gate: str) -> None:
    arguments = narrowed(call(83, gate))
    leaves = [x.requires_grad_() for x in arguments.values() if isinstance(x, Tensor)]
    whole, last = fv.linear_attention(**arguments, backend="native")
    parts, handed = [], None
    for some in (slice(0, 31), slice(31, 32), slice(32, 35), slice(35, 83)):
        part = {name: x[:, :, some] if isinstance(x, Tensor) and x.dim() > 1 else x for name, x in arguments.items()}
        out, handed = fv.linear_attention(**part, state=handed, backend="native")
        parts.append(out)
    pairs = []
    for out, state in ((torch.cat(parts, 2), handed.s), (whole, last.s)):
        total = (out * random(*out.shape).float()).sum() + (state * random(*state.shape, seed=2).float()).sum()
        pairs.append([out, state, *torch.autograd.grad(total, leaves)])
    found, true = (dict(zip(map(str, range(9)), pair, strict=False)) for pair in pairs)
    assert_near(found, true, 64)


def test_any_strides_are_read_where_they_are() -> None:
    arguments = narrowed(call(45, "by channel"))
    true = native.run(linear_problem(**arguments))
    odd = {}
    for name, x in arguments.items():
        odd[name] = x
        if isinstance(x, Tensor):
            turned = x.transpose(1, 2).contiguous().transpose(1, 2)
            odd[name] = turned if name in ("k", "beta") else x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert same_bits(list(native.run(linear_problem(**odd))), list(true))
    decay = arguments["decay"]
    for few in (decay[:1], decay[:, :1], decay[:, :, :1], decay[..., :1]):
        full = few.expand_as(decay).contiguous()
        first = results(native.run, linear_problem(**arguments | {"decay": few}), torch.float32)
        second = results(native.run, linear_problem(**arguments | {"decay": full}), torch.float32)
        second["decay"] = second["decay"].sum_to_size(first["decay"].shape)
        assert_near(first, second, 64)


def test_numbers_below_the_normal_ones_are_there_again_afterwards() -> None:
    native.run(linear_problem(**narrowed(call(40))))
    assert torch.tensor([1e-20]) * 1e-20 > 0


def test_who_computes_what() -> None:
    arguments = call(9)
    assert choose.linear_chosen(linear_problem(**narrowed(arguments))) is native
    assert choose.linear_chosen(linear_problem(**arguments)) is chunked
    with pytest.raises(fv.Unsupported, match=r"native: dtype is float64 \(takes float32, bfloat16, float16\)"):
        fv.linear_attention(**arguments, backend="native")
    one = narrowed({name: x[:, :, :1] if isinstance(x, Tensor) else x for name, x in arguments.items()})
    assert choose.linear_chosen(linear_problem(**one)) is native


def test_without_a_compiler_the_rest_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_native", None)
    assert choose.linear_chosen(linear_problem(**narrowed(call(9)))) is chunked
    assert choose.linear_chosen(linear_problem(**narrowed(call(1)))) is recurrence
    with pytest.raises(fv.Unsupported, match="install a C\\+\\+ compiler"):
        fv.linear_attention(**narrowed(call(9)), backend="native")


def test_transforms_and_second_derivatives_are_refused_in_a_sentence() -> None:
    arguments = narrowed(call(9))
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    with pytest.raises(fv.Unsupported, match="has no vmap"):
        torch.func.vmap(lambda x: fv.linear_attention(x, k, v, backend="native")[0])(q[None])
    torch.func.vmap(lambda x: fv.linear_attention(x, k, v)[0])(q[None])
    q = q.clone().requires_grad_()
    out, _ = fv.linear_attention(q, k, v)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(fv.Unsupported, match="no second derivative"):
        torch.autograd.grad(first.sum(), q)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    arguments = narrowed(call(40))
    v = arguments["v"].clone().requires_grad_()
    out, last = fv.linear_attention(**arguments | {"v": v}, backend="native")
    (of_state,) = torch.autograd.grad(last.s.sum(), v, retain_graph=True)
    (of_out,) = torch.autograd.grad(out.sum(), v, retain_graph=True)
    (of_both,) = torch.autograd.grad(out.sum() + last.s.sum(), v)
    assert_near({"v": of_state + of_out}, {"v": of_both}, 16)


@pytest.fixture
def _no_shape_checks() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


@pytest.mark.usefixtures("_no_shape_checks")
def test_a_graph_holds_the_whole_call_with_its_gradients() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        state, ids = fv.LinearState(s, None), IDS[:, : q.shape[2]]
        out, last = fv.linear_attention(
            q, k, v, decay=decay, beta=beta, delta_rule=True, state=state, documents=ids, backend="native"
        )
        return out, last.s

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (37, 50):
        made = narrowed(call(steps, "by channel") | {"state": given_state()})
        arguments = [made[name].requires_grad_() for name in ("q", "k", "v", "decay", "beta")]
        arguments.append(made["state"].s.requires_grad_())
        pairs = []
        for run in (compiled, attend):
            out, last = run(*arguments)
            pairs.append([out, last, *torch.autograd.grad(out.sin().sum() + last.cos().sum(), arguments)])
        for mine, theirs in zip(*pairs, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_the_operators_keep_their_contract() -> None:
    for gate, dtype in (("none", torch.float32), ("by step", torch.bfloat16), ("by channel", torch.float32)):
        made = linear_problem(**narrowed(call(19, gate), dtype), documents=IDS[:, :19])
        tensors = [made.q, made.k, made.v, made.decay, made.beta, made.resets, made.state]
        tensors = [x if x is None or x.dtype == torch.bool else x.detach().requires_grad_() for x in tensors]
        for saves in (True, False):
            arguments = (*tensors, 0.5, True, True, True, saves, "", 1)
            torch.library.opcheck(torch.ops.foveate.linear_forward.default, arguments)


def test_a_size_of_nothing_has_gradients_too() -> None:
    for sizes in ((0, 2, 3, 5, 7), (1, 2, 0, 5, 7), (1, 2, 3, 0, 7), (1, 2, 3, 5, 0)):
        batch, heads, steps, dim, width = sizes
        q, k = torch.randn(batch, HEADS, steps, dim), torch.randn(batch, heads, steps, dim)
        leaves = [q, k, torch.randn(batch, heads, steps, width), -torch.rand(batch, heads, steps)]
        leaves = [x.requires_grad_() for x in leaves]
        out, last = fv.linear_attention(*leaves[:3], decay=leaves[3], backend="native")
        gradients = torch.autograd.grad(out.sum() + last.s.sum(), leaves)
        assert [x.shape for x in gradients] == [x.shape for x in leaves]
        assert not any(x.any() for x in gradients)


def test_the_shapes_are_those_of_the_caller() -> None:
    out, state = fv.linear_attention(**narrowed(call(11), torch.bfloat16), backend="native")
    assert (out.dtype, out.shape) == (torch.bfloat16, (BATCH, HEADS, 11, VALUE_DIM))
    assert (state.s.dtype, state.s.shape) == (torch.float32, (BATCH, KEY_HEADS, DIM, VALUE_DIM))
