"""Linear attention: one meaning (a masked n × n formula written out here), whatever computes it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import jaxtyping
import pytest
import torch
from budget_linear import assert_linear_within_budget
from calls import near, random
from torch import Tensor

import foveate as fv
from foveate.linear import chunked, recurrence
from foveate.linear.problem import linear_problem

BATCH, KEY_HEADS, GROUP, DIM, VALUE_DIM = 2, 3, 2, 5, 7
HEADS = KEY_HEADS * GROUP
GATES = ("none", "by head", "by step", "by channel")
BACKENDS = ("recurrence", "chunked")
NARROW = (*BACKENDS, "native")  # what computes in float32 and narrower; the rest of native's laws: test_native_linear


def call(
    steps: int, gate: str = "by step", *, delta_rule: bool = True, beta: bool = True, seed: int = 0
) -> dict[str, Tensor | bool]:
    """The arguments of a call, in float64: keys of length 1, and decays from almost nothing to strong."""

    def draw(n: int, *shape: int) -> Tensor:
        return random(*shape, seed=10 * seed + n)

    keys = draw(1, BATCH, KEY_HEADS, steps, DIM)
    made: dict[str, Tensor | bool] = {
        "q": draw(0, BATCH, HEADS, steps, DIM),
        "k": keys / keys.norm(dim=-1, keepdim=True),
        "v": draw(2, BATCH, KEY_HEADS, steps, VALUE_DIM),
        "delta_rule": delta_rule,
    }
    shapes = {
        "by head": (KEY_HEADS,),
        "by step": (BATCH, KEY_HEADS, steps),
        "by channel": (BATCH, KEY_HEADS, steps, DIM),
    }
    if gate != "none":
        made["decay"] = -draw(3, *shapes[gate]).exp() / 4
    if beta:
        made["beta"] = draw(4, BATCH, KEY_HEADS, steps).sigmoid() * 2
    return made


def given_state(seed: int = 7, *, normalize: bool = False) -> fv.LinearState:
    z = random(BATCH, KEY_HEADS, DIM, seed=seed + 1).abs() if normalize else None
    return fv.LinearState(random(BATCH, KEY_HEADS, DIM, VALUE_DIM, seed=seed), z)


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    delta_rule: bool = False,
    state: fv.LinearState | None = None,
    documents: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out = (W ∘ mask)·v + R·S₀ with the whole n × n matrix W: row t is q_t·P(t, j)·k_j·β_j, R is q_t·P(t, 0).

    P(t, j) is the product of the factors (I − β·k·kᵀ)·A of the steps between, as dense matrices.
    """
    batch, heads, steps, dim = k.shape
    group = q.shape[1] // heads
    ones = torch.ones(batch, heads, steps, dim, dtype=q.dtype)
    if decay is not None:
        decay = decay[None, :, None, None] if decay.dim() == 1 else decay[..., None] if decay.dim() == 3 else decay
    factor = ones if decay is None else decay.exp() * ones
    write = ones[..., 0] if beta is None else beta
    own = torch.eye(dim, dtype=q.dtype) * factor[..., None, :]  # [B, H, T, D, D]: A, then (I − βkkᵀ)A
    if delta_rule:
        taken = torch.eye(dim, dtype=q.dtype) - write[..., None, None] * k[..., :, None] * k[..., None, :]
        own = taken @ own
    ids = torch.zeros(batch, steps, dtype=torch.int64) if documents is None else documents
    rows, through = [], torch.eye(dim, dtype=q.dtype).expand(batch, heads, dim, dim)
    reads = []
    columns = k.new_zeros(batch, heads, dim, 0)  # column j: P(t, j)·k_j·β_j
    for t in range(steps):
        columns = torch.cat([own[:, :, t] @ columns, (k[:, :, t] * write[:, :, t, None])[..., None]], -1)
        through = own[:, :, t] @ through
        query = q[:, :, t].unflatten(1, (heads, group))
        same = (ids[:, : t + 1] == ids[:, t, None])[:, None, None]
        rows.append(torch.nn.functional.pad((query @ columns) * same, (0, steps - t - 1)))
        reads.append((query @ through) * (ids[:, t] == ids[:, 0])[:, None, None, None])
    weights = torch.stack(rows, 3).flatten(1, 2)
    out = weights @ v.repeat_interleave(group, 1)
    same = (ids == ids[:, -1:])[:, None, None]
    last = (columns * same) @ v
    if state is not None:
        out = out + torch.stack(reads, 3).flatten(1, 2) @ state.s.repeat_interleave(group, 1)
        last = last + (through * (ids[:, -1] == ids[:, 0])[:, None, None, None]) @ state.s
    return out * (dim**-0.5 if scale is None else scale), last


