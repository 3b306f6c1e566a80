"""diffusers: attention layers that a pattern narrows, whatever processors they have."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import nn

from foveate.errors import InvalidInput
from foveate.integrations.calling import Order, Places, Wish
from foveate.integrations.following import follow, followed
from foveate.pattern.algebra import Pattern


class Narrowed:
    """What `narrow` returns: the layers that it narrows; `undo()`, or the end of a `with`, ends it."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], wish: Wish) -> None:
        self._wish = wish
        self._modules = [model, *layers.values()]
        for name, layer in layers.items():
            order = Order(wish, name, attends=wish.by_name or not getattr(layer, "is_cross_attention", False))
            wish.orders.append(order)
            now = followed(layer)
            follow(layer, (*now.orders, order), now.wishes)
        now = followed(model)
        follow(model, now.orders, (*now.wishes, wish))

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that are narrowed: before they run what their classes say, then what their calls have shown."""
        return tuple(order.name for order in self._wish.orders if order.attends)

    def undo(self) -> None:
        """Narrow no longer; what else narrows the same layers stays. Again does nothing."""
        for module in self._modules:
            now = followed(module)
            orders = tuple(order for order in now.orders if order.wish is not self._wish)
            follow(module, orders, tuple(wish for wish in now.wishes if wish is not self._wish))

    def __enter__(self) -> Narrowed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def narrow(
    model: nn.Module, pattern: Places, *, layers: Sequence[str] | None = None, image: slice | None = None
) -> Narrowed:
    """Narrow attention layers of a model of diffusers: each attends where it did *and* the pattern allows it.

    A UNet looks at grids of several sizes, so the pattern may also be a function of the number of positions. Positions
    count the tokens among which a layer attends, frames where it attends over time. Where these are a picture's and a
    text's (joint attention: SD3, HunyuanVideo put the text last, Flux, QwenImage, CogVideoX, Lumina2 first), they count
    both, unless `image` says which are the picture's: then the pattern is about those alone, and all others see
    everything and are seen by everything.

    It holds whatever processors the layers have, now or when they run, as long as these call PyTorch's
    scaled_dot_product_attention. What is narrowed twice is narrowed by both.

    Args:
        model: a model, or a part of one, with layers that have processors.
        pattern: who may attend to whom, or a function of the number of positions that says it.
        layers: names, or parts of names between dots ("attn1", "down_blocks.0"); None: all that attend among their own
            tokens. One that attends to a text is narrowed only if it is named, and keys are then the text's tokens.
        image: where the tokens of the picture (or video) stand in joint attention: `slice(77, None)` behind a text of
            77 tokens, `slice(None, -77)` before it.

    Raises:
        InvalidInput: no layer has a processor, or none has such a name. When the model runs, before it returns: a
            processor computes attention in another way, nothing was narrowed, or `image` fits no layer; the message
            names layer and processor.

    >>> import math
    >>> import foveate as fv
    >>> from diffusers import DiTTransformer2DModel
    >>> from foveate.integrations.diffusers import narrow
    >>> model = DiTTransformer2DModel(2, 8, num_layers=1, sample_size=8, norm_num_groups=1)
    >>> with narrow(model, lambda places: fv.neighborhood(2, math.isqrt(places))) as narrowed:
    ...     print(narrowed.layers)
    ('transformer_blocks.0.attn1',)
    """
    there = {name: layer for name, layer in model.named_modules() if hasattr(layer, "set_processor")}
    if not there:
        raise InvalidInput(f"narrow was given a {type(model).__name__}: wanted a model of diffusers that attends")
    if not isinstance(pattern, Pattern) and not callable(pattern):
        raise InvalidInput(
            f"the pattern is a {type(pattern).__name__}: wanted a pattern, such as fv.window(128), or a function of "
            "the number of positions that returns one"
        )
    if image is not None and not (isinstance(image, slice) and image.step in (None, 1)):
        raise InvalidInput(f"image is {image!r}: wanted where its tokens stand, such as slice(77, None)")
    chosen = _chosen(there, layers)
    for name, layer in chosen.items():
        for order in followed(layer).orders:
            if order.wish.image != image:
                raise InvalidInput(
                    f"{name} is narrowed with image={order.wish.image}: undo that, or give the same image="
                )
    return Narrowed(model, chosen, Wish(pattern, image, layers is not None, type(model).__name__))


def undo(model: nn.Module) -> None:
    """End all that narrows a model: of a deep copy too, which is narrowed as what it was copied from."""
    for module in model.modules():
        follow(module, (), ())


def _chosen(there: dict[str, nn.Module], layers: Sequence[str] | None) -> dict[str, nn.Module]:
    if layers is None:
        return there
    if isinstance(layers, str) or not layers or not all(isinstance(part, str) for part in layers):
        raise InvalidInput(f"layers is {layers!r}: wanted a list of names, or of parts of names between dots")
    for part in layers:
        if not any(f".{part}." in f".{name}." for name in there):
            raise InvalidInput(f"no attention layer is named {part!r}: there are {', '.join(there)}")
    return {name: layer for name, layer in there.items() if any(f".{part}." in f".{name}." for part in layers)}
