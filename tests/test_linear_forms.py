"""Feature maps and named forms against the equations of their papers, written out here as loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from calls import near, random
from test_linear import BACKENDS, BATCH, DIM, GROUP, HEADS, KEY_HEADS, VALUE_DIM, call, given_state
from torch import Tensor
from torch.nn.functional import normalize

import foveate as fv

STEPS = 37


def qkv(steps: int = STEPS) -> tuple[Tensor, Tensor, Tensor]:
    arguments = call(steps)
    return arguments["q"], arguments["k"], arguments["v"]  # type: ignore[return-value]


def heads_of(x: Tensor) -> Tensor:
    return x.repeat_interleave(GROUP, 1)


def stepwise(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, delta_rule: bool) -> Tensor:
    """o = Sᵀq/√d, one number at a time: the papers' recurrences for one batch row and head; alpha `[steps, dim]`."""
    steps, dim = k.shape
    state = [[0.0] * v.shape[1] for _ in range(dim)]
    rows = []
    for t in range(steps):
        state = [[float(alpha[t, i]) * x for x in state[i]] for i in range(dim)]
        for j in range(v.shape[1]):
            said = sum(float(k[t, i]) * state[i][j] for i in range(dim)) if delta_rule else 0.0
            for i in range(dim):
                state[i][j] += float(beta[t]) * float(k[t, i]) * (float(v[t, j]) - said)
        rows.append([sum(float(q[t, i]) * state[i][j] for i in range(dim)) / math.sqrt(dim) for j in range(v.shape[1])])
    return torch.tensor(rows, dtype=torch.float64)


def every_head(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, delta_rule: bool) -> Tensor:
    """`stepwise` for every batch row and query head; alpha `[B, Hk, steps, dim]`, beta `[B, Hk, steps]`."""
    return torch.stack(
        [
            torch.stack(
                [
                    stepwise(q[b, h], *(x[b, h // GROUP] for x in (k, v, alpha, beta)), delta_rule)
                    for h in range(q.shape[1])
                ]
            )
            for b in range(q.shape[0])
        ]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_named_form_is_its_papers_recurrence(backend: str) -> None:
    q, k, v = qkv(11)
    by_step, by_channel = (-random(BATCH, KEY_HEADS, 11, *more, seed=8).exp() for more in ((), (DIM,)))
    beta = random(BATCH, KEY_HEADS, 11, seed=9).sigmoid()
    one, ones = torch.ones_like(beta), torch.ones_like(by_channel)
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(KEY_HEADS)], dtype=torch.float64)[None, :, None, None]
    scalar = by_step.exp()[..., None] * ones
    forms = {
        "retention": (fv.retention(q, k, v, backend=backend), (gamma * ones, one, False)),
        "gated_linear": (fv.gated_linear(q, k, v, by_channel, backend=backend), (by_channel.exp(), one, False)),
        "delta": (fv.delta(q, k, v, beta, backend=backend), (ones, beta, True)),
        "gated_delta": (fv.gated_delta(q, k, v, by_step, beta, backend=backend), (scalar, beta, True)),
        "kimi_delta": (fv.kimi_delta(q, k, v, by_channel, beta, backend=backend), (by_channel.exp(), beta, True)),
    }
    for (found, state), (alpha, write, delta_rule) in forms.values():
        near(found, every_head(q, k, v, alpha, write, delta_rule), times=256)
        assert state.z is None


def test_a_gate_of_nothing_is_the_delta_rule_and_a_constant_one_is_retention() -> None:
    q, k, v = qkv()
    beta = random(BATCH, KEY_HEADS, STEPS).sigmoid()
    none = torch.zeros(BATCH, KEY_HEADS, STEPS, DIM, dtype=torch.float64)
    near(fv.gated_delta(q, k, v, none[..., 0], beta)[0], fv.delta(q, k, v, beta)[0], times=256)
    near(fv.kimi_delta(q, k, v, none, beta)[0], fv.delta(q, k, v, beta)[0], times=256)
    gamma = torch.tensor([-0.5, -0.25, -0.125], dtype=torch.float64)
    constant = gamma[:, None, None].expand(BATCH, -1, STEPS, DIM)
    near(fv.gated_linear(q, k, v, constant)[0], fv.retention(q, k, v, gamma)[0], times=256)
    near(fv.gated_linear(q, k, v, constant[..., 0])[0], fv.retention(q, k, v, gamma)[0], times=256)


def test_the_same_decay_in_every_channel_is_one_decay() -> None:
    q, k, v = qkv()
    decay, beta = -random(BATCH, KEY_HEADS, STEPS).exp(), random(BATCH, KEY_HEADS, STEPS, seed=3).sigmoid()
    wide = decay[..., None].expand(-1, -1, -1, DIM)
    near(fv.kimi_delta(q, k, v, wide, beta)[0], fv.gated_delta(q, k, v, decay, beta)[0], times=256)


def test_retention_is_its_parallel_form() -> None:
    q, k, v = qkv()
    distance = torch.arange(STEPS)[:, None] - torch.arange(STEPS)
    gamma = (1 - 2.0 ** -(5 + torch.arange(KEY_HEADS, dtype=torch.float64)))[:, None, None]
    decayed = torch.where(distance >= 0, gamma ** distance.clamp(min=0), 0)
    true = ((q @ heads_of(k).mT) * decayed.repeat_interleave(GROUP, 0)) @ heads_of(v) / math.sqrt(DIM)
    near(fv.retention(q, k, v)[0], true, times=256)


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_gated_delta_is_that_of_qwen3_next(name: str) -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next

    steps = 71
    draw = torch.Generator().manual_seed(3)
    q, k = (normalize(torch.randn(2, 3, steps, 16, generator=draw), dim=-1) for _ in range(2))
    v = torch.randn(2, 3, steps, 11, generator=draw)
    decay, beta = -torch.rand(2, 3, steps, generator=draw), torch.rand(2, 3, steps, generator=draw)
    state = torch.randn(2, 3, 16, 11, generator=draw)
    tensors = [q, k, v, decay, beta, state]
    true, last = getattr(modeling_qwen3_next, name)(
        *(x.transpose(1, 2) for x in tensors[:5]), initial_state=state, output_final_state=True
    )
    exact = [x.double().requires_grad_() for x in tensors]
    found, handed = fv.gated_delta(*exact[:5], state=fv.LinearState(exact[5], None))
    bound = 64 * torch.finfo(torch.float32).eps  # theirs is in float32
    assert (found - true.transpose(1, 2)).abs().max() < bound * found.abs().max()
    assert (handed.s - last).abs().max() < bound * last.abs().max()
    theirs = [x.clone().requires_grad_() for x in tensors]
    true, last = getattr(modeling_qwen3_next, name)(
        *(x.transpose(1, 2) for x in theirs[:5]), initial_state=theirs[5], output_final_state=True
    )
    mine = torch.autograd.grad(found.sin().sum() + handed.s.cos().sum(), exact)
    for one, other in zip(mine, torch.autograd.grad(true.sin().sum() + last.cos().sum(), theirs), strict=True):
        assert (one - other).abs().max() < 4 * bound * one.abs().max()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "everyone"])
