"""timm: an attention layer for `timm.create_model(…, attn_layer=…)`, with a pattern and with grouped heads."""

from __future__ import annotations

import copyreg
from typing import Any

from torch import Tensor, nn

from foveate.errors import InvalidInput
from foveate.installing import how_to_install
from foveate.integrations.sdpa_with_pattern import narrowed
from foveate.pattern.algebra import Pattern
from foveate.values import whole


def attention(pattern: Pattern | None = None, *, key_heads: int | None = None) -> type[nn.Module]:
    """The class of an attention layer for `timm.create_model("vit_…", attn_layer=attention(pattern))`.

    Without arguments it computes what timm's own computes, from the same weights under the same names. The pattern says
    which tokens see which, class tokens included: `neighborhood(3, 14, start=1) | global_tokens([0])` for a ViT of
    14 × 14 patches. Fewer `key_heads` than heads make a model with grouped heads, whose keys and values are never
    repeated; its `qkv` is smaller, so it is trained anew.

    Raises:
        InvalidInput: timm is missing, or `key_heads` is no whole number; while the model is made: they do not divide
            its heads.
    """
    try:
        from timm.layers import Attention
    except ImportError as missing:
        raise InvalidInput(f"integrations.timm needs timm: {how_to_install('timm')}") from missing
    if key_heads is not None:
        whole(key_heads, "key_heads", 1)

    class FoveateAttention(Attention, metaclass=_Made):  # type: ignore[misc]
        made_of = pattern, key_heads
        qkv: nn.Linear

        def __init__(self, dim: int, num_heads: int = 8, **rest: Any) -> None:
            super().__init__(dim, num_heads=num_heads, **rest)
            self.key_heads = key_heads or num_heads
            if num_heads % self.key_heads:
                raise InvalidInput(f"key_heads is {key_heads}: wanted a number that divides the {num_heads} heads")
            if self.key_heads != num_heads:
                width = (num_heads + 2 * self.key_heads) * self.head_dim
                like = self.qkv.weight
                self.qkv = nn.Linear(dim, width, bias=self.qkv.bias is not None, device=like.device, dtype=like.dtype)

        def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            """x `[batch, tokens, dim]` → the same shape (`dim_out` wide, where that was given)."""
            gate = None if self.gate is None else self.gate(x).sigmoid()
            heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            q, k, v = heads.split((self.num_heads, self.key_heads, self.key_heads), 1)
            dropout = self.attn_drop.p if self.training else 0.0
            out = narrowed(pattern, self.q_norm(q), self.k_norm(k), v, attn_mask, dropout, is_causal)
            out = self.norm(out.transpose(1, 2).flatten(2))
            return self.proj_drop(self.proj(out if gate is None else out * gate))  # type: ignore[no-any-return]

        def extra_repr(self) -> str:
            """What is not timm's own."""
            return f"pattern={pattern!r}, key_heads={self.key_heads}"

    return FoveateAttention


class _Made(type):
    """A class that a call made: a file names it by what that call was given."""

    made_of: tuple[Pattern | None, int | None]


def _remade(pattern: Pattern | None, key_heads: int | None) -> type[nn.Module]:
    return attention(pattern, key_heads=key_heads)


copyreg.pickle(_Made, lambda kind: (_remade, kind.made_of))  # type: ignore[arg-type, return-value]
