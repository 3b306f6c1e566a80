"""The masks of transformers as patterns: who may attend to whom, and where the first query stands.

transformers describes a mask by a function of absolute positions, composed of a few known ones. Each of those is a
pattern here, so that no n×n tensor exists and the cost follows what is visible. A function that a model brings itself
is no value that can be read: there, and only there, its boolean matrix is made, as for "sdpa".
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_, or_
from typing import Any

import torch
from torch import Tensor

from foveate.eager import is_known
from foveate.integrations.transformers.standing import Described, Mask
from foveate.integrations.transformers.switching import BEFORE, NAME
from foveate.pattern.algebra import And, Pattern
from foveate.pattern.catalogue import causal, chunks, documents, from_mask, padding, window
from foveate.pattern.packing import PaddingLengths
from foveate.pattern.positional import Window

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | Described | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **more: Any,
) -> Mask | Described:
    """The mask that transformers describes by a function of positions and a padding mask `[batch, length]`.

    q_offset and kv_offset are the absolute positions of the first query and the first key.
    """
    from transformers.masking_utils import causal_mask_function

    if isinstance(attention_mask, Mask | Described):
        return attention_mask  # made before the model was called, as for a static cache
    function = causal_mask_function if mask_function is None else mask_function
    keys = Keys(batch_size, kv_length, kv_offset, device)
    try:
        pattern = _compiled(function, keys, more) if torch.compiler.is_compiling() else _pattern(function, keys)
        pattern = _with_padding(pattern, attention_mask, keys)
    except _Unknown:
        pattern = _matrix(function, keys, q_length, q_offset, attention_mask, more)
    start = q_offset - kv_offset
    described = Described(
        pattern,
        start.reshape(1) if isinstance(start, Tensor) else start,
        kv_offset,
        (batch_size, 1, q_length, kv_length),
        dtype if _adds(more.get("config")) else torch.bool,
        device,
        is_whole=attention_mask is None,
    )
    return described if torch.compiler.is_compiling() else Mask(described)


def _adds(config: Any) -> bool:
    """Whether the layers of a model take a mask that is added, as "eager" has it, or one of booleans, as "sdpa" has."""
    before = BEFORE.get(id(config))  # what a patched model attended by
    return before == "eager" if before not in (None, NAME) else not _prefers_sdpa(type(config))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prefers_sdpa(kind: type) -> bool:
    """Whether a model with this kind of configuration attends by "sdpa" where nobody asks for another."""
    return _supports_sdpa(kind)


@functools.cache
def _supports_sdpa(kind: type) -> bool:
    import transformers

    modeling = sys.modules.get(kind.__module__.replace(".configuration_", ".modeling_"))
    parts = vars(modeling).values() if modeling else ()
    models = (part for part in parts if isinstance(part, type) and issubclass(part, transformers.PreTrainedModel))
    return any(model._supports_sdpa for model in models)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Keys:
    """The keys of a call: how many texts, how many keys each, and the absolute position of the first."""

    batch: int
    length: int
    offset: int
    device: torch.device | str

    def of(self, table: Tensor) -> Tensor:
        """The columns of a table `[batch, length]` by absolute position that belong to these keys."""
        return table[:, self.offset : self.offset + self.length]

    @property
    def positions(self) -> Tensor:
        """Absolute, `[1, keys]`."""
        return torch.arange(self.offset, self.offset + self.length, device=self.device)[None]


class _Unknown(Exception):
    """A mask function that is none of transformers' own."""


def _with_padding(pattern: Pattern | None, kept: Tensor | None, keys: Keys) -> Pattern | None:
    if kept is None or (is_known(kept) and bool(kept.all())):
        return pattern
    from transformers.masking_utils import prepare_padding_mask

    real = padding(keys.of(prepare_padding_mask(kept.bool(), keys.length, keys.offset)))
    return real if pattern is None else pattern & real


