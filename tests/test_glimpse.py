"""Glimpses against loops over pixels; the loss against the exact gradient of the expected reward."""

from __future__ import annotations

import math

import pytest
import torch
from calls import near, random

import foveate as fv
from foveate.nn import RecurrentAttentionModel
from foveate.nn.glimpse import Glimpses, glimpse


def at(image: list, y: int, x: int) -> float:
    """A pixel, 0 outside."""
    return image[y][x] if 0 <= y < len(image) and 0 <= x < len(image[0]) else 0.0


def test_a_glimpse_is_the_square_around_its_place() -> None:
    height, width, size = 11, 7, 4
    images = random(2, 3, height, width)
    places = [(5, 2), (-1, 8)]  # the corner that the middle of each square stands at, (x, y) in pixels
    locations = torch.tensor([[2 * x / width - 1, 2 * y / height - 1] for x, y in places], dtype=torch.float64)
    found = glimpse(images, locations, size, scales=3)
    for b, (x, y) in enumerate(places):
        for scale in range(3):
            step = 2**scale
            for c in range(3):
                pixels = images[b, c].tolist()
                for i in range(size):
                    for j in range(size):
                        top, left = y + (i - size // 2) * step, x + (j - size // 2) * step
                        box = [at(pixels, top + u, left + v) for u in range(step) for v in range(step)]
                        near(found[b, scale * 3 + c, i, j], torch.tensor(sum(box) / len(box), dtype=torch.float64), 256)


def test_between_pixels_it_is_interpolated_and_differentiates_by_the_place() -> None:
    ramp = (torch.arange(9.0).double() * 2 + torch.arange(9.0).double()[:, None] * 3)[None, None]
    place = torch.tensor([[0.1, -0.05]], dtype=torch.float64, requires_grad=True)
    seen = glimpse(ramp, place, 1)
    x, y = (9 * (place[0] + 1) - 1) / 2
    near(seen.flatten(), (2 * x + 3 * y)[None])
    assert torch.autograd.gradcheck(lambda place: glimpse(ramp, place, 3, 2), place)


def test_the_loss_has_the_gradient_of_the_expected_reward() -> None:
    """E over the draws, by Gauss-Hermite quadrature, which is exact for what is a polynomial of the draw."""
    torch.manual_seed(0)
    model = RecurrentAttentionModel(1, 3, glimpses=2, size=2, dim=16, sigma=0.3).double()
    images, first = random(1, 1, 8, 8), torch.zeros(1, 2, dtype=torch.float64)
    # The five nodes and weights for a normal variable.
    far, near_by, middle = 2.8569700138728056, 1.3556261799742659, 8 / 15
    nodes = torch.tensor([-far, -near_by, 0, near_by, far], dtype=torch.float64)
    weights = [0.011257411327720691, 0.2220759220056126, middle, 0.2220759220056126, 0.011257411327720691]

    def reward(place: torch.Tensor) -> torch.Tensor:
        return 1 - 0.7 * place[0] + place[0] * place[1] - 0.4 * place[1] ** 2

    state_of = [model.locator.weight, model.locator.bias, model.from_glimpse.weight, model.what.weight]
    mine, true = [torch.zeros_like(x) for x in state_of], torch.zeros((), dtype=torch.float64)
    for i, u in enumerate(nodes):
        for j, v in enumerate(nodes):
            noise = torch.stack([u, v])[None]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "randn", lambda *_, noise=noise, **__: noise)
                taken = model(images, start=first)
            mean = model.locator(state(model, images, first)).tanh()
            drawn = (mean + 0.3 * noise)[0]
            share = weights[i] * weights[j]
            true = true + share * reward(drawn)
            # Any reward will do: what the loss multiplies log p with is reward − baseline.
            loss = -(reward(drawn).detach() - 0.37) * taken.log_prob.sum()
            for total, part in zip(mine, torch.autograd.grad(share * loss, state_of), strict=True):
                total += part
    for found, want in zip(mine, torch.autograd.grad(-true, state_of), strict=True):
        assert want.abs().max() > 1e-4
        near(found, want, times=4096)


