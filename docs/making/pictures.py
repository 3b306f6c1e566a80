"""docs/images/: the pictures of the patterns and of the tour."""

from __future__ import annotations

import re

import torch

import foveate as fv
from foveate.see.gallery import gallery


def slug(name: str) -> str:
    """The name of a pattern's picture."""
    words = name.replace("|", " or ").replace("&", " and ").replace("~", " not ").replace("lambda", " ")
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


BLUE, LIGHT, FRAME = (15, 108, 141), (238, 240, 241), "#9aa5ab"


def heat(rows: list[list[float]], cell: int = 7) -> str:
    """A matrix of numbers from 0 to 1 as a small SVG: the larger, the darker."""
    height, width = len(rows) * cell, len(rows[0]) * cell
    shapes = []
    for y, row in enumerate(rows):
        x = 0
        while x < len(row):
            end = x + 1
            while end < len(row) and row[end] == row[x]:
                end += 1
            color = "#" + "".join(f"{round(lo + (hi - lo) * row[x]):02x}" for lo, hi in zip(LIGHT, BLUE, strict=True))
            if row[x] > 0:
                shapes.append(
                    f'<path fill="{color}" d="M{x * cell} {y * cell}h{(end - x) * cell}v{cell}h-{(end - x) * cell}z"/>'
                )
            x = end
    grid = [f"M0 {n * cell}h{width}" for n in range(1, len(rows))] + [
        f"M{n * cell} 0v{height}" for n in range(1, len(rows[0]))
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 2}" height="{height + 2}" '
        f'viewBox="-1 -1 {width + 2} {height + 2}" shape-rendering="crispEdges">'
        f'<path fill="#{"".join(f"{c:02x}" for c in LIGHT)}" d="M0 0h{width}v{height}h-{width}z"/>'
        f"{''.join(shapes)}"
        f'<path fill="none" stroke="#fff" stroke-width="1" d="{"".join(grid)}"/>'
        f'<path fill="none" stroke="{FRAME}" d="M0 0h{width}v{height}h-{width}z"/></svg>\n'
    )


def pictures() -> dict[str, str]:
    """Every SVG by its path below docs/."""
    made = {
        f"images/patterns/{slug(name)}.svg": heat(pattern.dense(16, 16)[0, 0].double().tolist())
        for name, pattern in gallery()
    }
    place = torch.arange(16, dtype=torch.float64)
    distance = (place[:, None] - place).abs()
    seen = (fv.causal & fv.window(9)).dense(16, 16)[0, 0]
    # Smooth made-up scores, so that the pictures show what a term does and not noise.
    scores = 2 * torch.cos(distance * 1.3) + torch.cos(place * 0.9)
    softmax = scores.softmax(-1)
    causal = scores.masked_fill(~fv.causal.dense(16, 16)[0, 0], -torch.inf).softmax(-1)
    windowed = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    tour = {
        "weights": softmax / softmax.max(),
        "weights-causal": causal / causal.max(),
        "weights-window": windowed / windowed.max(),
        "alibi": (1 - distance / 16).masked_fill(~fv.causal.dense(16, 16)[0, 0], 0),
    }
    for name, matrix in tour.items():
        made[f"images/tour/{name}.svg"] = heat((matrix * 1000).round().div(1000).tolist(), 10)
    return made