def test_elu_linear_is_katharopoulos_equation(causal: bool) -> None:
    q, k, v = qkv()
    features = [torch.where(x > 0, x + 1, x.exp()) for x in (q, heads_of(k))]
    pairs = features[0] @ features[1].mT
    pairs = pairs.tril() if causal else pairs
    found, state = fv.elu_linear(q, k, v, causal=causal)
    near(found, pairs @ heads_of(v) / pairs.sum(-1, keepdim=True), times=256)
    assert state.z is not None


def test_favor_is_softmax_on_average() -> None:
    draw = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 7, 8, generator=draw, dtype=torch.float64)
    true = (q @ k.mT / math.sqrt(8)).exp()
    phi = fv.favor(8, 24, generator=draw)
    found = []
    for _ in range(4000):
        phi = phi.redrawn(draw)
        found.append(phi(q) @ phi(k).mT)
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / math.sqrt(4000)
    assert ((mean - true).abs() / error).max() < 4.5  # of 49 draws from a normal distribution


def test_favors_directions_are_orthogonal_in_blocks_and_as_long_as_gaussians() -> None:
    directions = fv.favor(11, 400, generator=torch.Generator().manual_seed(1)).directions
    for block in directions.split(11):
        products = block @ block.mT
        near(products, torch.diag(products.diagonal()), times=256)
    squares = (directions**2).sum(-1)
    assert (squares.mean() - 11).abs() < 4 * math.sqrt(2 * 11 / 400)
    assert squares.std() > 1


def test_favor_is_fixed_by_its_generator_and_redrawn_differs() -> None:
    one, two = (fv.favor(5, 13, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one.directions, two.directions)
    fresh = one.redrawn(torch.Generator().manual_seed(5))
    assert fresh.directions.shape == (13, 5)
    assert not torch.equal(fresh.directions, one.directions)
    assert repr(one) == "favor(5, 13)"
    assert fv.favor(64).directions.shape == (round(64 * math.log(64)), 64)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "everyone"])
