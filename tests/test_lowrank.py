"""Linformer and Nyström: equal to loops and to Hugging Face's Nystromformer; padding is no text; no n × n anywhere."""

import math
import subprocess
import sys

import pytest
import torch
from calls import BATCH, DIM, GROUP, HEADS, KEY_HEADS, VALUE_DIM, gradients, near, random, tensors
from torch import Tensor

import foveate as fv
from foveate import InvalidInput

QUERIES, KEYS, SIZE, LONGEST = 11, 13, 3, 17
LENGTHS = torch.tensor([9, 13])


def projections(*, heads: bool = False) -> tuple[Tensor, Tensor]:
    lead = (KEY_HEADS,) if heads else ()
    return tuple(random(*lead, SIZE, LONGEST, seed=n).requires_grad_() for n in (21, 22))  # type: ignore[return-value]


def linformer_by_loops(q: Tensor, k: Tensor, v: Tensor, e: Tensor, f: Tensor, lengths: list[int]) -> Tensor:
    """Equation 7, one query of one head after the other."""
    out = []
    for b, length in enumerate(lengths):
        for h in range(q.shape[1]):
            g = h // GROUP
            mix, values = (
                sum(
                    m[..., :, j].reshape(-1, SIZE)[g if m.dim() == 3 else 0][:, None] * x[b, g, j]
                    for j in range(length)
                )
                for m, x in ((e, k), (f, v))
            )
            for row in q[b, h]:
                scores = torch.stack([row @ one / math.sqrt(DIM) for one in mix])
                out.append(sum(w * value for w, value in zip(scores.exp() / scores.exp().sum(), values, strict=True)))
    return torch.stack(out).view(*q.shape[:3], VALUE_DIM)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_linformer_equals_the_loop(heads, lengths):
    leaves = *tensors(QUERIES, KEYS, gradients=True), *projections(heads=heads)
    pattern = None if lengths is None else fv.padding(lengths)
    found = fv.linformer_attention(*leaves, pattern)
    true = linformer_by_loops(*leaves, [KEYS, KEYS] if lengths is None else lengths.tolist())
    near(found, true)
    for mine, want in zip(gradients((found,), leaves), gradients((true,), leaves), strict=True):
        near(mine, want)


def test_linformer_with_one_projection_for_keys_and_values():
    q, k, v = tensors(QUERIES, KEYS)
    e, _ = projections()
    near(fv.linformer_attention(q, k, v, e), fv.linformer_attention(q, k, v, e, e))


def test_linformer_with_the_identity_is_attention():
    q, k, v = tensors(QUERIES, KEYS)
    near(fv.linformer_attention(q, k, v, torch.eye(KEYS).double()), fv.attention(q, k, v))


