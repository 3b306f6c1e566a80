"""One self-contained HTML page that shows a report: no server, no network, nothing to install for whoever opens it."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import string
import zlib
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.errors import InvalidInput

if TYPE_CHECKING:
    from foveate.see.report import Report

SCRIPTS = ("reading.js", "viewer.js", "input.js", "save.js")
EXACT_UP_TO = 1_500_000  # weights; above that they take one byte each instead of two, and the page shows whole percents


def render(report: Report, *, layer: int = 0, head: int = 0, token: int | Sequence[int] | None = None) -> str:
    """The page, opened at one layer and head with one token pinned (default: the row with the largest weight).

    Several tokens are a word: it is opened at the mean of where they look.
    """
    layers, heads, length, keys = report.weights.shape
    if not report.tokens or not keys:
        raise InvalidInput("nothing to show: the report has no tokens or no keys")
    rows = report.rows(layer, head, token) or [int(report.weights[layer, head, :, 0].argmax())]

    weight_bytes = 2 if report.weights.numel() <= EXACT_UP_TO else 1
    index_bytes = 1 if length <= 1 << 8 else 2 if length <= 1 << 16 else 3
    packed = [
        _planes(report.indices, index_bytes),
        _planes(_roots(report.weights, weight_bytes), weight_bytes),
        _planes(_roots(report.rest(), 2), 2),
        _planes(_roots(report.received, 2), 2),
    ]
    about = {
        "text": report.text,
        "model": report.model,
        "note": report.note,
        "tokens": report.tokens,
        "shape": [layers, heads, length, keys],
        "indexBytes": index_bytes,
        "weightBytes": weight_bytes,
        # A word of several tokens is the row after the last.
        "word": rows if len(rows) > 1 else [],
        "start": {"layer": layer, "head": head, "token": length if len(rows) > 1 else rows[0]},
    }
    style, script = _source("viewer.css"), "\n".join(_source(name) for name in SCRIPTS)
    # string.Template looks at the template once and never at what it puts in: a token "$script" stays a token.
    return string.Template(_source("viewer.html")).substitute(
        style=style,
        style_hash=_digest(style),
        script=script,
        script_hash=_digest(script),
        report=_json(about),
        data=base64.b64encode(zlib.compress(b"".join(packed), 6)).decode(),
    )


def _source(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """What the content policy compares: only these very bytes may run."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: object) -> str:
    """JSON that cannot end its <script> element, whatever the tokens say; ASCII only, so U+2028 is escaped too."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _roots(weights: Tensor, width: int) -> Tensor:
    """Square roots on `width` bytes: small weights, of which there are many, keep more digits than large ones."""
    if not torch.isfinite(weights).all():
        raise InvalidInput("the report holds weights that are not finite: look for NaN in the model's own numbers")
    steps: Tensor = weights.double().clamp(0, 1).sqrt() * (256**width - 1)
    return steps.round().long()


def _planes(values: Tensor, width: int) -> bytes:
    """All low bytes, then all higher ones: those are nearly alike, so that deflate shrinks them; no byte order."""
    values = values.detach().cpu().flatten()
    planes = [(values >> (8 * plane) & 255).to(torch.uint8).contiguous() for plane in range(width)]
    # torch gives its bytes to Python through numpy alone, which we do not need otherwise.
    return b"".join(ctypes.string_at(plane.data_ptr(), plane.numel()) for plane in planes)
