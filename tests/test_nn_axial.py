"""Rotary positions of images and videos: they equal Hugging Face's Qwen2-VL and Qwen3-VL."""

from __future__ import annotations

import pytest
import torch
from calls import near, random
from torch import Tensor
from transformers import Qwen2VLTextConfig, Qwen3VLTextConfig
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

import foveate as fv
from foveate import InvalidInput, rotary

POSITIONS = torch.randint(900, (3, 2, 7), generator=torch.Generator().manual_seed(0))


def test_the_places_of_a_grid() -> None:
    found = rotary.grid(2, 3, 5)
    assert found.shape == (3, 30)
    assert found.T.tolist() == [[a, b, c] for a in range(2) for b in range(3) for c in range(5)]


@pytest.mark.parametrize(("sections", "alternating"), [((16, 24, 24), False), ((24, 20, 20), True)])
def test_multimodal_positions_are_those_of_hugging_face(sections: tuple[int, ...], alternating: bool) -> None:
    settings = {
        "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": list(sections)},
    }  # fmt: skip
    q, k = random(2, 4, 7, 128).float(), random(2, 2, 7, 128, seed=2).float()
    if alternating:
        theirs = qwen3.Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(head_dim=128, **settings))
    else:
        theirs = qwen2.Qwen2VLRotaryEmbedding(Qwen2VLTextConfig(**settings))  # type: ignore[assignment]
    true = qwen2.apply_rotary_pos_emb(q, k, *theirs(q, POSITIONS))
    part = fv.nn.MultimodalRotary(128, sections, alternating=alternating, base=500.0)
    for x, wanted in zip((q, k), true, strict=True):
        torch.testing.assert_close(part(x, POSITIONS), wanted, rtol=0, atol=1e-5)


def test_text_turns_as_ever() -> None:
    x, positions = random(2, 3, 7, 10), torch.tensor([0, 3, 1, 50, 1000, 2, 2])
    for part in (fv.nn.MultimodalRotary(10, (1, 2, 2)), fv.nn.MultimodalRotary(10, (3, 1, 1), alternating=True)):
        near(part(x, positions.expand(3, 7)), fv.rope(x, positions), 0)
        near(part(x, positions), fv.rope(x, positions), 0)


def test_axial_positions_are_those_of_hugging_face() -> None:
    config = Qwen2VLVisionConfig(embed_dim=96, num_heads=3)
    places = rotary.grid(3, 5)
    q, k = random(15, 3, 32).float(), random(15, 3, 32, seed=2).float()
    true = qwen2.apply_rotary_pos_emb_vision(q, k, *qwen2.Qwen2VLVisionRotaryEmbedding(config)(q, places.T))
    part = fv.nn.AxialRotary(32)
    for x, wanted in zip((q, k), true, strict=True):
        torch.testing.assert_close(part(x.transpose(0, 1), places).transpose(0, 1), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_axes_turn_one_by_one(interleaved: bool) -> None:
    part = fv.nn.AxialRotary(12, 3, base=77.0, interleaved=interleaved)
    x = random(2, 5, 7, 15)

    def pairs(n: int) -> list[int]:
        """The entries of axis n: first entries of its pairs, then second ones."""
        own = range(2 * n, 2 * n + 2)
        return [2 * i for i in own] + [2 * i + 1 for i in own] if interleaved else [*own, *(6 + i for i in own)]

    wanted = x.clone()
    for n in range(3):
        wanted[..., pairs(n)] = fv.rope(x[..., pairs(n)], POSITIONS[n], base=77.0)
    near(part(x, POSITIONS), wanted, 1)


def test_attention_depends_on_the_way_from_place_to_place() -> None:
    layer = fv.nn.SelfAttention(24, 3, rotary=fv.nn.AxialRotary(8)).double()
    x, places = random(1, 15, 24), rotary.grid(3, 5)
    here = layer(x, positions=places)
    torch.testing.assert_close(layer(x, positions=places + torch.tensor([[7], [30]])), here, rtol=0, atol=1e-5)
    assert not torch.allclose(layer(x, positions=places.flip(0)), here, atol=1e-2)


def test_bad_input() -> None:
    x, part = torch.randn(2, 3, 5, 8), fv.nn.MultimodalRotary(8, (2, 1, 1))
    three: Tensor = torch.zeros(3, 5, dtype=torch.int64)
    for match, call in {
        r"rotary dim 10 does not divide into pairs for 2 axes": lambda: fv.nn.AxialRotary(10),
        r"sections are \(2, 1, 2\): wanted numbers of pairs that add up to 4":
            lambda: fv.nn.MultimodalRotary(8, (2, 1, 2)),
        r"sections \(1, 2, 1\) do not alternate": lambda: fv.nn.MultimodalRotary(8, (1, 2, 1), alternating=True),
        r"positions are <int64 3×5>: wanted \[2, length\] or \[2, batch, length\]":
            lambda: fv.nn.AxialRotary(8)(x, three),
        r"positions are <int64 2×5>: wanted \[3, length\]": lambda: part(x, three[:2]),
        r"positions is <float32 3×5>: wanted integers": lambda: part(x, three.float()),
        r"for 4 positions": lambda: part(x, three[:, :4]),
    }.items():  # fmt: skip
        with pytest.raises(InvalidInput, match=match):
            call()
