"""Something to do once a module is loaded, by whoever loads it, so that nobody has to load it for that."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _Waiting(MetaPathFinder):
    """Finds one module as the others do, and does something after it has run."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name = name
        self.then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        found = find_spec(fullname)
        if found is not None and found.loader is not None:
            load = found.loader.exec_module

            def load_and_then(module: ModuleType) -> None:
                load(module)
                self.then()

            found.loader.exec_module = load_and_then  # type: ignore[method-assign]
        return found


def when_loaded(name: str, then: Callable[[], None]) -> Callable[[], None]:
    """Do something when the module is loaded, at once if it is already; the returned function waits no longer."""
    if name in sys.modules:
        then()
        return lambda: None
    waiting = _Waiting(name, then)
    sys.meta_path.insert(0, waiting)
    return lambda: sys.meta_path.remove(waiting) if waiting in sys.meta_path else None


@contextmanager
def once_loaded(name: str, then: Callable[[], None]) -> Iterator[None]:
    """Within the block, do something when the module is loaded; at once if it is already."""
    stop = when_loaded(name, then)
    try:
        yield
    finally:
        stop()
