"""A pattern by its list of keys: for every query the tokens, or the blocks of tokens, that it may attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.eager import is_known
from foveate.errors import InvalidInput
from foveate.pattern.algebra import Pattern
from foveate.positions import Extent, Pairs
from foveate.values import Name, describe, integers, whole
from foveate.words import explained


@dataclass(frozen=True, eq=False, repr=False)
class Selected(Pattern):
    """Row r of q sees the keys, or the blocks of `block` keys, that indices[:, :, r] lists; −1 lists none.

    `indices` `[batch or 1, heads, queries or 1, k]`: a head of the table for all query heads, for each of them, or
    for each group of neighbours. What is listed twice counts once.
    """

    indices: Tensor
    block: int

    def visible(self, at: Pairs) -> Tensor:
        listed, block = self._listed(at), at.key // self.block
        k = listed.shape[-1]
        if k == 0:
            shape = torch.broadcast_shapes(listed.shape[:-1], block.shape)
            return torch.zeros(shape, dtype=torch.bool, device=block.device)
        if listed.dim() < 2 or listed.shape[-2] != 1:
            return (listed == block[..., None]).any(-1)
        # A row for many keys: sorted once, then log k steps a pair instead of k.
        lists = listed.squeeze(-2).sort(-1).values
        shape = torch.broadcast_shapes(lists.shape[:-1], block.shape[:-1])
        lists, block = (x.expand(*shape, -1).contiguous() for x in (lists, block))
        return lists.gather(-1, torch.searchsorted(lists, block).clamp(max=k - 1)) == block

    def _listed(self, at: Pairs) -> Tensor:
        """The list of every pair's row, `[…, k]`."""
        heads = self.indices.shape[1]
        if heads > 1 and at.heads is None:
            raise InvalidInput(
                f"{self!r} is shared by groups of heads: use pattern.mask_mod(query_start, keys, heads), with the "
                "number of query heads"
            )
        group = max(1, (at.heads or heads) // max(heads, 1))
        places = (at.batch, at.head // group, at.row)
        return self.indices[
            tuple(
                place.clamp(0, n - 1) if n > 1 else place.new_zeros((1,) * place.dim())
                for place, n in zip(places, self.indices.shape[:3], strict=True)
            )
        ].long()

    def misfits(self, extent: Extent) -> list[str]:
        batch, heads, queries, _ = self.indices.shape
        reasons = super().misfits(extent)
        if batch != 1 and extent.batch not in (None, batch):
            reasons.append(f"{self!r} has {batch} batch rows but the batch is {extent.batch}")
        if extent.heads is not None and (heads == 0 or extent.heads % heads):
            reasons.append(
                f"{self!r} has {heads} heads beside {extent.heads} query heads: wanted 1, or so many that each "
                "serves a group of query heads"
            )
        if queries not in (1, extent.queries):
            reasons.append(f"{self!r} has {queries} rows but there are {extent.queries} queries")
        if not is_known(self.indices):
            return reasons  # what makes the summary looks at the numbers then
        return reasons + self.outside(extent.keys)

    def outside(self, keys: int) -> list[str]:
        """Why the numbers do not fit this many keys."""
        if self.indices.numel() == 0:
            return []
        count = -(-keys // self.block)
        lowest, highest = (int(x) for x in self.indices.aminmax())
        if lowest >= -1 and highest < count:
            return []
        what = f"blocks of {self.block} keys" if self.block > 1 else "keys"
        return [
            f"{self!r} lists {lowest if lowest < -1 else highest} but there are {count} {what}: "
            f"wanted 0 to {count - 1}, and −1 for none"
        ]

    def write(self, name: Name) -> str:
        return f"selected({name(self.indices)}{f', block={self.block}' if self.block > 1 else ''})"


@explained
def selected(indices: Int[Tensor, "batch heads queries k"], *, block: int = 1) -> Pattern:
    """The keys that are listed for each query: a selection that is made from the data, `fv.selection` say.

    Args:
        indices: `[batch or 1, heads, queries or 1, k]` by row of q; heads are 1, the key heads or the query heads, each
            serving a group of neighbours. −1 is none, and what is listed twice counts once.
        block: 1 for tokens; else indices are of blocks of so many keys, and block j is keys j · block and following.

    Raises:
        InvalidInput: no integers, or not four dimensions; in a call, numbers of keys that are not there.

    >>> import foveate as fv
    >>> print((fv.causal & fv.selected(torch.tensor([[[[0], [0], [1], [0]]]]), block=2)).picture(4, 4))
    1 . . .
    1 1 . .
    . . 1 .
    1 1 . .
    """
    given = integers(indices, "the indices of selected", [4])
    if given.dtype == torch.uint8:
        raise InvalidInput(f"the indices of selected are {describe(given)}: wanted int64, int32, int16 or int8")
    return Selected(given, whole(block, "the block of selected", 1))
