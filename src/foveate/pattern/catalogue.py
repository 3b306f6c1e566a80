"""Every pattern by name, and the compositions that papers gave a name of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from foveate.errors import InvalidInput
from foveate.pattern.algebra import Pattern
from foveate.pattern.blocked import blocks, blockwise, random_blocks
from foveate.pattern.custom import from_mask, rule
from foveate.pattern.grid import neighborhood
from foveate.pattern.packing import documents, padding
from foveate.pattern.positional import causal, chunks, every, global_tokens, pooled, prefix, window
from foveate.pattern.selected import selected
from foveate.values import Held, read, whole
from foveate.words import explained

_near = window  # the compositions have an argument called window


@explained
def longformer(window: int = 512, positions: Iterable[int] | Tensor = (0,), *, step: int = 1) -> Pattern:
    """Longformer (2004.05150): window / 2 positions on each side, `step` apart, and some global tokens.

    >>> import foveate as fv
    >>> fv.longformer(512)
    window(257) | global_tokens((0,))
    """
    return _near(whole(window, "longformer's window", 0) // 2 + 1, step=step) | global_tokens(positions)


@explained
def bigbird(block: int = 64, *, window_blocks: int = 3, random: int = 3, seed: int = 0) -> Pattern:
    """BigBird (2007.14062): a window of blocks, the first and the last block global, some random blocks.

    >>> import foveate as fv
    >>> fv.bigbird()
    blockwise(window(2) | global_tokens((0, -1)), 64) | random_blocks(3, 64, seed=0)
    """
    reach = whole(window_blocks, "bigbird's window_blocks", 1) // 2 + 1
    return blockwise(_near(reach) | global_tokens((0, -1)), block) | random_blocks(random, block, seed)


@explained
def streaming(first: int = 4, window: int = 1024) -> Pattern:
    """StreamingLLM's mask (2309.17453): the first tokens, as sinks for the weight, and a causal window.

    >>> import foveate as fv
    >>> print(fv.streaming(1, 2).picture(4, 4))
    1 . . .
    1 1 . .
    1 1 1 .
    1 . 1 1
    """
    return causal & (_near(window) | prefix(first))


@explained
def strided(stride: int) -> Pattern:
    """Child et al.'s strided attention (1904.10509), both parts: the last `stride` keys, and every stride-th before.

    >>> import foveate as fv
    >>> print(fv.strided(3).picture(6, 6))
    1 . . . . .
    1 1 . . . .
    1 1 1 . . .
    1 1 1 1 . .
    . 1 1 1 1 .
    . . 1 1 1 1
    >>> fv.strided(3)
    causal & (window(3) | window(left=None, right=0, step=3))
    """
    return causal & (window(whole(stride, "strided's stride", 1)) | window(right=0, step=stride))


@explained
def fixed(stride: int, last: int = 1) -> Pattern:
    """Child et al.'s fixed attention (1904.10509), both parts: the own block, and the last keys of earlier blocks.

    >>> import foveate as fv
    >>> print(fv.fixed(3).picture(6, 6))
    1 . . . . .
    1 1 . . . .
    1 1 1 . . .
    . . 1 1 . .
    . . 1 1 1 .
    . . 1 1 1 1
    """
    return causal & (chunks(whole(stride, "fixed's stride", 1)) | every(stride, last))


NAMES: dict[str, Pattern | Callable[..., Pattern]] = {
    "causal": causal,
    "window": window,
    "pooled": pooled,
    "prefix": prefix,
    "chunks": chunks,
    "every": every,
    "neighborhood": neighborhood,
    "documents": documents,
    "padding": padding,
    "global_tokens": global_tokens,
    "random_blocks": random_blocks,
    "blocks": blocks,
    "blockwise": blockwise,
    "rule": rule,
    "from_mask": from_mask,
    "selected": selected,
}  # fmt: skip


def parse(spec: str, held: Sequence[Held]) -> Pattern:
    """The pattern that `Pattern.spec` wrote."""
    pattern = read(spec, NAMES, held)
    if not isinstance(pattern, Pattern):
        raise InvalidInput(f"{spec!r} is no pattern")
    return pattern


__all__ = [
    "bigbird",
    "blocks",
    "blockwise",
    "causal",
    "chunks",
    "documents",
    "every",
    "fixed",
    "from_mask",
    "global_tokens",
    "longformer",
    "neighborhood",
    "padding",
    "parse",
    "pooled",
    "prefix",
    "random_blocks",
    "rule",
    "selected",
    "streaming",
    "strided",
    "window",
]
