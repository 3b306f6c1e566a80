"""Several attentions as one: weighted by gates, or one of them for some of the rows.

By log-sum-exp, which is exact where the parts split the keys, is `primitives.merge_states`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.problem import accumulator
from foveate.values import at_hand, dense, describe, floating, integers
from foveate.words import explained


def _by_gates(outs: Sequence[Tensor], gates: Tensor) -> Tensor:
    """Σ gates[..., c] · outs[c]; a gate of exactly 0 lets nothing through. See `functional.merge_by_gates`."""
    parts = list(outs)
    if not parts:
        raise InvalidInput("merge_by_gates was given no outs: wanted at least one")
    for part in parts:
        if isinstance(part, Tensor):
            dense(part, "an out of merge_by_gates")
        if not isinstance(part, Tensor) or part.shape != parts[0].shape or part.dtype != parts[0].dtype:
            raise InvalidInput(
                f"merge_by_gates was given {describe(part)} beside {describe(parts[0])}: wanted one shape and dtype"
            )
    rows = parts[0].shape[:-1]
    fits = isinstance(gates, Tensor) and gates.dtype.is_floating_point and gates.dim() == len(rows) + 1
    if (
        not fits
        or gates.shape[-1] != len(parts)
        or any(n not in (1, m) for n, m in zip(gates.shape, rows, strict=False))
    ):
        raise InvalidInput(f"the gates are {describe(gates)} for {len(parts)} outs {describe(parts[0])}: wanted floats "
                           f"that broadcast to {[*rows, len(parts)]}")  # fmt: skip
    wide = accumulator(parts[0].dtype)
    total = torch.zeros_like(parts[0], dtype=wide)
    for part, gate in zip(parts, gates.to(wide).unbind(-1), strict=True):
        gate = gate[..., None]
        total = total + part.to(wide).masked_fill(gate == 0, 0) * gate
    return total.to(parts[0].dtype)


def _by_rows(out: Tensor, part: Tensor, rows: Tensor) -> Tensor:
    """`out` with row rows[b, i] of every head from row i of `part`, −1 for none. See `functional.merge_by_rows`."""
    floating(out, "out", [3, 4])
    floating(part, "part", [out.dim()])
    queries, count = out.shape[-2], part.shape[-2]
    if part.dtype != out.dtype or (*part.shape[:-2], queries, part.shape[-1]) != out.shape:
        raise InvalidInput(f"merge_by_rows was given part {describe(part)} for out {describe(out)}: wanted the same, "
                           "but for the number of rows")  # fmt: skip
    index = integers(rows, "rows", [1, 2] if out.dim() == 4 else [1]).long()
    if index.shape[-1] != count or index.shape[:-1] not in ((), (1,), out.shape[:1]):
        raise InvalidInput(f"the rows are {describe(rows)} for part {describe(part)}: wanted [{count}], or one list "
                           "for each of the batch")  # fmt: skip
    if at_hand(index) and not -1 <= int(index.min()) <= int(index.max()) < queries:
        raise InvalidInput(f"the rows go from {int(index.min())} to {int(index.max())}: wanted 0 to {queries - 1}, or "
                           "−1 for none")  # fmt: skip
    # The rows that are none are written to a row behind the last, which is dropped.
    places = index.masked_fill(index < 0, queries)
    places = (places[:, None, :] if index.dim() == 2 else places)[..., None].expand(part.shape)
    longer = torch.nn.functional.pad(out, (0, 0, 0, 1))
    return longer.scatter(-2, places, part)[..., :queries, :]


@explained
def merge_by_gates(
    outs: Sequence[Float[Tensor, "*batch heads queries value_dim"]], gates: Tensor
) -> Float[Tensor, "*batch heads queries value_dim"]:
    """Σ gates[…, c] · outs[c]: several attentions, weighted for each row as the model likes.

    gates are floats `[*batch, heads, queries, parts]`, an axis may be 1: sigmoids of x, say. They are not normalised,
    and a gate of exactly 0 lets nothing through.

    Yuan et al. 2025, "Native Sparse Attention", equation 5: https://arxiv.org/abs/2502.11089

    >>> import torch
    >>> import foveate as fv
    >>> near, far = torch.ones(1, 2, 3), 10 * torch.ones(1, 2, 3)  # [heads, queries, value dim]
    >>> fv.merge_by_gates([near, far], torch.tensor([[[0.5, 0.0], [0.0, 0.5]]]))[0]
    tensor([[0.5000, 0.5000, 0.5000],
            [5.0000, 5.0000, 5.0000]])
    """
    return _by_gates(outs, gates)


@explained
def merge_by_rows(
    out: Float[Tensor, "*batch heads queries value_dim"],
    part: Float[Tensor, "*batch heads rows value_dim"],
    rows: Int[Tensor, " rows"] | Int[Tensor, "batch_or_one rows"],
) -> Float[Tensor, "*batch heads queries value_dim"]:
    """`out`, with row rows[i] of every head taken from row i of `part`: another attention for some of the queries.

    rows are different integers, one list for all or one for each of the batch; −1 is none, so that lists may differ in
    length. What is replaced gets no gradient.

    Beltagy et al. 2020, Longformer's global tokens: https://arxiv.org/abs/2004.05150

    >>> import torch
    >>> import foveate as fv
    >>> fv.merge_by_rows(torch.zeros(1, 4, 2), torch.ones(1, 2, 2), torch.tensor([3, -1]))[0, :, 0]
    tensor([0., 0., 0., 1.])
    """
    return _by_rows(out, part, rows)
