"""A lock that a forked child finds open: the thread that held it is not in the child, and would never let it go."""

from __future__ import annotations

import os
import threading
from types import TracebackType


class Lock:
    """One that its holder may take again. For what lives as long as the process: none is ever forgotten."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
