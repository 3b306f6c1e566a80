"""The modules of sparse attention: DeepSeek's indexer against Hugging Face's, native sparse attention against loops."""

from __future__ import annotations

import math

import pytest
import torch
from calls import near, random
from torch import Tensor, nn
from transformers.models.deepseek_v32 import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import (
    DeepseekV32Indexer,
    DeepseekV32RotaryEmbedding,
    apply_rotary_pos_emb,
)

import foveate as fv
from foveate import InvalidInput

BATCH, LENGTH, DIM = 2, 29, 20


def test_the_indexer_chooses_what_hugging_face_s_does() -> None:
    torch.manual_seed(5)
    config = DeepseekV32Config(
        hidden_size=DIM, num_attention_heads=6, q_lora_rank=13, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=7,
        index_topk=7, index_head_dim=10, index_n_heads=3, head_dim=4,
    )  # fmt: skip
    theirs = DeepseekV32Indexer(config, 0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    x, latent = random(BATCH, LENGTH, DIM).float(), random(BATCH, LENGTH, 13, seed=2).float()
    positions = torch.arange(LENGTH)
    cos, sin = DeepseekV32RotaryEmbedding(config)(x, positions.expand(BATCH, -1))

    def rotary(part: Tensor, at: Tensor) -> Tensor:
        turned, _ = apply_rotary_pos_emb(part[..., :4], part[..., :4], cos[:, at], sin[:, at], unsqueeze_dim=1)
        return torch.cat([turned, part[..., 4:]], -1)

    mine = fv.nn.LightningIndexer(DIM, heads=3, head_dim=10, top_k=7, query_dim=13, rotary=rotary)
    names = {"wq_b": "query", "wk": "key", "k_norm": "norm", "weights_proj": "weight"}
    mine.load_state_dict(
        {f"{names[key.split('.')[0]]}.{key.split('.')[1]}": value for key, value in theirs.state_dict().items()}
    )
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    true = theirs(x, latent, (cos, sin), causal.expand(BATCH, -1, -1), positions)
    found = mine(x, query_from=latent).indices  # type: ignore[attr-defined]
    for b in range(BATCH):
        for t in range(LENGTH):
            want = {int(s) for s in true[b, t] if s <= t}
            assert {int(s) for s in found[b, 0, t] if s >= 0} == want
            assert len(want) == min(7, t + 1)


def test_the_indexer_learns_from_its_loss_alone() -> None:
    torch.manual_seed(3)
    x = torch.randn(BATCH, LENGTH, DIM, requires_grad=True)
    q, k = x.unflatten(-1, (4, 5)).transpose(1, 2) * 2, x[..., :10].unflatten(-1, (2, 5)).transpose(1, 2) * 2
    indexer = fv.nn.LightningIndexer(DIM, heads=4, head_dim=8, top_k=6)
    optimizer = torch.optim.Adam(indexer.parameters(), 0.01)
    losses, captured = [], []
    weights = fv.weights(q, k, k, fv.causal).sum(1, keepdim=True)
    for _ in range(60):
        loss = indexer.loss(x, q, k, fv.causal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        captured.append((weights * indexer(x).dense(LENGTH, LENGTH, batch=BATCH)).sum().item())
    assert x.grad is None
    assert losses[-1] < 0.5 * losses[0]
    assert captured[-1] > captured[0]
    sparse = indexer.loss(x, q, k, indexer(x))
    assert 0 < sparse.item() < losses[0]


SIZES = {"length": 4, "stride": 2, "block": 4, "top_k": 4, "first": 1, "local": 2, "window": 5}


def nsa_by_loops(layer: fv.nn.NativeSparseAttention, x: Tensor) -> Tensor:
    """Yuan et al. 2025, section 3, query by query and branch by branch."""
    heads, key_heads, d, group = layer.heads, layer.key_heads, layer.head_dim, layer.heads // layer.key_heads
    n = x.shape[1]
    q = layer.query(x).view(BATCH, n, heads, d)
    k, v = (part(x).view(BATCH, n, 3, key_heads, d) for part in (layer.key, layer.value))
    gates = layer.gate(x).sigmoid().view(BATCH, n, 3, heads)
    starts = range(0, n - 3, 2)
    mixed = torch.zeros(BATCH, n, heads, d, dtype=torch.float64)
    for b in range(BATCH):
        for g in range(key_heads):

            def window(part: Tensor, network: nn.Module, first: int, b: int = b, g: int = g) -> Tensor:
                return network.network((part[b, first : first + 4, 0, g] + network.position).flatten())

            short = [(window(k, layer.compress_key, i), window(v, layer.compress_value, i)) for i in starts]
            for t in range(n):
                there = [number for number, first in enumerate(starts) if first + 3 <= t]
                worth = [0.0] * -(-n // 4)
                for h in range(g * group, (g + 1) * group):
                    if there:
                        p = torch.stack([q[b, t, h] @ short[i][0] for i in there]).div(math.sqrt(d)).softmax(0)
                        mixed[b, t, h] += gates[b, t, 0, h] * sum(p[n] * short[i][1] for n, i in enumerate(there))
                        for number, i in enumerate(there):
                            for token in range(2 * i, 2 * i + 4):
                                if token // 4 < len(worth):
                                    worth[token // 4] += float(p[number].detach())
                own = t // 4
                order = sorted(range(own + 1), key=lambda j: -math.inf if j == 0 or j > own - 2 else -worth[j])
                inside = [s for s in range(t + 1) if s // 4 in order[:4]]
                near_by = list(range(max(0, t - 4), t + 1))
                for branch, keys in ((1, inside), (2, near_by)):
                    for h in range(g * group, (g + 1) * group):
                        p = (k[b, keys, branch, g] @ q[b, t, h] / math.sqrt(d)).softmax(0)
                        mixed[b, t, h] += gates[b, t, branch, h] * (p @ v[b, keys, branch, g])
    return layer.out(mixed.flatten(2))


@pytest.mark.parametrize("length", [1, 3, 4, LENGTH])
def test_native_sparse_attention_is_its_paper(length: int) -> None:
    torch.manual_seed(length)
    layer = fv.nn.NativeSparseAttention(DIM, 4, key_heads=2, **SIZES).double()
    nn.init.normal_(layer.compress_key.position)
    x = random(BATCH, length, DIM) * 2
    found, true = layer(x), nsa_by_loops(layer, x)
    near(found, true)
    share = random(*true.shape, seed=4)
    parameters = list(layer.parameters())
    mine, theirs = (torch.autograd.grad((out * share).sum(), parameters, allow_unused=True) for out in (found, true))
    for one, other in zip(mine, theirs, strict=True):
        near(
            torch.zeros(1) if one is None else one,
            torch.zeros_like(one) if other is None and one is not None else other,
        )


def test_native_sparse_attention_does_not_know_the_future() -> None:
    layer = fv.nn.NativeSparseAttention(DIM, 4, key_heads=2, **SIZES)
    x = torch.randn(BATCH, LENGTH, DIM)
    later = x.clone()
    later[:, 14:] += 1
    torch.testing.assert_close(layer(later)[:, :14], layer(x)[:, :14], rtol=0, atol=1e-6)


def test_rotary_positions_turn_every_branch() -> None:
    calls = []

    def rotary(x: Tensor, positions: Tensor) -> Tensor:
        calls.append((tuple(x.shape), positions.tolist()))
        return x

    layer = fv.nn.NativeSparseAttention(DIM, 4, key_heads=2, rotary=rotary, **SIZES)
    layer(torch.randn(BATCH, 7, DIM))
    assert calls == [((BATCH, 4, 7, 5), list(range(7)))] + [((BATCH, 2, 7, 5), list(range(7)))] * 3


def test_moba_is_a_mechanism_that_takes_patterns_and_scores() -> None:
    q, k, v = random(3, BATCH, 4, LENGTH, 5).unbind()
    ids = torch.arange(LENGTH) // 11
    layer = fv.nn.MoBA(3, 20)
    pattern = fv.causal & fv.documents(ids)
    score = fv.sinks(torch.zeros(4, dtype=torch.float64))
    near(layer(q, k, v, pattern, score=score), fv.attention(q, k, v, pattern, score=score))
    with pytest.raises(InvalidInput, match="block size is 0"):
        fv.nn.MoBA(0, 3)
    assert repr(fv.nn.MoBA(8, 3, shared=True)) == "MoBA(8, 3, shared=True)"


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"heads": 3}, "20, 3 heads"),
        ({"key_heads": 3}, "3 key heads"),
        ({"stride": 3}, "stride of 3"),
        ({"block": 5}, "stride of 2"),
        ({"top_k": 2}, "top_k is 2 but 1 first and 2 local"),
        ({"window": 0}, "window is 0"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        fv.nn.NativeSparseAttention(DIM, **{"heads": 4, "key_heads": 2, **SIZES, **sizes})


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(InvalidInput, match=r"wanted \[batch, length, 20\]"):
        fv.nn.NativeSparseAttention(DIM, 4)(torch.zeros(2, 3, 7))
    with pytest.raises(InvalidInput, match=r"wanted \[batch, length, 20\]"):
        fv.nn.LightningIndexer(DIM, heads=2, head_dim=3)(torch.zeros(3, DIM))
