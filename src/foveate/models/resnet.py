"""ResNet, convolutions that turn an image into features; DETR looks at those of its last stage.

    stem      x = pool(relu(norm(conv(image))))                    a quarter of the image's sides
    unit      x = relu(x + norm(conv(relu(norm(conv(x))))))        basic: twice 3×3
              x = relu(x + norm(conv(relu(norm(conv(relu(norm(conv(x)))))))))      bottleneck: 1×1, 3×3, 1×1
    stages    units; the first one of every stage but the first halves the sides

Where the number of channels or the sides change, x itself goes through a convolution of 1×1. The norms are
frozen, and so are the stem and the first stage, as in DETR.
He et al. 2015, "Deep residual learning for image recognition": https://arxiv.org/abs/1512.03385
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.checkpoint.format import Names
from foveate.errors import InvalidInput, unknown_name
from foveate.values import describe

BASIC, BOTTLENECK = "basic", "bottleneck"


class FrozenNorm(nn.Module):
    """(x − mean) / √(variance + 10⁻⁵) · weight + bias, by channel: a batch norm that learns nothing any more."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x: Float[Tensor, "batch width rows columns"]) -> Float[Tensor, "batch width rows columns"]:
        # Not F.batch_norm, which rounds otherwise: a relu near 0 would have another gradient than Hugging Face's.
        factor = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * factor[:, None, None] + (self.bias - self.running_mean * factor)[:, None, None]


