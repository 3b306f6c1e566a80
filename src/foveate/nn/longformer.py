"""Longformer's attention: a window, and global tokens that look through projections of their own."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.eager import is_known
from foveate.errors import InvalidInput
from foveate.mechanisms.merge import merge_by_rows
from foveate.nn.attention import SelfAttention
from foveate.pattern.algebra import Pattern
from foveate.pattern.packing import PaddingKeep, PaddingLengths, padding
from foveate.pattern.positional import window
from foveate.values import describe, sequence, whole


class LongformerAttention(SelfAttention):
    """Every token sees window / 2 tokens on each side and the global ones; a global token sees all.

    The rows of global tokens are attention of other projections, query_global, key_global and value_global; all other
    rows read global keys through the ordinary ones.

    Args:
        window: of a token, half of it on each side, beside its own.
        step: of the window; more than 1 dilates it.
        dim, heads, head_dim, bias, dropout: as in `SelfAttention`.

    Raises:
        InvalidInput: an odd window; a pattern that is no padding.

    Beltagy et al. 2020: https://arxiv.org/abs/2004.05150

    >>> import torch
    >>> import foveate as fv
    >>> layer, x = fv.nn.LongformerAttention(32, 4, window=8), torch.randn(2, 50, 32)
    >>> layer(x, fv.padding(torch.tensor([50, 31])), global_tokens=torch.arange(50).expand(2, 50) == 0).shape
    torch.Size([2, 50, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 512,
        step: int = 1,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, head_dim=head_dim, bias=bias, dropout=dropout)
        if whole(window, "Longformer's window", 0) % 2:
            raise InvalidInput(f"Longformer's window is {window}: wanted an even number, half of it for each side")
        self.window, self.step = window, whole(step, "the step of Longformer's window", 1)
        wide = self.query.out_features
        self.query_global, self.key_global, self.value_global = (nn.Linear(dim, wide, bias) for _ in range(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in `SelfAttention`; the global projections begin as copies of the others, as the paper has it."""
        super().reset_parameters()
        for name in ("query", "key", "value") if hasattr(self, "value_global") else ():
            getattr(self, f"{name}_global").load_state_dict(getattr(self, name).state_dict())

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch length dim"],
        pattern: Pattern | None = None,
        *,
        global_tokens: Bool[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attention of x to itself.

        Args:
            pattern: None, or `padding(…)`.
            global_tokens: which tokens are global; None = none of them.
        """
        sequence(x, self.dim)
        if pattern is not None and not isinstance(pattern, PaddingKeep | PaddingLengths):
            raise InvalidInput(f"the pattern is {pattern!r}: wanted padding(…), the rest being Longformer's own")
        options = {"dropout": self.dropout} if self.dropout and self.training else {}
        near = window(self.window // 2 + 1, step=self.step)
        if global_tokens is not None:
            if global_tokens.dtype != torch.bool or global_tokens.shape != x.shape[:2]:
                wanted = f"a boolean [batch, length] = {list(x.shape[:2])}"
                raise InvalidInput(f"global_tokens is {describe(global_tokens)}: wanted {wanted}")
            near = near | padding(global_tokens)  # keys that everyone sees
        q, k, v = (self._heads(part, x) for part in (self.query, self.key, self.value))
        out = self.attend(q, k, v, near if pattern is None else near & pattern, **options)
        rows = None if global_tokens is None else _rows(global_tokens)
        if rows is not None:
            chosen = x.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
            q = self._heads(self.query_global, chosen)
            k, v = self._heads(self.key_global, x), self._heads(self.value_global, x)
            out = merge_by_rows(out, self.attend(q, k, v, pattern, **options), rows)
        made: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return made

    def _heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        heads: Tensor = projection(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        return heads

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}" + (f", step={self.step}" if self.step > 1 else "")


def _rows(chosen: Tensor) -> Tensor | None:
    """The places of True in each row, −1 where a row has fewer than the fullest one; None where there are none."""
    count = chosen.sum(1, keepdim=True)
    most = 0
    if count.numel():  # a trace has to hold for other numbers
        most = int(count.max()) if is_known(count) else chosen.shape[1]
    if not most:
        return None
    places = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return places.masked_fill(torch.arange(most, device=chosen.device) >= count, -1)
