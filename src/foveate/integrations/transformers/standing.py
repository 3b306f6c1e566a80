"""What stands for a mask while it travels through a model: a pattern that is a tensor to whoever asks for one.

A mask `[batch, 1, queries, keys]` is n×n, and nearly every layer hands it on untouched. So what travels is the pattern
that says the same; the matrix that the model's own attention would have got is made once somebody computes with it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from foveate.pattern.algebra import Pattern
from foveate.positions import grid
from foveate.values import static_size


class Described:
    """A mask as a pattern, None for everyone to everyone, and where its first query and first key stand.

    Its matrix has the dtype that the model's own attention would have been given: boolean, or floating and added.

    Positions count from the first key that is there; `key_start` is what stood before it and a rolling cache has let
    go of. `stands` says whether nobody can have written to the matrix, so that the pattern says the same. A compiled
    graph makes this itself, for it can make no subclass of Tensor, and its operators are those of the matrix;
    everywhere else it is inside a `Mask`.
    """

    def __init__(
        self,
        pattern: Pattern | None,
        query_start: int | Tensor,
        key_start: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
        is_whole: bool = False,
    ) -> None:
        self.pattern = pattern
        self.query_start = query_start
        self.key_start = key_start
        self.shape = shape
        self.dtype = dtype
        self.device = torch.device(device)
        self.ndim = 4  # transformers takes what has four dimensions for a mask that was made before, and hands it on
        self.is_whole = is_whole  # nobody gave padding, so that positions may tell where texts begin
        self.texts: Pattern | None = None  # those texts, once a layer has looked
        self.stands = True
        self._matrix: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """True or 0 where a query may attend, False or the lowest finite number elsewhere; made once."""
        if self._matrix is None:
            if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
                self._matrix = self._made()
            else:
                with torch.inference_mode(mode=False):  # so that writes to views of it are counted
                    self._matrix = self._made()
        return self._matrix

    def _made(self) -> Tensor:
        if self.pattern is None:
            seen = torch.ones(self.shape, dtype=torch.bool, device=self.device)
        else:
            at = grid(*self.shape, self.query_start, self.device)
            seen = self.pattern.visible(at).broadcast_to(self.shape)
        if self.dtype == torch.bool:
            return seen.contiguous()  # a write to it has a place of its own
        hidden = torch.full((), torch.finfo(self.dtype).min, dtype=self.dtype, device=self.device)
        return torch.where(seen, torch.zeros_like(hidden), hidden)

    @property
    def is_unmade(self) -> bool:
        """Whether nobody has asked for the matrix yet."""
        return self._matrix is None

    def contiguous(self) -> Described:
        """What transformers calls on a mask that it keeps."""
        return self

    def dim(self) -> int:
        """What models ask to tell a mask from padding; it needs no matrix."""
        return self.ndim

    def to(self, *where: Any, **more: Any) -> Described | Tensor:
        """What accelerate calls on whatever a model is given: a mask that is there already stays a pattern."""
        stays = len(where) == 1 and not isinstance(where[0], torch.dtype) and "dtype" not in more
        if stays and torch.device(where[0]) == self.device:
            return self
        return self.matrix.to(*where, **more)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what Python and torch ask of any object is no use of the mask
            raise AttributeError(name)
        if name.endswith("_"):
            self.stands = False
        return getattr(self.matrix, name)

    def __setitem__(self, place: Any, value: Any) -> None:
        self.stands = False
        self.matrix[place] = value

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        return bool(self.matrix)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(Described, lambda mask: mask.matrix, (args, kwargs or {}))
        return function(*args, **kwargs)


def _forward(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda mask, *others: operation(mask.matrix, *others)


def _reflected(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda mask, other: operation(other, mask.matrix)


def _in_place(operation: Callable[..., Any]) -> Callable[..., Any]:
    def write(mask: Described, other: Any) -> Described:
        mask.stands = False
        operation(mask.matrix, other)
        return mask

    return write


_OPERATORS = {"__setitem__", "__len__", "__bool__"}


def _define(name: str, function: Callable[..., Any]) -> None:
    setattr(Described, name, function)
    _OPERATORS.add(name)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    _define(f"__{_name}__", _forward(getattr(operator, f"__{_name}__")))
    _define(f"__r{_name}__", _reflected(getattr(operator, f"__{_name}__")))
    if hasattr(Tensor, f"__i{_name}__"):
        _define(f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))
for _name in ("lt", "le", "eq", "ne", "ge", "gt", "neg", "pos", "abs", "invert", "getitem"):
    _define(f"__{_name}__", _forward(getattr(operator, f"__{_name}__")))


class Mask(Tensor):
    """What travels through a model as `attention_mask`: a tensor whose entries are made when they are touched.

    Whatever is done to it is done to the matrix `[batch, 1, queries, keys]` that "eager" or "sdpa" would have made, and
    gives plain tensors. Foveate's own layers read the pattern, as long as nobody has written to the matrix.
    """

    described: Described

    @staticmethod
    def __new__(cls, described: Described) -> Mask:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(mode=False):  # so that every write to it, or to a view of it, is counted
                return Mask(described)
        size = tuple(map(static_size, described.shape))
        made: Mask = Tensor._make_wrapper_subclass(cls, size, dtype=described.dtype, device=described.device)
        made.described = described
        return made

    @property
    def pattern(self) -> Pattern | None:
        """Who may attend to whom; None for everyone to everyone."""
        return self.described.pattern

    @property
    def query_start(self) -> int | Tensor:
        """The position of the first query, counted from the first key."""
        return self.described.query_start

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            # Neither graph can hold this; a compiled one is given it where it was made before, as for a static cache.
            args, kwargs = tree_map_only(Mask, lambda mask: mask.described.matrix, (args, kwargs or {}))
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Mask(args[0].described)  # a checkpoint asks this of all that it is given
        plain, named = tree_map_only(Mask, lambda mask: mask.described.matrix, (args, kwargs or {}))
        out = function(*plain, **named)
        return args[0] if plain and out is plain[0] else out  # what writes in place returns what it was given

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        kept = standing(self)
        return Mask(copy.deepcopy(kept, memo)) if isinstance(kept, Described) else copy.deepcopy(kept, memo)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<Mask {self.pattern!r}: {'×'.join(map(str, self.described.shape))}>"


def _data(mask: Mask) -> Tensor:
    mask.described.stands = False  # a write to it is counted nowhere
    return mask.described.matrix.data


# A graph looks into no attribute that C gives.
_FACTS: dict[str, Callable[[Mask], Any]] = {
    "shape": lambda mask: torch.Size(map(static_size, mask.described.shape)),
    "dtype": lambda mask: mask.described.dtype,
    "device": lambda mask: mask.described.device,
    "ndim": lambda mask: mask.described.ndim,
    "data": _data,
}
for _name, _fact in _FACTS.items():
    setattr(Mask, _name, property(_fact))


def _method(name: str) -> Callable[..., Any]:
    """A method of Tensor: in a graph, which looks into no method written in C, that of the matrix."""
    own = getattr(Tensor, name)

    def method(mask: Mask, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return getattr(mask.described, name)(*args, **kwargs)
        return own(mask, *args, **kwargs)

    return method


def _of_memory(name: str) -> Callable[..., Any]:
    """A method that reaches the memory itself, which a subclass of Tensor cannot stand for."""

    def method(mask: Mask, *args: Any, **kwargs: Any) -> Any:
        mask.described.stands = False  # a write to it is counted nowhere
        return getattr(mask.described.matrix, name)(*args, **kwargs)

    return method


_OF_MEMORY = {"numpy", "tolist", "data_ptr", "untyped_storage", "storage", "__array__", "__dlpack__", "__reduce_ex__"}
for _name in dir(Tensor):
    if _name in _OF_MEMORY:
        setattr(Mask, _name, _of_memory(_name))
    elif (_name in _OPERATORS or not _name.startswith("_")) and callable(getattr(Tensor, _name)):
        setattr(Mask, _name, _method(_name))


def standing(mask: Described | Tensor) -> Described | Tensor:
    """What a layer reads of a mask: the pattern, or the matrix where that is known to say the same no longer."""
    if isinstance(mask, Mask):
        described = mask.described
        untouched = described.stands and (described.is_unmade or not mask._version)
        return described if untouched and not (torch.is_grad_enabled() and mask.requires_grad) else mask.clone()
    return mask.matrix if isinstance(mask, Described) and not mask.stands else mask
