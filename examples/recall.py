"""Recall against state size: how much of what was read can be asked for, by seven ways to attend.

    python examples/recall.py          two state sizes: a table, and recall.png
    python examples/recall.py --full   four sizes, longer; writes examples/results/

Multi-query associative recall (Arora et al. 2023, "Zoology": https://arxiv.org/abs/2312.04927): a sequence lists pairs
of a name and a value, then asks for every name once, in any order and with any number of blanks between; wherever a
name is asked for, its value is to be said.

    c 7   a 2   f 7   b 4   ·   f   ·   ·   b   c   ·   a        names and values are drawn anew for every sequence
                                7           4   7       2        what is to be said

All models are one layer and alike but for the attention: a short convolution puts a value and the name before it into
one place, the attention finds or stores it, a feed-forward follows. A state of S numbers is S / 128 keys with their
values of 64 entries each, or 64 / heads × 64 numbers of a linear layer, with as many heads as make that S.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import foveate as fv

DIM, HEADS = 64, 2
INDEX_HEADS, INDEX_DIM = 4, 16
WAYS = {
    "softmax": "every key",
    "window": "the last keys",
    "MoBA": "the blocks of best mean key, the own one among them",
    "DSA": "the keys that a small indexer chooses",
    "linear": "Σ φ(q)·φ(k)·v / Σ φ(q)·φ(k), φ = elu + 1",
    "delta": "a key replaces what is stored under it",
    "gated delta": "the same, and the state fades as far as a step says",
}


class Settings(NamedTuple):
    """What one training is given."""

    way: str
    state: int  # numbers that a token reads, beside what chooses them
    seed: int
    steps: int
    batch: int = 32
    length: int = 64
    pairs: int = 16
    names: int = 128  # that there are, and as many values
    tests: int = 2000


class Found(NamedTuple):
    """What came out of one training."""

    way: str
    state: int
    recall: float
    keeps: int  # numbers of a layer for the next token, at the end of a sequence
    seconds: float  # of a CPU
    by_distance: list[tuple[int, float]]  # how far back the value is, up to 8 tokens more; recall there


def sequences(given: Settings, n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens `[n, length]`: 0 a blank, then names, then values; and the value to say, from 0, or −100 for none."""
    names = torch.rand(n, given.names, generator=draw).argsort(1)[:, : given.pairs]
    values = torch.randint(given.names, (n, given.pairs), generator=draw)
    listed = 2 * given.pairs
    tokens, answers = torch.zeros(n, given.length, dtype=torch.int64), torch.full((n, given.length), -100)
    tokens[:, 0:listed:2], tokens[:, 1:listed:2] = 1 + names, 1 + given.names + values
    places = listed + torch.rand(n, given.length - listed, generator=draw).argsort(1)[:, : given.pairs]
    return tokens.scatter(1, places, 1 + names), answers.scatter(1, places, values)


