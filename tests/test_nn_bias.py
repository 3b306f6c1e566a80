"""Biases by distance as modules: they equal Hugging Face's BLOOM and T5."""

from __future__ import annotations

import pytest
import torch
from calls import near, random
from torch import Tensor
from transformers import T5Config
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

import foveate as fv
from foveate import InvalidInput

HEADS, LENGTH = 3, 7


def layer(heads: int = HEADS) -> tuple[fv.nn.SelfAttention, Tensor]:
    torch.manual_seed(0)
    return fv.nn.SelfAttention(4 * heads, heads).double(), random(2, LENGTH, 4 * heads)


@pytest.mark.parametrize("heads", [8, 6])
def test_alibi_is_that_of_hugging_face(heads: int) -> None:
    attention, x = layer(heads)
    theirs = build_alibi_tensor(torch.ones(1, LENGTH), heads, torch.float64).view(1, heads, 1, LENGTH)
    part = fv.nn.ALiBi(heads)
    assert not part.state_dict()
    near(
        attention(x, fv.causal, score=part()), attention(x, fv.causal, score=theirs)
    )  # softmax forgets what a row shares


def test_alibi_is_never_rounded() -> None:
    part = fv.nn.ALiBi(12).to(torch.bfloat16)
    assert torch.equal(part.slopes, fv.alibi_slopes(12))
    with torch.device("meta"):
        empty = fv.nn.ALiBi(12)
    assert torch.equal(empty.to_empty(device="cpu").slopes, fv.alibi_slopes(12))


@pytest.mark.parametrize("decoder", [False, True])
def test_relative_bias_is_that_of_hugging_face(decoder: bool) -> None:
    config = T5Config(num_heads=HEADS, relative_attention_num_buckets=8, relative_attention_max_distance=13,
                      is_decoder=decoder)  # fmt: skip
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    part = fv.nn.RelativeBias(HEADS, 8, 13, bidirectional=not decoder)
    with torch.no_grad():
        theirs.relative_attention_bias.weight.normal_()
    part.load_state_dict(theirs.relative_attention_bias.state_dict())
    attention, x = layer()
    pattern = fv.causal if decoder else None
    near(attention(x, pattern, score=part()), attention(x, pattern, score=theirs.compute_bias(LENGTH, LENGTH)))


def test_a_bias_for_all_layers() -> None:
    torch.manual_seed(0)
    blocks = [fv.nn.Block.paper(12, HEADS, dropout=0.0) for _ in range(2)]
    part, x, more = fv.nn.RelativeBias(HEADS, 8, 13), random(2, LENGTH, 12), random(LENGTH, LENGTH)
    part.weight.data.normal_()
    for kind in (fv.nn.Encoder, fv.nn.Decoder):
        whole = kind(blocks, relative=part).double()
        wanted = x
        for block in blocks:
            pattern = fv.causal if kind is fv.nn.Decoder else None
            wanted = block(wanted, pattern, score=part() + fv.bias(more))
        near(whole(x, score=more), wanted)
        near(whole(x, score=fv.bias(more)), wanted)
        assert not torch.allclose(whole(x), wanted)
    gradient = torch.autograd.grad(whole(x).sin().sum(), part.weight)[0]
    assert gradient.abs().sum(1).gt(0).sum() > 3


def test_bad_input() -> None:
    with pytest.raises(InvalidInput, match=r"max_distance is 4: too near for the 32 buckets"):
        fv.nn.RelativeBias(HEADS, max_distance=4)
    with pytest.raises(InvalidInput, match=r"wanted 2m \+ 1 entries"):
        fv.nn.RelativeBias(HEADS, max_distance=None)
    with pytest.raises(InvalidInput, match=r"number of heads is 0"):
        fv.nn.ALiBi(0)
    attention, x = layer()
    with pytest.raises(InvalidInput, match=r"slopes"):
        attention(x, score=fv.nn.ALiBi(4)())
