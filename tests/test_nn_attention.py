"""Multi-head attention as a module: it equals PyTorch's and Hugging Face's; parts are handed in."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from calls import near, random, random_mask
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

import foveate as fv
from foveate import InvalidInput

BATCH, HEADS, DIM, QUERIES, KEYS = 2, 3, 15, 5, 7


class Kept:
    """The least that a cache is: what was appended, one after the other."""

    def __init__(self) -> None:
        self.k, self.v = torch.empty(0), torch.empty(0)

    @property
    def length(self) -> int:
        return self.k.shape[2] if self.k.numel() else 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        held = self.length
        self.k = torch.cat([self.k, k], 2) if held else k
        self.v = torch.cat([self.v, v], 2) if held else v
        return self.k, self.v


def theirs(**options: object) -> nn.MultiheadAttention:
    """PyTorch's module in float64, its q and k weights scaled up until masks matter, its biases not 0."""
    torch.manual_seed(3)
    made = nn.MultiheadAttention(DIM, HEADS, batch_first=True, dtype=torch.float64, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2).add_(torch.randn_like(parameter) / 8)
    return made


def masks() -> dict[str, dict[str, Tensor]]:
    hidden = ~random_mask(QUERIES, KEYS, 0.7)[:, :HEADS]
    hidden[..., 0] = False
    pad = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    return {
        "none": {},
        "boolean": {"attn_mask": hidden[0, 0]},
        "boolean by head": {"attn_mask": hidden.flatten(0, 1)},
        "float": {"attn_mask": random(QUERIES, KEYS, seed=9)},
        "padding": {"key_padding_mask": pad},
        "boolean and padding": {"attn_mask": hidden[0, 0], "key_padding_mask": pad},
        "float and float padding": {
            "attn_mask": random(BATCH * HEADS, QUERIES, KEYS, seed=9),
            "key_padding_mask": random(BATCH, KEYS, seed=8),
        },
    }


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("options", [{}, {"kdim": 11, "vdim": 13}, {"bias": False}], ids=str)
def test_it_equals_torch_with_its_weights(mask: str, options: dict[str, object]) -> None:
    true = theirs(**options)
    mine = fv.nn.MultiHeadAttention.from_torch(true)
    x = random(BATCH, QUERIES, DIM).requires_grad_()
    k_from, v_from = (
        random(BATCH, KEYS, size, seed=n).requires_grad_() for n, size in ((4, true.kdim), (5, true.vdim))
    )
    given = masks()[mask]
    out = true(x, k_from, v_from, need_weights=False, **given)[0]
    pattern, score = fv.nn.torch_masks(**given, heads=HEADS)
    found = mine(x, (k_from, v_from), pattern, score=score)
    near(found, out)
    way = random(*out.shape, seed=6)
    inputs = (x, k_from, v_from)
    wanted = torch.autograd.grad((out * way).sum(), [*inputs, *true.parameters()])
    # PyTorch's gradients by our names: a module of ours reads them as if they were weights.
    named = dict(zip([name for name, _ in true.named_parameters()], wanted[3:], strict=True))
    renamed = copy.deepcopy(mine)
    renamed.load_state_dict(named)
    got = torch.autograd.grad((found * way).sum(), [*inputs, *mine.parameters()])
    for gradient, theirs_ in zip(got, (*wanted[:3], *renamed.parameters()), strict=True):
        near(gradient, theirs_.detach(), 256)


def test_self_attention_equals_torch() -> None:
    true = theirs().eval()
    mine = fv.nn.SelfAttention.from_torch(true)
    assert isinstance(mine, fv.nn.SelfAttention)
    assert not mine.training
    x = random(BATCH, QUERIES, DIM)
    hidden = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
    near(mine(x, fv.causal), true(x, x, x, attn_mask=hidden, need_weights=False)[0])


def test_a_state_dict_of_ours_comes_back() -> None:
    first, second = (fv.nn.MultiHeadAttention(12, 4, key_heads=2, head_dim=5) for _ in range(2))
    x = torch.randn(2, 3, 12)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    assert sorted(first.state_dict()) == [
        f"{part}.{kind}" for part in ("key", "out", "query", "value") for kind in ("bias", "weight")
    ]


