"""Layers of the linear family: their papers' equations as loops, and what holds for every one that carries a state."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from calls import near, random
from torch import Tensor, nn

import foveate as fv
from foveate.nn import (
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    KimiDeltaAttention,
    LightningAttention,
    LinearAttention,
    MixerState,
    MultiScaleRetention,
    Performer,
    ShortConvolution,
)

BATCH, STEPS, DIM, HEADS = 3, 11, 12, 2
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: LinearAttention(DIM, HEADS),
    "performer": lambda: Performer(DIM, HEADS, features=13),
    "retention": lambda: MultiScaleRetention(DIM, HEADS),
    "lightning": lambda: LightningAttention(DIM, HEADS, layer=1, layers=3),
    "gated linear": lambda: GatedLinearAttention(DIM, HEADS, rank=5, temperature=2.0),
    "delta": lambda: DeltaNet(DIM, HEADS, key_dim=5),
    "reflecting delta": lambda: DeltaNet(DIM, HEADS, reflecting=True, width=1),
    "gated delta": lambda: GatedDeltaNet(DIM, 4, key_heads=2, key_dim=5, value_dim=7),
    "kimi delta": lambda: KimiDeltaAttention(DIM, HEADS, value_dim=7, rank=3),
}
layers = pytest.mark.parametrize("name", LAYERS)


def made(name: str) -> nn.Module:
    """A layer in float64 with weights large enough that every gate is somewhere in between."""
    torch.manual_seed(len(name))
    layer = LAYERS[name]().double()
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.5)
    return layer


def run(layer: nn.Module, x: Tensor, state: MixerState | None = None, documents: object = None):
    return layer(x, state=state, documents=documents)


def same(found: MixerState, true: MixerState) -> None:
    for mine, theirs in zip((*found.memory, *found[1:]), (*true.memory, *true[1:]), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            near(mine, theirs, times=4096)


def stacked(states: list[MixerState]) -> MixerState:
    """The states of rows that ran apart, as the state of a batch."""

    def both(*parts: Tensor | None) -> Tensor | None:
        return None if parts[0] is None else torch.cat(parts)

    memory = fv.LinearState(*map(both, *(state.memory for state in states)))
    return MixerState(memory, *map(both, *(state[1:] for state in states)))


def of_row(state: MixerState, row: int) -> MixerState:
    def cut(part: Tensor | None) -> Tensor | None:
        return None if part is None else part[row : row + 1]

    return MixerState(fv.LinearState(*map(cut, state.memory)), *map(cut, state[1:]))


# What holds for every layer.


@layers
def test_split_and_state_is_the_whole(name: str) -> None:
    layer, x = made(name), random(BATCH, STEPS, DIM)
    whole, last = run(layer, x)
    for cuts in ((4,), (1, 2, 9), tuple(range(1, STEPS))):
        state, parts = None, []
        for part in x.tensor_split(cuts, 1):
            out, state = run(layer, part, state)
            parts.append(out)
        near(torch.cat(parts, 1), whole, times=4096)
        same(state, last)


@layers
def test_the_gradient_goes_through_the_state_to_every_parameter(name: str) -> None:
    layer, x = made(name), random(BATCH, STEPS, DIM).requires_grad_()
    weight = random(BATCH, STEPS, DIM, seed=3)
    leaves = [x, *layer.parameters()]
    true = torch.autograd.grad((run(layer, x)[0] * weight).sum(), leaves)
    first, state = run(layer, x[:, :4])
    second, _ = run(layer, x[:, 4:], state)
    mine = torch.autograd.grad((torch.cat([first, second], 1) * weight).sum(), leaves)
    for found, want in zip(mine, true, strict=True):
        near(found, want, times=1 << 15)
        assert want.abs().max() > 0


@layers
def test_no_step_sees_a_later_one(name: str) -> None:
    layer, x = made(name), random(BATCH, STEPS, DIM)
    for t in (0, 5, STEPS - 1):
        changed = x.clone()
        changed[:, t] += 1
        moved = (run(layer, changed)[0] - run(layer, x)[0]).abs().amax((0, 2))
        assert moved[:t].max() == 0 if t else True
        assert (moved[t:] > 1e-12).all()


@layers
def test_documents_in_one_row_are_documents_apart(name: str) -> None:
    layer, x = made(name), random(1, STEPS, DIM)
    first, before = run(layer, random(1, 3, DIM, seed=9))
    for documents in (
        torch.tensor([[4, 4, 4, 7, 7, 7, 7, 7, 7, 7, 2]]),
        fv.documents(cu_seqlens=torch.tensor([0, 3, 10, 11])),
    ):
        out, last = run(layer, x, before, documents)
        parts, state = [], before
        for part in (x[:, :3], x[:, 3:10], x[:, 10:]):
            part_out, state = run(layer, part, state)
            parts.append(part_out)
            final, state = state, None
        near(out, torch.cat(parts, 1), times=4096)
        if last.steps is None:  # where keys turn with their step, a state belongs to its steps
            same(last, final)
        after = random(1, 2, DIM, seed=5)
        near(run(layer, after, last)[0], run(layer, after, final)[0], times=4096)
    assert first.shape == (1, 3, DIM)


@layers
@pytest.mark.parametrize("value", [0.0, math.nan])
def test_padding_is_passed_over_wherever_it_stands(name: str, value: float) -> None:
    layer, lengths, places = made(name), (0, 1, 6), torch.full((3, STEPS), -1)
    alone = [random(1, n, DIM, seed=n) for n in lengths]
    x = torch.full((3, STEPS, DIM), value, dtype=torch.float64)
    places[1, 4], places[2, [1, 2, 5, 6, 7, 10]] = 0, 0
    for row, part in enumerate(alone):
        x[row, places[row] == 0] = part[0]
    starts = [run(layer, random(1, 2, DIM, seed=20 + row))[1] for row in range(3)]
    leaves = list(layer.parameters())
    out, last = run(layer, x, stacked(starts), places)
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(out[places == 0].sum(), leaves))
    for row, part in enumerate(alone):
        mine, own = run(layer, part, starts[row])
        near(out[row, places[row] == 0], mine[0], times=4096)
        same(of_row(last, row), own)


@layers
def test_a_layer_is_saved_copied_and_run_in_half_the_digits(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(BATCH, STEPS, DIM, generator=torch.Generator().manual_seed(1))
    twin = LAYERS[name]()
    twin.load_state_dict(layer.state_dict())
    for other in (twin, copy.deepcopy(layer)):
        assert torch.equal(run(other, x)[0], run(layer, x)[0])
    half, state = run(copy.deepcopy(layer).bfloat16(), x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert state.memory.s.dtype == torch.float32
    assert (half - run(layer, x)[0]).abs().max() < 0.1
    assert run(layer, x[:, :0])[0].shape == (BATCH, 0, DIM)
    assert run(layer, x[:0])[0].shape == (0, STEPS, DIM)


# What each of them is.


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], heads, -1)


def projected(part: nn.Module, x: Tensor) -> Tensor:
    """x·W + b by hand, for one layer or two in a row."""
    for linear in part if isinstance(part, nn.Sequential) else [part]:
        x = torch.einsum("btd,cd->btc", x, linear.weight) + (0 if linear.bias is None else linear.bias)
    return x


def by_steps(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, delta: bool) -> Tensor:
    """Every head of `[batch, steps, heads, dim]` apart: S ← A S, S ← S + β k (v − kᵀS or v)ᵀ, o = Sᵀq/√d."""
    out = torch.zeros_like(v)
    for b in range(v.shape[0]):
        for h in range(v.shape[2]):
            state = torch.zeros(k.shape[3], v.shape[3], dtype=torch.float64)
            for t in range(v.shape[1]):
                state = alpha[b, t, h][:, None] * state
                said = k[b, t, h] @ state if delta else 0
                state = state + beta[b, t, h] * torch.outer(k[b, t, h], v[b, t, h] - said)
                out[b, t, h] = q[b, t, h] @ state / math.sqrt(k.shape[3])
    return out


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def convolved(convolution: ShortConvolution, x: Tensor) -> Tensor:
    """SiLU of the sum over the last steps, one step at a time."""
    width, out = convolution.weight.shape[1], torch.zeros_like(x)
    for t in range(x.shape[1]):
        for j in range(min(width, t + 1)):
            out[:, t] += convolution.weight[:, width - 1 - j] * x[:, t - j]
    return out * out.sigmoid()


def read(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q and k of length 1, and v, by the delta rule's papers."""
    reader = layer.read
    mixed = convolved(
        reader.convolution, torch.cat([projected(part, x) for part in (reader.query, reader.key, reader.value)], -1)
    )
    q, k, v = mixed.split(reader.sizes, -1)
    q, k = (heads_of(y, reader.key_heads) for y in (q, k))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    group = reader.heads // reader.key_heads
    q, k = (torch.stack([y[:, :, h // group] for h in range(reader.heads)], 2) for y in (q, k))
    return q, k, heads_of(v, reader.heads)


@pytest.mark.parametrize("name", ["delta", "reflecting delta", "gated delta", "kimi delta"])
def test_the_delta_rule_s_layers_are_their_papers(name: str) -> None:
    layer, x = made(name), random(BATCH, STEPS, DIM)
    q, k, v = read(layer, x)
    beta = projected(layer.beta, x).sigmoid() * (2 if name == "reflecting delta" else 1)
    alpha, gate = torch.ones_like(k), torch.ones_like(v)
    if name == "gated delta":
        rate = torch.log(1 + torch.exp(projected(layer.decay, x) + layer.rest))
        alpha = torch.exp(-layer.rate.exp() * rate)[..., None] * alpha
        gate = heads_of(nn.functional.silu(projected(layer.gate, x)), 4)
    if name == "kimi delta":
        rate = heads_of(torch.log(1 + torch.exp(projected(layer.decay, x) + layer.rest)), HEADS)
        alpha = torch.exp(-layer.rate.exp()[:, None] * rate)
        gate = heads_of(projected(layer.gate, x).sigmoid(), HEADS)
    out = rms(by_steps(q, k, v, alpha, beta, delta=True), layer.norm.weight, layer.norm.eps) * gate
    near(run(layer, x)[0], projected(layer.out, out.flatten(2)), times=4096)


def test_gated_linear_attention_is_its_paper() -> None:
    layer, x = made("gated linear"), random(BATCH, STEPS, DIM)
    q, k, v, gate = (heads_of(projected(part, x), HEADS) for part in (layer.query, layer.key, layer.value, layer.gate))
    alpha = heads_of(projected(layer.decay, x).sigmoid() ** (1 / 2.0), HEADS)
    out = by_steps(q, k, v, alpha, torch.ones(BATCH, STEPS, HEADS), delta=False)
    mean = out.mean(-1, keepdim=True)
    out = (out - mean) / ((out - mean).square().mean(-1, keepdim=True) + layer.norm.eps).sqrt()
    out = (out * layer.norm.weight + layer.norm.bias) * gate * gate.sigmoid()
    near(run(layer, x)[0], projected(layer.out, out.flatten(2)), times=4096)


def test_retention_is_a_product_of_complex_numbers() -> None:
    layer, x = made("retention"), random(BATCH, STEPS, DIM)
    q, k, v = (heads_of(projected(part, x), HEADS) for part in (layer.query, layer.key, layer.value))
    size = DIM // HEADS
    q, k = (torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) for y in (q, k))
    theta = (1 / 10000 ** (torch.arange(0, size, 2) / size)).double()  # in float32, as rotary positions are
    out = torch.zeros(BATCH, STEPS, HEADS, v.shape[3], dtype=torch.float64)
    for n in range(STEPS):
        for m in range(n + 1):
            turn = torch.polar(torch.ones_like(theta), (n - m) * theta)
            for h in range(HEADS):
                weight = (1 - 2.0 ** (-5 - h)) ** (n - m) * (q[:, n, h] * k[:, m, h].conj() * turn).sum(-1).real
                out[:, n, h] += weight[:, None] / math.sqrt(size) * v[:, m, h]
    mean = out.mean(-1, keepdim=True)
    out = ((out - mean) / (out.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()).flatten(2)
    gate = projected(layer.gate, x)
    near(run(layer, x)[0], projected(layer.out, gate * gate.sigmoid() * out), times=4096)


def feature(name: str, layer: nn.Module, x: Tensor) -> Tensor:
    if name == "linear":
        return torch.where(x > 0, x + 1, x.exp())
    directions = layer.feature.directions
    x = x / x.shape[-1] ** 0.25
    return torch.stack([(x @ w - x.square().sum(-1) / 2).exp() for w in directions], -1) / math.sqrt(len(directions))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["linear", "performer"])
def test_attention_by_a_feature_map_is_a_weighted_mean(name: str, causal: bool) -> None:
    kind = LinearAttention if name == "linear" else Performer
    keys = STEPS if causal else 7
    torch.manual_seed(1)
    layer = kind(DIM, HEADS, causal=causal, context_dim=None if causal else 5).double()
    x = random(BATCH, STEPS, DIM)
    context, keep = (x, None) if causal else (random(BATCH, keys, 5, seed=3), torch.rand(BATCH, keys) < 0.6)
    q, k, v = (heads_of(y, HEADS) for y in (layer.query(x), layer.key(context), layer.value(context)))
    q, k = (feature(name, layer, y) for y in (q, k))
    out = torch.zeros(BATCH, STEPS, HEADS, DIM // HEADS, dtype=torch.float64)
    for b in range(BATCH):
        for t in range(STEPS):
            seen = range(t + 1) if causal else [j for j in range(keys) if keep[b, j]]
            for h in range(HEADS):
                weights = {j: q[b, t, h] @ k[b, j, h] for j in seen}
                if weights:
                    out[b, t, h] = sum(w * v[b, j, h] for j, w in weights.items()) / sum(weights.values())
    if causal:
        found, _ = layer(x)
    else:
        found, _ = layer(x, context.masked_fill(~keep[..., None], math.nan), keep=keep)
    near(found, layer.out(out.flatten(2)), times=4096)


def test_a_performer_s_directions_are_saved_and_drawn_again() -> None:
    layer = Performer(DIM, HEADS, generator=torch.Generator().manual_seed(0))
    same = Performer(DIM, HEADS, generator=torch.Generator().manual_seed(0))
    before = layer.feature.directions.clone()
    assert torch.equal(before, same.feature.directions)
    assert before.shape == (round(6 * math.log(6)), 6)
    assert "feature.directions" in layer.state_dict()
    layer.redraw(torch.Generator().manual_seed(1))
    assert not torch.equal(before, layer.feature.directions)
    assert before.shape == layer.feature.directions.shape


def test_a_feature_map_may_have_parameters() -> None:
    class Hedgehog(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(random(HEADS, DIM // HEADS, 3))

        def forward(self, x: Tensor) -> Tensor:
            return fv.hedgehog(self.weight)(x)

    layer = LinearAttention(DIM, HEADS, feature=Hedgehog()).double()
    layer(random(BATCH, STEPS, DIM))[0].sum().backward()
    assert layer.feature.weight.grad.abs().max() > 0


def test_wrong_input_is_said_in_a_sentence() -> None:
    layer, x = LAYERS["delta"](), torch.randn(BATCH, STEPS, DIM)
    linear = LAYERS["linear"]()
    state = layer(x)[1]
    for call, words in (
        (lambda: layer(x[0]), r"wanted \[batch, steps, 12\]"),
        (lambda: layer(x, state.memory), "wanted the MixerState"),
        (lambda: layer(x, state._replace(convolution=x)), r"wanted \[batch, width − 1, channels\] = \[3, 3, 32\]"),
        (lambda: layer(x[:2], state), "wanted"),
        (lambda: layer(x, documents=torch.zeros(BATCH, 5, dtype=torch.int64)), "documents"),
        (lambda: layer(x, documents=fv.causal), "documents is causal"),
        (lambda: ShortConvolution(3)(x), r"wanted \[batch, steps, 3\]"),
        (lambda: ShortConvolution(3, 0), "the width is 0"),
        (lambda: DeltaNet(12, 5), "does not divide into 5 heads"),
        (lambda: GatedDeltaNet(12, 4, key_heads=3), "no multiple of 3 key heads"),
        (lambda: GatedLinearAttention(12, 4), "dim / 2 of 12"),
        (lambda: GatedLinearAttention(12, 2, temperature=0), "the temperature is 0"),
        (lambda: MultiScaleRetention(9, 3), "the rotary dim is 3"),
        (lambda: MultiScaleRetention(12, 2)(x, linear(x)[1]), "counts no steps"),
        (lambda: LightningAttention(12, 2, layer=3, layers=3), "layer is 3 of 3"),
        (lambda: LinearAttention(12, 2, context_dim=5), "a causal layer has no context"),
        (lambda: linear(x, x), "a causal layer reads x alone"),
        (lambda: LinearAttention(12, 2, causal=False)(x, x[..., :5]), r"wanted \[batch, keys, 12\]"),
        (lambda: LinearAttention(12, 2, causal=False)(x, keep=x > 0), r"wanted booleans \[batch, keys\]"),
        (lambda: LinearAttention(12, 2, feature=lambda x: x)(x), "never negative"),
    ):
        with pytest.raises(fv.InvalidInput, match=words):
            call()
