"""Text from a decoder, one token after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.generation.cache import KeyValueCache
from foveate.pattern.packing import padding
from foveate.values import describe, integers, whole

Decoder = Callable[..., Tensor]  # (tokens, pattern, positions=, cache=) → hidden states [batch, tokens, dim]


@torch.no_grad()
def greedy(
    decoder: Decoder,
    logits: Callable[[Tensor], Tensor],
    tokens: Int[Tensor, "batch length"],
    cache: KeyValueCache,
    *,
    new: int,
    keep: Bool[Tensor, "batch length"] | None = None,
    end: int | Collection[int] | None = None,
    pad: int | None = None,
    positions: int | None = None,
    first: int | None = None,
    last: int | None = None,
    never: Collection[int] = (),
    never_first: Collection[int] = (),
) -> Int[Tensor, "batch longer"]:
    """`tokens` and up to `new` more, each the likeliest after those before it.

    Args:
        decoder: hidden states of new tokens, given a cache that holds the ones before.
        logits: of hidden states.
        keep: which tokens are real, where shorter texts are padded on the left; positions count the real ones.
        end: the token (or tokens) after which a text is over; the rest of its row is `pad`.
        pad: None = the first of `end`.
        positions: how many the decoder has; None = any number.
        first: what the first new token is, whatever the scores say.
        last: what the last of `new` tokens is, in a row that is not over.
        never: tokens that are not chosen.
        never_first: more of them, for the first new token alone.

    It stops when every row is over or `new` tokens have come.

    Raises:
        InvalidInput: more tokens than positions, a row that is padded on the right.
    """
    tokens = integers(tokens, "tokens", (2,))
    _check(tokens, new, keep, positions)
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    over = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    fill = pad if pad is not None else ends[0] if ends else 0
    places = None if keep is None else (keep.long().cumsum(1) - 1).clamp(min=0)
    step = tokens
    for n in range(new):
        seen = None if keep is None else padding(keep)
        hidden = decoder(step, seen, positions=places, cache=cache)
        scores = logits(hidden[:, -1:])
        unwritten = [*never, *never_first] if n == 0 else [*never]
        if unwritten:
            words = torch.arange(scores.shape[-1], device=scores.device)
            scores = scores.masked_fill(torch.isin(words, torch.tensor(unwritten, device=scores.device)), -torch.inf)
        forced = last if n == new - 1 and last is not None else first if n == 0 else None
        chosen = scores.argmax(-1) if forced is None else torch.full_like(step[:, -1:], forced)
        chosen = chosen.masked_fill(over[:, None], fill)
        tokens = torch.cat([tokens, chosen], 1)
        over = over | torch.isin(chosen[:, 0], torch.tensor(ends, device=tokens.device, dtype=tokens.dtype))
        if bool(over.all()):
            break
        step = chosen
        if keep is not None and places is not None:
            keep = torch.cat([keep, keep.new_ones(keep.shape[0], 1)], 1)
            places = places[:, -1:] + 1
    return tokens


def _check(tokens: Tensor, new: int, keep: Tensor | None, positions: int | None) -> None:
    if tokens.shape[1] < 1:
        raise InvalidInput(f"tokens are {describe(tokens)}: wanted at least one to start from")
    whole(new, "the number of new tokens", 0)
    if keep is not None:
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != tokens.shape:
            raise InvalidInput(f"keep is {describe(keep)}: wanted a boolean for each of tokens {describe(tokens)}")
        if not bool(keep[:, -1].all()):
            raise InvalidInput("keep says that the last token of a row is padding: pad shorter texts on the left")
    longest = tokens.shape[1] if keep is None else int(keep.sum(1).max())
    if positions is not None and longest + new - 1 > positions:
        raise InvalidInput(
            f"{new} tokens after {longest} were asked for, but the model has {positions} positions: ask for fewer"
        )
