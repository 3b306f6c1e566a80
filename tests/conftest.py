"""Every test runs with shapes checked as types, one torch thread, and no network."""

import os
from collections.abc import Iterator

import pytest
import torch
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
# The modules whose functions state shapes; elsewhere the wrappers would only get in the way of torch's tracers.
STATE_SHAPES = "functional", "linear.functional", "mechanisms", "see.watching"
install_import_hook([f"foveate.{name}" for name in STATE_SHAPES], "beartype.beartype")


@pytest.fixture
def _nothing_stays() -> Iterator[None]:
    """Before a test and after it, PyTorch's calls are PyTorch's."""
    from foveate.integrations.torch import _STATE

    assert not _STATE.active
    yield
    assert not _STATE.active
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.fixture
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever our kernels can compute of PyTorch's calls they do, be it slower."""
    from sdpa_calls import prefer

    prefer(monkeypatch, ours=True)
