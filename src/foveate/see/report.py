"""What every token of one text looked at, as data: what the terminal, the picture and the page show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import FoveateError, InvalidInput
from foveate.see.watching import Seen

NOTE = "Attention is a weight, not a cause: where a head looks need not be what decides the output."


@dataclass(frozen=True)
class Report:
    """What every token of one text looked at, in every layer and head: the top keys of each row and the rest.

    indices: int64 `[layers, heads, N, k]`, the keys of the largest weights, largest first.
    weights: float32 `[layers, heads, N, k]`; 0 where fewer keys were visible.
    received: float32 `[layers, heads, N]`, the mean weight a key got from the rows that may see it.
    note: what to keep in mind, shown beside the reading.
    """

    text: str
    model: str
    tokens: list[str]
    indices: Tensor
    weights: Tensor
    received: Tensor
    note: str = NOTE

    def rest(self) -> Tensor:
        """float32 `[layers, heads, N]`: the weight that is not shown."""
        return (1 - self.weights.sum(-1)).clamp(min=0)

    def looks(self, layer: int, head: int, rows: Sequence[int]) -> Tensor:
        """float32 `[N]`: what is shown of where these rows look on average, which is where a word of several looks."""
        total = self.received.new_zeros(len(self.tokens))
        for row in rows:
            total.index_add_(0, self.indices[layer, head, row], self.weights[layer, head, row])
        return total / len(rows)

    def rows(self, layer: int, head: int, token: int | Sequence[int] | None) -> list[int]:
        """The rows of a token or of a word's tokens, none for None; raises `InvalidInput` for what is not there."""
        rows = [] if token is None else [token] if isinstance(token, int) else [*token]
        layers, heads, length, _ = self.weights.shape
        places = [("layer", layer, layers), ("head", head, heads), *(("token", row, length) for row in rows)]
        for name, given, count in places:
            if not 0 <= given < count:
                raise InvalidInput(f"{name} {given} does not exist: this report has {count}, counted from 0")
        return rows


def report(seen: Seen, tokens: list[str], *, text: str = "", model: str = "", k: int = 16) -> Report:
    """The report on one text (the first of the batch) from the watched calls of a self-attending model."""
    looked = [seen.looked(layer, k) for layer in range(max(len(seen), 1))]
    count = len(tokens)
    shapes = {tuple(layer.indices.shape[1:]) for layer in looked}
    if len(shapes) > 1 or any(call.shape[2:] != (count, count) for call in seen.calls):
        raise FoveateError(
            f"the watched calls have the shapes {sorted({call.shape for call in seen.calls})} (batch, heads, queries, "
            f"keys): wanted one self-attention a layer over the {count} tokens"
        )
    return Report(
        text=text,
        model=model,
        tokens=tokens,
        indices=torch.stack([layer.indices[0] for layer in looked]).cpu(),
        weights=torch.stack([layer.weights[0] for layer in looked]).float().cpu(),
        received=torch.stack([(layer.received / layer.watchers.clamp(min=1))[0] for layer in looked]).float().cpu(),
    )
