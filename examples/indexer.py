"""A lightning indexer learns which keys a trained model needs: accuracy by k, before and after.

    python examples/indexer.py          one seed: a table, and indexer.png
    python examples/indexer.py --full   two seeds, more steps; writes examples/results/

DeepSeek's recipe (https://arxiv.org/abs/2512.02556) on the task and the layer of recall.py, where a token has to find
one of many pairs:

    dense       the model learns with every key in sight
    warm-up     all is frozen but the indexer, which learns from the attention that it sees, by its KL loss
    sparse      the model attends to the k keys of highest index score alone, and both go on learning

After the warm-up nothing else was changed: what the model loses with k keys is what the indexer did not find. The best
that any choice could do is measured too: the k keys that the attention itself gives most. And a model that went from
dense to sparse without the warm-up, for as many steps more, says what the warm-up is for.
"""

from __future__ import annotations

import argparse
import copy
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from recall import DIM, HEADS, Indexed, Reader, Settings, sequences
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import foveate as fv

WAYS = {
    "untrained": "the indexer as it was drawn",
    "warmed up": "by its KL loss, the model frozen",
    "sparse": "warmed up, then both trained with k keys",
    "no warm-up": "both trained with k keys at once, for as long as both together",
    "own best": "the k keys that the attention gives most",
}


class Plan(NamedTuple):
    """What one training is given."""

    seed: int
    dense: int  # steps
    warm_up: int
    sparse: int
    by: tuple[int, ...]  # the numbers of keys, k
    trained: tuple[int, ...]  # those that the sparse training is done for
    length: int
    pairs: int
    batch: int = 32
    names: int = 128
    tests: int = 400


class Found(NamedTuple):
    """What came out of it; shares of the test questions by way and k."""

    dense: float
    accuracy: dict[tuple[str, int], float]
    held: dict[tuple[str, int], float]  # the share of the attention that falls on the chosen keys
    losses: list[float]  # of the warm-up
    seconds: float  # of a CPU
    attention: Tensor  # [questions, length], of one sequence, the mean over heads
    chosen: list[Tensor]  # the same shape: the keys of the untrained indexer, and those after the warm-up


class Study:
    """A model and what it is trained and tested with."""

    def __init__(self, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.draw = plan, torch.Generator().manual_seed(plan.seed)
        self.task = Settings("DSA", 0, plan.seed, 0, plan.batch, plan.length, plan.pairs, plan.names)
        self.model = Reader(Indexed(DIM, HEADS, plan.length), plan.names)

    @property
    def mixer(self) -> Indexed:
        found = self.model.mixer
        assert isinstance(found, Indexed)
        return found

    def train(self, steps: int, rate: float, *, model: bool, indexer: bool, top_k: int | None = None) -> list[float]:
        """Train the model, its indexer, or both, with k keys or all; the indexer's losses, where it learns."""
        self.model.train().requires_grad_(model)
        self.mixer.indexer.requires_grad_(indexer)
        self.look(top_k)
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(steps, 1))
        losses = []
        for _ in range(steps):
            tokens, answers = sequences(self.task, self.plan.batch, self.draw)
            asked = answers >= 0
            scores = self.model(tokens, asked)
            loss = torch.zeros(())
            if model:
                loss = loss + cross_entropy(scores, answers[asked])
            if indexer:
                loss = loss + self.mixer.distance
                losses.append(self.mixer.distance.item())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        self.model.eval()
        return losses

    def look(self, top_k: int | None) -> None:
        """From now on, attend to so many keys, or to all of them."""
        self.mixer.sparse, self.mixer.indexer.top_k = top_k is not None, top_k or self.plan.length
        self.mixer.distance = torch.zeros(())  # the last one hangs on its graph, which cannot be copied

    def tested(self) -> list[tuple[Tensor, Tensor]]:
        """New sequences in parts, the same for every way."""
        tokens, answers = sequences(self.task, self.plan.tests, torch.Generator().manual_seed(1000))
        return list(zip(tokens.split(50), answers.split(50), strict=True))

    @torch.no_grad()
    def accuracy(self, top_k: int | None) -> float:
        """The share of right answers with k keys, or with all of them."""
        self.look(top_k)
        right = []
        for tokens, answers in self.tested():
            asked = answers >= 0
            right.append(self.model(tokens, asked).argmax(-1) == answers[asked])
        return torch.cat(right).double().mean().item()

    @torch.no_grad()
    def attention(self, read: Tensor) -> Tensor:
        """How much every token looks at every key `[batch, length, length]`, the mean over heads."""
        q, k, _ = self.mixer.heads(read)
        return fv.weights(q, k, k, fv.causal).mean(1)

    @torch.no_grad()
    def chosen(self, read: Tensor, top_k: int) -> Tensor:
        """Which keys the indexer chooses for every token `[batch, length, length]`."""
        self.look(top_k)
        return self.mixer.indexer(read, fv.causal).dense(read.shape[1], read.shape[1], batch=len(read))[:, 0]

    @torch.no_grad()
    def held(self, top_k: int) -> float:
        """How much of the attention falls on the k keys that the indexer chooses, where something is asked for."""
        shares = []
        for tokens, answers in self.tested():
            _, read = self.model.before(tokens)
            shares.append((self.attention(read) * self.chosen(read, top_k)).sum(-1)[answers >= 0])
        return torch.cat(shares).mean().item()

    @torch.no_grad()
    def own_best(self, top_k: int) -> tuple[float, float]:
        """(accuracy, share of the attention) with the k keys that the attention itself gives most."""
        right, shares = [], []
        for tokens, answers in self.tested():
            x, read = self.model.before(tokens)
            top = self.attention(read).topk(top_k)
            keys = fv.selected(top.indices[:, None].int())
            asked = answers >= 0
            said = self.model.after((x + self.mixer(read, fv.causal & keys))[asked]).argmax(-1)
            right.append(said == answers[asked])
            shares.append(top.values.sum(-1)[asked])
        return torch.cat(right).double().mean().item(), torch.cat(shares).mean().item()