def _pattern(function: MaskFunction, keys: Keys) -> Pattern | None:
    """The pattern behind a mask function of transformers, in positions that count from the first key; None = all."""
    from transformers import masking_utils as known

    if function is known.causal_mask_function:
        return causal
    if function is known.bidirectional_mask_function:
        return None
    match _maker(function):
        case "and_masks", {"mask_functions": parts}:
            return _all_of([_pattern(part, keys) for part in parts])
        case "or_masks", {"mask_functions": parts}:
            return _any_of([_pattern(part, keys) for part in parts])
        case "sliding_window_overlay", {"sliding_window": int(size)}:
            return window(left=size - 1) if size > 0 else _nothing(keys, size)
        case "sliding_window_bidirectional_overlay", {"sliding_window": int(size)}:
            return window(left=size, right=size) if size >= 0 else _nothing(keys, size)
        case "chunked_overlay", {"chunk_size": int(size), "left_padding": Tensor() as left}:
            if is_known(left) and not bool(left.any()) and keys.offset % size == 0:
                return chunks(size)
            return documents((keys.positions - left[:, None]) // size)
        case "blockwise_overlay", {"block_sequence_ids": Tensor() as ids}:
            return documents(keys.of(ids))
        case "padding_mask_function", {"padding_mask": Tensor() as real}:
            return padding(keys.of(real.bool()))
        case "packed_sequence_mask_function", {"packed_sequence_mask": Tensor() as ids}:
            ids = keys.of(ids)
            return documents(ids - ids.min())  # a negative id would belong to no document
        case "remap_positions_for_packed_sequence", {"mask_function": inner, "position_ids": Tensor() as positions}:
            return _inside_documents(inner, positions, keys)
    raise _Unknown


@dataclass(frozen=True, eq=False, repr=False)
class NoWindow(PaddingLengths):
    """No key at all: a window of size 0, of which some models make a mask that no layer of theirs attends by."""

    size: int


def _nothing(keys: Keys, size: int) -> Pattern:
    return NoWindow(torch.zeros(keys.batch, dtype=torch.int64, device=keys.device), size)


def _maker(function: MaskFunction) -> tuple[str, dict[str, Any]]:
    """Which function of transformers made this one, and of what; neither for any other."""
    code = getattr(function, "__code__", None)
    if code is None or getattr(function, "__module__", None) != "transformers.masking_utils":
        return "", {}
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    return function.__qualname__.partition(".")[0], dict(zip(code.co_freevars, cells, strict=True))


def _inside_documents(function: MaskFunction, positions: Tensor, keys: Keys) -> Pattern | None:
    """A mask inside packed texts, whose positions start anew in each: what depends on distance alone stays as it is."""
    from transformers import masking_utils as known

    if function is known.causal_mask_function or function is known.bidirectional_mask_function:
        return _pattern(function, keys)
    match _maker(function):
        case "and_masks", {"mask_functions": parts}:
            return _all_of([_inside_documents(part, positions, keys) for part in parts])
        case "sliding_window_overlay" | "sliding_window_bidirectional_overlay", _:
            return _pattern(function, keys)
        case "chunked_overlay", {"chunk_size": int(size), "left_padding": Tensor() as left}:
            return documents((keys.of(positions) - left[:, None]) // size)
    raise _Unknown


def _compiled(function: MaskFunction, keys: Keys, more: dict[str, Any]) -> Pattern | None:
    """What a graph can know of a mask function, into which it cannot look: the two plain ones, and a causal window.

    transformers skips no mask but a plain one, and names the window of a plain one as `local_size`.
    """
    from transformers import masking_utils as known

    if function is known.causal_mask_function:
        return causal
    if function is known.bidirectional_mask_function:
        return None
    size, config = more.get("local_size"), more.get("config")
    is_window = size == getattr(config, "sliding_window", None) != getattr(config, "attention_chunk_size", None)
    if size is not None and is_window and more.get("allow_is_causal_skip"):
        return causal & window(size) if size > 0 else _nothing(keys, size)
    raise _Unknown


def _matrix(
    function: MaskFunction,
    keys: Keys,
    q_length: int,
    q_offset: int | Tensor,
    kept: Tensor | None,
    more: dict[str, Any],
) -> Pattern:
    """The boolean matrix `[batch, 1, queries, keys]` of a function that is not known, as transformers makes it."""
    from transformers.masking_utils import sdpa_mask

    seen = sdpa_mask(
        keys.batch,
        q_length,
        keys.length,
        q_offset,
        keys.offset,
        function,
        kept,
        allow_is_causal_skip=False,
        use_vmap=more.get("use_vmap", False),
        device=keys.device,
    )
    return from_mask(seen.broadcast_to(keys.batch, 1, q_length, keys.length))


def _all_of(patterns: Sequence[Pattern | None]) -> Pattern | None:
    """The intersection, as people write it: causal first, and a window beside it has one size."""
    parts: list[Pattern] = []
    for pattern in patterns:
        if pattern is not None:
            parts.extend(pattern.parts if isinstance(pattern, And) else (pattern,))
    if causal in parts:
        parts = [causal, *(_both_sides(part) for part in parts if part is not causal)]
    return reduce(and_, parts) if parts else None


def _both_sides(pattern: Pattern) -> Pattern:
    """A window without a right side as one with two, which causal makes the same."""
    one_sided = isinstance(pattern, Window) and pattern.left is not None and pattern.right is None
    return window(pattern.left + 1) if one_sided else pattern  # type: ignore[attr-defined]


def _any_of(patterns: Sequence[Pattern | None]) -> Pattern | None:
    known = [pattern for pattern in patterns if pattern is not None]
    return reduce(or_, known) if len(known) == len(patterns) else None
