"""`once_loaded` does something when a module is loaded, and leaves no trace."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from foveate.import_hook import once_loaded


def test_it_is_done_once_and_after_the_module_has_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "arriving.py").write_text("value = 3")
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    seen: list[int] = []

    def look() -> None:
        seen.append(sys.modules["arriving"].value)

    with once_loaded("arriving", look):
        assert seen == []
        importlib.import_module("arriving")
        importlib.import_module("arriving")
        assert seen == [3]
    assert sys.meta_path == finders
    with once_loaded("arriving", look):
        assert seen == [3, 3]
    del sys.modules["arriving"]


def test_what_is_never_loaded_leaves_no_trace() -> None:
    finders = list(sys.meta_path)
    with pytest.raises(ZeroDivisionError), once_loaded("nowhere", lambda: None):
        raise ZeroDivisionError
    with once_loaded("nowhere", lambda: None), pytest.raises(ModuleNotFoundError):
        importlib.import_module("nowhere")
    assert sys.meta_path == finders