class Indexed(nn.Module):
    """Softmax attention to the `top_k` keys that a lightning indexer chooses, or to all while `sparse` is False.

    `distance` is how far the indexer was from the attention in the last call, which is what it learns from; it is not
    worked out while the indexer is frozen.
    """

    def __init__(self, dim: int, heads: int, top_k: int) -> None:
        super().__init__()
        self.attention = fv.nn.SelfAttention(dim, heads, bias=False)
        self.indexer = fv.nn.LightningIndexer(dim, heads=INDEX_HEADS, head_dim=INDEX_DIM, top_k=top_k)
        self.sparse, self.distance = False, torch.zeros(())

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[batch, heads, length, head dim]`."""
        q = self.attention.query(x).unflatten(-1, (self.attention.heads, -1)).transpose(1, 2)
        return q, *self.attention.project(x)

    def forward(self, x: Tensor, keys: fv.Pattern | None = None) -> Tensor:
        q, k, v = self.heads(x)
        if keys is None:
            keys = self.indexer(x, fv.causal) if self.sparse else fv.causal
        if self.training and self.indexer.key.weight.requires_grad:
            self.distance = self.indexer.loss(x, q, k, keys)
        return self.attention.out(fv.attention(q, k, v, keys).transpose(1, 2).flatten(2))


class Reader(nn.Module):
    """Token ─ embedding ─ (+ short convolution) ─ (+ attention) ─ (+ feed-forward) ─ the value that it says."""

    def __init__(self, mixer: nn.Module, names: int, pattern: fv.Pattern = fv.causal) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1 + 2 * names, DIM)
        self.convolution = fv.nn.ShortConvolution(DIM, 3)
        self.mixer, self.pattern = mixer, pattern
        self.feed_forward = fv.nn.FeedForward(DIM, 2 * DIM)
        self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in range(4))
        self.answer = nn.Linear(DIM, names)

    def before(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(x before the attention is added, what the attention reads)."""
        x = self.embedding(tokens)
        x = x + self.convolution(self.norms[0](x))[0]
        return x, self.norms[1](x)

    def after(self, x: Tensor) -> Tensor:
        """The score of every value, from x with what the attention gave."""
        return self.answer(self.norms[3](x + self.feed_forward(self.norms[2](x))))

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """The score of every value, `[questions, names]`, at the tokens where `asked` is True."""
        x, read = self.before(tokens)
        mixed = self.mixer(read, self.pattern) if isinstance(self.mixer, fv.nn.SelfAttention) else self.mixer(read)
        x = x + (mixed[0] if isinstance(mixed, tuple) else mixed)  # a linear layer gives its state too
        return self.after(x[asked])


def reader(given: Settings) -> Reader:
    """A model whose attention reads `given.state` numbers for each token."""
    keys, heads = given.state // (2 * DIM), DIM * DIM // given.state
    if given.way == "softmax":
        return Reader(fv.nn.SelfAttention(DIM, HEADS, bias=False), given.names)
    if given.way == "window":
        return Reader(fv.nn.SelfAttention(DIM, HEADS, bias=False), given.names, fv.causal & fv.window(keys))
    if given.way == "MoBA":
        block = min(4, keys // 2)
        chosen = fv.nn.MoBA(block, keys // block)
        return Reader(fv.nn.SelfAttention(DIM, HEADS, bias=False, attend=chosen), given.names)
    if given.way == "DSA":
        return Reader(Indexed(DIM, HEADS, keys), given.names)
    if given.way == "gated delta":
        gated = fv.nn.GatedDeltaNet(DIM, heads)
        # It begins by forgetting 1 % a step. At the usual start, up to 80 %, nothing is left where something is asked.
        gated.rate.data.zero_(), gated.rest.data.fill_(-4.6)
        return Reader(gated, given.names)
    layers = {"linear": fv.nn.LinearAttention, "delta": fv.nn.DeltaNet}
    return Reader(layers[given.way](DIM, heads), given.names)


def train(given: Settings) -> Found:
    """Train one reader and test it."""
    torch.set_num_threads(1)  # so small a model gains nothing from more, and its sums stay the same on every machine
    started = time.process_time()
    torch.manual_seed(given.seed)
    draw = torch.Generator().manual_seed(given.seed)
    model = reader(given)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, given.steps)
    for step in range(given.steps):
        tokens, answers = sequences(given, given.batch, draw)
        asked = answers >= 0
        if given.way == "DSA":  # all keys while the indexer looks on, then the chosen ones
            model.mixer.sparse = step >= given.steps // 2
        loss = cross_entropy(model(tokens, asked), answers[asked])
        if given.way == "DSA":
            loss = loss + model.mixer.distance  # of other parameters: neither learns from the other's
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return test(model.eval(), given, started)


@torch.no_grad()
def test(model: Reader, given: Settings, started: float) -> Found:
    """Ask new sequences, the same for every way."""
    draw = torch.Generator().manual_seed(1000)
    tokens, answers = sequences(given, given.tests, draw)
    asked = answers >= 0
    said = [model(*part).argmax(-1) for part in zip(tokens.split(100), asked.split(100), strict=True)]
    right = torch.cat(said) == answers[asked]
    # Which pair has the name that is asked for, and so how far back its value stands.
    pair = (tokens[:, :, None] == tokens[:, None, 0 : 2 * given.pairs : 2]).int().argmax(-1)
    back = (torch.arange(given.length) - (2 * pair + 1))[asked]
    by_distance = []
    for near in range(0, given.length, 8):
        here = (back >= near) & (back < near + 8)
        if here.any():
            by_distance.append((near, right[here].double().mean().item()))
    recall, seconds = right.double().mean().item(), time.process_time() - started
    print(f"{given.way}, {given.state:,}: {recall:.1%} in {seconds:.0f} CPU seconds", flush=True)
    return Found(given.way, given.state, recall, kept(model, given), seconds, by_distance)


def kept(model: Reader, given: Settings) -> int:
    """The numbers that the attention keeps for the next token, after a whole sequence."""
    if given.way == "window":
        return given.state
    everything = 2 * DIM * given.length
    if given.way == "DSA":
        return everything + INDEX_DIM * given.length
    if given.way in ("softmax", "MoBA"):
        return everything
    _, state = model.mixer(torch.zeros(1, given.length, DIM))
    return sum(x.numel() for x in (*state.memory, state.convolution) if x is not None)


def table(found: list[Found]) -> str:
    """The results as Markdown: for every size the mean over seeds."""
    states = sorted({one.state for one in found if one.way != "softmax"})
    lines = [
        f"| attention | | keeps | {' | '.join(f'{state:,}' for state in states)} | CPU seconds |",
        f"|:--|:--|--:|{'--:|' * len(states)}--:|",
    ]
    for way, meaning in WAYS.items():
        runs = [one for one in found if one.way == way]
        cells = []
        for state in states:
            here = [one.recall for one in runs if one.state == state or way == "softmax"]
            cells.append(f"{sum(here) / len(here):.1%}")
        low, high = min(one.keeps for one in runs), max(one.keeps for one in runs)
        keeps = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        seconds = sum(one.seconds for one in runs) / len(runs)
        lines.append(f"| {way} | {meaning} | {keeps} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def picture(found: list[Found], path: Path) -> None:
    """Recall by state size, and, for the second smallest size, by how far back the value is."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    states = sorted({one.state for one in found if one.way != "softmax"})
    shown = states[min(1, len(states) - 1)] if len(states) > 2 else states[0]
    figure, (by_state, by_distance) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for way, color in zip(WAYS, plt.colormaps["tab10"].colors, strict=False):
        runs = [one for one in found if one.way == way]
        here = {state: [one.recall for one in runs if one.state == state or way == "softmax"] for state in states}
        mean = [sum(here[state]) / len(here[state]) for state in states]
        style = {"color": color, "label": way, "linestyle": "--" if way == "softmax" else "-"}
        by_state.plot(states, [100 * recall for recall in mean], marker="" if way == "softmax" else "o", **style)
        one = next(one for one in runs if one.state == shown or way == "softmax")
        by_distance.plot([near + 4 for near, _ in one.by_distance], [100 * r for _, r in one.by_distance], **style)
    by_state.set_xscale("log", base=2)
    by_state.set_xticks(states, [f"{state:,}" for state in states])
    by_state.set(xlabel="numbers that a token attends to", ylabel="% of values recalled", ylim=(-3, 103))
    by_distance.set(xlabel=f"tokens back to the value, state {shown:,}", ylim=(-3, 103))
    by_state.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Train every way at every size, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="four sizes and 1000 steps, into examples/results")
    parser.add_argument("--states", type=int, nargs="+", help="sizes: powers of 2 from 512 to 4096 (512 2048)")
    parser.add_argument("--steps", type=int, help="of training (600)")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 (1)")
    parser.add_argument("--length", type=int, default=64, help="tokens in a sequence (64)")
    parser.add_argument("--pairs", type=int, default=16, help="pairs in a sequence (16)")
    parser.add_argument("--names", type=int, default=128, help="names that there are, and as many values (128)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (2)")
    parser.add_argument("--out", type=Path, help="the folder for the picture and the table (here)")
    given = parser.parse_args(arguments)
    states = given.states or ([512, 1024, 2048, 4096] if given.full else [512, 2048])
    steps = given.steps or (1000 if given.full else 600)
    folder = given.out or (Path(__file__).parent / "results" if given.full else Path())
    folder.mkdir(parents=True, exist_ok=True)  # a place that cannot be is told before anything is trained
    asked = {"length": given.length, "pairs": given.pairs, "names": given.names}
    ways = [(way, state) for way in reversed(WAYS) for state in states if way != "softmax"]
    ways.append(("softmax", 2 * DIM * given.length))  # no choice of a size
    work = [Settings(way, state, seed, steps, **asked) for seed in range(given.seeds) for way, state in ways]
    started = time.perf_counter()
    if given.jobs == 1:
        found = list(map(train, work))
    else:
        with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
            found = list(pool.map(train, work))
    said = table(found)
    print(said)
    picture(found, folder / "recall.png")
    told = (
        f"{given.pairs} pairs in {given.length} tokens, {given.names} names, {steps} steps of {work[0].batch}, "
        f"{given.seeds} seed{'s' * (given.seeds > 1)}, 2000 sequences to test with; "
        f"{time.perf_counter() - started:.0f} s in {given.jobs} process{'es' * (given.jobs > 1)} of one thread, "
        f"torch {torch.__version__}."
    )
    (folder / "recall.md").write_text(
        f"# Recall against state size\n\n{told}\n\n{said}\n\n![Recall by state size and by distance](recall.png)\n",
        "utf-8",
    )
    print(f"\n{told}\nwrote {folder / 'recall.md'} and {folder / 'recall.png'}")


if __name__ == "__main__":
    main()
