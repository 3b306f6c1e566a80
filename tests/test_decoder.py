"""The attentive decoder against its papers' equations written as loops: one row, one step, one position at a time."""

from __future__ import annotations

import math

import pytest
import torch
from calls import near, random
from torch import Tensor

import foveate as fv
from foveate.nn import AdditiveAttention, AttentiveDecoder, LuongAttention

BATCH, STEPS, SOURCE, DIM, MEMORY, VOCABULARY, WIDTH = 3, 5, 7, 6, 8, 11, 2
LENGTHS = torch.tensor([7, 4, 1])
ATTENTIONS = {
    "additive": lambda: AdditiveAttention(DIM, MEMORY, 5),
    "additive local-p": lambda: AdditiveAttention(DIM, MEMORY, 5, alignment="local-p", width=WIDTH),
    "dot": lambda: LuongAttention(DIM, DIM, score="dot"),
    "general": lambda: LuongAttention(DIM, MEMORY),
    "concat": lambda: LuongAttention(DIM, MEMORY, score="concat"),
    "dot local-m": lambda: LuongAttention(DIM, DIM, score="dot", alignment="local-m", width=WIDTH),
    "general local-p": lambda: LuongAttention(DIM, MEMORY, alignment="local-p", width=WIDTH),
}
DECODERS = {
    "Bahdanau": {"query": "previous"},
    "Luong": {},
    "no feeding": {"input_feeding": False},
    "two layers": {"layers": 2, "cell": "lstm"},
}


def made(attention: str = "general", seed: int = 3, **options: object) -> AttentiveDecoder:
    torch.manual_seed(seed)
    decoder = AttentiveDecoder(VOCABULARY, DIM, ATTENTIONS[attention](), start=2, **options).double()  # type: ignore[arg-type]
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return decoder


def inputs(decoder: AttentiveDecoder) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(VOCABULARY, (BATCH, STEPS), generator=torch.Generator().manual_seed(4))
    return targets, random(BATCH, SOURCE, decoder.attention.memory_dim), LENGTHS