class Convolution(nn.Module):
    """norm(conv(x)): size × size, around each place."""

    def __init__(self, channels: int, width: int, size: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, size, stride, size // 2 * dilation, dilation, bias=False)
        self.norm = FrozenNorm(width)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch width fewer narrower"]:
        return cast(Tensor, self.norm(self.conv(x)))


class Unit(nn.Module):
    """relu(x + convolutions(x)), in between relu; `stride` 2 halves the sides, in the convolution of 3×3."""

    def __init__(self, kind: str, channels: int, width: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        inner = width // 4
        if kind == BOTTLENECK:
            parts = [
                Convolution(channels, inner, 1),
                Convolution(inner, inner, 3, stride=stride, dilation=dilation),
                Convolution(inner, width, 1),
            ]
        else:
            parts = [Convolution(channels, width, 3, stride=stride), Convolution(width, width, 3)]
        self.parts = nn.ModuleList(parts)
        changes = stride > 1 or channels != width
        self.shortcut = Convolution(channels, width, 1, stride=stride) if changes else nn.Identity()

    def forward(self, x: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch width fewer narrower"]:
        y = x
        for n, part in enumerate(self.parts):
            y = part(F.relu(y) if n else y)
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """From pixels to the features of the last stage, whose sides are the image's divided by 2^(stages + 1).

    Args:
        channels, stem: of the image, of the first convolution.
        widths, depths: channels and number of units of each stage.
        unit: of what the stages are made, "basic" or "bottleneck".
        dilated: the last stage keeps the sides; its convolutions look twice as far instead, after the first unit.

    Raises:
        InvalidInput: another number of widths than of depths, a unit that is not known, a basic one dilated.

    >>> import torch
    >>> from foveate.models.resnet import ResNet
    >>> ResNet(3, 8, (16, 24), (1, 2), "bottleneck")(torch.randn(2, 3, 64, 96)).shape
    torch.Size([2, 24, 8, 12])
    """

    def __init__(
        self, channels: int, stem: int, widths: Sequence[int], depths: Sequence[int], unit: str, dilated: bool = False
    ) -> None:
        super().__init__()
        if not 0 < len(widths) == len(depths) or min(depths) < 1:
            raise InvalidInput(f"widths are {widths} and depths {depths}: wanted one of each for every stage")
        if unit not in (BASIC, BOTTLENECK):
            raise unknown_name("unit of a ResNet", unit, (BASIC, BOTTLENECK))
        if dilated and unit == BASIC:
            raise InvalidInput("a dilated ResNet of basic units was asked for: wanted bottlenecks")
        self.stem = Convolution(channels, stem, 7, stride=2)
        self.stages = nn.ModuleList()
        for n, (before, width, depth) in enumerate(zip((stem, *widths), widths, depths, strict=False)):
            keeps = n == 0 or (dilated and n == len(widths) - 1)
            units = [Unit(unit, before, width, stride=1 if keeps else 2)]
            units += [Unit(unit, width, width, dilation=2 if keeps and n else 1) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(*units))
        for part in (self.stem, self.stages[0]):
            part.requires_grad_(False)  # edges and colors stay what they were

    def forward(
        self, pixels: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch features rows columns"]:
        channels = self.stem.conv.in_channels
        if pixels.dim() != 4 or pixels.shape[1] != channels or 0 in pixels.shape:
            raise InvalidInput(f"pixels is {describe(pixels)}: wanted [batch, {channels} channels, height, width]")
        x = F.max_pool2d(F.relu(self.stem(pixels)), 3, 2, padding=1)
        for stage in self.stages:
            x = stage(x)
        return x


def _timm_names() -> Names:
    """What timm calls them, and torchvision; both count from 1."""
    found = {"conv1.weight": "stem.conv.weight", "bn1.*": "stem.norm.*"}
    for n in range(4):
        there, here = f"layer{n + 1}.*", f"stages.{n}.*"
        found |= {f"{there}.downsample.0.weight": f"{here}.shortcut.conv.weight"}
        found |= {f"{there}.downsample.1.*": f"{here}.shortcut.norm.*"}
        for part in range(3):
            found |= {f"{there}.conv{part + 1}.weight": f"{here}.parts.{part}.conv.weight"}
            found |= {f"{there}.bn{part + 1}.*": f"{here}.parts.{part}.norm.*"}
    return found


STAGES = "encoder.stages.*.layers.*"
NAMES: dict[str, Names] = {
    "resnet": {
        "embedder.embedder.convolution.weight": "stem.conv.weight",
        "embedder.embedder.normalization.*": "stem.norm.*",
        f"{STAGES}.layer.*.convolution.weight": "stages.*.*.parts.*.conv.weight",
        f"{STAGES}.layer.*.normalization.*": "stages.*.*.parts.*.norm.*",
        f"{STAGES}.shortcut.convolution.weight": "stages.*.*.shortcut.conv.weight",
        f"{STAGES}.shortcut.normalization.*": "stages.*.*.shortcut.norm.*",
    },
    "timm_backbone": _timm_names(),
}
# How many steps a norm was trained, which no one asks any more.
IGNORED = tuple(f"{name[:-1]}num_batches_tracked" for names in NAMES.values() for name in names if name.endswith("*"))

# Of detr.Config → in config.json.
FIELDS = {
    "channels": "backbone_config.num_channels", "stem": "backbone_config.embedding_size",
    "widths": "backbone_config.hidden_sizes", "depths": "backbone_config.depths",
    "unit": "backbone_config.layer_type", "backbone": "backbone_config.model_type",
}  # fmt: skip
FIXED = {
    "backbone_config.hidden_act": "relu", "backbone_config.downsample_in_first_stage": False,
    "backbone_config.downsample_in_bottleneck": False,
}  # fmt: skip

TIMM = {  # name → kind of the units, widths, depths; the stem has 64 channels
    "resnet18": (BASIC, (64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet34": (BASIC, (64, 128, 256, 512), (3, 4, 6, 3)),
    "resnet50": (BOTTLENECK, (256, 512, 1024, 2048), (3, 4, 6, 3)),
    "resnet101": (BOTTLENECK, (256, 512, 1024, 2048), (3, 4, 23, 3)),
    "resnet152": (BOTTLENECK, (256, 512, 1024, 2048), (3, 8, 36, 3)),
}


def spelled_out(found: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose backbone is said in numbers, also where it is only named, as timm does."""
    said = dict(found.get("backbone_config") or {})
    if not said and found.get("use_timm_backbone", True):
        more = found.get("backbone_kwargs") or {}
        said = {
            "model_type": "timm_backbone", "backbone": found.get("backbone") or "resnet50",
            "num_channels": more.get("in_chans", found.get("num_channels", 3)),
            "output_stride": more.get("output_stride", 16 if found.get("dilation") else 32),
        }  # fmt: skip
    kind = said.setdefault("model_type", "resnet")
    if kind not in NAMES:
        raise unknown_name("backbone", kind, NAMES)
    if kind == "timm_backbone":
        name, stride = said.get("backbone"), said.get("output_stride") or 32
        if name not in TIMM:
            raise unknown_name("backbone of timm", name, TIMM)
        if stride not in (16, 32):
            raise InvalidInput(f"config.json says backbone_config.output_stride is {stride}: wanted 16 or 32")
        said["embedding_size"], (said["layer_type"], said["hidden_sizes"], said["depths"]) = 64, TIMM[name]
        found = {key: value for key, value in found.items() if key != "backbone_kwargs"} | {"dilation": stride == 16}
    stages = len(said.get("depths") or TIMM["resnet50"][2])
    for key, last in (("out_indices", (stages, -1)), ("out_features", (f"stage{stages}", f"layer{stages}"))):
        if said.get(key) and said[key][-1] not in last:
            raise InvalidInput(f"config.json says backbone_config.{key} is {said[key]}: wanted {last[0]} at its end")
    return {**found, "backbone_config": said}


def named(config: Any) -> dict[str, Any]:
    """What config.json says instead where the convolutions are timm's, as published; nothing where they are not."""
    if config.backbone == "resnet":
        if config.dilated:
            raise InvalidInput("dilated is said by files of the backbone 'timm_backbone' alone: give that one")
        return {}
    sizes = config.unit, config.widths, config.depths
    name = next((name for name, known in TIMM.items() if known == sizes and config.stem == 64), None)
    if name is None:
        raise InvalidInput(f"timm has no ResNet of {sizes}, whose stem is {config.stem}: give the backbone 'resnet'")
    more = {"use_timm_backbone": True, "backbone_config": None, "num_channels": config.channels}
    return {"backbone": name, **more}
