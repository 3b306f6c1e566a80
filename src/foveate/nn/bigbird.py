"""BigBird's attention: a window of blocks, global blocks at both ends, and random ones."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from foveate.nn.attention import SelfAttention
from foveate.pattern.algebra import Pattern
from foveate.pattern.blocked import blocks, blockwise
from foveate.pattern.catalogue import bigbird
from foveate.pattern.positional import global_tokens, window
from foveate.score import Score


class BigBirdAttention(SelfAttention):
    """Attention of blocks of tokens: to the blocks beside it, the first and the last one, and some random ones.

    The visible blocks are a set: a random block that is a neighbor too counts once, and the length may be any.

    Args:
        block: tokens in a block.
        window_blocks: blocks in the window, the own one in the middle.
        random: random blocks for each block and head.
        seed: of the random blocks; give each layer its own.
        dim, heads, key_heads, head_dim, bias, dropout: as in `SelfAttention`.

    Zaheer et al. 2020: https://arxiv.org/abs/2007.14062

    >>> import torch
    >>> import foveate as fv
    >>> layer = fv.nn.BigBirdAttention(32, 4, block=8, random=2, seed=1)
    >>> layer(torch.randn(2, 100, 32), fv.padding(torch.tensor([100, 31]))).shape
    torch.Size([2, 100, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        block: int = 64,
        window_blocks: int = 3,
        random: int = 3,
        seed: int = 0,
        key_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, key_heads=key_heads, head_dim=head_dim, bias=bias, dropout=dropout)
        self.block, self.window_blocks = block, window_blocks
        self.pattern = bigbird(block, window_blocks=window_blocks, random=random, seed=seed)

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch length dim"],
        pattern: Pattern | None = None,
        *,
        random_blocks: Tensor | None = None,
        score: Score | Tensor | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attention of x to itself.

        Args:
            pattern: what else limits it: `padding(…)`, say.
            random_blocks: random blocks of your own instead: booleans `[blocks, blocks]` or `[heads, blocks, blocks]`.
        """
        own = self.pattern
        if random_blocks is not None:
            near = window(self.window_blocks // 2 + 1) | global_tokens((0, -1))
            own = blockwise(near, self.block) | blocks(random_blocks, self.block)
        return super().forward(x, own if pattern is None else own & pattern, score=score)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.pattern!r}"
