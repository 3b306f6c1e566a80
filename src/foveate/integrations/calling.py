"""One call of one layer, in which attention is narrowed, and what several calls have shown."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket

from foveate.errors import InvalidInput
from foveate.integrations.origins import Origin, Origins, tensors_in
from foveate.integrations.sdpa_with_pattern import narrowed, narrowed_among
from foveate.pattern.algebra import Pattern

Places = Pattern | Callable[[int], Pattern]

_SDPA = torch._C._nn.scaled_dot_product_attention  # whatever torch.nn.functional has been given in its place
_PRODUCTS = {"bmm", "baddbmm", "matmul", "einsum"}
_OR_LEAVE = ", or leave the layer out by layers="


@dataclass(eq=False)
class Wish:
    """What one `narrow` wants of a model's layers, and what the forward that runs has shown."""

    pattern: Places
    image: slice | None
    by_name: bool  # so that layers which attend to a text are meant too
    model: str
    orders: list[Order] = field(default_factory=list)
    runs: bool = False
    trains: bool = False
    counted: tuple[int, str] | None = None  # the picture's tokens, and the layer that had them

    def begin(self) -> None:
        """A forward of the model begins."""
        self.runs, self.trains, self.counted = True, torch.is_grad_enabled(), None

    def end(self) -> None:
        """A forward of the model ended: by now some attention has to have been narrowed."""
        self.runs = self.trains = False
        if not any(order.was_narrowed for order in self.orders):
            called = ", ".join(order.name for order in self.orders if order.was_called)
            seen = f"attend to other tokens than their own ({called})" if called else "were not called"
            raise InvalidInput(
                f"narrow has narrowed nothing: the layers of {self.model} that have processors {seen}; say by layers= "
                "which ones you mean"
            )


@dataclass(eq=False)
class Order:
    """What is wanted of one layer, and what became of it."""

    wish: Wish
    name: str
    attends: bool  # among its own tokens, or as it was named: what its class says, then what its calls have shown
    was_called: bool = False
    was_narrowed: bool = False


