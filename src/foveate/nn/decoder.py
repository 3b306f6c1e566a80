"""A recurrent decoder that attends to a memory at every step, ready to train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.errors import InvalidInput
from foveate.nn.additive import LuongAttention
from foveate.values import describe, integers, whole


class DecoderState(NamedTuple):
    """What a decoder carries from step to step.

    hidden `[layers, batch, dim]`; cell, the same for an LSTM and None for a GRU; fed `[batch, dim]`, the last
    attentional state h̃, which is fed back; and step, how many steps went before.
    """

    hidden: Tensor
    cell: Tensor | None
    fed: Tensor
    step: int


class AttentiveDecoder(nn.Module):
    """A GRU or LSTM that writes a sequence and attends to a memory at each step, as Luong's decoder or Bahdanau's does.

        query = "current"  (Luong)      s_t = RNN([y_{t−1}; h̃_{t−1}], s_{t−1}),  c_t = attention(s_t)
        query = "previous" (Bahdanau)   c_t = attention(s_{t−1}),  s_t = RNN([y_{t−1}; c_t], s_{t−1})

        h̃_t = tanh(W_c [c_t; s_t]),  logits_t = W h̃_t

    y is the embedded token, and y_0 that of `start`. Without input feeding Luong's RNN does not read h̃_{t−1}, so that
    all steps are worked out at once. The output layer is Luong's in both.

    Args:
        vocabulary: how many tokens there are.
        dim: of the embedding and of the states.
        attention: how states are compared with the memory, with `query_dim` = dim.
        cell: "gru" or "lstm".
        layers: stacked one on the other; the last one attends.
        query: the state that attends.
        input_feeding: whether Luong's RNN reads the last h̃.
        dropout: on the embedding, between layers and on h̃.
        start: the token before the first.

    Raises:
        InvalidInput: sizes or names that do not fit.

    Bahdanau et al. 2014: https://arxiv.org/abs/1409.0473; Luong et al. 2015: https://arxiv.org/abs/1508.04025

    >>> import torch
    >>> from foveate.nn import AdditiveAttention, AttentiveDecoder
    >>> decoder = AttentiveDecoder(11, 6, AdditiveAttention(6, 8, 5), query="previous")
    >>> memory, targets = torch.randn(3, 7, 8), torch.randint(11, (3, 5))
    >>> decoder(targets, memory).shape, decoder.weights(targets, memory).shape
    (torch.Size([3, 5, 11]), torch.Size([3, 5, 7]))
    >>> decoder.greedy(memory, 4).shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        attention: LuongAttention,
        *,
        cell: Literal["gru", "lstm"] = "gru",
        layers: int = 1,
        query: Literal["current", "previous"] = "current",
        input_feeding: bool = True,
        dropout: float = 0.0,
        start: int = 0,
    ) -> None:
        super().__init__()
        if cell not in ("gru", "lstm"):
            raise InvalidInput(f"cell is {cell!r}: wanted 'gru' or 'lstm'")
        if query not in ("current", "previous"):
            raise InvalidInput(f"query is {query!r}: wanted 'current' (Luong) or 'previous' (Bahdanau)")
        if query == "previous" and not input_feeding:
            raise InvalidInput("query='previous' feeds the context into the cell: input_feeding=False is for 'current'")
        if attention.query_dim != dim:
            raise InvalidInput(f"the attention takes states of {attention.query_dim}: wanted query_dim = dim = {dim}")
        whole(layers, "layers", 1)
        self.dim, self.query, self.input_feeding, self.start = dim, query, input_feeding, start
        self.embedding = nn.Embedding(whole(vocabulary, "the vocabulary", start + 1), dim)
        self.attention = attention
        fed = attention.memory_dim if query == "previous" else dim if input_feeding else 0
        kind = nn.GRU if cell == "gru" else nn.LSTM
        self.cell = kind(dim + fed, dim, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.combine = nn.Linear(attention.memory_dim + dim, dim, bias=False)
        self.readout = nn.Linear(dim, vocabulary)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        targets: Int[Tensor, "batch steps"],
        memory: Float[Tensor, "batch source memory_dim"],
        lengths: Int[Tensor, " batch"] | None = None,
        *,
        initial: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch steps vocabulary"]:
        """The logits of every target, having read the targets before it (teacher forcing).

        Args:
            lengths: how much of each row of the memory there is.
            initial: the first hidden state `[layers, batch, dim]` as torch.nn.GRU gives it, a pair for an LSTM;
                None = zeros.
        """
        return self._logits(torch.cat([fed for _, _, fed, _ in self._steps(targets, memory, lengths, initial)], 1))

    def weights(
        self,
        targets: Int[Tensor, "batch steps"],
        memory: Float[Tensor, "batch source memory_dim"],
        lengths: Int[Tensor, " batch"] | None = None,
        *,
        initial: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch steps source"]:
        """The alignment of every step of `forward`."""
        keys = self.attention.keys(memory)
        rows = [
            self.attention.weights(asking, memory, lengths, keys=keys, start=step)
            for asking, step, _, _ in self._steps(targets, memory, lengths, initial)
        ]
        return torch.cat(rows, 1)

    @torch.no_grad()
    def greedy(
        self,
        memory: Float[Tensor, "batch source memory_dim"],
        most: int,
        lengths: Int[Tensor, " batch"] | None = None,
        *,
        initial: Tensor | tuple[Tensor, Tensor] | None = None,
        stop: int | None = None,
    ) -> Int[Tensor, "batch steps"]:
        """The likeliest token, step by step, at most `most` of them; after `stop` a row is filled up with it."""
        whole(most, "the number of steps", 0)
        keys = self.attention.keys(memory)
        state = self._state(memory, initial)
        token = torch.full((memory.shape[0], 1), self.start, device=memory.device)
        tokens: list[Tensor] = []
        done = torch.zeros(memory.shape[0], 1, dtype=torch.bool, device=memory.device)
        while len(tokens) < most and not (stop is not None and bool(done.all())):
            _, fed, state = self.step(token, memory, lengths, keys=keys, state=state)
            token = self._logits(fed).argmax(-1)
            if stop is not None:
                token = token.masked_fill(done, stop)
                done = done | (token == stop)
            tokens.append(token)
        return torch.cat(tokens, 1) if tokens else token[:, :0]

    def step(
        self,
        tokens: Int[Tensor, "batch steps"],
        memory: Float[Tensor, "batch source memory_dim"],
        lengths: Int[Tensor, " batch"] | None,
        *,
        keys: Float[Tensor, "batch source dim"],
        state: DecoderState,
    ) -> tuple[Tensor, Tensor, DecoderState]:
        """Read some tokens (one, unless there is no input feeding): (the states that attended, h̃, the state after)."""
        read = self.dropout(self.embedding(tokens))
        before = state.hidden if state.cell is None else (state.hidden, state.cell)

        def attend(asking: Tensor) -> Tensor:
            context: Tensor = self.attention(asking, memory, lengths, keys=keys, start=state.step)
            return context

        if self.query == "previous":
            asking = state.hidden[-1][:, None]
            context = attend(asking)
            states, after = self.cell(torch.cat([read, context], -1), before)
        else:
            if self.input_feeding:
                read = torch.cat([read, state.fed[:, None]], -1)
            states, after = self.cell(read, before)
            asking, context = states, attend(states)
        fed = self.dropout(self.combine(torch.cat([context, states], -1)).tanh())
        hidden, cell = after if isinstance(after, tuple) else (after, None)
        return asking, fed, DecoderState(hidden, cell, fed[:, -1], state.step + tokens.shape[1])

    def _steps(
        self,
        targets: Tensor,
        memory: Tensor,
        lengths: Tensor | None,
        initial: Tensor | tuple[Tensor, Tensor] | None,
    ) -> Iterator[tuple[Tensor, int, Tensor, DecoderState]]:
        """(the states that attended, the step of the first, h̃, the state after), part by part."""
        targets = integers(targets, "targets", [2])
        if not targets.shape[1]:
            raise InvalidInput(f"targets is {describe(targets)}: wanted at least one step")
        keys = self.attention.keys(memory)
        if targets.shape[0] != memory.shape[0]:
            raise InvalidInput(f"targets is {describe(targets)} and the memory {describe(memory)}: wanted one batch")
        state = self._state(memory, initial)
        tokens = torch.cat([torch.full_like(targets[:, :1], self.start), targets[:, :-1]], 1)
        # Without feeding no step waits for the attention of the one before.
        at_once = tokens.shape[1] if self.query == "current" and not self.input_feeding else 1
        for first in range(0, tokens.shape[1], at_once):
            asking, fed, state = self.step(tokens[:, first : first + at_once], memory, lengths, keys=keys, state=state)
            yield asking, first, fed, state

    def _state(self, memory: Tensor, initial: Tensor | tuple[Tensor, Tensor] | None) -> DecoderState:
        shape = (self.cell.num_layers, memory.shape[0], self.dim)
        zeros = memory.new_zeros(shape)
        pair = isinstance(self.cell, nn.LSTM)
        if initial is None:
            initial = (zeros, zeros) if pair else zeros
        given = initial if isinstance(initial, tuple) else (initial,)
        if len(given) != 1 + pair or any(not isinstance(x, Tensor) or tuple(x.shape) != shape for x in given):
            want = f"[layers, batch, dim] = {list(shape)}"
            raise InvalidInput(
                f"initial is {', '.join(map(describe, given))}: wanted {'a pair of ' if pair else ''}{want}"
            )
        return DecoderState(given[0], given[-1] if pair else None, memory.new_zeros(shape[1:]), 0)

    def _logits(self, fed: Tensor) -> Tensor:
        logits: Tensor = self.readout(fed)
        return logits
