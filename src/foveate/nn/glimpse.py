"""Hard attention over an image: a few glimpses, sharp in the middle, and a network that learns where to look next."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, grid_sample, mse_loss, relu

from foveate.errors import InvalidInput
from foveate.values import describe, integers, positive, whole


def glimpse(
    images: Float[Tensor, "batch channels height width"],
    locations: Float[Tensor, "batch 2"],
    size: int,
    scales: int = 1,
) -> Float[Tensor, "batch scales*channels size size"]:
    """What an eye sees that looks at a location: squares of size · 2^s pixels around it, all brought down to size².

        ┌───────────┐
        │   ┌───┐   │   locations (x, y) go from −1 to 1: (−1, −1) is the upper left corner of the image, (0, 0) its
        │   │ · │   │   middle. What lies outside of the image is 0; between pixels it is interpolated.
        │   └───┘   │
        └───────────┘

    Mnih et al. 2014, section 3.1: https://arxiv.org/abs/1406.6247

    >>> import torch
    >>> from foveate.nn.glimpse import glimpse
    >>> glimpse(torch.arange(16.0).view(1, 1, 4, 4), torch.tensor([[0.0, 0.0]]), 2)
    tensor([[[[ 5.,  6.],
              [ 9., 10.]]]])
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.dtype.is_floating_point:
        raise InvalidInput(f"the images are {describe(images)}: wanted floats [batch, channels, height, width]")
    if not isinstance(locations, Tensor) or tuple(locations.shape) != (images.shape[0], 2):
        raise InvalidInput(f"the locations are {describe(locations)}: wanted [batch, 2] = [{images.shape[0]}, 2]")
    pixels = images.new_tensor([images.shape[3], images.shape[2]])
    seen = []
    for scale in range(scales):
        side = size * 2**scale
        offsets = torch.arange(side, device=images.device, dtype=images.dtype) - (side - 1) / 2
        square = torch.stack(torch.meshgrid(offsets, offsets, indexing="xy"), -1)
        grid = locations.to(images.dtype)[:, None, None] + square * 2 / pixels
        part = grid_sample(images, grid, align_corners=False)
        seen.append(avg_pool2d(part, 2**scale) if scale else part)
    return torch.cat(seen, 1)


class Glimpses(NamedTuple):
    """What a model saw and said.

    logits `[batch, classes]`; locations `[batch, glimpses, 2]`, where it looked; log_prob `[batch, glimpses − 1]`, of
    every place that it chose, 0 in eval mode; baseline `[batch, glimpses − 1]`, the reward it expected before.
    """

    logits: Tensor
    locations: Tensor
    log_prob: Tensor
    baseline: Tensor