class Narrowing(Origins):
    """Inside it, which is one call of one layer, PyTorch's attention is narrowed as the orders say."""

    def __init__(self, layer: nn.Module, orders: tuple[Order, ...], own: object, given: Iterable[object]) -> None:
        super().__init__(own, given)
        self.layer = layer
        self.orders = orders
        self.calls = self.among_own = self.to_others = 0
        self.computes = False  # nothing at all: what a cache gives was computed before
        self.other_ways = 0  # products of own tokens with own tokens, as attention computed in another way has them

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, given: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        self.computes = True
        if function is _SDPA:
            function = self._attend
        elif getattr(function, "__name__", "") in _PRODUCTS or isinstance(function, OpOverload | OpOverloadPacket):
            self.other_ways += (
                sum(origin is not None and origin.own for origin in map(self.origin, tensors_in(given))) > 1
            )
        return super().__torch_function__(function, types, given, named)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
        self.calls += 1
        origin = self.origin(key)
        if origin is None:
            raise InvalidInput(
                f"narrow cannot tell whose keys {self._who()} attends to: use another processor{_OR_LEAVE}"
            )
        if origin.own:
            self.among_own += 1
            orders = self.orders
        else:  # beside attention among its own tokens, as an IP-Adapter has it, it stays as it is
            orders = () if self.among_own else tuple(order for order in self.orders if order.wish.by_name)
            self.to_others += bool(orders)
        if self.to_others and self.to_others + self.among_own > 1:
            raise InvalidInput(
                f"{self._who()} attends to several sequences one after the other, so the pattern could mean any: use "
                f"another processor{_OR_LEAVE}"
            )
        if not orders:
            return _SDPA(query, key, value, *rest, **named)
        for order in orders:
            order.was_narrowed = order.attends = True
        tokens = self._tokens(query.shape[-2], key.shape[-2], origin) if origin.own else None
        places = query.shape[-2] if tokens is None else len(tokens)
        pattern = functools.reduce(operator.and_, [_pattern(order.wish.pattern, places) for order in orders])
        if tokens is None:
            out = narrowed(pattern, query, key, value, *rest, **named)
        else:
            out = narrowed_among(tokens, pattern, query, key, value, *rest, **named)
        return out[...] if torch.compiler.is_compiling() else out  # as in Origins: else it takes no mark

    def _tokens(self, queries: int, keys: int, origin: Origin) -> range | None:
        """Which of the keys the pattern is about; None: all of them."""
        pieces = origin.pieces if sum(length for _, length in origin.pieces) == keys else ()
        own = _own_among(pieces)
        image = self.orders[0].wish.image
        if image is None:
            if queries == keys:
                return None
            if own is None or len(own) != queries:
                raise InvalidInput(
                    f"{self._who()} attends from {queries} tokens to {keys} keys, and narrow cannot tell which of "
                    f"those are the {queries}: say it by image={_OR_LEAVE}"
                )
            return own
        tokens = range(*image.indices(keys))
        if queries not in (keys, len(tokens)) or not tokens:
            raise InvalidInput(
                f"{self._who()} attends from {queries} tokens to {keys} keys, of which image={image} are "
                f"{len(tokens)}: give another image={_OR_LEAVE}"
            )
        if own is not None and own != tokens:
            raise InvalidInput(
                f"{self._who()} has its own {len(own)} tokens at image=slice({own.start}, {own.stop}) of {keys}, but "
                f"image={image} was given: give that{_OR_LEAVE}"
            )
        self._count(len(tokens))
        return tokens

    def _count(self, tokens: int) -> None:
        """Notice layers that hold no text: what `image` leaves of them is less than of others."""
        for order in self.orders:
            before = order.wish.counted
            order.wish.counted = (tokens, order.name)
            if order.wish.runs and before is not None and before[0] != tokens:
                raise InvalidInput(
                    f"image={order.wish.image} leaves {before[0]} tokens of the picture in {before[1]} but {tokens} in "
                    f"{order.name}: say by layers= which of them hold the picture beside other tokens"
                )

    def check(self) -> None:
        """After the call: whoever was to be narrowed was."""
        for order in self.orders:
            order.was_called = True
            if self.among_own or (self.to_others and order.wish.by_name) or not self.computes:
                continue
            if not self.calls and (order.attends or self.other_ways or not self._is_given_tokens()):
                raise InvalidInput(
                    f"{self._who()} did not call torch.nn.functional.scaled_dot_product_attention, so nothing was "
                    "narrowed: give it a processor that does (AttnProcessor2_0), without attention slicing and with "
                    f"diffusers' attention backend 'native'{_OR_LEAVE}"
                )
            order.attends = False

    def _is_given_tokens(self) -> bool:
        return any(x.dim() == 3 and x.is_floating_point() for x in self.given)

    def _who(self) -> str:
        processor = getattr(self.layer, "processor", None)
        backend = getattr(processor, "_attention_backend", None)
        on = "" if backend is None else f" on {getattr(backend, 'value', backend)}"
        return f"{self.orders[0].name} ({type(self.layer).__name__} with {type(processor).__name__}{on})"


def _own_among(pieces: tuple[tuple[bool, int], ...]) -> range | None:
    """Where the layer's own tokens stand among the pieces, if they are one piece."""
    if [own for own, _ in pieces].count(True) != 1:
        return None
    start = 0
    for own, length in pieces:
        if own:
            return range(start, start + length)
        start += length
    return None


def _pattern(given: Places, places: int) -> Pattern:
    if isinstance(given, Pattern):
        return given
    made = given(places)
    if not isinstance(made, Pattern):
        raise InvalidInput(f"the function of the number of positions gave a {type(made).__name__}: wanted a pattern")
    return made
