"""Reformer's attention: equal to Hugging Face's, to full attention where nothing is missed, and linear in memory."""

import math
import subprocess
import sys

import pytest
import torch
from calls import BATCH, gradients, near, random, random_mask
from torch import Tensor

import foveate as fv
from foveate import InvalidInput

HEADS, DIM, VALUE_DIM = 3, 5, 7


def tensors(length: int, *, gradient: bool = False) -> tuple[Tensor, Tensor]:
    shapes = (BATCH, HEADS, length, DIM), (BATCH, HEADS, length, VALUE_DIM)
    return tuple(random(*shape, seed=n).requires_grad_(gradient) for n, shape in enumerate(shapes))  # type: ignore[return-value]


def plain(x: Tensor, v: Tensor, pattern: fv.Pattern | None = None, scale: float = 1.0) -> Tensor:
    """Shared-QK attention to everything by the formula: nobody sees itself unless it sees nobody else."""
    length = x.shape[2]
    seen = ~torch.eye(length, dtype=torch.bool)
    allowed = torch.ones_like(seen)
    if pattern is not None:
        allowed = pattern.dense(length, length, batch=BATCH, heads=HEADS)
    itself = allowed.diagonal(dim1=-2, dim2=-1)
    norm = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * math.sqrt(x.shape[3])
    scores = (x @ (x / norm).mT * scale).masked_fill(~(seen & allowed), -1e5)
    scores = scores.masked_fill(~allowed, -math.inf)
    weights = torch.nan_to_num(scores.softmax(-1), 0.0)
    lonely = ~(seen & allowed).any(-1) & ~itself
    return (weights @ v).masked_fill(lonely[..., None], 0)


