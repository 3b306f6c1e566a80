"""Positions: rotary against complex numbers and Hugging Face, sinusoidal against its formula, learned by its table."""

from __future__ import annotations

import math

import pytest
import torch
from calls import near, random
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import foveate as fv
from foveate import InvalidInput, rotary

LAWS = {
    "linear": (rotary.Linear(4.0), {"factor": 4.0}),
    "dynamic": (rotary.DynamicNTK(2.0, 64), {"factor": 2.0}),
    "yarn": (rotary.YaRN(4.0, 2048), {"factor": 4.0, "original_max_position_embeddings": 2048}),
    "yarn, a ramp of parts": (
        rotary.YaRN(7.0, 512, 16.0, 2.0, attention_factor=1.25, whole=False),
        {"factor": 7.0, "original_max_position_embeddings": 512, "beta_fast": 16.0, "beta_slow": 2.0,
         "attention_factor": 1.25, "truncate": False},
    ),
    "llama3": (
        rotary.Llama3(8.0, 1024),
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024},
    ),
}  # fmt: skip


def config(law: str | None = None, dim: int = 64) -> LlamaConfig:
    kind = "default" if law is None else law.partition(",")[0]
    more = {} if law is None else LAWS[law][1]
    return LlamaConfig(
        hidden_size=4 * dim, num_attention_heads=4, max_position_embeddings=64,
        rope_parameters={"rope_type": kind, "rope_theta": 500000.0, **more},
    )  # fmt: skip


@pytest.mark.parametrize("law", LAWS)
def test_stretched_frequencies_are_those_of_hugging_face(law: str) -> None:
    theirs, factor = ROPE_INIT_FUNCTIONS[law.partition(",")[0]](config(law))
    scaling = LAWS[law][0]
    torch.testing.assert_close(scaling.frequencies(64, 500000.0, torch.arange(3)), theirs, rtol=3e-7, atol=0)
    assert scaling.attention_factor == pytest.approx(factor)
    assert not torch.allclose(theirs, rotary.frequencies(64, 500000.0)) or law == "dynamic"


@pytest.mark.parametrize("law", [None, *LAWS])
def test_a_turn_is_that_of_hugging_face(law: str | None) -> None:
    positions = torch.tensor([[0, 1, 5, 40, 211], [3, 2, 1, 99, 0]])
    q, k = random(2, 7, 5, 64).float(), random(2, 3, 5, 64, seed=2).float()
    true = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config(law))(q, positions))
    part = fv.nn.Rotary(64, base=500000.0, scaling=None if law is None else LAWS[law][0])
    for x, theirs in zip((q, k), true, strict=True):
        torch.testing.assert_close(part(x, positions), theirs, rtol=0, atol=1e-5)


