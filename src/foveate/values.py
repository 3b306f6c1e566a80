"""What patterns and scores share as values: they are checked, compared, printed, written down and read back."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.positions import Extent

Held = Tensor | Callable[..., Tensor]  # what no literal can say
Name = Callable[[Any], str]

_PARSER = threading.Lock()  # CPython 3.11 counts the depth of a tree in one place for all threads


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


def number(size: int | Tensor) -> int:
    """A size as a number: while `torch.jit.trace` records, sizes are tensors."""
    if not isinstance(size, Tensor):
        return size
    trace = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined] # else every look at it is warned of
    try:
        return int(size)
    finally:
        torch._C._set_tracing_state(trace)  # type: ignore[attr-defined]


def whole(value: object, what: str, least: int) -> int:
    """`value` as an int of at least `least`, or a clear error that names it."""
    if isinstance(value, Tensor) and torch._C._get_tracing_state() is not None:
        value = number(value)
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value < least:
        raise InvalidInput(f"{what} is {value!r}: wanted a whole number of at least {least}")
    return value  # type: ignore[return-value]


def integers(tensor: object, what: str, dims: Sequence[int]) -> Tensor:
    """`tensor` as an integer tensor with one of these numbers of dimensions, or a clear error that names it."""
    if not isinstance(tensor, Tensor):
        raise InvalidInput(f"{what} is a {type(tensor).__name__}: wanted an integer tensor")
    dense(tensor, what)
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise InvalidInput(f"{what} is {describe(tensor)}: wanted integers of a common kind, such as int64")
    if tensor.dim() not in dims:
        raise InvalidInput(f"{what} is {describe(tensor)}: wanted {' or '.join(map(str, dims))} dimension(s)")
    return tensor


def floating(tensor: object, what: str, dims: Sequence[int]) -> Tensor:
    """`tensor` as a floating-point tensor with one of these numbers of dimensions, or a clear error that names it."""
    if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
        raise InvalidInput(f"{what} is {describe(tensor)}: wanted a floating-point tensor")
    dense(tensor, what)
    if tensor.dim() not in dims:
        raise InvalidInput(f"{what} is {describe(tensor)}: wanted {' or '.join(map(str, dims))} dimension(s)")
    return tensor


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
    # The right-aligned reading puts a leading batch where heads belong: refuse instead of guessing.
    if len(shape) == 3 and shape[0] != 1 and not (extent.batch in (None, 1) and extent.heads in (None, shape[0])):
        return [
            f"the {what} {describe(tensor)} could mean [batch, queries, keys] or [heads, queries, keys]: "
            f"give 4 dimensions that broadcast to {list(want)}, mask[:, None] for a batch, mask[None] for heads"
        ]
    if any(size is not None and have not in (1, size) for have, size in zip(shape[::-1], want[::-1], strict=False)):
        return [f"the {what} {describe(tensor)} does not broadcast to [batch, heads, queries, keys] = {list(want)}"]
    return []