def both(found: tuple[Tensor, fv.LinearState], true: tuple[Tensor, Tensor]) -> None:
    near(found[0], true[0], times=4096)
    near(found[1].s, true[1], times=4096)


@pytest.mark.parametrize("delta_rule", [False, True], ids=["plain", "delta"])
@pytest.mark.parametrize("gate", GATES)
def test_recurrent_is_chunked_is_parallel_at_every_length(gate: str, delta_rule: bool) -> None:
    for steps in range(1, 131):
        arguments = call(steps, gate, delta_rule=delta_rule, beta=steps % 2 == 0, seed=steps)
        state = given_state(steps) if steps % 3 else None
        true = parallel(**arguments, state=state)
        problem = linear_problem(**arguments, state=state)
        if steps < 20 or steps % 16 < 2:
            both(problem.result(*recurrence.run(problem)), true)
        both(problem.result(*chunked.run(problem)), true)
        both(problem.result(*chunked.run(problem, chunk=(1, 3, 7, 16, 23, 37, 64)[steps % 7])), true)


def test_the_size_of_a_chunk_changes_nothing() -> None:
    for gate in GATES:
        problem = linear_problem(**call(89, gate), state=given_state())
        true = chunked.run(problem)
        for chunk in (1, 2, 5, 11, 32, 88, 89, 90, 1000):
            for mine, theirs in zip(chunked.run(problem, chunk), true, strict=True):
                near(mine, theirs, times=1024)


def leaves(arguments: dict[str, Tensor | bool], *more: Tensor) -> list[Tensor]:
    return [x.requires_grad_() for x in (*arguments.values(), *more) if isinstance(x, Tensor)]


def slopes(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    total = sum((x * random(*x.shape, seed=5 + n)).sum() for n, x in enumerate(outputs))
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("delta_rule", [False, True], ids=["plain", "delta"])
@pytest.mark.parametrize("gate", GATES)
def test_gradients_are_those_of_the_parallel_form(gate: str, delta_rule: bool, backend: str) -> None:
    arguments, state = call(71, gate, delta_rule=delta_rule), given_state()
    inputs = leaves(arguments, state.s)
    true = slopes(parallel(**arguments, state=state), inputs)
    out, last = fv.linear_attention(**arguments, state=state, backend=backend)
    for mine, theirs in zip(slopes((out, last.s), inputs), true, strict=True):
        near(mine, theirs, times=16384)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("normalize", [False, True], ids=["bare", "normalised"])
def test_split_and_state_are_the_whole(gate: str, backend: str, normalize: bool) -> None:
    arguments = call(83, gate, delta_rule=not normalize)
    options = {"normalize": normalize, "backend": backend, "feature": fv.elu_plus_one if normalize else None}
    state = given_state(normalize=normalize)
    inputs = leaves(arguments, *(x for x in state if x is not None))
    whole, last = fv.linear_attention(**arguments, **options, state=state)
    parts, handed = [], state
    for some in (slice(0, 31), slice(31, 32), slice(32, 83)):
        part = {name: x[:, :, some] if isinstance(x, Tensor) and x.dim() > 1 else x for name, x in arguments.items()}
        out, handed = fv.linear_attention(**part, **options, state=handed)
        parts.append(out)
    kept = [n for n in range(2) if last[n] is not None]
    mine, theirs = (torch.cat(parts, 2), *(handed[n] for n in kept)), (whole, *(last[n] for n in kept))
    for one, other in zip((*mine, *slopes(mine, inputs)), (*theirs, *slopes(theirs, inputs)), strict=True):
        near(one, other, times=16384)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_decay_is_a_decay_of_nothing_and_beta_left_out_is_one(backend: str) -> None:
    arguments = call(67, "none", beta=False)
    true = fv.linear_attention(**arguments, backend=backend)[0]
    zero = torch.zeros(BATCH, KEY_HEADS, 67, DIM, dtype=torch.float64)
    near(fv.linear_attention(**arguments, decay=zero, backend=backend)[0], true, times=1024)
    near(fv.linear_attention(**arguments, decay=zero[..., 0], backend=backend)[0], true, times=1024)
    near(fv.linear_attention(**arguments, decay=zero[0, :, 0, 0], backend=backend)[0], true, times=1024)
    near(fv.linear_attention(**arguments, beta=zero[..., 0] + 1, backend=backend)[0], true, times=1024)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decays_by_head_step_and_channel_broadcast(backend: str) -> None:
    arguments = call(41, "none")
    by_head = -random(KEY_HEADS).exp()
    true = fv.linear_attention(**arguments, decay=by_head, backend=backend)[0]
    for decay in (
        by_head[None, :, None],
        by_head[None, :, None, None],
        by_head[:, None].expand(BATCH, KEY_HEADS, 41),
        by_head[:, None, None].expand(BATCH, KEY_HEADS, 41, DIM),
    ):
        near(fv.linear_attention(**arguments, decay=decay, backend=backend)[0], true, times=1024)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", GATES)
def test_no_step_knows_the_future(gate: str, backend: str) -> None:
    arguments = call(79, gate)
    before = fv.linear_attention(**arguments, backend=backend)[0]
    for at in (0, 1, 40, 63, 64, 78):
        for name in arguments.keys() - {"delta_rule"}:
            if arguments[name].dim() == 1:
                continue
            changed = arguments[name].clone()
            changed[:, :, at:] = changed[:, :, at:] * 0.5
            after = fv.linear_attention(**arguments | {name: changed}, backend=backend)[0]
            near(after[:, :, :at], before[:, :, :at], times=16)
            assert (after[:, :, at] - before[:, :, at]).abs().max() > 1e-6 or (at, name) == (0, "decay")


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_query_reads_the_last_state_when_it_is_not_causal(backend: str) -> None:
    for gate in GATES:
        arguments = call(73, gate)
        state = given_state()
        _, last = parallel(**arguments, state=state)
        q = random(BATCH, HEADS, 11, DIM, seed=99)
        found = fv.linear_attention(**arguments | {"q": q}, causal=False, state=state, backend=backend)
        both(found, (q @ last.repeat_interleave(GROUP, 1) * DIM**-0.5, last))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "everyone"])
