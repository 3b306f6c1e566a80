"""Attention of recurrent decoders as modules: Bahdanau's and Luong's scores with their parameters, global and local."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.eager import is_known
from foveate.errors import InvalidInput
from foveate.functional import attention, weights
from foveate.mechanisms.additive import additive_attention, additive_weights, local_attention
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import padding
from foveate.values import describe, integers, sequence, whole

Score = Literal["dot", "general", "concat"]
Alignment = Literal["global", "local-m", "local-p"]


class LuongAttention(nn.Module):
    """Luong's attention of decoder states h_t to a memory h̄: one of three scores, over one of three windows.

        dot      h_t · h̄_s                         global   every position of the memory
        general  h_tᵀ W h̄_s                        local-m  |s − t| ≤ width
        concat   v · tanh(W [h_t; h̄_s])            local-p  |s − p_t| ≤ width, p_t = S·σ(v_p · tanh(W_p h_t))

    The weights are the softmax of the score; those of local-p are multiplied by exp(−(s − p_t)² / 2σ²), σ = width / 2,
    which is what gives p_t a gradient. S is the length of each row's own memory.

    Args:
        query_dim: of the decoder's states.
        memory_dim: of the memory; as large as `query_dim` for the dot product.
        score: "dot", "general" or "concat".
        alignment: "global", "local-m" or "local-p".
        width: D of the paper, for the local ones.
        dim: the hidden size of concat; None = `query_dim`.

    Raises:
        InvalidInput: an unknown score or alignment, or sizes that do not fit.

    Luong et al. 2015: https://arxiv.org/abs/1508.04025

    >>> import torch
    >>> from foveate.nn import LuongAttention
    >>> attend = LuongAttention(6, 8, score="general", alignment="local-p", width=2)
    >>> states, memory, lengths = torch.randn(3, 5, 6), torch.randn(3, 7, 8), torch.tensor([7, 4, 1])
    >>> attend(states, memory, lengths).shape, attend.weights(states, memory, lengths).shape
    (torch.Size([3, 5, 8]), torch.Size([3, 5, 7]))
    """

    def __init__(
        self,
        query_dim: int,
        memory_dim: int,
        *,
        score: Score = "general",
        alignment: Alignment = "global",
        width: int = 10,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        for name, given, known in (("score", score, Score), ("alignment", alignment, Alignment)):
            if given not in get_args(known):
                raise InvalidInput(f"{name} is {given!r}: wanted one of {', '.join(map(repr, get_args(known)))}")
        if score == "dot" and query_dim != memory_dim:
            raise InvalidInput(
                f"query_dim is {query_dim} and memory_dim {memory_dim}: the dot score wants them equal; take 'general'"
            )
        self.query_dim, self.memory_dim = whole(query_dim, "query_dim", 1), whole(memory_dim, "memory_dim", 1)
        self.score, self.alignment, self.width = score, alignment, whole(width, "the width", 1)
        if dim is not None and score != "concat":
            raise InvalidInput(f"dim is {dim}: only the concat score has a hidden size")
        dim = query_dim if dim is None else whole(dim, "dim", 1)
        self.query = nn.Linear(query_dim, dim, bias=False) if score == "concat" else nn.Identity()
        self.key = nn.Linear(memory_dim, dim, bias=False) if score != "dot" else nn.Identity()
        self.vector = nn.Parameter(torch.empty(dim).uniform_(-(dim**-0.5), dim**-0.5)) if score == "concat" else None
        if alignment == "local-p":
            self.position = nn.Sequential(
                nn.Linear(query_dim, query_dim, bias=False), nn.Tanh(), nn.Linear(query_dim, 1, bias=False)
            )

    def keys(self, memory: Float[Tensor, "batch source memory_dim"]) -> Float[Tensor, "batch source dim"]:
        """What the score compares states with: worked out once, and given to every step as `keys=`."""
        sequence(memory, self.memory_dim, "the memory is", "source")
        keys: Tensor = self.key(memory)
        return keys

    def forward(
        self,
        states: Float[Tensor, "batch steps query_dim"],
        memory: Float[Tensor, "batch source memory_dim"],
        lengths: Int[Tensor, " batch"] | None = None,
        *,
        keys: Float[Tensor, "batch source dim"] | None = None,
        start: int = 0,
    ) -> Float[Tensor, "batch steps memory_dim"]:
        """The context of every state: Σ_s weight · memory_s.

        Args:
            lengths: how much of each row of the memory there is; what lies beyond never matters.
            keys: `self.keys(memory)`, if it is there already.
            start: the step that the first state stands at, which local-m looks around.
        """
        return self._attend(states, memory, memory, lengths, keys, start)

    def weights(
        self,
        states: Float[Tensor, "batch steps query_dim"],
        memory: Float[Tensor, "batch source memory_dim"],
        lengths: Int[Tensor, " batch"] | None = None,
        *,
        keys: Float[Tensor, "batch source dim"] | None = None,
        start: int = 0,
    ) -> Float[Tensor, "batch steps source"]:
        """The alignment itself: what `forward` weighs the memory with."""
        if self.alignment != "global":  # its weights are what comes out where the values are the identity
            eye = torch.eye(memory.shape[1], dtype=memory.dtype, device=memory.device).expand(memory.shape[0], -1, -1)
            return self._attend(states, memory, eye, lengths, keys, start)
        q, k, pattern = self._prepared(states, memory, lengths, keys)
        if self.vector is not None:
            return additive_weights(q, k, self.vector, pattern, query_start=0)[:, 0]
        return weights(q, k, k, pattern, scale=1.0, query_start=0)[:, 0]

    def centers(
        self, states: Float[Tensor, "batch steps query_dim"], source: int, lengths: Tensor | None = None, start: int = 0
    ) -> Float[Tensor, "batch steps"]:
        """Where the window of each state is: t for local-m, the learned p_t for local-p."""
        if self.alignment == "local-p":
            long = lengths.to(states.dtype)[:, None] if lengths is not None else source
            centers: Tensor = long * self.position(states).squeeze(-1).sigmoid()
            return centers
        steps = torch.arange(start, start + states.shape[1], dtype=states.dtype, device=states.device)
        return steps.expand(states.shape[0], -1)

    def _attend(
        self,
        states: Tensor,
        memory: Tensor,
        values: Tensor,
        lengths: Tensor | None,
        keys: Tensor | None,
        start: int,
    ) -> Tensor:
        q, k, pattern = self._prepared(states, memory, lengths, keys)
        v = values[:, None]
        if self.alignment != "global":
            center = self.centers(states, memory.shape[1], lengths, start)[:, None]
            sigma = None if self.alignment == "local-p" else torch.inf
            return local_attention(
                q, k, v, center, pattern, width=self.width, sigma=sigma, vector=self.vector, scale=1.0, query_start=0
            )[:, 0]
        if self.vector is not None:
            return additive_attention(q, k, v, self.vector, pattern, query_start=0)[:, 0]
        return attention(q, k, v, pattern, scale=1.0, query_start=0)[:, 0]

    def _prepared(
        self, states: Tensor, memory: Tensor, lengths: Tensor | None, keys: Tensor | None
    ) -> tuple[Tensor, Tensor, Pattern | None]:
        """q and k `[batch, 1, …]`, and which keys are there."""
        sequence(states, self.query_dim, "the states are", "steps")
        k = self.keys(memory) if keys is None else keys
        if lengths is None:
            return self.query(states)[:, None], k[:, None], None
        lengths = integers(lengths, "lengths", [1])
        if lengths.shape[0] != memory.shape[0]:
            raise InvalidInput(f"lengths is {describe(lengths)}: wanted [batch] = [{memory.shape[0]}]")
        if lengths.device.type == "cpu" and is_known(lengths) and bool((lengths > memory.shape[1]).any()):
            raise InvalidInput(
                f"a length is {int(lengths.max())}: wanted at most the {memory.shape[1]} positions of the memory"
            )
        return self.query(states)[:, None], k[:, None], padding(lengths)

    def extra_repr(self) -> str:
        local = "" if self.alignment == "global" else f", width={self.width}"
        return f"{self.query_dim}, {self.memory_dim}, score={self.score!r}, alignment={self.alignment!r}{local}"


class AdditiveAttention(LuongAttention):
    """Bahdanau's attention of decoder states s to a memory h: softmax_j(v · tanh(W s_i + U h_j)) · h_j.

    What Luong calls concat, so its windows fit it too. Bahdanau's decoder asks with its previous state.

    Bahdanau et al. 2014, appendix A.1.2: https://arxiv.org/abs/1409.0473

    >>> import torch
    >>> from foveate.nn import AdditiveAttention
    >>> attend = AdditiveAttention(6, 8, 5)
    >>> memory = torch.randn(3, 7, 8)
    >>> keys = attend.keys(memory)  # U h, once for all steps
    >>> attend(torch.randn(3, 1, 6), memory, keys=keys).shape
    torch.Size([3, 1, 8])
    """

    def __init__(
        self, query_dim: int, memory_dim: int, dim: int, *, alignment: Alignment = "global", width: int = 10
    ) -> None:
        super().__init__(query_dim, memory_dim, score="concat", alignment=alignment, width=width, dim=dim)