def test_it_equals_hugging_face_with_norms_turns_and_groups() -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=24, num_attention_heads=6, num_key_value_heads=2, head_dim=10, attn_implementation="eager",
        num_hidden_layers=1, rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )  # fmt: skip
    true = Qwen3Attention(config, 0).double()
    norms = (nn.RMSNorm(10, eps=config.rms_norm_eps) for _ in range(2))
    mine = fv.nn.MultiHeadAttention(
        24, 6, key_heads=2, head_dim=10, bias=False, rotary=fv.nn.Rotary(10, base=1000.0),
        query_norm=next(norms), key_norm=next(norms),
    ).double()  # fmt: skip
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out", "q_norm": "query_norm"}
    with torch.no_grad():
        for name, weight in true.named_parameters():
            weight.copy_(torch.randn_like(weight))
            part = name.partition(".")[0]
            mine.get_parameter(f"{names.get(part, 'key_norm')}.weight").copy_(weight)
    x, positions = random(2, 7, 24), torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 4]])
    mask = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    angles = Qwen3RotaryEmbedding(config)(x, positions)
    wanted = true(x, angles, mask)[0]
    assert (mine(x, pattern=fv.causal, positions=positions) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_fewer_key_heads_are_repeated_key_heads() -> None:
    few = fv.nn.MultiHeadAttention(12, 6, key_heads=2, head_dim=5).double()
    many = fv.nn.MultiHeadAttention(12, 6, head_dim=5).double()
    state = few.state_dict()
    for name in ("key.weight", "key.bias", "value.weight", "value.bias"):
        state[name] = state[name].unflatten(0, (2, 5)).repeat_interleave(3, 0).flatten(0, 1)
    many.load_state_dict(state)
    x = random(2, 7, 12)
    near(few(x, pattern=fv.causal), many(x, pattern=fv.causal))


@pytest.mark.parametrize("batched", [False, True])
def test_steps_with_a_cache_are_the_whole(batched: bool) -> None:
    layer = fv.nn.SelfAttention(12, 6, key_heads=2, rotary=fv.nn.Rotary(2)).double()
    x, cache = random(2, 7, 12), Kept()
    whole = layer(x, fv.causal)
    cuts = [(0, 3), (3, 4), (4, 7)]
    parts = [
        layer(x[:, a:b], fv.causal, cache=cache, positions=torch.arange(a, b).expand(2, -1) if batched else None)
        for a, b in cuts
    ]
    near(torch.cat(parts, 1), whole)
    assert cache.length == 7


def test_a_projected_context_is_the_context() -> None:
    layer = fv.nn.CrossAttention(12, 3, context_dim=5).double()
    x, context = random(2, 4, 12), random(2, 7, 5, seed=2)
    keep = fv.padding(torch.tensor([7, 3]))
    near(layer(x, layer.project(context), keep), layer(x, context, keep), 0)


def test_mechanisms_are_handed_in() -> None:
    x, scores = random(2, 7, 12), fv.alibi(random(3))
    plain = fv.nn.SelfAttention(12, 3).double()
    sparse = fv.nn.SelfAttention(12, 3, attend=functools.partial(fv.attention, normalizer=fv.sparsemax)).double()
    sparse.load_state_dict(plain.state_dict())
    q, (k, v) = plain.query(x).unflatten(-1, (3, 4)).transpose(1, 2), plain.project(x)
    for layer, options in ((plain, {}), (sparse, {"normalizer": fv.sparsemax})):
        true = fv.attention(q, k, v, fv.causal, score=scores, **options)  # type: ignore[arg-type]
        near(layer(x, fv.causal, score=scores), plain.out(true.transpose(1, 2).flatten(2)))

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strength = nn.Parameter(torch.ones(3))

        def forward(self, q: Tensor, k: Tensor, v: Tensor, pattern: object) -> Tensor:
            assert pattern is None
            return fv.elu_linear(q, k, v)[0] * self.strength[:, None, None]

    layer = fv.nn.SelfAttention(12, 3, attend=Linear()).double()
    layer(x).sum().backward()
    assert layer.get_parameter("attend.strength").grad is not None


def test_dropout_acts_in_training_alone() -> None:
    layer = fv.nn.SelfAttention(12, 3, dropout=0.5).double()
    x = random(2, 7, 12)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    near(layer(x), first, 0)
    assert not torch.equal(layer(x), first)
    state = torch.get_rng_state()
    near(layer.eval()(x), layer(x), 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def _traced() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)  # the tracer cannot follow the run-time checks of shapes
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def layer_and_input() -> tuple[fv.nn.SelfAttention, Tensor]:
    torch.manual_seed(0)
    layer = fv.nn.SelfAttention(24, 6, key_heads=2, rotary=fv.nn.Rotary(4), query_norm=nn.RMSNorm(4))
    return layer, torch.randn(2, 7, 24, requires_grad=True)


@pytest.mark.usefixtures("_traced")
def test_compiled_whole_it_is_the_same() -> None:
    layer, x = layer_and_input()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, true = compiled(x, fv.causal), layer(x, fv.causal)
    torch.testing.assert_close(found, true)
    got, wanted = (torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()]) for out in (found, true))
    torch.testing.assert_close(got, wanted)