def by_complex_numbers(x: Tensor, positions: Tensor, dim: int, base: float) -> Tensor:
    """The paper's definition, of neighbouring pairs: x₂ᵢ + i·x₂ᵢ₊₁ times exp(i·n·θ_i)."""
    out = x.clone()
    for i in range(dim // 2):
        theta = rotary.frequencies(dim, base)[i].double()
        pair = torch.complex(x[..., 2 * i], x[..., 2 * i + 1]) * torch.exp(1j * positions.double() * theta)
        out[..., 2 * i], out[..., 2 * i + 1] = pair.real, pair.imag
    return out


@pytest.mark.parametrize("dim", [6, 10])
def test_pairs_turn_as_complex_numbers(dim: int) -> None:
    x, positions = random(2, 3, 7, 10), torch.tensor([0, 3, 1, 50, 1000, 2, 2])
    true = by_complex_numbers(x, positions, dim, 77.0)
    near(fv.rope(x, positions, base=77.0, interleaved=True, dim=dim), true)
    order = [*range(0, dim, 2), *range(1, dim, 2), *range(dim, 10)]
    near(fv.rope(x[..., order], positions, base=77.0, dim=dim), true[..., order])


@pytest.mark.parametrize("interleaved", [False, True])
def test_derivatives_of_a_turn(interleaved: bool) -> None:
    x, positions = random(2, 1, 3, 6).requires_grad_(), torch.tensor([[1, 2, 9], [4, 0, 3]])

    def call(x: Tensor) -> Tensor:
        return fv.rope(x, positions, dim=4, interleaved=interleaved, scaling=rotary.YaRN(4.0, 64))

    torch.autograd.gradcheck(call, x, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(call, x)
    near(torch.func.vmap(call, in_dims=2, out_dims=2)(x.expand(5, *x.shape).movedim(0, 2))[:, :, 4], call(x))


def test_narrow_numbers_are_turned_by_wide_angles() -> None:
    part = fv.nn.Rotary(8).to(torch.bfloat16)
    x, positions = random(1, 2, 3, 8).bfloat16(), torch.tensor([1001, 1003, 4097])
    true = part(x.double(), positions)
    assert part(x, positions).dtype == torch.bfloat16
    torch.testing.assert_close(part(x, positions).double(), true, rtol=2**-8, atol=2**-9)
    assert not part.state_dict()


def test_angles_worked_out_once_are_the_same() -> None:
    part, positions = fv.nn.Rotary(6, interleaved=True), torch.tensor([[2, 7, 1]])
    x = random(3, 5, 3, 6)
    near(part(x, part.angles(positions, x.dtype)), part(x, positions[0]), 0)


def test_nothing_to_turn() -> None:
    scaling = rotary.DynamicNTK(2.0, 64)
    assert fv.rope(torch.empty(2, 3, 0, 8), torch.arange(0), scaling=scaling).shape == (2, 3, 0, 8)


@pytest.mark.parametrize("interleaved", [True, False])
def test_sinusoidal_positions(interleaved: bool) -> None:
    x, positions = random(2, 5, 6), torch.tensor([[0, 1, 2, 3, 4], [7, 100, 3, 1, 0]])
    made = fv.nn.Sinusoidal(6, base=50.0, interleaved=interleaved)
    for n, row in enumerate(positions.tolist()):
        for m, position in enumerate(row):
            angle = [position / 50.0 ** (2 * i / 6) for i in range(3)]
            sines, cosines = map(math.sin, angle), map(math.cos, angle)
            pairs = list(zip(sines, cosines, strict=True)) if interleaved else [(*sines, *cosines)]
            true = x[n, m] + torch.tensor([number for pair in pairs for number in pair]).double()
            torch.testing.assert_close(made(x, positions)[n, m], true, rtol=0, atol=1e-5)
    near(made(x)[0], made(x, positions)[0], 0)


def test_learned_positions() -> None:
    made = fv.nn.Learned(7, 3).double()
    x = random(2, 5, 3)
    near(made(x), x + made.weight[:5], 0)
    near(made(x, torch.tensor([6, 0, 1, 2, 2])), x + made.weight[[6, 0, 1, 2, 2]], 0)
    made(x).sum().backward()
    assert made.weight.grad is not None
    assert made.weight.grad.sum(1).tolist() == [6.0] * 5 + [0.0] * 2


def test_bad_input() -> None:
    x = torch.randn(2, 3, 5, 8)
    with pytest.raises(InvalidInput, match=r"rotary dim is 7: wanted an even number"):
        fv.nn.Rotary(7)
    with pytest.raises(InvalidInput, match=r"rotary dim is 3"):
        fv.rope(x, torch.arange(5), dim=3)
    with pytest.raises(InvalidInput, match=r"for 5 positions and a dim of 10: wanted floats .* 5, 10 or more"):
        fv.rope(x, torch.arange(5), dim=10)
    with pytest.raises(InvalidInput, match=r"for 4 positions"):
        fv.nn.Rotary(8)(x, torch.arange(4))
    with pytest.raises(InvalidInput, match=r"of a batch of 3 were given x <float32 2×3×5×8>"):
        fv.nn.Rotary(8)(x, torch.zeros(3, 5, dtype=torch.int64))
    with pytest.raises(InvalidInput, match=r"positions is <float32 5>: wanted integers"):
        fv.nn.Rotary(8)(x, torch.arange(5.0))
    with pytest.raises(InvalidInput, match=r"base is 0: wanted a finite number above 1"):
        fv.nn.Rotary(8, base=0)
    with pytest.raises(InvalidInput, match=r"factor of YaRN is -1.0: wanted a positive"):
        rotary.YaRN(-1.0, 64)
    with pytest.raises(InvalidInput, match=r"fast above slow"):
        rotary.Llama3(slow=4.0)
    with pytest.raises(InvalidInput, match=r"with DynamicNTK is 2: wanted at least 4"):
        fv.rope(x, torch.arange(5), dim=2, scaling=rotary.DynamicNTK(2.0, 64))
    with pytest.raises(InvalidInput, match=r"sinusoidal positions is 5: wanted an even one"):
        fv.nn.Sinusoidal(5)
    with pytest.raises(InvalidInput, match=r"x is <float32 2×5×3>: wanted \[batch, length, 4\]"):
        fv.nn.Sinusoidal(4)(torch.zeros(2, 5, 3))
    with pytest.raises(InvalidInput, match=r"x has length 5 but there are 4 learned positions"):
        fv.nn.Learned(4, 3)(torch.zeros(2, 5, 3))
    with pytest.raises(InvalidInput, match=r"positions are <int64 4> for x <float32 2×5×3>: wanted one for each"):
        fv.nn.Learned(4, 3)(torch.zeros(2, 5, 3), torch.arange(4))