def test_performer_comes_near_softmax_with_many_directions(causal: bool) -> None:
    q, k, v = qkv()
    true = fv.attention(q, k, v, fv.causal if causal else None)
    errors = []
    for count in (32, 8192):
        phi = fv.favor(DIM, count, generator=torch.Generator().manual_seed(6))
        out, state = fv.performer(q, k, v, phi, causal=causal)
        errors.append((out - true).abs().mean())
        assert state.s.shape == (BATCH, KEY_HEADS, count, VALUE_DIM)
    assert errors[1] < errors[0] / 4
    assert errors[1] < 0.05


def test_cosformer_weighs_by_distance() -> None:
    q, k, v = qkv()
    place = torch.arange(STEPS, dtype=torch.float64)
    pairs = q.relu() @ heads_of(k).relu().mT * torch.cos(math.pi / 2 * (place[:, None] - place) / 41)
    pairs = pairs.tril()
    true = torch.nan_to_num(pairs @ heads_of(v) / pairs.sum(-1, keepdim=True))
    near(fv.linear_attention(q, k, v, feature=fv.cosformer(41), normalize=True)[0], true, times=2048)
    first, state = fv.linear_attention(*(x[:, :, :20] for x in (q, k, v)), feature=fv.cosformer(41), normalize=True)
    rest = fv.linear_attention(
        *(x[:, :, 20:] for x in (q, k, v)), feature=fv.cosformer(41, start=20), normalize=True, state=state
    )[0]
    near(torch.cat([first, rest], 2), true, times=2048)


def test_taylors_product_is_the_exponentials_first_terms() -> None:
    q, k, _ = qkv()
    scores = q @ heads_of(k).mT / math.sqrt(DIM)
    near(fv.taylor(q) @ heads_of(fv.taylor(k)).mT, 1 + scores + scores**2 / 2, times=64)


def test_hedgehog_is_two_softmaxes_of_what_it_learned() -> None:
    q, k, v = qkv()
    of_q, of_k = random(HEADS, DIM, 3).requires_grad_(), random(DIM, 3, seed=2).requires_grad_()
    out, state = fv.linear_attention(q, k, v, feature=(fv.hedgehog(of_q), fv.hedgehog(of_k)), normalize=True)
    signed = [torch.cat([(s * (x @ w)).softmax(-1) for s in (1, -1)], -1) for x, w in ((q, of_q), (k, of_k))]
    pairs = (signed[0] @ heads_of(signed[1]).mT).tril()
    near(out, pairs @ heads_of(v) / pairs.sum(-1, keepdim=True), times=256)
    assert state.s.shape == (BATCH, KEY_HEADS, 6, VALUE_DIM)
    assert all(x.abs().max() > 0 for x in torch.autograd.grad(out.square().sum(), (of_q, of_k)))


def test_features_are_differentiable_by_finite_differences() -> None:
    x = random(1, 2, 3, 5).requires_grad_()
    maps = (
        fv.elu_plus_one,
        fv.taylor,
        fv.favor(5, 7, generator=torch.Generator().manual_seed(1)),
        fv.cosformer(3),
        fv.hedgehog(random(5, 2)),
    )
    for feature in maps:
        assert torch.autograd.gradcheck(feature, (x,))


def test_bfloat16_features_are_worked_out_in_float32() -> None:
    q, k, v = (x.bfloat16() for x in qkv())
    out, state = fv.elu_linear(q, k, v)
    true, _ = fv.elu_linear(*(x.float() for x in (q, k, v)))
    assert out.dtype == torch.bfloat16
    assert state.s.dtype == state.z.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(out, true.bfloat16())


def test_decoding_step_by_step_is_the_whole() -> None:
    q, k, v = qkv()
    decay, beta = -random(BATCH, KEY_HEADS, STEPS).exp(), random(BATCH, KEY_HEADS, STEPS, seed=3).sigmoid()
    whole, last = fv.gated_delta(q, k, v, decay, beta, state=given_state())
    state, rows = given_state(), []
    for t in range(STEPS):
        row, state = fv.gated_delta(*(x[:, :, t : t + 1] for x in (q, k, v, decay, beta)), state=state)
        rows.append(row)
    near(torch.cat(rows, 2), whole, times=256)
    near(state.s, last.s, times=256)
