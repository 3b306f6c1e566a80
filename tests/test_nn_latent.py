"""Latent attention equals Hugging Face's DeepSeek-V3; absorbed is plain; a small cache is enough to decode."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from calls import gradients, near, random
from test_nn_attention import Kept
from test_nn_sparse import lively, load, same
from torch import Tensor, nn

import foveate as fv
from foveate import InvalidInput

BATCH, LENGTH, DIM = 2, 17, 22
SIZES = {"latent_dim": 13, "head_dim": 5, "rope_dim": 6, "value_dim": 7}
THEIRS = {
    "latent.weight": "kv_a_proj_with_mqa", "latent_norm.weight": "kv_a_layernorm", "up.weight": "kv_b_proj",
    "out.weight": "o_proj",
}  # fmt: skip
FROM_X = {"query.weight": "q_proj"}
FROM_LATENT = {"query.weight": "q_b_proj", "query_latent.weight": "q_a_proj", "query_norm.weight": "q_a_layernorm"}
ways = pytest.mark.parametrize("absorbed", [False, True])


def layer(**options: object) -> nn.Module:
    return lively(fv.nn.LatentAttention(DIM, 3, **{"query_latent_dim": 11, **SIZES, **options}))


@ways
@pytest.mark.parametrize("query_latent_dim", [None, 11])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("yarn", [False, True])
def test_it_equals_hugging_face(query_latent_dim, interleaved, yarn, absorbed, monkeypatch):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if yarn:
        rope = {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8,
            "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
        }  # fmt: skip
    config = DeepseekV3Config(
        hidden_size=DIM, num_attention_heads=3, num_key_value_heads=3, kv_lora_rank=13, q_lora_rank=query_latent_dim,
        qk_rope_head_dim=6, qk_nope_head_dim=5, v_head_dim=7, rope_parameters=rope, rope_interleave=interleaved,
        max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    theirs, rotary = lively(DeepseekV3Attention(config, 0)), DeepseekV3RotaryEmbedding(config)
    # Norms, angles and weights are in float32 there: in float64 they can be told from rounding.
    plain = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: plain(x, dim))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for name in ("kv_a_layernorm", "q_a_layernorm"):
        norm = getattr(theirs, name)
        if norm is not None:
            exact = nn.RMSNorm(norm.weight.shape[0], norm.variance_epsilon).double()
            exact.weight = norm.weight
            setattr(theirs, name, exact)
    names = {**THEIRS, **(FROM_X if query_latent_dim is None else FROM_LATENT)}
    scaling = fv.rotary.YaRN(4.0, 8, attention_factor=rotary.attention_scaling) if yarn else None
    mine = fv.nn.LatentAttention(
        DIM, 3, query_latent_dim=query_latent_dim, **SIZES, interleaved=interleaved, scaling=scaling,
        scale=theirs.scaling, eps=config.rms_norm_eps,
    )  # fmt: skip
    load(mine, {a: getattr(theirs, b).weight for a, b in names.items()})
    xs = [random(BATCH, LENGTH, DIM).requires_grad_() for _ in range(2)]
    mask = torch.full((LENGTH, LENGTH), -torch.inf).double().triu(1)[None, None]
    true = theirs(xs[0], rotary(xs[0], torch.arange(LENGTH)[None]), mask)[0]
    leaves = [
        tuple(f(name) for name in names) for f in (mine.get_parameter, lambda a: getattr(theirs, names[a]).weight)
    ]
    same(mine(xs[1], fv.causal, absorbed=absorbed), true, (xs[1], *leaves[0]), (xs[0], *leaves[1]))


@pytest.mark.parametrize(
    "pattern", [None, fv.causal, fv.causal & fv.window(4), fv.padding(torch.tensor([17, 9]))], ids=repr
)
def test_absorbed_is_plain(pattern):
    made, x = layer(), random(BATCH, LENGTH, DIM).requires_grad_()
    plain, absorbed = (made(x, pattern, absorbed=way) for way in (False, True))
    leaves = (x, *made.parameters())
    same(absorbed, plain, leaves, leaves)


@ways
@pytest.mark.parametrize("cuts", [[1] * LENGTH, [9, 1, 7], [16, 1]])
def test_from_a_cache_of_latents_it_is_the_whole(cuts, absorbed):
    made, x, cache = layer(), random(BATCH, LENGTH, DIM), Kept()
    parts = [made(part, fv.causal, cache=cache, absorbed=absorbed) for part in x.split(cuts, 1)]
    near(torch.cat(parts, 1), made(x, fv.causal))
    assert cache.k.shape == (BATCH, 1, LENGTH, SIZES["latent_dim"])  # 13 + 6 numbers a token, not 3 · (11 + 7)
    assert cache.v.shape == (BATCH, 1, LENGTH, SIZES["rope_dim"])


def test_it_chooses_by_work(monkeypatch):
    big = fv.nn.LatentAttention(64, 2)  # the sizes of DeepSeek: 512 latent, 64 turned, 128 and 128
    asked: list[tuple[int, bool]] = []
    monkeypatch.setattr(
        fv.nn.LatentAttention, "_absorbed", lambda self, *x: asked.append((x[0].shape[2], True)) or self._plain(*x)
    )
    with torch.no_grad():
        cache = Kept()
        big(torch.randn(1, 300, 64), fv.causal, cache=cache)
        big(torch.randn(1, 200, 64), fv.causal, cache=cache)
        assert asked == []  # a prompt
        big(torch.randn(1, 2, 64), fv.causal, cache=cache)
        assert asked == [(2, True)]


def test_positions_and_angles_are_those_of_the_rotary():
    made, x = layer(), random(BATCH, LENGTH, DIM)
    places = torch.arange(LENGTH) + 5
    near(made(x, fv.causal, positions=places), made(x, fv.causal))  # distances are what counts
    angles = made.rotary.angles(places, torch.float64)
    near(made(x, fv.causal, positions=angles), made(x, fv.causal))
    assert not torch.allclose(made(x, fv.causal, positions=2 * places), made(x, fv.causal))


def test_dropout_is_for_training():
    made, x = layer(dropout=0.5), random(BATCH, LENGTH, DIM)
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))


def test_in_low_precision_absorbed_stays_near_plain():
    made, x = layer().to(torch.bfloat16), random(BATCH, LENGTH, DIM).to(torch.bfloat16)
    plain, absorbed = (made(x, fv.causal, absorbed=way) for way in (False, True))
    true = layer()(x.double(), fv.causal)
    assert absorbed.dtype == torch.bfloat16
    assert (absorbed.double() - true).abs().max() <= 2 * (plain.double() - true).abs().max() + 2**-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fv.nn.LatentAttention(DIM, 3, latent_dim=0), "latent_dim is 0: wanted a whole number of at least 1"),
        (lambda: fv.nn.LatentAttention(DIM, 3, rope_dim=3), "the rotary dim is 3: wanted an even number"),
        (lambda: fv.nn.LatentAttention(DIM, 3, query_latent_dim=0), "query_latent_dim is 0"),
        (lambda: fv.nn.LatentAttention(DIM, 3, dropout=1.0), "dropout is 1.0"),
        (lambda: layer()(random(2, 5, 3)), "x is <float64 2×5×3>: wanted .batch, length, 22."),
    ],
)
def test_bad_input_gets_a_sentence(make, message):
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(InvalidInput, match=message):
            make()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_gradients_reach_every_weight() -> None:
    made, x = layer(), random(BATCH, LENGTH, DIM)
    for way in (False, True):
        found: tuple[Tensor, ...] = gradients((made(x, absorbed=way),), tuple(made.parameters()))
        assert all(one.abs().max() > 0 for one in found)
