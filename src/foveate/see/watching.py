"""`watch`: run a model as usual, then ask what each attention call looked at. O(n) memory at any length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor, nn

from foveate import capture
from foveate.capture import Looked
from foveate.dispatch import observe
from foveate.errors import FoveateError, InvalidInput
from foveate.problem import Problem
from foveate.score import parse
from foveate.words import explained


@dataclass(repr=False)
class Seen:
    """The attention calls that were watched, in the order in which they ran; weights are worked out when asked for."""

    calls: list[Problem] = field(default_factory=list)
    _versions: list[tuple[int | None, ...]] = field(default_factory=list)

    def keep(self, call: Problem) -> None:
        """Remember one call: its q, k and v, without their history."""
        score = None
        if call.score is not None:
            words, tensors = call.score.spec()
            score = parse(words, [tensor.detach() for tensor in tensors])
        kept = replace(call, q=call.q.detach(), k=call.k.detach(), v=call.v.detach(), score=score)
        self.calls.append(kept)
        self._versions.append(_versions(kept))

    def __repr__(self) -> str:
        return f"<Seen: {len(self)} attention calls>"

    def __len__(self) -> int:
        return len(self.calls)

    def weights(
        self, call: int, rows: Sequence[int] | Tensor | None = None, columns: Sequence[int] | Tensor | None = None
    ) -> Float[Tensor, "batch heads rows columns"]:
        """The exact weights of one call, for these rows and columns; None means all."""
        return capture.weights(self._call(call), rows, columns)

    def looked(self, call: int, k: int = 16) -> Looked:
        """The k largest weights of every row of one call, the rest of the weight, and what every key received."""
        return capture.looked(self._call(call), k)

    def _call(self, number: int) -> Problem:
        if not self.calls:
            raise FoveateError(
                "nothing was watched: no attention call went through foveate inside the `with`; a compiled graph, "
                "or a model that computes its own softmax, is not seen"
            )
        if not -len(self) <= number < len(self):
            raise InvalidInput(
                f"call {number} was asked for, but {len(self)} were watched: wanted 0 to {len(self) - 1}"
            )
        call = self.calls[number]
        if _versions(call) != self._versions[number]:
            raise FoveateError(
                f"the tensors of call {number} were overwritten after it ran (a static cache does that): "
                "ask inside the `with`, before the next step"
            )
        return call


@explained
@contextmanager
def watch(model: nn.Module | None = None) -> Iterator[Seen]:
    """Record every attention call of `model` while the `with` runs.

    A Hugging Face model is switched to foveate meanwhile. Without a model, every `fv.attention` call of this
    thread is recorded.

    >>> import torch
    >>> import foveate as fv
    >>> q = torch.zeros(1, 1, 4, 8)
    >>> with fv.watch() as seen:
    ...     out = fv.attention(q, q, q, fv.causal)
    >>> seen.weights(0, rows=[1])
    tensor([[[[0.5000, 0.5000, 0.0000, 0.0000]]]])
    """
    seen = Seen()
    with _switched(model):
        end = observe(seen.keep)
        try:
            yield seen
        finally:
            end()


def _switched(model: nn.Module | None) -> AbstractContextManager[object]:
    """A Hugging Face model on foveate while the `with` runs, if it is not already."""
    if model is None or not hasattr(model, "set_attn_implementation"):
        return nullcontext()
    from foveate.integrations.transformers import is_patched, patch

    return nullcontext() if is_patched(model) else patch(model)


def _versions(call: Problem) -> tuple[int | None, ...]:
    tensors = [call.q, call.k, call.v]
    tensors += call.pattern.tensors() if call.pattern is not None else []
    tensors += call.score.tensors() if call.score is not None else []
    tensors += [call.query_start] if isinstance(call.query_start, Tensor) else []
    return tuple(None if x.is_inference() else x._version for x in tensors)
