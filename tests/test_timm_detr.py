"""DETR on timm's convolutions, as the published folders have it, is Hugging Face's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from torch import nn
from vision import load_timm

if find_spec("timm") is None:
    pytest.skip("timm is not installed: make test-timm runs these", allow_module_level=True)
load_timm()  # before transformers looks for it

import transformers as hf  # noqa: E402
from parity import Case, check  # noqa: E402
from test_models_detr import SHARP, SIZES, found, images, layers, lived  # noqa: E402

LAYERS = {ours: theirs for ours, theirs in layers("body.", "model.").items() if "stages" not in ours}


@pytest.mark.parametrize(("backbone", "dilation"), [("resnet18", False), ("resnet50", False), ("resnet50", True)])
def test_it_is_hugging_faces(backbone: str, dilation: bool, tmp_path: Path) -> None:
    def made() -> nn.Module:
        config = hf.DetrConfig(backbone=backbone, use_timm_backbone=True, dilation=dilation, **SIZES)
        return lived(hf.DetrForObjectDetection(config))

    check(Case(made, images, found, LAYERS, SHARP, ("pixel_mask",)), tmp_path)
