"""What patterns and scores share as values: they are checked, compared, printed, written down and read back."""

from __future__ import annotations

import ast
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from foveate.eager import is_known
from foveate.errors import InvalidInput
from foveate.locks import Lock
from foveate.positions import Extent

Held = Tensor | Callable[..., Tensor]  # what no literal can say
Name = Callable[[Any], str]


class Array(Protocol):
    """What has NumPy's way to become a tensor."""

    def __array__(self) -> Any: ...


Integers = Tensor | Sequence[int] | Sequence[Sequence[int]] | Array  # where integers are meant; booleans are some
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_PARSER = Lock()  # CPython 3.11 counts the depth of a tree in one place for all threads


def spelled(write: Callable[[Name], str]) -> tuple[str, list[Any]]:
    """The expression that `write` makes with what it holds called t[0], t[1]…, and that itself, in order."""
    held: list[Any] = []

    def name(thing: Any) -> str:
        held.append(thing)
        return f"t[{len(held) - 1}]"

    return write(name), held


def read(spec: str, names: Mapping[str, Any], held: Sequence[Any]) -> Any:
    """The value of an expression that `spelled` made: calls of `names`, `& | ~ +`, t[…] and literals, nothing else."""

    def build(node: ast.expr) -> Any:
        match node:
            case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
                return build(left) & build(right)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return build(left) | build(right)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return build(left) + build(right)
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return ~build(operand)
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.Call(func=ast.Name(id=name)) if name in names:
                keywords = {word.arg: build(word.value) for word in node.keywords if word.arg}
                return names[name](*map(build, node.args), **keywords)
            case ast.Subscript(value=ast.Name(id="t"), slice=ast.Constant(value=int(index))):
                return held[index]
            case _:
                return ast.literal_eval(node)

    with _PARSER:
        tree = ast.parse(spec, mode="eval")
    return build(tree.body)


def describe(thing: object) -> str:
    """A tensor inside a repr, `<int64 2×17>`; anything else by its name or its type."""
    if not isinstance(thing, Tensor):
        return getattr(thing, "__name__", type(thing).__name__)
    nested = thing.is_nested and thing.layout is torch.strided  # which has no sizes
    size = "nested" if nested else "×".join(f"{n}" for n in thing.shape) or "scalar"
    return f"<{str(thing.dtype).removeprefix('torch.')} {size}>"


def dense(tensor: Tensor, what: str) -> Tensor:
    """`tensor`, if its numbers lie in rows; a clear error that names it for sparse, nested and mkldnn ones."""
    if tensor.is_nested:
        raise InvalidInput(
            f"{what} is a nested tensor: lay its texts end to end in one row of the batch, and give foveate.documents("
            "cu_seqlens=) as the pattern; a jagged tensor has both, as .values() and .offsets()"
        )
    if tensor.layout is not torch.strided:
        raise InvalidInput(f"{what} is a tensor of layout {tensor.layout}: wanted a dense one; .to_dense() makes it")
    return tensor


def sequence(x: object, dim: int, what: str = "x is", length: str = "length") -> Tensor:
    """`x` as a tensor `[batch, length, dim]`, or a clear error that names it."""
    if isinstance(x, Tensor):
        dense(x, what.rpartition(" ")[0])
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != dim:
        raise InvalidInput(f"{what} {describe(x)}: wanted [batch, {length}, {dim}]")
    return x


def identity(value: Any) -> Any:
    """What stands for `value` in a comparison: tensors count by identity and version, all else by value."""
    if isinstance(value, Tensor):
        return (id(value), None if torch.compiler.is_compiling() or value.is_inference() else value._version)
    return value


def static_size(size: int | Tensor) -> int:
    """A size as a number: while `torch.jit.trace` records, sizes are tensors."""
    if not isinstance(size, Tensor):
        return size
    trace = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined] # else every look at it is warned of
    try:
        return int(size)
    finally:
        torch._C._set_tracing_state(trace)  # type: ignore[attr-defined]


