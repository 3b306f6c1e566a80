"""`register` tells transformers of foveate, and says of a transformers that is missing or another what to do."""

from __future__ import annotations

import re
import sys
import types

import pytest
from families import build

import foveate as fv
from foveate.installing import how_to_install
from foveate.integrations.transformers import NAME


def test_register_is_for_the_process_and_can_be_undone() -> None:
    network = build("bert")
    fv.register()
    fv.register()
    with fv.patch(network), pytest.raises(fv.FoveateError, match="foveate still computes for BertForMaskedLM: unpatch"):
        fv.unregister()
    fv.unregister()
    with pytest.raises(ValueError, match="foveate"):
        network.set_attn_implementation(NAME)
    with pytest.raises(fv.FoveateError, match="foveate is not registered with transformers: nothing to undo"):
        fv.unregister()
    fv.register()
    network.set_attn_implementation(NAME)


@pytest.mark.parametrize("version", ["4.57.1", "5.99.0", "6.0.0.dev0"])
def test_another_transformers_is_said_and_goes_on(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fv.register()
    fv.unregister()
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.warns(UserWarning, match=rf"transformers is {re.escape(version)} and foveate was tested with 5\.23"):
        fv.register()
    with fv.patch(build("bert")):  # once is enough
        pass


def test_a_transformers_without_the_interface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("transformers")
    old.__version__ = "4.40.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(fv.FoveateError, match=r"transformers 4\.40\.0 has no attention interface: wanted 5\.23"):
        fv.register()


def test_a_missing_transformers_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(fv.FoveateError, match=re.escape(f"transformers is missing: {how_to_install('hf')}")):
        fv.register()
