"""Find one digit among clutter by looking at one place: five ways to train a choice, and how often it is the right one.

    python examples/hard_attention.py          one seed: a table, and hard_attention.png with what each way looks at
    python examples/hard_attention.py --full   three seeds, longer; writes examples/results/

A scene has 32 × 32 pixels: a digit of 8 × 8 at one of 7 × 7 places, and fragments of other digits all over. A small
network makes a key and a value of every place, a learned query weighs the places, and the digit is named from what was
looked at. The digits are those of scikit-learn; the scenes are made of them, those to test with of digits that training
never saw.
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
from torch.nn.functional import log_softmax, unfold

import foveate as fv

SIDE, DIGIT, STRIDE, PLACES = 32, 8, 4, 49
FRAGMENT, FRAGMENTS = 5, 10

WAYS = {
    "random place": "no choice is learned: what the picture gives away by chance",
    "soft": "the mean of all places by weight",
    "straight-through": "the best place; backward as if soft",
    "Gumbel": "a place drawn by noise; backward as if soft",
    "REINFORCE": "a place drawn by weight; rewarded by log p(digit)",
}


class Settings(NamedTuple):
    """What one training is given."""

    way: str
    seed: int
    steps: int
    batch: int
    scenes: int  # to test with


class Found(NamedTuple):
    """What came out of one training: shares of the test scenes, and a few scenes to look at."""

    way: str
    accuracy: float  # looking as it learned to look
    one_place: float  # looking at the place of the largest weight alone
    right_place: float  # how often that place is the digit's
    seconds: float
    scenes: Tensor
    weights: Tensor
    truth: Tensor


class Digits(NamedTuple):
    """Images `[n, 8, 8]` from 0 to 1, and what they are."""

    images: Tensor
    labels: Tensor

    def scenes(self, n: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Some scenes `[n, 32, 32]`, the digit in each, and its place."""
        scenes, here = torch.zeros(n, SIDE, SIDE), torch.arange(n)[:, None, None]

        def square(top: Tensor, left: Tensor, side: int) -> tuple[Tensor, Tensor]:
            along = torch.arange(side)
            return top[:, None, None] + along[:, None], left[:, None, None] + along

        for _ in range(FRAGMENTS):
            other = torch.randint(len(self.images), (n, 1, 1), generator=draw)
            cut = square(*torch.randint(DIGIT - FRAGMENT + 1, (2, n), generator=draw).unbind(), FRAGMENT)
            put = square(*torch.randint(SIDE - FRAGMENT + 1, (2, n), generator=draw).unbind(), FRAGMENT)
            scenes[here, *put] = self.images[other, *cut]
        which = torch.randint(len(self.images), (n,), generator=draw)
        place = torch.randint(PLACES, (n,), generator=draw)
        scenes[here, *square(place // 7 * STRIDE, place % 7 * STRIDE, DIGIT)] = self.images[which]
        return scenes, self.labels[which], place


def digits() -> tuple[Digits, Digits]:
    """Digits to train with and to test with."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Digits(images[order[400:]], labels[order[400:]]), Digits(images[order[:400]], labels[order[:400]])


class Reader(nn.Module):
    """Keys and values of every place, one query, and a name for what was looked at."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Linear(DIGIT * DIGIT, 128), nn.ReLU(), nn.Linear(128, 2 * dim))
        self.query = nn.Parameter(torch.randn(dim))
        self.name = nn.Sequential(nn.ReLU(), nn.Linear(dim, 64), nn.ReLU(), nn.Linear(64, 10))

    def places(self, scenes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[batch, 1, 1, dim]`, k and v `[batch, 1, 49, dim]`."""
        patches = unfold(scenes[:, None], DIGIT, stride=STRIDE).transpose(1, 2)
        k, v = self.look(patches)[:, None].chunk(2, -1)
        return self.query.expand(len(scenes), 1, 1, -1), k, v

    def log_p(self, context: Tensor) -> Tensor:
        """log p of every digit `[batch, 10]`."""
        return log_softmax(self.name(context[:, 0, 0]), -1)


def train(given: Settings) -> Found:
    """Train one reader in one way, and test it."""
    torch.set_num_threads(1)  # so small a model gains nothing from more, and its sums stay the same on every machine
    started = time.perf_counter()
    train_digits, test_digits = digits()
    torch.manual_seed(given.seed)
    draw = torch.Generator().manual_seed(given.seed)
    model = Reader()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, given.steps)
    baseline = -2.3  # log p of a guess; then the running mean of the reward
    for _ in range(given.steps):
        scenes, labels, _ = train_digits.scenes(given.batch, draw)
        q, k, v = model.places(scenes)
        if given.way == "REINFORCE":
            taken = fv.sampled_attention(q, k, v, soft_share=0.5, generator=draw)
            reward = model.log_p(taken.out).gather(1, labels[:, None])[:, 0]
            loss = fv.reinforce_loss(reward, taken, baseline=baseline, entropy_weight=0.002)
            baseline = 0.9 * baseline + 0.1 * reward.mean().item()
        else:
            loss = -model.log_p(looked(given.way, q, k, v, draw)).gather(1, labels[:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return test(model, given, test_digits, started)


def looked(way: str, q: Tensor, k: Tensor, v: Tensor, draw: torch.Generator) -> Tensor:
    """What a way sees, `[batch, 1, 1, dim]`."""
    if way == "soft":
        return fv.attention(q, k, v)
    if way == "straight-through":
        return fv.straight_through(q, k, v).out
    if way == "Gumbel":
        return fv.gumbel_attention(q, k, v, generator=draw).out
    anywhere = torch.randint(k.shape[2], q.shape[:3], generator=draw)
    return fv.sampled_attention(q, k, v, choices=anywhere).out


@torch.no_grad()
def test(model: Reader, given: Settings, test_digits: Digits, started: float) -> Found:
    """Name the digits of new scenes. Only chance and the soft way look otherwise than at the best place."""
    draw = torch.Generator().manual_seed(1000)  # every way and seed is tested with the same scenes
    scenes, labels, truth = test_digits.scenes(given.scenes, draw)
    q, k, v = model.places(scenes)
    best = fv.attention(q, k, v, normalizer=fv.hardmax)
    own = looked(given.way, q, k, v, draw) if given.way in ("soft", "random place") else best
    accuracy, one_place = ((model.log_p(seen).argmax(-1) == labels).float().mean().item() for seen in (own, best))
    weights = fv.weights(q, k, k)[:, 0, 0]
    right = (weights.argmax(-1) == truth).float().mean().item()
    shown = slice(0, 6)
    return Found(given.way, accuracy, one_place, right, time.perf_counter() - started,
                 scenes[shown], weights[shown], truth[shown])  # fmt: skip


def table(found: list[Found]) -> str:
    """The results as Markdown: the mean over seeds, and the worst and the best if there are more than one."""

    def cell(values: list[float]) -> str:
        mean = sum(values) / len(values)
        return f"{mean:.1%}" + (f" ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else "")

    lines = [
        "| trained by | | digit named | from the best place alone | best place is the digit's | seconds |",
        "|:--|:--|--:|--:|--:|--:|",
    ]
    for way, meaning in WAYS.items():
        runs = [one for one in found if one.way == way]
        cells = [cell([getattr(one, name) for one in runs]) for name in ("accuracy", "one_place", "right_place")]
        cells[1:] = cells[1:] if way != "random place" else ["–", "–"]  # its query was never trained
        seconds = sum(one.seconds for one in runs) / len(runs)
        lines.append(f"| {way} | {meaning} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def picture(found: list[Found], path: Path) -> None:
    """What each way looks at in the same scenes: red by weight; the digit is in the green frame."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    ways = [next(one for one in found if one.way == way) for way in WAYS if way != "random place"]
    figure, axes = plt.subplots(len(ways), len(ways[0].scenes), figsize=(9, 1.6 * len(ways)), layout="constrained")
    for row, one in zip(axes, ways, strict=True):
        for axis, scene, weights, truth in zip(row, one.scenes, one.weights, one.truth.tolist(), strict=True):
            axis.imshow(scene.numpy(), cmap="gray_r", vmax=1.4)
            # The weight of a place colours the middle of its patch, so that places do not overlap.
            places = weights.view(7, 7).numpy()
            axis.imshow(places, cmap="Reds", vmin=0, vmax=1, alpha=0.7 * places**0.5, extent=(1.5, 29.5, 29.5, 1.5))
            corner = (truth % 7 * STRIDE - 0.5, truth // 7 * STRIDE - 0.5)
            axis.add_patch(Rectangle(corner, DIGIT, DIGIT, fill=False, edgecolor="green"))
            axis.set(xticks=[], yticks=[], xlim=(-0.5, 31.5), ylim=(31.5, -0.5))
        row[0].set_ylabel(one.way)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Train every way, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="three seeds and 3000 steps, into examples/results")
    parser.add_argument("--steps", type=int, help="of training (1500)")
    parser.add_argument("--batch", type=int, default=128, help="scenes in a step (128)")
    parser.add_argument("--scenes", type=int, default=4000, help="scenes to test with (4000)")
    parser.add_argument("--seeds", type=int, help="how many, from 0 (1)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (2)")
    parser.add_argument("--out", type=Path, help="the folder for the picture and the table (here)")
    given = parser.parse_args(arguments)
    steps, seeds = given.steps or (3000 if given.full else 1500), given.seeds or (3 if given.full else 1)
    folder = given.out or (Path(__file__).parent / "results" if given.full else Path())
    folder.mkdir(parents=True, exist_ok=True)  # a place that cannot be is told before anything is trained
    work = [Settings(way, seed, steps, given.batch, given.scenes) for seed in range(seeds) for way in WAYS]
    started = time.perf_counter()
    if given.jobs == 1:
        found = list(map(train, work))
    else:
        with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
            found = list(pool.map(train, work))
    said = table(found)
    print(said)
    picture(found, folder / "hard_attention.png")
    told = (
        f"{steps} steps of {given.batch} scenes, {seeds} seed{'s' * (seeds > 1)}, {given.scenes} test scenes; "
        f"{time.perf_counter() - started:.0f} s in {given.jobs} process{'es' * (given.jobs > 1)} of one thread, "
        f"torch {torch.__version__}."
    )
    (folder / "hard_attention.md").write_text(
        f"# One digit among clutter\n\n{told}\n\n{said}\n\n![What each way looks at](hard_attention.png)\n", "utf-8"
    )
    print(f"\n{told}\nwrote {folder / 'hard_attention.md'} and {folder / 'hard_attention.png'}")


if __name__ == "__main__":
    main()
