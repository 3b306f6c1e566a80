"""Layers with a sparse pattern equal Hugging Face's with the same weights, in outputs and gradients."""

from __future__ import annotations

import copy
import functools
import math
import subprocess
import sys

import jaxtyping
import numpy as np
import pytest
import torch
from calls import gradients, near, random
from test_nn_attention import Kept
from torch import Tensor, nn

import foveate as fv
from foveate import InvalidInput

BATCH, HEADS, HEAD_DIM = 2, 3, 5
DIM = HEADS * HEAD_DIM


def lively(layer: nn.Module) -> nn.Module:
    """In float64, with weights that are large enough for masks to matter and biases that are not 0."""
    torch.manual_seed(7)
    layer = layer.double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn_like(weight) / (2 if weight.dim() == 1 else math.sqrt(weight.shape[-1]) / 1.5))
    return layer


def load(layer: nn.Module, state: dict[str, Tensor], *, out: bool = True) -> nn.Module:
    """A layer in float64 with these weights; `out` is the identity where they have none."""
    if not out:
        state = {**state, "out.weight": torch.eye(DIM), "out.bias": torch.zeros(DIM)}
    layer.double().load_state_dict(state)
    return layer


def same(found: Tensor, true: Tensor, mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...], times: int = 256) -> None:
    near(found, true, times)
    for one, want in zip(gradients((found,), mine), gradients((true,), theirs), strict=True):
        near(one, want, times)


def chosen(*rows: list[int], length: int) -> Tensor:
    table = torch.zeros(len(rows), length, dtype=torch.bool)
    for b, row in enumerate(rows):
        table[b, row] = True
    return table


LONG = 24
SPECIAL = {
    "none": None,
    "one": chosen([0], [0], length=LONG),
    "unequal": chosen([0, 5, 23], [2], length=LONG),
    "only one text": chosen([], [7, 3], length=LONG),
    "all": torch.ones(BATCH, LONG, dtype=torch.bool),
}


def longformer(window: int) -> nn.Module:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=DIM, num_attention_heads=HEADS, attention_window=[window], attention_probs_dropout_prob=0.0
    )
    return lively(LongformerSelfAttention(config, 0))


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [4, 8])
def test_longformer_equals_hugging_face(special, padded, window, monkeypatch):
    plain = torch.nn.functional.softmax  # in float32 there, whatever is given
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: plain(x, dim))
    theirs = longformer(window)
    mine = load(fv.nn.LongformerAttention(DIM, HEADS, window=window), theirs.state_dict(), out=False)
    x, tokens = random(BATCH, LONG, DIM), SPECIAL[special]
    real = torch.ones(BATCH, LONG, dtype=torch.bool)
    if padded and special != "all":
        real[1, 17:] = False
    marks = torch.where(real, 0.0, -10000.0)
    if tokens is not None:
        marks = torch.where(tokens, 10000.0, marks)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    true = theirs(
        xs[0].clone(), attention_mask=marks, is_index_masked=marks < 0, is_index_global_attn=marks > 0,
        is_global_attn=bool((marks > 0).any()),
    )[0]  # fmt: skip
    found = mine(xs[1], fv.padding(real) if padded else None, global_tokens=tokens)
    names = [name for name, _ in theirs.named_parameters() if tokens is not None or "global" not in name]
    leaves = [tuple(layer.get_parameter(name) for name in names) for layer in (mine, theirs)]
    kept = real[..., None].double()
    same(found * kept, true * kept, (xs[1], *leaves[0]), (xs[0], *leaves[1]))


def longformer_by_loops(layer: nn.Module, x: Tensor, tokens: Tensor, reach: int, step: int) -> Tensor:
    """One token of one head after the other."""
    length = x.shape[1]
    out = torch.zeros_like(x)
    for b in range(BATCH):
        names = ("query", "key", "value")
        local, everywhere = ([getattr(layer, name + end)(x[b]) for name in names] for end in ("", "_global"))
        for h in range(HEADS):
            part = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
            for i in range(length):
                q, k, v = (y[:, part] for y in (everywhere if tokens[b, i] else local))
                keys = [
                    j
                    for j in range(length)
                    if tokens[b, i] or tokens[b, j] or (abs(i - j) <= reach * step and (i - j) % step == 0)
                ]
                out[b, i, part] = (k[keys] @ q[i] / math.sqrt(HEAD_DIM)).softmax(0) @ v[keys]
    return layer.out(out)