@pytest.mark.usefixtures("_traced")
def test_exported_it_is_the_same() -> None:
    layer, x = layer_and_input()

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, fv.causal)

    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(Causal().eval(), (x.detach(),), dynamic_shapes={"x": {1: length}})
    longer = torch.randn(2, 11, 24)
    torch.testing.assert_close(program.module()(longer), layer(longer, fv.causal))


def test_checkpointed_it_is_the_same() -> None:
    layer, x = layer_and_input()
    for out in (layer(x, fv.causal), checkpoint(layer, x, fv.causal, use_reentrant=False)):
        assert isinstance(out, Tensor)
        gradients = torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])
        torch.testing.assert_close(
            gradients, torch.autograd.grad(layer(x, fv.causal).sin().sum(), [x, *layer.parameters()])
        )


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own RMSNorm
def test_autocast_is_near() -> None:
    layer, x = layer_and_input()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, fv.causal)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x, fv.causal), rtol=0.05, atol=0.05)


def test_bad_input() -> None:
    make, x = fv.nn.MultiHeadAttention, torch.randn(2, 5, 12)
    for match, call in {
        r"dim 12 does not divide into 5 heads": lambda: make(12, 5),
        r"6 heads are no multiple of 4 key heads": lambda: make(12, 6, key_heads=4),
        r"number of heads is 0": lambda: make(12, 0),
        r"turn 6 entries but a head has 4": lambda: make(12, 3, rotary=fv.nn.Rotary(6)),
        r"dropout is 1.0": lambda: make(12, 3, dropout=1.0),
        r"x is <float32 2×5×11>: wanted \[batch, length, 12\]": lambda: make(12, 3)(x[..., :11]),
        r"context of the values is <float32 2×5×12>: wanted \[batch, length, 7\]":
            lambda: make(12, 3, context_dim=(12, 7))(x, x),
        r"rotary positions are of self-attention": lambda: make(12, 3, rotary=fv.nn.Rotary(4))(x, x),
        r"a cache is of self-attention": lambda: make(12, 3)(x, x, cache=Kept()),
        r"attend has a score of its own": lambda: make(
            12, 3, attend=functools.partial(fv.attention, score=fv.softcap(3.0))
        )(x, score=fv.softcap(2.0)),
        r"has add_bias_kv": lambda: make.from_torch(nn.MultiheadAttention(12, 3, add_bias_kv=True)),
        r"has add_zero_attn": lambda: make.from_torch(nn.MultiheadAttention(12, 3, add_zero_attn=True)),
        r"state dict has bias_k": lambda: make(12, 3).load_state_dict(
            nn.MultiheadAttention(12, 3, add_bias_kv=True).state_dict()
        ),
        r"attn_mask is <bool 6×5×5>: wanted": lambda: fv.nn.torch_masks(torch.zeros(6, 5, 5, dtype=torch.bool)),
        r"key_padding_mask is <bool 5>": lambda: fv.nn.torch_masks(None, torch.zeros(5, dtype=torch.bool)),
    }.items():  # fmt: skip
        with pytest.raises(InvalidInput, match=match):
            call()
