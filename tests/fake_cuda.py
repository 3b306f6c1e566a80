"""CUDA without a card: FakeTensorMode says what is computed where, and raises where the host would read a number.

What remains to be said about a card is what PyTorch's own kernels compute; up to them the way is the same.
"""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import foveate
from foveate.pattern.catalogue import parse
from foveate.problem import Problem, problem
from foveate.score import parse as parse_score

CUDA = torch.device("cuda:0")
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # one for each kind of device, in c10's order
_PACKAGES = ("", "pattern.", "softmax.", "linear.", "selection.", "nn.")
_APART = ("foveate.cli", "foveate.__main__")
_NAMES = [
    f"foveate.{package}{each.name}"
    for package in _PACKAGES
    for each in pkgutil.iter_modules([str(Path(foveate.__file__).parent / package.rstrip("."))])
    if not each.ispkg and f"foveate.{package}{each.name}" not in _APART
]
_OF_CUDA, _OF_META, _KINDS = 1, 14, 22


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Inside, tensors may be made on "cuda:0"; they have no data, and asking for it raises.

    PyTorch's guard of the current device would ask the driver, or is missing in a build for CPUs: meanwhile the one of
    "meta" stands in, which does nothing.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * _KINDS).in_dll(library, _GUARDS)
    before, guards[_OF_CUDA] = guards[_OF_CUDA], guards[_OF_META]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        guards[_OF_CUDA] = before


def moved(mode: FakeTensorMode, call: Problem, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """The same problem on the card; its pattern's and its score's tensors too."""

    def there(x: Any) -> Any:
        return mode.from_tensor(x).to(CUDA) if isinstance(x, Tensor) else x

    pattern, score, start = call.pattern, call.score, there(call.query_start)
    if pattern is not None:
        words, held = pattern.spec()
        pattern = parse(words, [there(x) for x in held])
    if score is not None:
        score_words, tensors = score.spec()
        score = parse_score(score_words, [there(x) for x in tensors])
    q, k, v = (there(x).to(dtype).requires_grad_(x.requires_grad) for x in (call.q, call.k, call.v))
    return problem(
        q, k, v, pattern, score=score, scale=call.scale, query_start=start, normalizer=call.normalizer,
        dropout=call.dropout, seed=call.seed, needs_lse=call.needs_lse,
    )  # fmt: skip


def everyone_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake tensor has no numbers, which is why nobody looks: now everyone does who would look at a real one."""
    for name in _NAMES:  # all of them now: what is loaded later would keep what stands in for it here
        module = importlib.import_module(name)
        if hasattr(module, "is_known"):
            monkeypatch.setattr(module, "is_known", lambda x: x.numel() > 0)


def really(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, computed for real even inside: what a CPU computes before anything goes to the card."""

    def computed(*arguments: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments, **options)

    return computed
