"""Layers of the linear family beside those of Hugging Face models, weight for weight, in float32."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import KimiLinearConfig, MiniMaxConfig, OlmoHybridConfig, Qwen3NextConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from foveate.nn import GatedDeltaNet, KimiDeltaAttention, LightningAttention

BATCH, STEPS, DIM = 2, 71, 24  # more than one chunk of 64

Pair = tuple[nn.Module, nn.Module]


def drawn(theirs: nn.Module) -> nn.Module:
    """Their layer with weights large enough that every gate is somewhere in between."""
    generator = torch.Generator().manual_seed(4)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 0.7)
    return theirs.eval()


def fill(ours: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    ours.load_state_dict(weights)
    return ours


def qwen() -> Pair:
    heads, key_heads, key_dim, value_dim = 4, 2, 6, 10
    config = Qwen3NextConfig(
        hidden_size=DIM, linear_num_value_heads=heads, linear_num_key_heads=key_heads, linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim, num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = drawn(Qwen3NextGatedDeltaNet(config, 0))
    # Rows of their projection: for each key head its query, its key, its values, their gates.
    group = heads // key_heads
    rows = theirs.in_proj_qkvz.weight.view(key_heads, -1, DIM)
    q, k, v, z = rows.split([key_dim, key_dim, group * value_dim, group * value_dim], 1)
    b, a = theirs.in_proj_ba.weight.view(key_heads, -1, DIM).split([group, group], 1)
    ours = GatedDeltaNet(DIM, heads, key_heads=key_heads, key_dim=key_dim, value_dim=value_dim)
    return theirs, fill(
        ours,
        {
            "read.query.weight": q.reshape(-1, DIM), "read.key.weight": k.reshape(-1, DIM),
            "read.value.weight": v.reshape(-1, DIM), "gate.weight": z.reshape(-1, DIM),
            "beta.weight": b.reshape(-1, DIM), "decay.weight": a.reshape(-1, DIM),
            "read.convolution.weight": theirs.conv1d.weight[:, 0], "rate": theirs.A_log, "rest": theirs.dt_bias,
            "norm.weight": theirs.norm.weight, "out.weight": theirs.out_proj.weight,
        },
    )  # fmt: skip


def olmo() -> Pair:
    config = OlmoHybridConfig(
        hidden_size=DIM, linear_num_value_heads=3, linear_num_key_heads=3, linear_key_head_dim=6,
        linear_value_head_dim=10, linear_allow_neg_eigval=True, num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    theirs = drawn(OlmoHybridGatedDeltaNet(config, 0))
    ours = GatedDeltaNet(DIM, 3, key_dim=6, value_dim=10, reflecting=True, eps=1e-5)
    return theirs, fill(
        ours,
        {
            "read.query.weight": theirs.q_proj.weight, "read.key.weight": theirs.k_proj.weight,
            "read.value.weight": theirs.v_proj.weight, "gate.weight": theirs.g_proj.weight,
            "beta.weight": theirs.b_proj.weight, "decay.weight": theirs.a_proj.weight,
            "read.convolution.weight": theirs.conv1d.weight[:, 0], "rate": theirs.A_log, "rest": theirs.dt_bias,
            "norm.weight": theirs.o_norm.weight, "out.weight": theirs.o_proj.weight,
        },
    )  # fmt: skip


def kimi() -> Pair:
    config = KimiLinearConfig(
        hidden_size=DIM, linear_num_heads=3, linear_head_dim=8, num_hidden_layers=1, layer_types=["linear_attention"]
    )
    theirs = drawn(KimiLinearDeltaAttention(config, 0))
    gate = theirs.forget_gate
    return theirs, fill(
        KimiDeltaAttention(DIM, 3, key_dim=8, value_dim=8, eps=config.rms_norm_eps),
        {
            "read.query.weight": theirs.q_proj.weight, "read.key.weight": theirs.k_proj.weight,
            "read.value.weight": theirs.v_proj.weight, "beta.weight": theirs.b_proj.weight,
            "decay.0.weight": gate.f_a_proj.weight, "decay.1.weight": gate.f_b_proj.weight,
            "gate.0.weight": theirs.g_a_proj.weight, "gate.1.weight": theirs.g_b_proj.weight,
            "read.convolution.weight": theirs.conv1d.weight[:, 0], "rate": gate.A_log.flatten(), "rest": gate.dt_bias,
            "norm.weight": theirs.o_norm.weight, "out.weight": theirs.o_proj.weight,
        },
    )  # fmt: skip


def minimax() -> Pair:
    config = MiniMaxConfig(hidden_size=DIM, num_attention_heads=4, head_dim=10, num_hidden_layers=3, block_size=16)
    theirs = drawn(MiniMaxLightningAttention(config, 1))
    return theirs, fill(
        LightningAttention(DIM, 4, head_dim=10, layer=1, layers=3),
        {
            "qkv.weight": theirs.qkv_proj.weight, "norm.weight": theirs.norm.weight,
            "gate.weight": theirs.output_gate.weight, "out.weight": theirs.out_proj.weight,
        },
    )  # fmt: skip


PAIRS = {"Qwen3-Next": qwen, "Olmo Hybrid": olmo, "Kimi Linear": kimi, "MiniMax": minimax}


def call(theirs: nn.Module, x: Tensor) -> Tensor:
    if isinstance(theirs, MiniMaxLightningAttention):
        return theirs(x, None, None)[0]
    return theirs(x)


@pytest.mark.parametrize("model", PAIRS)
def test_outputs_states_and_gradients_are_theirs(model: str) -> None:
    theirs, ours = PAIRS[model]()
    x = torch.randn(BATCH, STEPS, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight = torch.randn(BATCH, STEPS, DIM, generator=torch.Generator().manual_seed(2))
    true, (found, state) = call(theirs, x), ours(x)
    close(found, true)
    slopes = [torch.autograd.grad((out * weight).sum(), x)[0] for out in (found, true)]
    close(*slopes)
    # A step at a time from the middle on, as they decode.
    _, state = ours(x[:, :40])
    for t in range(40, STEPS):
        row, state = ours(x[:, t : t + 1], state)
        close(row, true[:, t : t + 1])
    assert state.memory.s.shape[:2] == (BATCH, found_heads(ours))


def found_heads(ours: nn.Module) -> int:
    return ours.heads if hasattr(ours, "heads") else ours.read.heads


def close(found: Tensor, true: Tensor) -> None:
    """Within float32's rounding of sums over the length: theirs and ours add in another order."""
    assert found.shape == true.shape
    assert true.abs().max() > 0.05
    error = (found - true).abs().max().item()
    assert error <= 256 * 2.0**-23 * max(1.0, true.abs().max().item()), f"off by {error:.3g}"


@pytest.mark.parametrize("model", ["Qwen3-Next", "Olmo Hybrid", "Kimi Linear"])
def test_the_state_is_the_one_they_hand_on(model: str) -> None:
    theirs, ours = PAIRS[model]()
    x = torch.randn(BATCH, STEPS, DIM, generator=torch.Generator().manual_seed(1))
    kept: dict[str, Tensor] = {}
    cache = SimpleNamespace(
        get_conv_state=lambda *_, **__: None,
        get_recurrent_state=lambda *_, **__: None,
        is_recording_past=lambda *_: False,
        update_conv_state=lambda mixed, *_, **__: kept.setdefault("convolution", mixed),
        update_recurrent_state=lambda state, *_: kept.setdefault("memory", state),
    )
    theirs(x, cache)
    _, state = ours(x)
    close(state.memory.s, kept["memory"])
    close(state.convolution, kept["convolution"][:, :, -3:].mT)