def whole(value: object, what: str, least: int, most: int | None = None, wanted: str | None = None) -> int:
    """`value` as an int of at least `least`, or a clear error that names it; a bool or a tensor is no number."""
    if isinstance(value, Tensor) and torch._C._get_tracing_state() is not None:
        value = static_size(value)
    found = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value  # NumPy's too
    if not isinstance(found, int | torch.SymInt) or isinstance(found, bool):
        raise no_number(value, what, wanted or f"a whole number of at least {least}")
    if found < least or (most is not None and found > most):
        raise no_number(value, what, wanted or f"a whole number of at least {least}")
    return found  # type: ignore[return-value]


def number(
    value: object, what: str, wanted: str, *, least: float = -math.inf, above: float = -math.inf,
    most: float = math.inf, below: float | None = None,
) -> float:  # fmt: skip
    """`value` as a float between these ends, or a clear error; a bool, a tensor or a NaN is no number."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        found = float(value)
        if found >= least and found > above and found <= most and (below is None or found < below):
            return found
    raise no_number(value, what, wanted)


def positive(value: object, what: str) -> float:
    """`value` as a positive, finite float, or a clear error."""
    return number(value, what, "a positive, finite number", above=0, below=math.inf)


def dropout_of(value: object) -> float:
    """A probability that something is dropped, or a clear error."""
    return number(value, "dropout", "at least 0 and less than 1", least=0, below=1)


def scale_of(value: object) -> float:
    """The factor before a softmax, or a clear error."""
    if type(value) is float and -math.inf < value < math.inf:
        return value
    if isinstance(value, Tensor):
        raise InvalidInput(f"scale is {describe(value)}: wanted a number, or None; multiply q by what is a tensor")
    return number(value, "scale", "a finite number, or None for dim^-½", below=math.inf)


def no_number(value: object, what: str, wanted: str) -> InvalidInput:
    """What is said of a number that is none, or not one that was wanted."""
    if isinstance(value, Tensor):  # looking at it would wait for a GPU and break a graph, so that is for the caller
        return InvalidInput(f"{what} is {describe(value)}: wanted {wanted}; tensor.item() makes a number")
    return InvalidInput(f"{what} is {value!r}: wanted {wanted}")


def integers(given: object, what: str, dims: Sequence[int]) -> Tensor:
    """Integers as a tensor of one of these numbers of dimensions, or a clear error; lists and arrays will do."""
    tensor = dense(as_tensor(given, what, "integers"), what)
    if tensor.dtype not in _INTEGERS:
        raise InvalidInput(f"{what} is {describe(tensor)}: wanted integers of a common kind, such as int64")
    return _of_dims(tensor, what, dims)


def booleans(given: object, what: str, wanted: str, dims: Sequence[int]) -> Tensor:
    """Booleans as a tensor of one of these numbers of dimensions, or a clear error; lists and arrays will do."""
    tensor = dense(as_tensor(given, what, wanted), what) if isinstance(given, Tensor) or is_listed(given) else None
    if tensor is None or tensor.dtype != torch.bool or tensor.dim() not in dims:
        said = describe(given if tensor is None else tensor)
        raise InvalidInput(f"{what} was given {said}: wanted {wanted}{_as_booleans(tensor)}")
    return tensor


def floating(tensor: object, what: str, dims: Sequence[int]) -> Tensor:
    """`tensor` as a floating-point tensor with one of these numbers of dimensions, or a clear error that names it."""
    if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
        hint = "; torch.tensor(…) makes one" if is_listed(tensor) else ""
        raise InvalidInput(f"{what} is {describe(tensor)}: wanted a floating-point tensor{hint}")
    dense(tensor, what)
    return _of_dims(tensor, what, dims)


def _as_booleans(tensor: Tensor | None) -> str:
    return "" if tensor is None or tensor.dtype == torch.bool else "; .bool() makes True of what is not 0"


def _of_dims(tensor: Tensor, what: str, dims: Sequence[int]) -> Tensor:
    if tensor.dim() not in dims:
        raise InvalidInput(f"{what} is {describe(tensor)}: wanted {' or '.join(map(str, dims))} dimension(s)")
    return tensor


def is_listed(given: object) -> bool:
    """Whether this is a list, a tuple, a range or an array: what integers and booleans may come in beside a tensor."""
    if isinstance(given, Tensor | numbers.Number):
        return False
    return isinstance(given, list | tuple | range) or hasattr(given, "__array__")


def as_tensor(given: object, what: str, wanted: str) -> Tensor:
    """A tensor as it is, and a list or an array as a tensor of its own; or a clear error that says what was wanted."""
    if isinstance(given, Tensor):
        return given
    if isinstance(given, list | tuple) and not _is_plain(given):
        raise InvalidInput(f"{what} is {given!r}: wanted {wanted}")
    try:
        if is_listed(given):
            made = torch.tensor(given)  # a copy: what is shared with an array could change unseen
            return made if made.numel() else made.long()  # an empty list says nothing of its kind
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{what} is {given!r:.60}: wanted {wanted}, as a tensor, a list or an array") from error
    raise InvalidInput(f"{what} is a {type(given).__name__}: wanted {wanted}, as a tensor, a list or an array")


def _is_plain(given: Sequence[Any]) -> bool:
    """Whether a nested list holds numbers alone, or booleans alone: torch makes a 1 of a True among numbers."""
    flat = list(given)
    while any(isinstance(one, list | tuple) for one in flat):
        flat = [each for one in flat for each in (one if isinstance(one, list | tuple) else (one,))]
    logical = [isinstance(one, bool) for one in flat]
    return not any(isinstance(one, Tensor) for one in flat) and (all(logical) or not any(logical))


def at_hand(tensor: Tensor) -> bool:
    """Whether a tensor's numbers can be looked at for next to nothing: known, and no GPU's."""
    return tensor.device.type == "cpu" and is_known(tensor)


def extremes(tensor: Tensor) -> tuple[int, int]:
    """The least and the largest of some integers that are at hand; (0, 0) of none."""
    if tensor.numel() > 64:  # where torch's own way is the faster one
        low, high = tensor.aminmax()
        return int(low), int(high)
    numbers = tensor.tolist()
    return min(numbers, default=0), max(numbers, default=0)


def device_misfits(what: object, tensors: Sequence[Tensor], extent: Extent) -> list[str]:
    """Why tensors that are not where q is do not fit."""
    return [
        f"{what} has a tensor on {tensor.device} but q is on {extent.device}: move it"
        for tensor in tensors
        if tensor.device != extent.device
    ]


def mask_misfit(what: str, tensor: Tensor, extent: Extent) -> list[str]:
    """Why `tensor` does not broadcast to [batch, heads, queries, keys], or could mean two things."""
    want = (extent.batch, extent.heads, extent.queries, extent.keys)
    shape = tuple(tensor.shape)
    if len(shape) == 2 and 1 < shape[0] == extent.batch == extent.queries and shape[1] == extent.keys:
        more = f"padding({what}) or {what}[:, None, None]" if tensor.dtype == torch.bool else f"{what}[:, None, None]"
        return [
            f"the {what} {describe(tensor)} could mean [queries, keys] or [batch, keys]: "
            f"give {what}[None] for the first, {more} for the second"
        ]
    # The right-aligned reading puts a leading batch where heads belong: refuse instead of guessing.
    if len(shape) == 3 and shape[0] != 1 and not (extent.batch in (None, 1) and extent.heads in (None, shape[0])):
        return [
            f"the {what} {describe(tensor)} could mean [batch, queries, keys] or [heads, queries, keys]: "
            f"give 4 dimensions that broadcast to {list(want)}, mask[:, None] for a batch, mask[None] for heads"
        ]
    if any(size is not None and have not in (1, size) for have, size in zip(shape[::-1], want[::-1], strict=False)):
        hint = ""
        if len(shape) == 2 and shape == (extent.batch, extent.keys):
            hint = f"; {f'padding({what})' if tensor.dtype == torch.bool else f'{what}[:, None, None]'} goes by batch"
        return [
            f"the {what} {describe(tensor)} does not broadcast to [batch, heads, queries, keys] = {list(want)}{hint}"
        ]
    return []
