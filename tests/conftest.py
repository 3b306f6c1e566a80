"""Every test runs with shapes checked as types, one torch thread, and no network."""

import os

import torch
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
# The modules whose functions state shapes; elsewhere the wrappers would only get in the way of torch's tracers.
install_import_hook(["foveate.functional", "foveate.see.watching"], "beartype.beartype")