def recurrent(cell: torch.nn.Module, x: Tensor, before: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """One step of a stack of GRUs or LSTMs: (h, c) of every layer, for one row."""
    after = []
    for layer, (h, c) in enumerate(before):
        w, u, b, a = (getattr(cell, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        if isinstance(cell, torch.nn.GRU):
            (r, z, n), (hr, hz, hn) = (w @ x + b).chunk(3), (u @ h + a).chunk(3)
            r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
            x = (1 - z) * (n + r * hn).tanh() + z * h
        else:
            i, f, g, o = (w @ x + b + u @ h + a).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            x = o.sigmoid() * c.tanh()
        after.append((x, c))
    return after


def aligned(attention: LuongAttention, h: Tensor, memory: Tensor, step: int) -> list[Tensor]:
    """The weight of every position of one row's memory."""
    center: Tensor | float = float(step)
    if attention.alignment == "local-p":
        w, v = attention.position[0].weight, attention.position[2].weight[0]
        center = len(memory) * torch.sigmoid(v @ torch.tanh(w @ h))
    energies = {}
    for s in range(len(memory)):
        if attention.alignment != "global" and abs(s - torch.as_tensor(center).item()) > WIDTH:
            continue
        if attention.score == "dot":
            energy = h @ memory[s]
        elif attention.score == "general":
            energy = h @ attention.key.weight @ memory[s]
        else:
            both = torch.cat([attention.query.weight, attention.key.weight], 1)
            energy = attention.vector @ torch.tanh(both @ torch.cat([h, memory[s]]))
        energies[s] = energy.exp()
    total = sum(energies.values())
    weights = []
    for s in range(len(memory)):
        weight = energies[s] / total if s in energies else h.new_zeros(())
        if attention.alignment == "local-p":
            weight = weight * torch.exp(-((s - center) ** 2) / (2 * (WIDTH / 2) ** 2))
        weights.append(weight)
    return weights


def looped(decoder: AttentiveDecoder, targets: Tensor, memory: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, alignments)."""
    logits, alignments = [], torch.zeros(BATCH, STEPS, memory.shape[1], dtype=torch.float64)
    for b in range(BATCH):
        there = memory[b, : lengths[b]]
        fed = states = torch.zeros(DIM, dtype=torch.float64)
        stack = [(states, states)] * decoder.cell.num_layers
        token = torch.tensor(decoder.start)
        for t in range(STEPS):
            y = decoder.embedding.weight[token]
            if decoder.query == "previous":
                weights = aligned(decoder.attention, stack[-1][0], there, t)
                context = sum(w * h for w, h in zip(weights, there, strict=True))
                stack = recurrent(decoder.cell, torch.cat([y, context]), stack)
            else:
                stack = recurrent(decoder.cell, torch.cat([y, fed]) if decoder.input_feeding else y, stack)
                weights = aligned(decoder.attention, stack[-1][0], there, t)
                context = sum(w * h for w, h in zip(weights, there, strict=True))
            fed = torch.tanh(decoder.combine.weight @ torch.cat([context, stack[-1][0]]))
            logits.append(decoder.readout.weight @ fed + decoder.readout.bias)
            alignments[b, t, : len(there)] = torch.stack(weights).detach()
            token = targets[b, t]
    return torch.stack(logits).view(BATCH, STEPS, VOCABULARY), alignments


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_it_is_the_papers_equations(attention: str, kind: str) -> None:
    decoder = made(attention, **DECODERS[kind])
    targets, memory, lengths = inputs(decoder)
    logits, weights = looped(decoder, targets, memory, lengths)
    near(decoder(targets, memory, lengths), logits, times=512)
    near(decoder.weights(targets, memory, lengths), weights, times=512)


@pytest.mark.parametrize(("attention", "kind"), [("additive local-p", "Bahdanau"), ("general", "two layers")])
def test_its_gradients_are_those_of_the_equations(attention: str, kind: str) -> None:
    decoder = made(attention, **DECODERS[kind])
    targets, memory, lengths = inputs(decoder)
    leaves = [memory.requires_grad_(), *decoder.parameters()]
    weight = random(BATCH, STEPS, VOCABULARY, seed=9)
    mine = torch.autograd.grad((decoder(targets, memory, lengths) * weight).sum(), leaves)
    true = torch.autograd.grad((looped(decoder, targets, memory, lengths)[0] * weight).sum(), leaves)
    for found, want in zip(mine, true, strict=True):
        near(found, want, times=4096)
        assert found.abs().max() > 0


@pytest.mark.parametrize("kind", DECODERS)
def test_what_lies_beyond_a_length_never_matters(kind: str) -> None:
    for attention in ATTENTIONS:
        decoder = made(attention, **DECODERS[kind])
        targets, memory, lengths = inputs(decoder)
        beyond = (torch.arange(SOURCE) >= lengths[:, None])[..., None]
        clean, dirty = (memory.masked_fill(beyond, x).requires_grad_() for x in (0.0, math.nan))
        near(decoder(targets, dirty, lengths), decoder(targets, clean, lengths))
        slope = torch.autograd.grad(decoder(targets, dirty, lengths).sum(), dirty)[0]
        assert slope.isfinite().all()
        assert (slope.masked_select(beyond) == 0).all()


@pytest.mark.parametrize("kind", DECODERS)
def test_greedy_writes_what_teacher_forcing_on_it_finds_likeliest(kind: str) -> None:
    decoder = made("general local-p", **DECODERS[kind])
    _, memory, lengths = inputs(decoder)
    written = decoder.greedy(memory, STEPS, lengths)
    assert torch.equal(decoder(written, memory, lengths).argmax(-1), written)
    stop = int(written[0, 1])
    stopped = decoder.greedy(memory, STEPS, lengths, stop=stop)
    for row, free in zip(stopped.tolist(), written.tolist(), strict=True):
        until = free.index(stop) + 1 if stop in free else STEPS
        assert row[:until] == free[: min(until, len(row))]
        assert all(token == stop for token in row[until:])
    assert decoder.greedy(memory, 0).shape == (BATCH, 0)


def test_the_initial_state_is_where_it_starts() -> None:
    for cell, pair in (("gru", False), ("lstm", True)):
        decoder = made(cell=cell, layers=2)
        targets, memory, lengths = inputs(decoder)
        first = tuple(random(2, BATCH, DIM, seed=n) for n in (5, 6))
        given = first if pair else first[0]
        zeros = tuple(torch.zeros_like(x) for x in first) if pair else torch.zeros_like(first[0])
        near(decoder(targets, memory, lengths, initial=zeros), decoder(targets, memory, lengths))
        changed = decoder(targets, memory, lengths, initial=given) - decoder(targets, memory, lengths)
        assert changed[:, 0].abs().amax(-1).min() > 1e-3
        with pytest.raises(fv.InvalidInput, match=r"wanted (a pair of )?\[layers, batch, dim\] = \[2, 3, 6\]"):
            decoder(targets, memory, initial=first[0][:1])


def test_it_learns_to_read_backwards() -> None:
    torch.manual_seed(0)
    decoder = AttentiveDecoder(9, 32, AdditiveAttention(32, 32, 16), query="previous")
    symbols, places = torch.nn.Embedding(9, 32), torch.nn.Embedding(6, 32)
    optimizer = torch.optim.Adam([*decoder.parameters(), *symbols.parameters(), *places.parameters()], 1e-2)
    for _ in range(150):
        words = torch.randint(1, 9, (32, 6))
        logits = decoder(words.flip(1), symbols(words) + places.weight)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), words.flip(1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    words = torch.randint(1, 9, (50, 6))
    written = decoder.greedy(symbols(words) + places.weight, 6)
    assert (written == words.flip(1)).float().mean() > 0.9
    looked = decoder.weights(written, symbols(words) + places.weight)
    assert (looked.argmax(-1) == torch.arange(5, -1, -1)).float().mean() > 0.9


def test_wrong_input_is_said_in_a_sentence() -> None:
    decoder = made()
    targets, memory, lengths = inputs(decoder)
    for call, words in (
        (lambda: LuongAttention(6, 8, score="dot"), "the dot score wants them equal"),
        (lambda: LuongAttention(6, 8, score="cosine"), "wanted one of 'dot', 'general', 'concat'"),
        (lambda: LuongAttention(6, 8, alignment="local"), "wanted one of 'global', 'local-m', 'local-p'"),
        (lambda: LuongAttention(6, 8, dim=3), "only the concat score has a hidden size"),
        (lambda: LuongAttention(6, 8, width=0), "the width is 0"),
        (lambda: AttentiveDecoder(11, 6, LuongAttention(5, 8)), "wanted query_dim = dim = 6"),
        (lambda: made(cell="rnn"), "wanted 'gru' or 'lstm'"),
        (lambda: made(query="next"), "wanted 'current'"),
        (lambda: made(query="previous", input_feeding=False), "feeds the context into the cell"),
        (lambda: decoder(targets[0], memory), "wanted 2 dimension"),
        (lambda: decoder(targets[:, :0], memory), "wanted at least one step"),
        (lambda: decoder(targets[:2], memory), "wanted one batch"),
        (lambda: decoder(targets, memory[..., :3]), r"wanted \[batch, source, 8\]"),
        (lambda: decoder.attention(memory, memory), r"wanted \[batch, steps, 6\]"),
        (lambda: decoder(targets, memory, lengths + 1), "wanted at most the 7 positions of the memory"),
        (lambda: decoder(targets, memory, lengths[:2]), r"wanted \[batch\] = \[3\]"),
    ):
        with pytest.raises(fv.InvalidInput, match=words):
            call()