def state(model: RecurrentAttentionModel, images: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """The state after one glimpse, by the paper's equations."""
    seen = glimpse(images, place, model.size, model.scales).flatten(1)
    what, where = model.what(seen).clamp(min=0), model.where(place).clamp(min=0)
    features = (model.from_what(what) + model.from_where(where)).clamp(min=0)
    return (model.from_state.bias + model.from_glimpse(features)).clamp(min=0)


def test_the_loss_is_the_paper_s_sum() -> None:
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]]).double().requires_grad_()
    log_prob, baseline = random(2, 3, seed=2).requires_grad_(), random(2, 3, seed=3).requires_grad_()
    labels = torch.tensor([0, 1])  # the first is right, the second wrong
    model = RecurrentAttentionModel(1, 2)
    loss = model.loss(Glimpses(logits, random(2, 4, 2), log_prob, baseline), labels, weight=0.5)
    rewards = (1.0, 0.0)
    nll = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    want = sum(nll) / 2
    for b in range(2):
        for t in range(3):
            b_t, log_p = baseline[b, t].item(), log_prob[b, t].item()
            want += -0.5 * (rewards[b] - b_t) * log_p / 2 + (rewards[b] - b_t) ** 2 / 6
    near(loss.detach(), torch.tensor(want, dtype=torch.float64))
    of_log_prob, of_baseline = torch.autograd.grad(loss, (log_prob, baseline))
    earned = torch.tensor(rewards).double()[:, None]
    near(of_log_prob, -0.25 * (earned - baseline.detach()))
    near(of_baseline, -2 * (earned - baseline.detach()) / 6)  # fitted by the square alone


def test_the_baseline_teaches_nothing_but_itself() -> None:
    model = RecurrentAttentionModel(1, 3, dim=10)
    taken = model(torch.rand(2, 1, 9, 9))
    slopes = torch.autograd.grad(taken.baseline.sum(), [model.critic.weight, *model.parameters()], allow_unused=True)
    assert [slope is not None for slope in slopes].count(True) == 3  # the critic's weight, and again, and its bias


def test_eval_mode_never_draws_and_training_follows_its_generator() -> None:
    model = RecurrentAttentionModel(2, 4, glimpses=3, size=4, scales=2, dim=10, sigma=1.0)
    images = torch.rand(5, 2, 9, 12)
    first, second = (model(images, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.locations, model(images, generator=torch.Generator().manual_seed(2)).locations)
    assert first.locations.abs().max() == 1  # what is drawn outside of the image is looked at on its edge
    model.eval()
    before = torch.get_rng_state()
    seen = model(images)
    assert torch.equal(before, torch.get_rng_state())
    assert seen.locations[:, 0].abs().max() == 0
    assert model(images, start=torch.ones(5, 2)).locations[0, 0].tolist() == [1, 1]


def test_one_glimpse_has_nothing_to_choose() -> None:
    model = RecurrentAttentionModel(1, 4, glimpses=1)
    taken = model(torch.rand(3, 1, 9, 9))
    assert taken.log_prob.shape == (3, 0)
    near(
        model.loss(taken, torch.arange(3)).double(),
        torch.nn.functional.cross_entropy(taken.logits, torch.arange(3)).double(),
    )


@pytest.mark.slow
def test_it_learns_to_read_what_only_a_sharp_glimpse_tells() -> None:
    """Somewhere is a block, and on it a pair of points, + − or − +, of which a blurred glimpse sees nothing."""
    torch.manual_seed(0)
    model = RecurrentAttentionModel(2, 2, glimpses=3, size=4, scales=3, dim=64)
    optimizer, draw = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(0)

    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = torch.zeros(n, 2, 12, 12), torch.randint(2, (n,), generator=draw)
        (y, x), rows = torch.randint(1, 10, (2, n), generator=draw), torch.arange(n)
        for down in (-1, 0, 1):
            images[rows, 0, y + down, x] = images[rows, 0, y + down, x + 1] = 1.0
        images[rows, 1, y, x], images[rows, 1, y, x + 1] = labels * 2.0 - 1, 1.0 - labels * 2
        return images, labels

    for _ in range(1200):
        images, labels = batch(64)
        loss = model.loss(model(images, generator=draw), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels = batch(500)
    assert (model(images, generator=draw).logits.argmax(-1) == labels).float().mean() > 0.9


def test_wrong_input_is_said_in_a_sentence() -> None:
    model = RecurrentAttentionModel(1, 2)
    for call, words in (
        (lambda: glimpse(torch.rand(3, 8, 8), torch.zeros(3, 2), 2), "wanted floats"),
        (lambda: glimpse(torch.rand(3, 1, 8, 8), torch.zeros(2, 2), 2), r"\[batch, 2\] = \[3, 2\]"),
        (lambda: RecurrentAttentionModel(1, 2, glimpses=0), "glimpses is 0"),
        (lambda: RecurrentAttentionModel(1, 2, sigma=0.0), "sigma is 0.0"),
        (lambda: model.loss(model(torch.rand(3, 1, 9, 9)), torch.arange(2)), r"wanted \[batch\] = \[3\]"),
    ):
        with pytest.raises(fv.InvalidInput, match=words):
            call()
