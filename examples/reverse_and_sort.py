"""The Transformer of 2017 learns to reverse and to sort sequences of digits, until every fresh one comes out right.

    reverse 3 1 4 1 5  →  5 1 4 1 3
    sort    3 1 4 1 5  →  1 1 3 4 5

One model does both; the first token says which. It writes with `generate`, each token the likeliest after those before
it. The picture shows where it looks while it writes: from the last digit to the first when it reverses, and for all
equal digits when it sorts.

    python examples/reverse_and_sort.py                   # needs pip install -e ".[examples]"
    python examples/reverse_and_sort.py --steps 20 --out  # a taste, and no picture
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import foveate as fv
from foveate.paths import checked

PAD, BEGIN, END, REVERSE, SORT, ZERO = range(6)
TASKS = {"reverse": REVERSE, "sort": SORT}
VOCABULARY, LONGEST, DIM = ZERO + 10, 12, 64


def draw(count: int, generator: torch.Generator, task: int | None = None) -> tuple[Tensor, Tensor]:
    """(source, target): a task and 3 to 12 digits, [count, 13]; begin, the answer and end, [count, 14]."""
    place = torch.arange(LONGEST)
    length = torch.randint(3, LONGEST + 1, (count, 1), generator=generator)
    digits = torch.randint(ZERO, VOCABULARY, (count, LONGEST), generator=generator)
    here = place < length
    first = (
        torch.randint(REVERSE, SORT + 1, (count, 1), generator=generator)
        if task is None
        else torch.full((count, 1), task)
    )
    mirrored = digits.gather(1, (length - 1 - place).clamp(min=0))
    ordered = digits.masked_fill(~here, VOCABULARY).sort(1).values
    answer = torch.where(first == REVERSE, mirrored, ordered).masked_fill(~here, PAD)
    target = torch.cat([torch.full((count, 1), BEGIN), answer, torch.zeros(count, 1, dtype=torch.int64)], 1)
    target.scatter_(1, length + 1, END)
    return torch.cat([first, digits.masked_fill(~here, PAD)], 1), target


def model() -> fv.nn.Seq2Seq:
    transformer = fv.nn.Transformer.paper(DIM, heads=4, layers=2, hidden=4 * DIM, dropout=0.0)
    return fv.nn.Seq2Seq(VOCABULARY, DIM, transformer=transformer, dropout=0.0, pad=PAD)


def right(learner: fv.nn.Seq2Seq, task: int, count: int, seed: int) -> float:
    """The share of fresh sequences that come out right to the last token."""
    source, target = draw(count, torch.Generator().manual_seed(seed), task)
    written = learner.eval().generate(source, new=LONGEST + 1, begin=BEGIN, end=END)
    written = torch.nn.functional.pad(written, (0, target.shape[1] - written.shape[1]), value=PAD)
    return (written == target).all(1).double().mean().item()


def train(
    steps: int, seed: int, tried: int = 200, batch: int = 128
) -> tuple[fv.nn.Seq2Seq, list[tuple[int, float, float, float]]]:
    """The model, and (step, loss, share of reversed, share of sorted) along the way."""
    torch.manual_seed(seed)
    learner, generator = model(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.5, betas=(0.9, 0.98), eps=1e-9)
    # The paper's results are those of averaged weights (section 6.1); here over about the last hundred steps.
    averaged = AveragedModel(learner, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    schedule = LambdaLR(optimizer, fv.nn.inverse_sqrt_rate(DIM, warmup=400))
    history = []
    for step in range(1, steps + 1):
        loss = learner.train().loss(*draw(batch, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        averaged.update_parameters(learner)
        if step % max(steps // 10, 1) == 0:
            history.append(
                (step, loss.item(), *(right(averaged.module, task, tried, seed=1) for task in TASKS.values()))
            )
            print(f"{step:>5}  {loss.item():6.3f}  {history[-1][2]:9.1%}  {history[-1][3]:7.1%}")
    return averaged.module, history


def looks(learner: fv.nn.Seq2Seq, task: int, digits: Sequence[int]) -> tuple[list[int], Tensor]:
    """(what is written, where each of its tokens looks in the source): the mean over the heads of the last layer."""
    source = torch.tensor([[task, *(ZERO + digit for digit in digits)]])
    written = learner.eval().generate(source, new=len(digits), begin=BEGIN)
    with torch.no_grad(), fv.watch() as seen:
        learner(source, written[:, :-1])
    return (written[0, 1:] - ZERO).tolist(), seen.weights(-1)[0].mean(0)


def picture(learner: fv.nn.Seq2Seq, history: list[tuple[int, float, float, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    curve, *maps = figure.subplots(1, 3)
    for n, name in enumerate(TASKS, 2):
        curve.plot([row[0] for row in history], [100 * row[n] for row in history], marker="o", label=name)
    curve.set(xlabel="step", ylabel="% of sequences all right", ylim=(-3, 103))
    curve.legend(frameon=False)
    digits = [3, 1, 4, 1, 5, 9, 2, 6]
    for axes, (name, task) in zip(maps, TASKS.items(), strict=True):
        written, weights = looks(learner, task, digits)
        axes.imshow(weights.sqrt().numpy(), cmap="Oranges", vmin=0, vmax=1)
        axes.set_xticks(range(len(digits) + 1), ["task", *map(str, digits)])
        axes.set_yticks(range(len(written)), map(str, written))
        axes.set(title=f"{name}: where each digit looks", xlabel="source", ylabel="written")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--fresh", type=int, default=1000, help="how many sequences of each kind are tried at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, nargs="?", default=Path("reverse_and_sort.png"), help="the picture; none without a name"
    )
    chosen = parser.parse_args(arguments)
    if chosen.out:
        checked(chosen.out, (".png", ".svg", ".pdf"))  # before anything is trained
    torch.set_num_threads(1)  # sums in one order on any machine, and matrices too small to share
    start = time.perf_counter()
    print(" step    loss  reversed   sorted")
    learner, history = train(chosen.steps, chosen.seed, min(200, chosen.fresh))
    shares = {name: right(learner, task, chosen.fresh, seed=2) for name, task in TASKS.items()}
    print(f"of {chosen.fresh} fresh ones each: {shares['reverse']:.1%} reversed, {shares['sort']:.1%} sorted")
    print(f"{sum(p.numel() for p in learner.parameters()):,} weights, {time.perf_counter() - start:.0f} s")
    if chosen.out:
        picture(learner, history, chosen.out)
    return shares


if __name__ == "__main__":
    main()