def train(plan: Plan) -> Found:
    """The whole recipe for one seed."""
    torch.set_num_threads(1)  # so small a model gains nothing from more, and its sums stay the same on every machine
    started = time.process_time()
    study = Study(plan)
    study.train(plan.dense, 1e-2, model=True, indexer=False)
    dense, accuracy, held = study.accuracy(None), {}, {}
    untrained = copy.deepcopy(study)
    losses = study.train(plan.warm_up, 3e-3, model=False, indexer=True)
    for k in plan.by:
        accuracy["own best", k], held["own best", k] = study.own_best(k)
        for way, one in (("untrained", untrained), ("warmed up", study)):
            accuracy[way, k], held[way, k] = one.accuracy(k), one.held(k)
    for k in plan.trained:
        for way, start, steps in (
            ("sparse", study, plan.sparse),
            ("no warm-up", untrained, plan.warm_up + plan.sparse),
        ):
            one = copy.deepcopy(start)
            one.train(steps, 3e-3, model=True, indexer=True, top_k=k)
            accuracy[way, k] = one.accuracy(k)
    tokens, answers = study.tested()[0]
    _, read = study.model.before(tokens[:1])
    asked = answers[0] >= 0
    attention = study.attention(read)[0, asked]
    chosen = [one.chosen(read, min(4, plan.length))[0, asked] for one in (untrained, study)]
    return Found(dense, accuracy, held, losses, time.process_time() - started, attention, chosen)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(plan: Plan, found: list[Found]) -> str:
    """The results as Markdown: the mean over seeds."""

    def cells(kind: str, way: str) -> str:
        shares = [[getattr(one, kind)[way, k] for one in found if (way, k) in getattr(one, kind)] for k in plan.by]
        return " | ".join(f"{mean(here):.1%}" if here else "–" for here in shares)

    lines = [
        f"| k keys, chosen by | | {' | '.join(map(str, plan.by))} |",
        f"|:--|:--|{'--:|' * len(plan.by)}",
        *(f"| {way} | {meaning} | {cells('accuracy', way)} |" for way, meaning in WAYS.items()),
    ]
    lines += [
        f"| held, {way} | the share of the attention that falls on them | {cells('held', way)} |"
        for way in ("untrained", "warmed up", "own best")
    ]
    return "\n".join(lines)