def test_normalised_is_a_mean_by_the_products_of_features(causal: bool, backend: str) -> None:
    arguments = call(61, "none", delta_rule=False, beta=False)
    q, k, v = (arguments[name] for name in "qkv")
    weights = fv.elu_plus_one(q) @ fv.elu_plus_one(k).repeat_interleave(GROUP, 1).mT
    weights = weights.tril() if causal else weights
    true = (weights / weights.sum(-1, keepdim=True)) @ v.repeat_interleave(GROUP, 1)
    for scale in (None, 3.0):  # it cancels
        found, state = fv.linear_attention(
            q, k, v, feature=fv.elu_plus_one, normalize=True, causal=causal, scale=scale, backend=backend
        )
        near(found, true, times=1024)
        near(state.z, fv.elu_plus_one(k).sum(2), times=1024)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_weight_gives_zero(backend: str) -> None:
    arguments = call(9, "none", delta_rule=False, beta=False)
    q = arguments["q"].clone()
    q[:, :, 4] = -1
    out, _ = fv.linear_attention(**arguments | {"q": q}, feature=torch.relu, normalize=True, backend=backend)
    assert not out[:, :, 4].any()
    assert out.isfinite().all()


IDS = torch.tensor([[0] * 23 + [1] + [5] * 44 + [2] * 5, [3] * 65 + [1] * 8])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("delta_rule", [False, True], ids=["plain", "delta"])
@pytest.mark.parametrize("gate", GATES)
def test_documents_begin_with_an_empty_state(gate: str, delta_rule: bool, backend: str) -> None:
    arguments, state = call(73, gate, delta_rule=delta_rule), given_state()
    inputs = leaves(arguments, state.s)
    true = parallel(**arguments, state=state, documents=IDS)
    found = fv.linear_attention(**arguments, state=state, documents=IDS, backend=backend)
    both(found, true)
    mine = slopes((found[0], found[1].s), inputs)
    for one, other in zip(mine, slopes(true, inputs), strict=True):
        near(one, other, times=16384)


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_are_separate_calls(backend: str) -> None:
    arguments = call(73)
    packed = fv.documents(cu_seqlens=torch.tensor([0, 13, 13, 50, 73]))
    found, last = fv.linear_attention(**arguments, documents=packed, backend=backend)
    for some in (slice(0, 13), slice(13, 50), slice(50, 73)):
        part = {name: x[:, :, some] if isinstance(x, Tensor) else x for name, x in arguments.items()}
        alone, state = fv.linear_attention(**part, backend=backend)
        near(found[:, :, some], alone, times=1024)
    near(last.s, state.s, times=1024)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", GATES)
