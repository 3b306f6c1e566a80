"""Feature maps."""

from torch import Tensor
from torch.nn.functional import elu


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1."""
    return elu(x) + 1
