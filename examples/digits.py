"""A vision transformer reads the 8 × 8 digits of scikit-learn: 97 % or more of those that it has never seen.

    image ─ 16 patches of 2 × 2 ─ linear ─ + learned positions, behind a class token ─ blocks ─ class token ─ digit

Dosovitskiy et al. 2020: https://arxiv.org/abs/2010.11929. The picture shows eight digits that it has never seen, and
where the class token looks in the last layer.

    python examples/digits.py                     # needs pip install -e ".[examples]"
    python examples/digits.py --epochs 1 --out    # a taste, and no picture
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

import foveate as fv
from foveate.paths import checked

PATCH, SIDE, DIM, HEADS, LAYERS = 2, 8, 64, 4, 4
PLACES = (SIDE // PATCH) ** 2


class ViT(nn.Module):
    """The scores of the ten digits, from images `[batch, 8, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(PATCH * PATCH, DIM)
        self.class_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.position = fv.nn.Learned(1 + PLACES, DIM)
        nn.init.normal_(self.position.weight, std=0.5)  # as large as a patch: small data has no time to make them grow
        self.encoder = fv.nn.Encoder((self.block() for _ in range(LAYERS)), nn.LayerNorm(DIM))
        self.score = nn.Linear(DIM, 10)

    @staticmethod
    def block() -> fv.nn.Block:
        return fv.nn.Block(
            fv.nn.PreNorm(fv.nn.SelfAttention(DIM, HEADS), nn.LayerNorm(DIM), dropout=0.1),
            fv.nn.PreNorm(fv.nn.FeedForward(DIM, 2 * DIM, activation=nn.GELU()), nn.LayerNorm(DIM), dropout=0.1),
        )

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        x = torch.cat([self.class_token.expand(len(images), -1, -1), self.patch(patches)], 1)
        return self.score(self.encoder(self.position(x))[:, 0])


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images from −1 to 1 and digits to learn from, and a fifth of all to be asked."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.images), generator=torch.Generator().manual_seed(seed))
    images, digits = torch.tensor(bunch.images).float()[order] / 8 - 1, torch.tensor(bunch.target)[order]
    asked = len(images) // 5
    return images[asked:], digits[asked:], images[:asked], digits[:asked]


def shifted(images: Tensor) -> Tensor:
    """Every image moved by up to one pixel each way, so that 1,438 of them become many."""
    padded = functional.pad(images, (1, 1, 1, 1), value=-1.0)
    start = torch.randint(3, (2, len(images), 1))
    rows, columns = (way + torch.arange(SIDE) for way in start)
    return padded[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None]]


def right(model: ViT, images: Tensor, digits: Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(images).argmax(1) == digits).double().mean().item()


def train(epochs: int, seed: int, batch: int = 64) -> tuple[ViT, list[tuple[int, float, float, float]]]:
    """The model, and (epoch, loss, share of right ones among those learned from, among the others)."""
    torch.manual_seed(seed)
    images, digits, *asked = data(seed)
    model = ViT()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = OneCycleLR(optimizer, 3e-3, epochs=epochs, steps_per_epoch=len(images) // batch)
    history = []
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(images))
        for n in range(len(images) // batch):
            now = order[n * batch : (n + 1) * batch]
            scores = model.train()(shifted(images[now]))
            loss = functional.cross_entropy(scores, digits[now], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % max(epochs // 10, 1) == 0:
            history.append((epoch, loss.item(), right(model, images, digits), right(model, *asked)))
            print(f"{epoch:>5}  {loss.item():6.3f}  {history[-1][2]:7.1%}  {history[-1][3]:6.1%}")
    return model, history


def picture(model: ViT, history: list[tuple[int, float, float, float]], images: Tensor, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, others = figure.subfigures(1, 2, width_ratios=(1, 2.2))
    curve = left.subplots()
    for n, name in ((2, "learned from"), (3, "never seen")):
        curve.plot([row[0] for row in history], [100 * row[n] for row in history], marker="o", label=name)
    curve.set(xlabel="epoch", ylabel="% right", ylim=(min(80, *(100 * row[3] for row in history)), 100.5))
    curve.legend(frameon=False)
    with torch.no_grad(), fv.watch() as seen:
        model.eval()(images)
    looks = seen.weights(-1, rows=[0])[:, :, 0, 1:].mean(1).unflatten(1, (SIDE // PATCH, -1))
    for axes, image, look in zip(others.subplots(2, len(images)).T, images, looks, strict=True):
        for ax, shown, cmap in ((axes[0], image, "gray_r"), (axes[1], look, "Oranges")):
            ax.imshow(shown.numpy(), cmap=cmap)
            ax.axis("off")
    others.suptitle("digits, and where the class token looks")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, nargs="?", default=Path("digits.png"), help="the picture; none without a name"
    )
    chosen = parser.parse_args(arguments)
    if chosen.out:
        checked(chosen.out, (".png", ".svg", ".pdf"))  # before anything is trained
    torch.set_num_threads(1)  # sums in one order on any machine, and matrices too small to share
    start = time.perf_counter()
    print("epoch    loss  learned   never seen")
    model, history = train(chosen.epochs, chosen.seed)
    *_, images, digits = data(chosen.seed)
    share = right(model, images, digits)
    print(f"{share:.1%} of {len(digits)} digits that it has never seen")
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {time.perf_counter() - start:.0f} s")
    if chosen.out:
        picture(model, history, images[:8], chosen.out)
    return share


if __name__ == "__main__":
    main()
