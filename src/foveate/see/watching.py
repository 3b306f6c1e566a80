"""`watch`: run a model as usual, then ask what each attention call looked at. O(n) memory at any length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from foveate import inspection
from foveate.dispatch.choose import Observation
from foveate.errors import FoveateError, InvalidInput
from foveate.inspection import Looked
from foveate.problem import Problem
from foveate.score import parse
from foveate.see.forwards import follow
from foveate.see.switching import switch, switch_back, watchable
from foveate.words import explained


@dataclass(repr=False)
class Seen:
    """The attention calls that were watched, in the order in which they ran; weights are worked out when asked for."""

    calls: list[Problem] = field(default_factory=list)
    _model: str = ""
    _ran: bool = False
    _versions: dict[int, tuple[int | None, ...]] = field(default_factory=dict)  # by the id of a call

    def keep(self, call: Problem) -> None:
        """Remember one call: its q, k and v, without their history."""
        score = None
        if call.score is not None:
            words, tensors = call.score.spec()
            score = parse(words, [tensor.detach() for tensor in tensors])
        kept = replace(call, q=call.q.detach(), k=call.k.detach(), v=call.v.detach(), score=score)
        self._versions[id(kept)] = _versions(kept)  # first: threads may ask for a call as soon as it is listed
        self.calls.append(kept)

    def ran(self) -> None:
        """Remember that the model began to compute something."""
        self._ran = True

    def __repr__(self) -> str:
        return f"<Seen: {len(self)} attention calls>"

    def __len__(self) -> int:
        return len(self.calls)

    def weights(
        self, call: int, rows: Sequence[int] | Tensor | None = None, columns: Sequence[int] | Tensor | None = None
    ) -> Float[Tensor, "batch heads rows columns"]:
        """The exact weights of one call, for these rows and columns; None means all."""
        return inspection.weights(self._call(call), rows, columns)

    def looked(self, call: int, k: int = 16) -> Looked:
        """The k largest weights of every row of one call, the rest of the weight, and what every key received."""
        return inspection.looked(self._call(call), k)

    def _call(self, number: int) -> Problem:
        if not self.calls:
            raise FoveateError(f"nothing was watched: {self._why_nothing()}")
        if not -len(self) <= number < len(self):
            raise InvalidInput(
                f"call {number} was asked for, but {len(self)} were watched: wanted 0 to {len(self) - 1}"
            )
        call = self.calls[number]
        if _versions(call) != self._versions.get(id(call), _versions(call)):
            raise FoveateError(
                f"the tensors of call {number} were overwritten after it ran (a static cache does that): "
                "ask inside the `with`, before the next step"
            )
        return call

    def _why_nothing(self) -> str:
        not_seen = "a compiled graph, or a model that computes its own softmax, is not seen"
        if not self._model:
            return f"no attention call of this thread went through foveate inside the `with`; {not_seen}"
        if not self._ran:
            return f"{self._model} did not run inside the `with`, or only as a compiled graph, which is not seen"
        return f"{self._model} ran, but no attention in it went through foveate; {not_seen}"


@explained
@contextmanager
def watch(model: nn.Module | Any | None = None) -> Iterator[Seen]:
    """Record every attention call in the forwards of `model`, in any thread, while the `with` runs.

    Hugging Face models, the model itself or those in a wrapper, are switched to foveate meanwhile. Without a model,
    every `fv.attention` call of this thread is recorded.

    Args:
        model: a Hugging Face model, a wrapper of one (SentenceTransformer, nn.DataParallel), a pipeline with one in
            `.model`, a part of a model that is patched, or any module that calls foveate's attention.

    Raises:
        InvalidInput: there is no attention in it that foveate could see; the message says what to give.

    >>> import torch
    >>> import foveate as fv
    >>> q = torch.zeros(1, 1, 4, 8)
    >>> with fv.watch() as seen:
    ...     out = fv.attention(q, q, q, fv.causal)
    >>> seen.weights(0, rows=[1])
    tensor([[[[0.5000, 0.5000, 0.0000, 0.0000]]]])
    """
    if model is None:
        seen = Seen()
        observation = Observation(seen.keep)
        observation.begin()
        try:
            yield seen
        finally:
            observation.close()
        return
    module = watchable(model)
    seen = Seen(_model=type(module).__name__)
    observation = Observation(seen.keep)
    needed = switch(module)
    try:
        end = follow(module, observation, seen.ran)
        try:
            yield seen
        finally:
            end()
            observation.close()
    finally:
        switch_back(needed)


def _versions(call: Problem) -> tuple[int | None, ...]:
    tensors = [call.q, call.k, call.v]
    tensors += call.pattern.tensors() if call.pattern is not None else []
    tensors += call.score.tensors() if call.score is not None else []
    tensors += [call.query_start] if isinstance(call.query_start, Tensor) else []
    return tuple(None if x.is_inference() else x._version for x in tensors)
