"""Tensors in files: safetensors mapped into memory, shards by their index, and `.bin` without running what is in it.

A safetensors file is a length, a header in JSON and the bytes. What a header says is checked before a tensor is made,
so that a file cut short or put together wrongly is one sentence. The format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.errors import InvalidInput

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
WORDS = {dtype: word for word, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Files:
    """What a library calls the files of weights in a folder, without their endings."""

    stem: str
    stem_bin: str

    @property
    def single(self) -> str:
        """All tensors in one file."""
        return f"{self.stem}.safetensors"

    @property
    def index(self) -> str:
        """Which of several files each tensor is in."""
        return f"{self.stem}.safetensors.index.json"

    @property
    def single_bin(self) -> str:
        """The same of pickled files."""
        return f"{self.stem_bin}.bin"

    @property
    def index_bin(self) -> str:
        """The same of pickled files."""
        return f"{self.stem_bin}.bin.index.json"


TRANSFORMERS = Files("model", "pytorch_model")
DIFFUSERS = Files("diffusion_pytorch_model", "diffusion_pytorch_model")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: what it is, and the function that gives it without a copy."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    release: Callable[[], None] = lambda: None  # forget the pages that reading brought into memory


def stored_in(folder: Path, files: Files = TRANSFORMERS) -> dict[str, Stored]:
    """Every tensor of a folder of weights by its name; nothing of their content is read yet."""
    names = files.single, files.index, files.single_bin, files.index_bin
    for name in names:
        path = folder / name
        if path.is_file():
            return _sharded(path) if name.endswith(".json") else _one(path)
    raise InvalidInput(f"{folder} has no weights: wanted {', '.join(names[:3])} or {names[3]} in it")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, without a key that is there twice."""
    try:
        return _json(path.read_bytes(), str(path))
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from None


def _json(text: bytes, where: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidInput(f"{where} has the key {twice!r} twice: wanted each once")
        return found

    try:
        found = json.loads(text, object_pairs_hook=once)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InvalidInput(f"{where} is not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise InvalidInput(f"{where} holds a {type(found).__name__}: wanted a JSON object")
    return found


def _one(path: Path) -> dict[str, Stored]:
    return _safetensors(path) if path.suffix == ".safetensors" else _bin(path)


def _sharded(index: Path) -> dict[str, Stored]:
    """The tensors of all files that an index names; each has to be in the file that the index says, and only there."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise InvalidInput(f"{index} has no weight_map from names to files")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    found: dict[str, Stored] = {}
    for file in sorted(set(places.values())):
        if not file.endswith(suffix) or any(part in file for part in ("/", "\\", ":", "\0")):
            raise InvalidInput(f"{index} places tensors in {file!r}: wanted the name of a {suffix} file of the folder")
        if not (index.parent / file).is_file():
            raise InvalidInput(f"{index} places tensors in {file}, which is not in the folder")
        here = _one(index.parent / file)
        for name, tensor in here.items():
            if places.get(name) != file:
                other = f"in {places[name]}" if name in places else "nowhere"
                raise InvalidInput(f"{file} has a tensor {name} that {index.name} places {other}: wanted each once")
            found[name] = tensor
        lost = [name for name, place in places.items() if place == file and name not in here]
        if lost:
            raise InvalidInput(f"{index.name} places {listed(lost)} in {file}, where there is no such tensor")
    return found


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names with commas between them, the first ones of many."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _safetensors(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InvalidInput(f"{path} is cut short: it has {size} bytes, fewer than its header needs")
        header = _json(file.read(length), f"the header of {path}")
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: nothing is written back
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    end, before = 0, "the header"
    for name, (_, _, first, last) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if first < end:
            raise InvalidInput(f"{path}: {before} and {name} overlap: wanted each tensor in bytes of its own")
        if first > end:
            raise InvalidInput(f"{path}: between {before} and {name} are {first - end} bytes that belong to no tensor")
        end, before = last, name
    if 8 + length + end != size:
        given = "is cut short: it" if 8 + length + end > size else "has bytes after its last tensor: it"
        raise InvalidInput(f"{path} {given} has {size} bytes, and its header speaks of {8 + length + end}")
    return {
        name: _mapped(memory, shape, dtype, 8 + length + first) for name, (shape, dtype, first, _) in entries.items()
    }


def _entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], torch.dtype, int, int]:
    """(shape, dtype, first byte, byte after the last) of one tensor, as its header says and as they fit together."""
    match entry:
        case {"dtype": str(word), "shape": [*shape], "data_offsets": [int(first), int(last)]} if all(
            isinstance(n, int) and n >= 0 for n in shape
        ):
            pass
        case _:
            raise InvalidInput(f"the header of {path} says {entry!r} of {name}: wanted dtype, shape and data_offsets")
    if word not in DTYPES:
        raise InvalidInput(f"{path}: the dtype of {name} is {word}: wanted one of {', '.join(DTYPES)}")
    dtype = DTYPES[word]
    if not 0 <= first <= last or last - first != math.prod(shape) * dtype.itemsize:
        raise InvalidInput(
            f"{path}: {name} is {word} {shape} in bytes {first} to {last}: wanted {math.prod(shape) * dtype.itemsize}"
        )
    return tuple(shape), dtype, first, last


def _mapped(memory: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype, start: int) -> Stored:
    count = math.prod(shape)
    stop = start + count * dtype.itemsize

    def read() -> Tensor:
        if not count:
            return torch.empty(shape, dtype=dtype)
        if start % dtype.itemsize:  # kernels take addresses that are multiples of the item size
            return torch.frombuffer(bytearray(memory[start:stop]), dtype=dtype).view(shape)
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)

    def release() -> None:
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of this tensor alone
        last = stop // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            memory.madvise(mmap.MADV_DONTNEED, first, last - first)

    return Stored(shape, dtype, read, release)


def _bin(path: Path) -> dict[str, Stored]:
    """The tensors of a pickled state dict; anything else in it is refused, not run."""
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6, which cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InvalidInput(f"{path} holds more than tensors, and opening it could run code: convert it") from None
    except Exception as error:  # what is wrong in a broken pickle raises anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidInput(f"{path} cannot be read: {reason}") from None
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise InvalidInput(f"{path} holds a {type(found).__name__}: wanted names with a tensor each")
    return {str(name): Stored(tuple(t.shape), t.dtype, partial(_itself, t)) for name, t in found.items()}


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Written:
    """A tensor to be written: what it will be, and the function that makes it when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """How many it takes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def shards(tensors: Mapping[str, Written], most: int) -> list[dict[str, Written]]:
    """The tensors in groups of at most `most` bytes, or of one tensor that is larger."""
    groups: list[dict[str, Written]] = [{}]
    room = most
    for name, tensor in tensors.items():
        if groups[-1] and tensor.bytes > room:
            groups.append({})
            room = most
        groups[-1][name] = tensor
        room -= tensor.bytes
    return groups


def write_safetensors(path: Path, tensors: Mapping[str, Written]) -> None:
    """One file; a tensor is in memory a second time only while it is written, and only if it has to be made."""
    # The widest first, and the header filled up to 8 bytes: so every tensor starts at a multiple of its item size.
    order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in order:
        header[name] = {
            "dtype": WORDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.bytes],
        }  # fmt: skip
        end += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in order:
            made = tensor.make().detach().to("cpu").contiguous()
            assert (tuple(made.shape), made.dtype) == (tensor.shape, tensor.dtype), name
            if tensor.bytes:
                file.write((ctypes.c_char * tensor.bytes).from_address(made.data_ptr()))
        file.flush()
        os.fsync(file.fileno())
