"""What modules of the linear family share: their state, short convolutions, keys of length 1, heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.errors import InvalidInput
from foveate.linear.problem import LinearState, step_ids
from foveate.pattern.algebra import Pattern
from foveate.values import at_hand, describe, sequence, whole


class MixerState(NamedTuple):
    """All that a layer keeps of the past; it does not grow.

    memory is that of `linear_attention`; convolution `[batch, width − 1, channels]` the last inputs of a short
    convolution; steps `[batch]` how many went before, for rotated keys. None where the layer has no such part.
    """

    memory: LinearState
    convolution: Tensor | None = None
    steps: Tensor | None = None


class ShortConvolution(nn.Module):
    """y_t = SiLU(Σ_{j < width} w_j ∘ x_{t−j}): each channel by itself, over the last few steps.

    Gives the outputs and the last width − 1 inputs, which the next call takes: split + state = whole.

    Args:
        channels: of x.
        width: how many steps it sees, its own among them.
        bias: whether each channel has one.

    Raises:
        InvalidInput: x or the state does not fit.

    Fu et al. 2022, "Hungry Hungry Hippos", section 3: https://arxiv.org/abs/2212.14052

    >>> import torch
    >>> from foveate.nn import ShortConvolution
    >>> convolve = ShortConvolution(3)
    >>> x = torch.randn(2, 9, 3)
    >>> whole, _ = convolve(x)
    >>> first, state = convolve(x[:, :5])
    >>> second, _ = convolve(x[:, 5:], state)
    >>> torch.allclose(torch.cat([first, second], 1), whole)
    True
    """

    def __init__(self, channels: int, width: int = 4, *, bias: bool = False) -> None:
        super().__init__()
        bound = whole(width, "the width", 1) ** -0.5
        # w_j is in column width − 1 − j, as in torch.nn.Conv1d.
        self.weight = nn.Parameter(torch.empty(whole(channels, "channels", 1), width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(
        self,
        x: Float[Tensor, "batch steps channels"],
        state: Float[Tensor, "batch before channels"] | None = None,
        documents: Tensor | Pattern | None = None,
    ) -> tuple[Float[Tensor, "batch steps channels"], Float[Tensor, "batch before channels"]]:
        """(outputs, the last inputs).

        Args:
            state: what an earlier call returned; None = zeros.
            documents: as in `linear_attention`: no step sees another document, and a negative id is passed over.
        """
        channels, width = self.weight.shape
        sequence(x, channels, length="steps")
        shape = (x.shape[0], width - 1, channels)
        if state is None:
            state = x.new_zeros(shape)
        elif not isinstance(state, Tensor) or tuple(state.shape) != shape:
            raise InvalidInput(f"the state is {describe(state)}: wanted [batch, width − 1, channels] = {list(shape)}")
        if documents is None:
            joined = torch.cat([state.to(x.dtype), x], 1)
            return self._sum(joined, None), joined[:, x.shape[1] :]
        return self._in_documents(x, state.to(x.dtype), step_ids(documents, x.shape[0], x.shape[1], x.device))

    def _sum(self, joined: Tensor, ids: Tensor | None) -> Tensor:
        width, steps = self.weight.shape[1], joined.shape[1] - self.weight.shape[1] + 1
        out = joined[:, width - 1 :] * self.weight[:, -1]
        for column in range(width - 1):
            earlier = joined[:, column : column + steps]
            if ids is not None:
                other = ids[:, column : column + steps] != ids[:, width - 1 :]
                earlier = earlier.masked_fill(other[..., None], 0)
            out = torch.addcmul(out, earlier, self.weight[:, column])
        return silu(out if self.bias is None else out + self.bias)

    def _in_documents(self, x: Tensor, state: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        batch, steps, channels = x.shape
        before, ids = self.weight.shape[1] - 1, ids.expand(batch, -1)
        skipped, order = ids < 0, None
        if not at_hand(ids) or bool(skipped.any()):  # what is passed over goes to the end, and back afterwards
            order = skipped.byte().argsort(dim=1, stable=True)
            x, ids = x.gather(1, order[..., None].expand_as(x)), ids.gather(1, order)
        joined = torch.cat([state, x], 1)
        # The state belongs to the first document.
        ids = torch.cat([(ids[:, :1] if steps else ids.new_zeros(batch, 1)).expand(-1, before), ids], 1)
        out, count = self._sum(joined, ids), (~skipped).sum(1, keepdim=True)
        if order is not None:
            out = out.gather(1, order.argsort(1)[..., None].expand_as(out)).masked_fill(skipped[..., None], 0)
        place = count + torch.arange(before, device=x.device)
        if before:
            last = ids.gather(1, count + before - 1)
            joined = joined.masked_fill((ids != last)[..., None], 0)  # and the one handed on to the last
        return out, joined.gather(1, place[..., None].expand(-1, -1, channels))


def entered(
    x: Tensor, dim: int, documents: Tensor | Pattern | None, state: MixerState | None
) -> tuple[Tensor, Tensor | None]:
    """(x with zeros where a step is passed over, the document of every step), checked."""
    sequence(x, dim, length="steps")
    if state is not None and not isinstance(state, MixerState):
        raise InvalidInput(f"state is a {type(state).__name__}: wanted the MixerState that an earlier call returned")
    if documents is None:
        return x, None
    ids = step_ids(documents, x.shape[0], x.shape[1], x.device)
    return x.masked_fill((ids < 0)[..., None], 0), ids


def parted(x: Tensor, heads: int) -> Tensor:
    """`[batch, steps, heads · dim]` → `[batch, heads, steps, dim]`."""
    heads_apart: Tensor = x.unflatten(-1, (heads, -1))
    return heads_apart.transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """`[batch, heads, steps, dim]` → `[batch, steps, heads · dim]`."""
    return x.transpose(1, 2).flatten(2)


def of_length_one(x: Tensor) -> Tensor:
    """x / √(‖x‖² + 1e−6): what the delta rule wants of keys."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def head_size(dim: int, heads: int, given: int | None, name: str) -> int:
    """The size of a head: given, or dim / heads."""
    whole(dim, "dim", 1)
    if given is None and dim % whole(heads, "the number of heads", 1):
        raise InvalidInput(f"dim {dim} does not divide into {heads} heads: change one, or give {name}")
    return whole(dim // heads if given is None else given, name, 1)