def huggingface(landmarks: int, length: int, kernel: int | None) -> torch.nn.Module:
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = NystromformerConfig(
        hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_landmarks=landmarks, segment_means_seq_len=length,
        conv_kernel_size=kernel or 1, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    layer = NystromformerSelfAttention(config).double()
    layer.init_option = "exact"  # the other takes one norm for all texts and heads: a text would change with its batch
    layer.conv_kernel_size = kernel
    return layer


@pytest.mark.parametrize(("landmarks", "length", "kernel"), [(4, 28, 5), (7, 35, None), (13, 13, 3)])
def test_nystrom_equals_hugging_face(landmarks, length, kernel):
    layer = huggingface(landmarks, length, kernel)
    x = random(BATCH, length, HEADS * DIM).requires_grad_()
    true = layer(x)[0]
    q, k, v = (
        project(x).view(BATCH, length, HEADS, DIM).transpose(1, 2) for project in (layer.query, layer.key, layer.value)
    )
    convolution = layer.conv.weight[:, 0, :, 0] if kernel else None
    out = fv.nystrom_attention(q, k, v, landmarks=landmarks, convolution=convolution)
    found = out.transpose(1, 2).flatten(2)
    near(found, true)
    leaves = (x, *(weight for name, weight in layer.named_parameters() if kernel or name != "conv.weight"))
    for mine, want in zip(gradients((found,), leaves), gradients((true,), leaves), strict=True):
        near(mine, want, 256)


def nystrom_by_loops(q: Tensor, k: Tensor, v: Tensor, landmarks: int) -> Tensor:
    """One head without padding, with the inverse that the iteration converges to."""

    def means(x: Tensor) -> Tensor:
        segment = [row * landmarks // len(x) for row in range(len(x))]
        return torch.stack([x[[s == one for s in segment]].mean(0) for one in range(landmarks)])

    scale = q.shape[-1] ** -0.5
    first = (q @ means(k).mT * scale).softmax(-1)
    middle = (means(q) @ means(k).mT * scale).softmax(-1)
    return first @ torch.linalg.pinv(middle) @ ((means(q) @ k.mT * scale).softmax(-1) @ v)


@pytest.mark.parametrize("queries", [19, 23])
def test_nystrom_equals_the_formula_for_odd_sizes_and_grouped_heads(queries):
    q, k, v = tensors(queries, 19)
    found = fv.nystrom_attention(q, k, v, landmarks=5, iterations=60)
    for b in range(BATCH):
        for h in range(HEADS):
            near(found[b, h], nystrom_by_loops(q[b, h], k[b, h // GROUP], v[b, h // GROUP], 5), 1 << 20)


def test_nystrom_with_as_many_landmarks_as_tokens_is_attention():
    for queries, keys, landmarks in ((11, 13, 13), (3, 13, 4), (13, 13, 64)):
        q, k, v = tensors(queries, keys)
        near(fv.nystrom_attention(q, k, v, landmarks=landmarks), fv.attention(q, k, v))


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_no_text(left):
    """What is padded equals what is short, whatever the padding holds, and gets no gradient."""
    length, short = 23, 17
    part = slice(length - short, length) if left else slice(0, short)
    keep = torch.zeros(BATCH, length, dtype=torch.bool)
    keep[:, part] = True
    pattern = fv.padding(keep) if left else fv.padding(torch.tensor([short] * BATCH))
    clean = tensors(short, short, gradients=True)
    padded = tuple(
        torch.full((*x.shape[:2], length, x.shape[3]), bad).double()
        for x, bad in zip(clean, (7, math.nan, math.inf), strict=True)
    )
    for x, inner in zip(padded, clean, strict=True):
        x[:, :, part] = inner.detach()
        x.requires_grad_()
    mixtures = [torch.zeros(KEY_HEADS, SIZE, length).double() for _ in range(2)]
    for x, inner in zip(mixtures, projections(heads=True), strict=True):
        x[:, :, part] = inner.detach()  # the columns that the text meets
    short_mixtures = [x[:, :, part] for x in mixtures]
    convolution = random(KEY_HEADS, 5)
    for true, found in (
        (fv.linformer_attention(*clean, *short_mixtures), fv.linformer_attention(*padded, *mixtures, pattern)),
        tuple(fv.nystrom_attention(*x, landmarks=5, convolution=convolution) for x in (clean, (*padded, pattern))),
    ):
        near(found[:, :, part], true)
        wants = gradients((true,), clean)
        weights = torch.zeros_like(found)
        weights[:, :, part] = random(*true.shape, seed=5)
        for mine, want in zip(torch.autograd.grad((found * weights).sum(), padded), wants, strict=True):
            near(mine[:, :, part], want, 256)
            assert (mine[:, :, ~keep[0]] == 0).all()
    nothing = fv.padding(torch.zeros(BATCH, length, dtype=torch.bool))
    q, k, v = tensors(length, length, gradients=True)
    for out in (
        fv.nystrom_attention(q, k, v, nothing, landmarks=5),
        fv.linformer_attention(q, k, v, *mixtures, nothing),
    ):
        assert (out == 0).all()
        assert all((x == 0).all() for x in gradients((out,), (q, k, v)))


def test_a_text_does_not_depend_on_its_batch():
    q, k, v = tensors(23, 23)
    out = fv.nystrom_attention(q, k, v, landmarks=5)
    near(fv.nystrom_attention(q[:1], k[:1], v[:1], landmarks=5), out[:1], 1)
    near(fv.nystrom_attention(q[0], k[0], v[0], landmarks=5), out[0], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_stays_near_the_truth(dtype):
    wide = [x * 0.5 for x in tensors(40, 40)]
    q, k, v = (x.to(dtype) for x in wide)
    e = random(SIZE, 40).to(dtype)
    for attend in (
        lambda *x: fv.nystrom_attention(*x, landmarks=4),
        lambda *x: fv.linformer_attention(*x, e.to(x[0].dtype)),
    ):
        true, found = attend(q.double(), k.double(), v.double()), attend(q, k, v)
        assert found.dtype == dtype
        assert (found.double() - true).abs().max() <= 16 * torch.finfo(dtype).eps * max(1, true.abs().max())


def eye(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (
            "linformer",
            {"key_projection": eye(3, 12)},
            "there are 13 keys but key_projection is <float64 3×12>: .* n = 12",
        ),
        ("linformer", {"key_projection": eye(18, 17)}, "k = 18 for n = 17: wanted k at most n"),
        ("linformer", {"key_projection": eye(2, 3, 17)}, "key_projection is <float64 2×3×17>: wanted .*3 key heads"),
        ("linformer", {"key_projection": eye(3, 17), "value_projection": eye(4, 17)}, "wanted the same size k"),
        ("linformer", {"key_projection": eye(17)}, "key_projection is <float64 17>: wanted 2 or 3 dimension"),
        ("linformer", {"key_projection": eye(3, 17).long()}, "wanted a floating-point tensor"),
        ("linformer", {"key_projection": eye(3, 17), "pattern": fv.causal}, "the pattern is causal: Linformer.*causal"),
        ("nystrom", {"pattern": fv.causal}, "the pattern is causal: Nyström.*cannot be causal"),
        ("nystrom", {"pattern": fv.causal & fv.padding(LENGTHS)}, "any pattern but padding"),
        ("nystrom", {"landmarks": 0}, "the number of landmarks is 0: wanted a whole number of at least 1"),
        ("nystrom", {"iterations": -1}, "the number of iterations is -1"),
        ("nystrom", {"convolution": eye(KEY_HEADS, 4)}, "the convolution is <float64 3×4>: wanted .* an odd size"),
        ("nystrom", {"convolution": eye(HEADS, 3)}, "the convolution is <float64 6×3>: wanted .* with 3 heads"),
        ("nystrom", {"convolution": eye(KEY_HEADS, 3)}, "there are 11 queries and 13 keys: the convolution"),
    ],
)
def test_bad_input_gets_a_sentence(function, options, message):
    with pytest.raises(InvalidInput, match=message):
        getattr(fv, f"{function}_attention")(*tensors(QUERIES, KEYS), **options)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is there alone")
@pytest.mark.slow
def test_a_long_text_takes_no_matrix():
    code = """
import torch, foveate as fv
torch.set_num_threads(1)
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**20
q, k, v = (torch.randn(1, 1, 32768, 32).requires_grad_() for _ in range(3))
before = peak()
fv.nystrom_attention(q, k, v, convolution=torch.randn(1, 33)).sum().backward()
fv.linformer_attention(q, k, v, torch.randn(64, 32768)).sum().backward()
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, timeout=600)
    assert float(done.stdout) < 0.5  # a matrix of 32,768 × 32,768 floats has 4 GiB