def picture(plan: Plan, found: list[Found], path: Path) -> None:
    """Accuracy by k; the warm-up's loss; and where a sequence's questions look, with the keys chosen for them."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_k, by_step, looks) = plt.subplots(
        1, 3, figsize=(13, 4), width_ratios=(1.2, 1, 1.8), layout="constrained"
    )
    for way in WAYS:
        points = [(k, 100 * mean([one.accuracy[way, k] for one in found]))
                  for k in plan.by if (way, k) in found[0].accuracy]  # fmt: skip
        style = {"linestyle": "--", "color": "gray"} if way == "own best" else {"marker": "o"}
        by_k.plot(*zip(*points, strict=True), label=way, **style)
    by_k.axhline(100 * mean([one.dense for one in found]), color="black", linewidth=0.8, linestyle=":")
    by_k.set_xscale("log", base=2)
    by_k.set_xticks(plan.by, map(str, plan.by))
    by_k.set(xlabel="keys, k", ylabel="% of values recalled", ylim=(-3, 103))
    by_k.legend(frameon=False, fontsize=8)
    for one in found:
        by_step.plot(range(1, len(one.losses) + 1), one.losses, linewidth=1)
    by_step.set(xlabel="step of the warm-up", ylabel="KL(attention ‖ indexer)", ylim=0)
    first = found[0]
    looks.imshow(first.attention.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for seen, marker, color, label in zip(
        first.chosen, ("x", "o"), ("tab:blue", "tab:orange"), ("untrained", "warmed up"), strict=True
    ):
        rows, columns = seen.nonzero().T.numpy()
        marks = {"facecolors": "none", "edgecolors": color} if marker == "o" else {"color": color}
        looks.scatter(columns, rows, s=28, marker=marker, linewidths=1, label=label, **marks)
    looks.set(xlabel="key", ylabel="question", yticks=[])
    looks.set_title("black: the attention; marked: the 4 keys that the indexer chooses", fontsize=9)
    looks.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Train, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="two seeds, more steps, into examples/results")
    parser.add_argument("--length", type=int, default=128, help="tokens, of which a quarter are pairs (128)")
    parser.add_argument("--names", type=int, default=128, help="names that there are, and as many values (128)")
    parser.add_argument("--steps", type=int, nargs=3, help="dense, of the warm-up, sparse (500 300 200)")
    parser.add_argument("--by", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="k's (1 2 4 8 16 32)")
    parser.add_argument("--trained", type=int, nargs="+", default=[2, 4], help="k's of the sparse training (2 4)")
    parser.add_argument("--seeds", type=int, help="how many, from 0 (1)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (2)")
    parser.add_argument("--out", type=Path, help="the folder for the picture and the table (here)")
    given = parser.parse_args(arguments)
    length, seeds = given.length, given.seeds or (2 if given.full else 1)
    dense, warm_up, sparse = given.steps or ((800, 300, 200) if given.full else (500, 300, 200))
    folder = given.out or (Path(__file__).parent / "results" if given.full else Path())
    folder.mkdir(parents=True, exist_ok=True)  # a place that cannot be is told before anything is trained
    work = [Plan(seed, dense, warm_up, sparse, tuple(given.by), tuple(given.trained), length, length // 8,
                 names=given.names) for seed in range(seeds)]  # fmt: skip
    started = time.perf_counter()
    if given.jobs == 1 or seeds == 1:
        found = list(map(train, work))
    else:
        with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
            found = list(pool.map(train, work))
    each = " and ".join(f"{one.dense:.1%}" for one in found)
    said = f"With every key: {each}{' (each seed; below, their mean)' if seeds > 1 else ''}.\n\n{table(work[0], found)}"
    print(said)
    picture(work[0], found, folder / "indexer.png")
    told = (
        f"{length // 8} pairs in {length} tokens, {given.names} names; {dense} dense steps of {work[0].batch}, "
        f"{warm_up} of the warm-up, {sparse} sparse; {seeds} seed{'s' * (seeds > 1)}; "
        f"{time.perf_counter() - started:.0f} s ({mean([one.seconds for one in found]):.0f} CPU seconds a seed) "
        f"in {min(given.jobs, seeds)} process{'es' * (min(given.jobs, seeds) > 1)} of one thread, "
        f"torch {torch.__version__}."
    )
    (folder / "indexer.md").write_text(
        f"# A lightning indexer learns\n\n{told}\n\n{said}\n\n![Accuracy by k, the loss, and the keys](indexer.png)\n",
        "utf-8",
    )
    print(f"\n{told}\nwrote {folder / 'indexer.md'} and {folder / 'indexer.png'}")


if __name__ == "__main__":
    main()