def test_a_position_of_no_document_is_passed_over(gate: str, backend: str) -> None:
    arguments, state = call(47, gate), given_state()
    kept = torch.tensor([n for n in range(47) if n not in (0, 1, 17, 18, 30, 46)])
    ids = torch.full((47,), -1)
    ids[kept] = (kept > 20).long()
    few = {name: x[:, :, kept] if isinstance(x, Tensor) and x.dim() > 1 else x for name, x in arguments.items()}
    true, last = fv.linear_attention(**few, state=state, documents=ids[kept], backend=backend)
    poisoned = {}
    for name, x in arguments.items():
        poisoned[name] = x
        if isinstance(x, Tensor) and x.dim() > 1:
            poisoned[name] = torch.full_like(x, torch.nan)
            poisoned[name][:, :, kept] = x[:, :, kept]
    inputs = leaves(poisoned)
    found, after = fv.linear_attention(**poisoned, state=state, documents=ids, backend=backend)
    near(found[:, :, kept], true, times=1024)
    near(after.s, last.s, times=1024)
    assert not found[:, :, ids < 0].any()
    assert all(gradient.isfinite().all() for gradient in slopes((found, after.s), inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_broken_reaches_no_earlier_row_and_no_other_document(gate: str, backend: str, broken: float) -> None:
    arguments = call(73, gate)
    true = fv.linear_attention(**arguments, documents=IDS, backend=backend)[0]
    for name in "kv":
        hurt = arguments[name].clone()
        hurt[0, 1, 30, 2] = broken
        found, state = fv.linear_attention(**arguments | {name: hurt}, documents=IDS, backend=backend)
        assert state.s.isfinite().all()
        reached = torch.zeros_like(found, dtype=torch.bool)
        reached[0, GROUP : 2 * GROUP, 30:68] = True  # key head 1, until its document ends
        near(found.masked_fill(reached, 0), true.masked_fill(reached, 0), times=1024)
        assert not found[0, GROUP : 2 * GROUP, 30:68].isfinite().all(-1).any()
        _, state = fv.linear_attention(**arguments | {name: hurt}, backend=backend)
        assert not state.s[0, 1].isfinite().all()
        assert state.s[1].isfinite().all()
    query = arguments["q"].clone()
    query[1, 2, 7] = broken
    found = fv.linear_attention(**arguments | {"q": query}, documents=IDS, backend=backend)[0]
    assert not found[1, 2, 7].isfinite().any()
    found[1, 2, 7] = true[1, 2, 7]
    near(found, true, times=1024)


@pytest.mark.parametrize("backend", NARROW)
@pytest.mark.parametrize("gate", ["by step", "by channel"])
@pytest.mark.parametrize("strong", [-50.0, -3000.0, -torch.inf])
def test_strong_decays_stay_exact_in_float32(gate: str, backend: str, strong: float) -> None:
    arguments = call(97, gate)
    decay = arguments["decay"] * 0.01
    decay[:, :, ::5] = strong  # beside weak ones, which a difference of large sums would lose
    arguments["decay"] = decay
    assert_linear_within_budget(backend, linear_problem(**arguments), torch.float32)
    arguments["decay"] = torch.full_like(decay, strong)
    assert_linear_within_budget(backend, linear_problem(**arguments), torch.float32)


@pytest.mark.parametrize("backend", NARROW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta_rule", [False, True], ids=["plain", "delta"])
def test_every_dtype_keeps_within_the_budget(gate: str, delta_rule: bool, dtype: torch.dtype, backend: str) -> None:
    problem = linear_problem(**call(131, gate, delta_rule=delta_rule), state=given_state())
    assert_linear_within_budget(backend, problem, dtype)
    out, state = fv.linear_attention(*(getattr(problem, name).to(dtype) for name in "qkv"), backend=backend)
    assert (out.dtype, state.s.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", GATES)
def test_first_and_second_derivatives_by_finite_differences(gate: str, backend: str) -> None:
    problem = linear_problem(**call(5, gate), state=fv.LinearState(random(BATCH, KEY_HEADS, DIM, VALUE_DIM), None))
    names = [name for name in ("q", "k", "v", "decay", "beta", "state") if getattr(problem, name) is not None]
    run = {"recurrence": recurrence.run, "chunked": lambda call: chunked.run(call, 3)}[backend]
    small = {name: getattr(problem, name)[:1, :2].detach().clone().requires_grad_() for name in names}
    small["k"], small["v"] = (small[name][:, :1].detach().clone().requires_grad_() for name in "kv")
    for name in small.keys() - {"q", "k", "v"}:
        small[name] = small[name][:, :1].detach().clone().requires_grad_()

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return run(replace(problem, **dict(zip(small, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, tuple(small.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(small.values()), fast_mode=True)


@pytest.mark.parametrize("backend", NARROW)
@pytest.mark.parametrize("empty", ["batch", "heads", "steps", "dim", "value dim"])
@pytest.mark.parametrize("delta_rule", [False, True], ids=["plain", "delta"])
def test_nothing_is_a_size_too(empty: str, delta_rule: bool, backend: str) -> None:
    sizes = {"batch": 2, "heads": 3, "steps": 5, "dim": 7, "value dim": 11} | {empty: 0}
    batch, heads, steps, dim, width = sizes.values()
    q = torch.randn(batch, 2 * heads, steps, dim)
    k, v = torch.randn(batch, heads, steps, dim), torch.randn(batch, heads, steps, width)
    decay = -torch.rand(batch, heads, steps, dim)
    for causal in (True, False):
        out, state = fv.linear_attention(q, k, v, decay=decay, delta_rule=delta_rule, causal=causal, backend=backend)
        assert out.shape == (batch, 2 * heads, steps, width)
        assert state.s.shape == (batch, heads, dim, width)
        if empty in ("dim", "steps"):
            assert not out.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_steps_hand_the_state_on(backend: str) -> None:
    given = given_state()
    _, state = fv.linear_attention(**call(0), state=given, backend=backend)
    assert torch.equal(state.s, given.s)


def test_the_batch_may_be_left_out_and_strides_are_free() -> None:
    arguments = call(29, "by channel")
    true, last = fv.linear_attention(**arguments, state=given_state())
    one = {name: x[0] if isinstance(x, Tensor) else x for name, x in arguments.items()}
    out, state = fv.linear_attention(**one, state=fv.LinearState(given_state().s[0], None))
    near(out, true[0], times=64)
    near(state.s, last.s[0], times=64)
    odd = {
        name: x.transpose(1, 2).contiguous().transpose(1, 2) if isinstance(x, Tensor) else x
        for name, x in arguments.items()
    }
    near(fv.linear_attention(**odd, state=given_state())[0], true, times=64)


def test_one_step_is_the_recurrence_and_more_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for module in (recurrence, chunked):
        whole = module.run
        monkeypatch.setattr(
            module, "run", lambda call, run=whole, name=module.__name__: (ran.append(name), run(call))[1]
        )
    for steps in (1, 2):
        fv.linear_attention(**call(steps))
    assert ran == ["foveate.linear.recurrence", "foveate.linear.chunked"]


def test_a_graph_holds_the_whole_call() -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # the tracer cannot follow the checks of shapes
    try:

        def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            state, ids = fv.LinearState(s, None), IDS[:, :37]
            out, last = fv.linear_attention(
                q, k, v, decay=decay, beta=beta, delta_rule=True, state=state, documents=ids
            )
            return out, last.s

        arguments = [x for x in (*call(37, "by channel").values(), given_state().s) if isinstance(x, Tensor)]
        found = torch.compile(attend, fullgraph=True, backend="aot_eager")(*arguments)
        for mine, theirs in zip(found, attend(*arguments), strict=True):
            near(mine, theirs, times=1024)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
        torch._dynamo.reset()


def test_autocast_casts_q_k_v_and_nothing_else() -> None:
    arguments = {name: x.float() if isinstance(x, Tensor) else x for name, x in call(37).items()}
    with torch.autocast("cpu", torch.bfloat16):
        out, state = fv.linear_attention(**arguments)
    cast = arguments | {name: arguments[name].bfloat16() for name in "qkv"}
    true, last = fv.linear_attention(**cast)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, true)
    assert torch.equal(state.s, last.s)


MEMORY = """
import resource, torch, foveate as fv
torch.set_num_threads(1)
q, k, v = torch.randn(3, 1, 1, 32768, 8)
k = torch.nn.functional.normalize(k, dim=-1)
q.requires_grad_()
decay = {decay}
few = (x[:, :, :64] for x in (q, k, v))
fv.linear_attention(*few, decay=decay[:, :, :64], delta_rule=True)[0].sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fv.linear_attention(q, k, v, decay=decay, delta_rule=True)[0].sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    "decay", ["-torch.rand(1, 1, 32768)", "-torch.rand(1, 1, 32768, 8)"], ids=["scalar", "channel"]
)
def test_no_matrix_of_the_whole_length_is_made(decay: str) -> None:
    grown = int(subprocess.check_output([sys.executable, "-c", MEMORY.format(decay=decay)], text=True))
    unit = 1 if sys.platform == "darwin" else 1024
    assert grown * unit < 32768**2 / 4  # a sixteenth of such a matrix in float32: 256 MiB