class RecurrentAttentionModel(nn.Module):
    """RAM: classify an image by a few glimpses, each placed by what was seen so far.

        g_t = ReLU(W ReLU(W glimpse_t) + W ReLU(W l_t)),  h_t = ReLU(W h_{t−1} + W g_t)
        l_{t+1} ~ N(tanh(W h_t), σ²),  logits = W h_T

    The cost follows the glimpses and not the size of the image. Train it with `loss`; in eval mode nothing is drawn: it
    looks at the middle first and then at the means.

    Args:
        channels: of the images.
        classes: how many there are.
        glimpses: how often it looks.
        size: the side of a glimpse in pixels.
        scales: squares of how many sizes, each twice as wide as the one before.
        dim: of the state; the two halves of a glimpse's features have half of it.
        sigma: the standard deviation of the places it tries.

    Raises:
        InvalidInput: sizes that are not positive, images of another kind.

    Mnih et al. 2014, "Recurrent Models of Visual Attention": https://arxiv.org/abs/1406.6247

    >>> import torch
    >>> from foveate.nn import RecurrentAttentionModel
    >>> model = RecurrentAttentionModel(1, 10, glimpses=4, size=8)
    >>> images, labels = torch.rand(5, 1, 28, 28), torch.arange(5)
    >>> taken = model(images, generator=torch.Generator().manual_seed(0))
    >>> model.loss(taken, labels).backward()
    >>> taken.logits.shape, taken.locations.shape
    (torch.Size([5, 10]), torch.Size([5, 4, 2]))
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        glimpses: int = 6,
        size: int = 8,
        scales: int = 1,
        dim: int = 256,
        sigma: float = 0.17,
    ) -> None:
        super().__init__()
        for value, name in ((channels, "channels"), (classes, "classes"), (size, "size"), (scales, "scales")):
            whole(value, name, 1)
        self.sigma = positive(sigma, "sigma")
        self.glimpses, self.size, self.scales = whole(glimpses, "glimpses", 1), size, scales
        half = whole(dim, "dim", 2) // 2
        self.what = nn.Linear(channels * scales * size**2, half)
        self.where = nn.Linear(2, half)
        self.from_what, self.from_where = nn.Linear(half, dim), nn.Linear(half, dim)
        self.from_state, self.from_glimpse = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.locator, self.critic, self.classifier = nn.Linear(dim, 2), nn.Linear(dim, 1), nn.Linear(dim, classes)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        *,
        start: Float[Tensor, "batch 2"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Glimpses:
        """Look at every image and say what it is.

        Args:
            start: where to look first, (x, y) from −1 to 1; None = anywhere in training, the middle in eval mode.
            generator: of the first places and of those that are tried.
        """
        if start is None:
            start = images.new_zeros(images.shape[0], 2)
            if self.training:
                start = start.uniform_(-1, 1, generator=generator)
        place, state = start, images.new_zeros(images.shape[0], self.from_state.in_features)
        places, log_probs, baselines = [place], [], []
        for n in range(self.glimpses):
            seen = glimpse(images, place, self.size, self.scales).flatten(1)
            features = relu(self.from_what(relu(self.what(seen))) + self.from_where(relu(self.where(place))))
            state = relu(self.from_state(state) + self.from_glimpse(features))
            if n + 1 < self.glimpses:
                place, log_prob = self._next(state, generator)
                places.append(place)
                log_probs.append(log_prob)
                baselines.append(self.critic(state.detach()).squeeze(-1))
        none = images.new_zeros(images.shape[0], 0)
        return Glimpses(
            self.classifier(state),
            torch.stack(places, 1),
            torch.stack(log_probs, 1) if log_probs else none,
            torch.stack(baselines, 1) if baselines else none,
        )

    def _next(self, state: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """The next place and its log-density. The density is that of the draw, whether or not it lies in the image."""
        mean = self.locator(state).tanh()
        if not self.training:
            return mean, mean.new_zeros(mean.shape[0])
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        drawn = (mean + self.sigma * noise).detach()  # the choice differentiates through its probability alone
        density = -((drawn - mean) ** 2) / (2 * self.sigma**2) - math.log(self.sigma * math.sqrt(2 * math.pi))
        return drawn.clamp(-1, 1), density.sum(-1)

    def loss(self, taken: Glimpses, labels: Int[Tensor, " batch"], *, weight: float = 1.0) -> Float[Tensor, ""]:
        """Cross entropy + REINFORCE: −mean[log p(label) + weight · Σ_t (r − b_t) · log p(l_t)] + mean (r − b_t)².

        r is 1 for a right answer and 0 for a wrong one, b_t is fitted to it.
        """
        labels = integers(labels, "the labels", [1])
        if labels.shape[0] != taken.logits.shape[0]:
            raise InvalidInput(f"the labels are {describe(labels)}: wanted [batch] = [{taken.logits.shape[0]}]")
        loss = cross_entropy(taken.logits, labels)
        if not taken.log_prob.shape[1]:
            return loss
        reward = (taken.logits.argmax(-1) == labels).to(taken.logits.dtype)[:, None].expand_as(taken.baseline)
        gain = (reward - taken.baseline.detach()) * taken.log_prob
        return loss - weight * gain.sum(1).mean() + mse_loss(taken.baseline, reward)
