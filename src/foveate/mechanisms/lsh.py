"""Attention among keys that fall into the same bucket (Reformer's LSH), for one tensor that is both q and k.

    x ──hash──▶ bucket ──stable sort──▶ ┌ c ┬ c ┬ c ┐  each chunk of c tokens sees itself and the one before,
                                        └───┴───┴───┘  and no token itself unless it meets nobody else

The hash of a round is argmax([x·R; −x·R]) for a random R, so that vectors that point the same way meet. What the rounds
find is merged by its log-sum-exp, like attention over parts of the keys.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.pattern.algebra import Pattern
from foveate.positions import Pairs
from foveate.primitives import masked_softmax, merge_states, raw_scores, weigh
from foveate.problem import Problem, accumulator, batched_problem, without_autocast
from foveate.values import at_hand, describe, floating, static_size, whole
from foveate.words import Others, lenient, refused

_HASHED_AT_ONCE = 1 << 22  # numbers x·R held at once
_EPS = 1e-6  # of the mean square, as the paper's code has it


class Hash(NamedTuple):
    """How a text is hashed: into a product of `buckets` in each of the rounds of R `[heads, dim, rounds, Σ/2]`."""

    buckets: tuple[int, ...]
    rotations: Tensor


def hash_of(
    call: Problem,
    chunk: int,
    buckets: int | tuple[int, ...] | None,
    rounds: int,
    rotations: Tensor | None,
    generator: torch.Generator | None,
) -> Hash:
    """The checked hash of a call: rotations as given, or drawn."""
    whole(chunk, "the chunk of lsh_attention", 1)
    whole(rounds, "the rounds of lsh_attention", 1)
    factors = _default(call.shape[2], chunk) if buckets is None else buckets
    factors = tuple(factors) if isinstance(factors, tuple | list) else (factors,)
    for factor in factors:
        if whole(factor, "the buckets of lsh_attention", 2) % 2:
            raise InvalidInput(f"the buckets of lsh_attention are {factors}: wanted even numbers, one half being the "
                               "other turned round")  # fmt: skip
    heads, dim = call.q.shape[1], call.q.shape[3]
    shape = heads, dim, rounds, sum(factors) // 2
    if rotations is None:
        device = call.q.device if generator is None else generator.device
        drawn = torch.randn(shape, generator=generator, device=device)
        return Hash(factors, drawn.to(call.q.device, accumulator(call.q.dtype)))
    if floating(rotations, "rotations", [4]).shape != shape:
        raise InvalidInput(f"the rotations are {describe(rotations)}: wanted [heads, dim, rounds, buckets / 2] = "
                           f"{list(shape)}")  # fmt: skip
    return Hash(factors, rotations)


def _lsh(call: Problem, chunk: int, hashed: Hash) -> Tensor:
    """Attention of each chunk of tokens in order of their buckets to itself and the chunk before, rounds merged."""
    batch, heads, length, _ = call.shape
    if not (batch and heads and length):
        return call.v.new_zeros(batch, heads, length, call.v.shape[3])
    wide = accumulator(call.q.dtype)
    with without_autocast(call.q.device):
        x, v = call.q.to(wide), call.v.to(wide)
        order = _order(call, hashed, chunk) if length > chunk else _all(call)
        rounds, padded = order.shape[2:]
        places = order.flatten(2).unflatten(2, (-1, min(chunk, padded)))  # [B, H, chunks, c]
        visible = _visible(call, places, _around(places)).flatten(1, 2)
        queries, values = _take(x, places), _take(v, places)
        keys = queries * (queries.square().mean(-1, keepdim=True) + _EPS).rsqrt() / math.sqrt(x.shape[-1])
        q, k, v_around = queries.flatten(1, 2), _around(keys).flatten(1, 2), _around(values).flatten(1, 2)
        if _all_finite(x, v):
            weights, lse = masked_softmax(q @ k.mT * call.scale, visible)
            out = weights @ v_around
        else:
            weights, lse = masked_softmax(raw_scores(q, k) * call.scale, visible)
            out = weigh(weights, v_around)
        # Back to the order of the text: the padding is sorted behind and dropped.
        back = order.masked_fill(order < 0, length).argsort(-1)[..., :length]
        lse = lse.view(batch, heads, rounds, padded).gather(-1, back)
        out = out.view(batch, heads, rounds, padded, -1)
        out = out.gather(3, back[..., None].expand(*back.shape, out.shape[-1]))
        merged, total = merge_states(list(zip(out.unbind(2), lse.unbind(2), strict=True)))
        alone = (total == -math.inf) & _sees_itself(call)
        return torch.where(alone[..., None], v, merged).to(call.v.dtype)


def _default(length: int, chunk: int) -> tuple[int, ...]:
    """About two chunks' worth of buckets, a power of two; as a product of two where one factor grows large."""
    power = max((2 * (static_size(length) // chunk)).bit_length() - 1, 1)
    if 2**power <= 2 * chunk or power < 2:
        return (2**power,)
    return 2 ** (power // 2), 2 ** (power - power // 2)


@torch.no_grad()
def _order(call: Problem, hashed: Hash, chunk: int) -> Tensor:
    """Positions in order of their buckets `[B, H, rounds, N']`, N' a multiple of the chunk; −1 is none.

    Tokens that the pattern hides from themselves, padding that is, come last in every round.
    """
    batch, heads, length = call.shape[:3]
    rotations = hashed.rotations
    rounds, width = rotations.shape[2:]
    buckets = torch.zeros(batch, heads, rounds, length, dtype=torch.int64, device=call.q.device)
    step = max(1, _HASHED_AT_ONCE // (batch * heads * rounds * width))
    for first in range(0, length, step):
        part = slice(first, first + step)
        x = call.q.detach()[:, :, part].to(rotations.dtype)
        turned = torch.einsum("bhnd,hdrw->bhrnw", x, rotations)
        factor = 1
        for count, one in zip(hashed.buckets, turned.split([n // 2 for n in hashed.buckets], -1), strict=True):
            buckets[..., part] += factor * torch.cat([one, -one], -1).argmax(-1)
            factor *= count
    last = math.prod(hashed.buckets)
    buckets = buckets.masked_fill(~_sees_itself(call)[:, :, None], last)
    order = buckets.argsort(dim=-1, stable=True)
    return torch.nn.functional.pad(order, (0, -length % chunk), value=-1)


def _all(call: Problem) -> Tensor:
    batch, heads, length, _ = call.shape
    return torch.arange(length, device=call.q.device).expand(batch, heads, 1, length)


def _sees_itself(call: Problem) -> Tensor:
    """Whether each position may attend to itself, `[B, H, N]`."""
    batch, heads, length, _ = call.shape
    if call.pattern is None:
        return torch.ones(batch, heads, length, dtype=torch.bool, device=call.q.device)
    b, h, n = (torch.arange(size, device=call.q.device) for size in (batch, heads, length))
    at = Pairs(b[:, None, None], h[:, None], n, n, n, length)
    return call.pattern.visible(at).expand(batch, heads, length)


def _visible(call: Problem, queries: Tensor, keys: Tensor) -> Tensor:
    """Which keys of its neighborhood each token sees `[B, H, chunks, c, c or 2c]`: real ones, allowed, not itself."""
    query, key = queries[..., :, None], keys[..., None, :]
    seen = (query >= 0) & (key >= 0) & (query != key)
    if call.pattern is None:
        return seen
    batch, heads, length, _ = call.shape
    b = torch.arange(batch, device=query.device).view(-1, 1, 1, 1, 1)
    h = torch.arange(heads, device=query.device).view(-1, 1, 1, 1)
    query, key = query.clamp(min=0), key.clamp(min=0)
    return seen & call.pattern.visible(Pairs(b, h, query, query, key, length))


def _take(x: Tensor, places: Tensor) -> Tensor:
    """The rows of `[B, H, N, D]` at places `[B, H, chunks, c]`; where there is none some row, which nobody sees."""
    batch, heads, length, dim = x.shape
    first = torch.arange(0, batch * heads * length, length, device=x.device).view(batch, heads, 1, 1)
    rows = (places.clamp(min=0) + first).flatten()
    return x.reshape(-1, dim).index_select(0, rows).view(*places.shape, dim)


def _around(chunks: Tensor) -> Tensor:
    """Each chunk behind the one before it, the first behind the last; a single one as it is."""
    return torch.cat([chunks.roll(1, 2), chunks], 3) if chunks.shape[2] > 1 else chunks


def _all_finite(*tensors: Tensor) -> bool:
    """Whether nothing has to be kept from spreading, where it costs little to know."""
    known = all(at_hand(x) or (x.device.type == "cpu" and not x.numel()) for x in tensors)
    return known and all(bool(x.isfinite().all()) for x in tensors)


@lenient
def lsh_attention(
    qk: Float[Tensor, "*batch heads length dim"],
    v: Float[Tensor, "*batch heads length value_dim"],
    pattern: Pattern | Tensor | None = None,
    *,
    chunk: int = 64,
    buckets: int | tuple[int, ...] | None = None,
    rounds: int = 1,
    rotations: Tensor | None = None,
    generator: torch.Generator | None = None,
    scale: float = 1.0,
    **others: Unpack[Others],
) -> Float[Tensor, "*batch heads length value_dim"]:
    """Reformer's attention: softmax(scale · x_i·x_j/‖x_j‖)·v over the tokens that a hash puts near each other.

    A round hashes by argmax([x·R; −x·R]), sorts the tokens by bucket, cuts the order into chunks, and lets a token see
    its own chunk and the one before; a token sees itself only where it meets no other. Rounds are merged by their
    log-sum-exp, so a key that is met twice counts twice. A text of one chunk is plain attention. Time and memory grow
    with length · chunk · rounds.

    Args:
        qk: queries and keys in one, and one head of v for each of its heads.
        pattern: any pattern, by the positions in the text; tokens hidden from themselves (padding) are sorted last.
        chunk: tokens in a chunk.
        buckets: an even number, or several whose product counts; None = about 2 · length / chunk.
        rounds: hashes, each with its own R; more of them miss fewer pairs.
        rotations: the R's, `[heads, dim, rounds, Σ buckets / 2]`; None draws them, normally distributed.
        generator: what draws them; None = torch's default one.

    Raises:
        InvalidInput: the call is wrong, as in `attention`; odd buckets; rotations of another shape.

    Kitaev et al. 2020: https://arxiv.org/abs/2001.04451

    >>> import torch
    >>> import foveate as fv
    >>> x, v = torch.randn(2, 1, 2, 1000, 16).unbind()
    >>> fv.lsh_attention(x, v, fv.causal, chunk=32, rounds=2).shape
    torch.Size([1, 2, 1000, 16])
    """
    if others:
        raise refused(lsh_attention, others)
    call, batched = batched_problem(qk, qk, v, pattern, None, scale, 0, None, 0.0, None, needs_lse=False)
    out = _lsh(call, chunk, hash_of(call, chunk, buckets, rounds, rotations, generator))
    return out if batched else out[0]