@pytest.mark.parametrize(("window", "step"), [(4, 1), (4, 3), (0, 1)])
def test_longformer_of_any_length_and_dilated(window, step):
    layer = lively(fv.nn.LongformerAttention(DIM, HEADS, window=window, step=step))
    x, tokens = random(BATCH, 17, DIM), chosen([0, 9], [4], length=17)
    near(layer(x, global_tokens=tokens), longformer_by_loops(layer, x, tokens, window // 2, step))


def test_global_projections_begin_as_copies():
    layer = fv.nn.LongformerAttention(DIM, HEADS)
    assert torch.equal(layer.key_global.weight, layer.key.weight)
    assert layer.key_global.weight is not layer.key.weight


def bigbird(block: int, random_blocks: int) -> nn.Module:
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    config = BigBirdConfig(
        hidden_size=DIM, num_attention_heads=HEADS, block_size=block, num_random_blocks=random_blocks,
        attention_probs_dropout_prob=0.0, max_position_embeddings=512,
    )  # fmt: skip
    return lively(BigBirdBlockSparseAttention(config, seed=3)).train()


@pytest.mark.parametrize(("block", "count", "random_blocks"), [(4, 11, 2), (3, 13, 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_bigbird_equals_hugging_face_in_training(block, count, random_blocks, padded):
    from transformers.models.big_bird.modeling_big_bird import BigBirdModel

    theirs, length = bigbird(block, random_blocks), block * count
    mine = load(fv.nn.BigBirdAttention(DIM, HEADS, block=block, random=random_blocks), theirs.state_dict(), out=False)
    real = torch.ones(BATCH, length)
    if padded:
        real[1, length - 2 * block - 1 :] = 0
    # Its own draw, repeated: for each head, the random blocks of query blocks 1 to the last but one.
    np.random.seed(3)
    lengths, counts = theirs._get_rand_attn_plan(length, block, random_blocks)
    drawn = theirs._bigbird_block_rand_mask_with_head(length, length, block, block, HEADS, lengths, counts)
    table = torch.zeros(HEADS, count, count, dtype=torch.bool)
    for h, rows in enumerate(drawn):
        for i, row in enumerate(rows):
            table[h, i + 1, row.tolist()] = True
    xs = [random(BATCH, length, DIM).requires_grad_() for _ in range(2)]
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(real.double(), block)
    true = theirs(xs[0], band, from_mask, to_mask, blocked, blocked)[0]
    found = mine(xs[1], fv.padding(real.bool()) if padded else None, random_blocks=table)
    leaves = [tuple(layer.get_parameter(name) for name, _ in theirs.named_parameters()) for layer in (mine, theirs)]
    kept = real[..., None].double()
    same(found * kept, true * kept, (xs[1], *leaves[0]), (xs[0], *leaves[1]))


def test_bigbird_s_own_blocks_are_its_pattern():
    layer = lively(fv.nn.BigBirdAttention(DIM, HEADS, block=4, random=1, seed=5))
    x, pattern = random(BATCH, 29, DIM), fv.bigbird(4, random=1, seed=5)
    plain = load(fv.nn.SelfAttention(DIM, HEADS), layer.state_dict())
    near(layer(x), plain(x, pattern))
    near(layer(x, fv.padding(torch.tensor([29, 11]))), plain(x, pattern & fv.padding(torch.tensor([29, 11]))))
    assert "blockwise" in repr(layer)


MECHANISMS = {
    "strided": (fv.nn.Strided(5), fv.strided(5), fv.strided(5)),
    "strided, split": (
        fv.nn.Strided(5, split=True), fv.causal & fv.window(5), fv.causal & fv.window(right=0, step=5)
    ),
    "fixed": (fv.nn.Fixed(5, 2), fv.fixed(5, 2), fv.fixed(5, 2)),
    "fixed, split": (fv.nn.Fixed(5, 2, split=True), fv.causal & fv.chunks(5), fv.causal & fv.every(5, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", MECHANISMS)
def test_strided_and_fixed_layers_are_their_patterns(name):
    attend, near_by, far = MECHANISMS[name]
    layer = lively(fv.nn.SelfAttention(4 * HEAD_DIM, 4, key_heads=2, attend=attend))
    x, pattern = random(BATCH, 23, 4 * HEAD_DIM).requires_grad_(), fv.padding(torch.tensor([23, 17]))

    def by_patterns(more: fv.Pattern | None) -> Tensor:
        q = layer.query(x).unflatten(-1, (4, -1)).transpose(1, 2)
        k, v = layer.project(x)
        parts = [
            fv.attention(q[:, 2 * h : 2 * h + 2], k[:, h : h + 1], v[:, h : h + 1], p if more is None else p & more)
            for h, p in enumerate((near_by, far))
        ]
        return layer.out(torch.cat(parts, 1).transpose(1, 2).flatten(2))

    leaves = (x, *layer.parameters())
    for more in (None, pattern):
        same(layer(x, more), by_patterns(more), leaves, leaves)
    # A token at a time, from a cache.
    cache, whole = Kept(), layer(x)
    near(torch.cat([layer(x[:, n : n + 1], cache=cache) for n in range(23)], 1), whole)
    assert repr(attend).startswith(("Strided(5", "Fixed(5, 2"))


def llama4(layers: int, **options: object) -> tuple[nn.Module, object]:
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextModel

    config = Llama4TextConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6, num_hidden_layers=layers,
        attention_chunk_size=7, floor_scale=5, intermediate_size=8, intermediate_size_mlp=8, num_local_experts=1,
        moe_layers=[], vocab_size=11, attn_implementation="eager", **options,
    )  # fmt: skip
    return lively(Llama4TextModel(config)), config


@pytest.mark.parametrize("norm", [True, False])
def test_llama_4_s_layers_equal_hugging_face(norm, monkeypatch):
    from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

    theirs, config = llama4(4, use_qk_norm=norm)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # it computes angles and norms in float32
    length = 23
    for n, layer in enumerate(theirs.layers):
        attention = layer.self_attn
        mine = fv.nn.ChunkedAttention(
            24, 4, layer=n, chunk=7, key_heads=2, norm=norm, sharpen_from=5, base=config.rope_parameters["rope_theta"]
        )
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
        load(mine, {f"{a}.weight": getattr(attention, b).weight for a, b in names.items()})
        assert mine.sees_all == (n == 3) == (config.layer_types[n] == "full_attention")
        xs = [random(BATCH, length, 24).requires_grad_() for _ in range(2)]
        at = torch.arange(length)[None]
        make = create_causal_mask if n == 3 else create_chunked_causal_mask
        mask = make(config=config, inputs_embeds=xs[0], attention_mask=None, past_key_values=None, position_ids=at)
        true = attention(xs[0], theirs.rotary_emb(xs[0], at), mask)[0]
        leaves = [
            tuple(getattr(mine, a).weight for a in names),
            tuple(getattr(attention, b).weight for b in names.values()),
        ]
        same(mine(xs[1]), true, (xs[1], *leaves[0]), (xs[0], *leaves[1]))
        # A token at a time, and in two parts.
        with torch.no_grad():
            whole = mine(xs[1])
            for cuts in ([1] * length, [9, 14]):
                cache = Kept()
                near(torch.cat([mine(part, cache=cache) for part in xs[1].split(cuts, 1)], 1), whole)


def test_chunked_layers_take_more_patterns():
    layer = lively(fv.nn.ChunkedAttention(DIM * 2, HEADS, layer=0, chunk=5))
    x, ids = random(BATCH, 17, DIM * 2), torch.arange(17) // 4
    out = layer(x, fv.documents(ids))
    changed = x.clone()
    changed[:, 5] += 1
    moved = (layer(changed, fv.documents(ids)) - out).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [5, 6, 7]


def test_linformer_and_nystrom_layers_are_their_functions():
    x, padding = random(BATCH, 23, 4 * HEAD_DIM), fv.padding(torch.tensor([23, 19]))
    for attend, function in (
        (fv.nn.Linformer(29, 7, key_heads=2), lambda a, *x: fv.linformer_attention(*x[:3], *a.parameters(), *x[3:])),
        (
            fv.nn.Linformer(29, 7, share=True),
            lambda a, *x: fv.linformer_attention(*x[:3], a.key_projection, None, *x[3:]),
        ),
        (
            fv.nn.Nystrom(2, 5, kernel=3, iterations=4),
            lambda a, *x: fv.nystrom_attention(*x, landmarks=5, iterations=4, convolution=a.convolution),
        ),
        (fv.nn.Nystrom(2, 5, kernel=None), lambda a, *x: fv.nystrom_attention(*x, landmarks=5)),
    ):
        layer = lively(fv.nn.SelfAttention(4 * HEAD_DIM, 4, key_heads=2, attend=attend))
        plain = copy.deepcopy(layer)
        del plain.attend
        plain.attend = functools.partial(function, attend)
        near(layer(x, padding), plain(x, padding), 1)
        assert all(p.grad is not None for p in _backward(layer, x))
        assert repr(attend).startswith(("Linformer(", "Nystrom("))


def _backward(layer: nn.Module, x: Tensor) -> list[Tensor]:
    layer(x).sum().backward()
    return list(layer.parameters())


def test_reformer_is_its_function_and_hashes_the_same_in_eval_mode():
    layer = lively(fv.nn.ReformerAttention(DIM, HEADS, chunk=4, buckets=4, rounds=2, seed=5))
    x = random(BATCH, 23, DIM)
    layer.eval()
    assert torch.equal(layer(x, fv.causal), layer(x, fv.causal))
    qk, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (layer.query_key, layer.value))
    draw = torch.Generator().manual_seed(5)
    out = fv.lsh_attention(qk, v, fv.causal, chunk=4, buckets=4, rounds=2, generator=draw)
    near(layer(x, fv.causal), layer.out(out.transpose(1, 2).flatten(2)), 1)
    layer.train()
    assert not torch.equal(layer(x, fv.causal), layer(x, fv.causal))
    assert "chunk=4" in repr(layer)


WRONG = {
    "odd window": (lambda: fv.nn.LongformerAttention(DIM, HEADS, window=5), "window is 5: wanted an even number"),
    "step 0": (lambda: fv.nn.LongformerAttention(DIM, HEADS, step=0), "the step of Longformer's window is 0"),
    "a pattern": (
        lambda: fv.nn.LongformerAttention(DIM, HEADS)(torch.zeros(2, 5, DIM), fv.causal),
        "the pattern is causal: wanted padding",
    ),
    "global tokens": (
        lambda: fv.nn.LongformerAttention(DIM, HEADS)(torch.zeros(2, 5, DIM), global_tokens=torch.zeros(2, 5)),
        "global_tokens is <float32 2×5>: wanted a boolean",
    ),
    "x": (lambda: fv.nn.LongformerAttention(DIM, HEADS)(torch.zeros(2, 5, 3)), "x is <float32 2×5×3>"),
    "block 0": (lambda: fv.nn.BigBirdAttention(DIM, HEADS, block=0), "the block.* is 0: wanted"),
    "blocks": (
        lambda: fv.nn.BigBirdAttention(DIM, HEADS, block=2)(
            torch.zeros(2, 9, DIM), random_blocks=torch.ones(3, 4, 4) > 0
        ),
        "is too small: wanted at least 5 × 5 blocks",
    ),
    "stride 0": (lambda: fv.nn.Strided(0), "the stride is 0"),
    "last": (lambda: fv.nn.Fixed(3, 4), "every was given stride 3 and last 4: wanted"),
    "split of odd heads": (
        lambda: fv.nn.SelfAttention(DIM, HEADS, attend=fv.nn.Strided(3, split=True))(torch.zeros(2, 5, DIM)),
        "q has 3 and k 3: wanted even numbers",
    ),
    "chunk 0": (lambda: fv.nn.ChunkedAttention(DIM, HEADS, layer=0, chunk=0), "the chunk of ChunkedAttention is 0"),
    "no layer": (lambda: fv.nn.ChunkedAttention(DIM, HEADS, layer=-1), "the number of the layer is -1"),
    "odd heads": (lambda: fv.nn.ChunkedAttention(DIM, HEADS, layer=0), "the rotary dim is 5: wanted an even number"),
    "a mask": (
        lambda: fv.nn.ChunkedAttention(DIM * 2, HEADS, layer=0)(torch.zeros(2, 5, DIM * 2), torch.ones(5, 5) > 0),
        "ChunkedAttention was given a mask: wanted a pattern",
    ),
    "k above n": (lambda: fv.nn.Linformer(8, 9), "Linformer was given size 9 for length 8"),
    "too long": (
        lambda: fv.nn.SelfAttention(DIM, HEADS, attend=fv.nn.Linformer(4, 2))(torch.zeros(2, 5, DIM)),
        "there are 5 keys but key_projection is <float32 2×4>",
    ),
    "even kernel": (lambda: fv.nn.Nystrom(3, kernel=4), "the width of the convolution is 4: wanted an odd"),
    "dropout": (
        lambda: fv.nn.SelfAttention(DIM, HEADS, attend=fv.nn.Nystrom(3), dropout=0.1)(torch.zeros(2, 5, DIM)),
        "Nyström attention has no weights of queries × keys, so it takes no dropout",
    ),
    "heads": (lambda: fv.nn.ReformerAttention(16, 3), "dim 16 does not divide into 3 heads"),
    "x of Reformer": (lambda: fv.nn.ReformerAttention(DIM, HEADS)(torch.zeros(5, DIM)), "x is <float32 5×15>"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_gets_a_sentence(name):
    call, message = WRONG[name]
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(InvalidInput, match=message):
            call()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


LONG_LAYERS = {
    "longformer": "fv.nn.LongformerAttention(64, 2, window=512), {'global_tokens': torch.arange(n)[None] % 4096 == 0}",
    "bigbird": "fv.nn.BigBirdAttention(64, 2), {}",
    "strided": "fv.nn.SelfAttention(64, 2, attend=fv.nn.Strided(128)), {}",
    "fixed": "fv.nn.SelfAttention(64, 2, attend=fv.nn.Fixed(128, split=True)), {}",
    "chunked": "fv.nn.ChunkedAttention(64, 2, layer=0, chunk=1024), {}",
    "latent": "fv.nn.LatentAttention(64, 2, latent_dim=32, query_latent_dim=None, head_dim=16, rope_dim=16, "
    "value_dim=16), {'pattern': fv.causal, 'absorbed': True}",
    "linformer": "fv.nn.SelfAttention(64, 2, attend=fv.nn.Linformer(n, 64)), {}",
    "nystrom": "fv.nn.SelfAttention(64, 2, attend=fv.nn.Nystrom(2)), {}",
    "reformer": "fv.nn.ReformerAttention(64, 2, chunk=64), {}",
}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is there alone")
@pytest.mark.slow
@pytest.mark.parametrize("name", LONG_LAYERS)
def test_a_long_text_takes_no_matrix(name):
    code = f"""
import torch, foveate as fv
torch.set_num_threads(1)
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**20
n = 32768
layer, options = {LONG_LAYERS[name]}
x = torch.randn(1, n, 64)
short = {{name: value[:, :256] if isinstance(value, torch.Tensor) else value for name, value in options.items()}}
layer(x[:, :256], **short).sum().backward()
before = peak()
layer(x, **options).sum().backward()
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, timeout=900)
    # A boolean for each pair would take 1 GiB, a float for each pair and head 8 GiB.
    assert float(done.stdout) < 0.75