def huggingface(chunk: int, buckets: int | list[int], rounds: int, *, causal: bool) -> torch.nn.Module:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = ReformerConfig(
        hidden_size=11, num_attention_heads=HEADS, attention_head_size=DIM, lsh_attn_chunk_length=chunk,
        num_buckets=buckets, num_hashes=rounds, is_decoder=causal, hash_seed=3, lsh_attention_probs_dropout_prob=0.0,
        attn_layers=["lsh"],
    )  # fmt: skip
    torch.manual_seed(0)
    layer = LSHSelfAttention(config).double()
    layer.self_mask_value_float32.fill_(-1e3)  # as good as −1e5, with less rounding
    return layer


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("chunk", "chunks", "buckets", "rounds"), [(7, 5, 4, 1), (7, 5, 6, 3), (5, 7, [4, 6], 2), (11, 1, 4, 2)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_it_equals_hugging_face(chunk, chunks, buckets, rounds, causal, padded):
    layer = huggingface(chunk, buckets, rounds, causal=causal)
    length = chunk * chunks
    hidden = random(BATCH, length, 11).requires_grad_()
    keep = torch.ones(BATCH, length, dtype=torch.bool)
    if padded:
        keep[1, length * 2 // 3 :] = False
    true = layer(hidden, attention_mask=keep if padded else None, num_hashes=rounds).hidden_states
    factors = tuple(buckets) if isinstance(buckets, list) else buckets
    torch.manual_seed(3)
    half = sum(factors) // 2 if isinstance(factors, tuple) else factors // 2
    rotations = torch.randn(HEADS, DIM, rounds, half, dtype=torch.float64)
    qk, v = (
        project(hidden).view(BATCH, length, HEADS, DIM).transpose(1, 2) for project in (layer.query_key, layer.value)
    )
    patterns = [fv.causal] * causal + [fv.padding(keep)] * padded
    pattern = None if not patterns else patterns[0] if len(patterns) == 1 else patterns[0] & patterns[1]
    out = fv.lsh_attention(qk, v, pattern, chunk=chunk, buckets=factors, rounds=rounds, rotations=rotations)
    # What a padded token gets is nobody's promise.
    found, true = (x * keep[..., None] for x in (out.transpose(1, 2).flatten(2), true))
    near(found, true, 1024)  # a token alone gets weights exp(−1e3 − −1e3): rounded as a number of that size
    leaves = (hidden, *layer.parameters())
    for mine, want in zip(gradients((found,), leaves), gradients((true,), leaves), strict=True):
        near(mine, want, 1024)


@pytest.mark.parametrize("length", [1, 2, 17, 23])
@pytest.mark.parametrize(
    "pattern",
    [None, fv.causal, fv.window(3), fv.causal & ~fv.window(1), "padding", "mask"],
    ids=repr,
)
def test_where_chunks_hold_the_text_nothing_is_missed(length, pattern):
    """One chunk, or two where each sees the other: attention to everything, whatever the hash says."""
    if pattern == "mask":
        pattern = fv.from_mask(random_mask(length, length, 0.3)[:, :HEADS])
    elif pattern == "padding":
        pattern = fv.padding(torch.tensor([1, min(length, 9)]))
    leaves = tensors(length, gradient=True)
    true = plain(*leaves, pattern)
    wants = gradients((true,), leaves)
    for chunk in (length, (length + 1) // 2, 64):
        found = fv.lsh_attention(*leaves, pattern, chunk=chunk, buckets=4, generator=torch.Generator().manual_seed(1))
        near(found, true)
        for mine, want in zip(gradients((found,), leaves), wants, strict=True):
            near(mine, want)


@pytest.mark.parametrize("pattern", [None, fv.causal], ids=repr)
def test_odd_sizes_equal_a_loop_over_chunks(pattern):
    """A text that is no multiple of the chunk: the last chunk of a round is short, and that is all."""
    length, chunk, buckets, rounds = 29, 6, 4, 3
    x, v = tensors(length)
    rotations = random(HEADS, DIM, rounds, buckets // 2, seed=9)
    found = fv.lsh_attention(x, v, pattern, chunk=chunk, buckets=buckets, rounds=rounds, rotations=rotations)
    for b in range(BATCH):
        for h in range(HEADS):
            chunks = []
            for r in range(rounds):
                turned = x[b, h] @ rotations[h, :, r]
                bucket = torch.cat([turned, -turned], -1).argmax(-1).tolist()
                order = sorted(range(length), key=lambda n, bucket=bucket: (bucket[n], n))
                chunks += [order[n : n + chunk] for n in range(0, length, chunk)]
            met = {n: [] for n in range(length)}  # every key that a token meets, as often as it meets it
            for n, tokens in enumerate(chunks):
                for i in tokens:
                    met[i] += [j for j in chunks[n - 1] + tokens if j != i and (pattern is None or j < i)]
            for i, keys in met.items():
                norms = (x[b, h, keys].square().mean(-1) + 1e-6).sqrt() * math.sqrt(DIM)
                weights = (x[b, h, keys] @ x[b, h, i] / norms).softmax(0)
                near(found[b, h, i], weights @ v[b, h, keys] if keys else v[b, h, i])


def test_more_rounds_come_nearer_to_everything():
    x, v = torch.randn(2, 1, 1, 512, 16, generator=torch.Generator().manual_seed(0)).double().unbind()
    x = x * 2  # so that few keys hold the weight
    true = plain(x.expand(BATCH, HEADS, -1, -1), v.expand(BATCH, HEADS, -1, -1))[:1, :1]
    errors = []
    for rounds in (1, 4, 16):
        draw = torch.Generator().manual_seed(4)
        out = fv.lsh_attention(x, v, chunk=32, rounds=rounds, generator=draw)
        errors.append((out - true).norm().item())
    assert errors[0] > errors[1] > errors[2]


def test_draws_follow_the_generator_and_change_no_dtype():
    x, v = (y.to(torch.bfloat16) for y in tensors(50))

    def draw(seed):
        return fv.lsh_attention(x, v, chunk=8, rounds=2, generator=torch.Generator().manual_seed(seed))

    assert draw(1).dtype == torch.bfloat16
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    near(fv.lsh_attention(x[0], v[0], chunk=64).double(), fv.lsh_attention(x, v, chunk=64)[0].double(), 1)
    assert fv.lsh_attention(x[:, :, :0], v[:, :, :0]).shape == (BATCH, HEADS, 0, VALUE_DIM)


def test_causal_attention_does_not_see_the_future():
    """Which earlier tokens share a chunk depends on all of the text; that nobody later is seen does not."""
    x, v = tensors(23)
    later, values = x.clone(), v.clone()
    later[:, :, 11:] += 1
    values[:, :, 11:] = math.nan
    first, second = (fv.lsh_attention(*pair, fv.causal, chunk=12, buckets=2) for pair in ((x, v), (later, values)))
    near(first[:, :, :11], second[:, :, :11])


def test_padding_may_hold_anything():
    x, v = tensors(29)
    keep = torch.ones(BATCH, 29, dtype=torch.bool)
    keep[:, 19:] = False
    found = []
    for bad in ((0.0, 0.0), (7.0, math.nan)):
        leaves = [y.masked_fill(~keep[:, None, :, None], z).requires_grad_() for y, z in zip((x, v), bad, strict=True)]
        draw = torch.Generator().manual_seed(5)
        out = fv.lsh_attention(*leaves, fv.padding(keep), chunk=4, buckets=4, rounds=2, generator=draw)
        kept = out[:, :, :19]
        found.append([kept, *gradients((kept,), tuple(leaves))])
    for one, other in zip(*found, strict=True):
        near(one[:, :, :19], other[:, :, :19], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "the chunk of lsh_attention is 0: wanted a whole number of at least 1"),
        ({"rounds": 0}, "the rounds of lsh_attention is 0"),
        ({"buckets": 5}, r"the buckets of lsh_attention are \(5,\): wanted even numbers"),
        ({"buckets": 0}, "the buckets of lsh_attention is 0"),
        ({"buckets": (4, 3)}, "wanted even numbers"),
        (
            {"buckets": 4, "rotations": torch.zeros(3, 5, 1, 4)},
            r"the rotations are <float32 3×5×1×4>: .*\[3, 5, 1, 2\]",
        ),
        ({"rotations": torch.zeros(3)}, "rotations is <float32 3>"),
    ],
)
def test_bad_input_gets_a_sentence(options, message):
    with pytest.raises(InvalidInput, match=message):
        fv.lsh_attention(*tensors(23), **options)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is there alone")
@pytest.mark.slow
def test_a_long_text_takes_no_matrix():
    code = """
import torch, foveate as fv
torch.set_num_threads(1)
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**20
x, v = (torch.randn(1, 1, 32768, 32).requires_grad_() for _ in range(2))
before = peak()
fv.lsh_attention(x, v, fv.causal, chunk=64).sum().backward()
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, timeout=600)
    assert float(done.stdout) < 0.5  # a matrix of 32,768 × 32,768 floats has 4 GiB
