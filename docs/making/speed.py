"""docs/images/speed.svg: what committed results say of a row for each kind of work, beside its best peer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from making.pictures import BLUE

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "xeon-amx" / "softmax.json"
ROWS = {
    "fp32 full N=2048 D=64": "full, 2,048 tokens, float32",
    "fp32 causal N=2048 D=64": "causal, 2,048 tokens, float32",
    "bf16 causal N=2048 D=64, forward + backward": "causal, 2,048 tokens, bfloat16, training",
    "fp32 causal & window(256) N=16384 D=64": "window of 256, 16,384 tokens, float32",
    "fp32 longformer(512) N=8192 D=64": "Longformer, 8,192 tokens, float32",
    "bf16 decode, 16384 keys, 32/8 heads D=128": "decode, 16,384 keys, GQA, bfloat16",
}
PEERS = {"sdpa": "SDPA", "flex": "FlexAttention", "folded": "SDPA, group folded into the queries"}
WIDTH, LEFT, ROW, BAR = 720, 258, 44, 15


def best_peer(row: dict[str, Any]) -> tuple[str, float]:
    """(name, milliseconds) of the fastest that is not ours."""
    others = {name: figure for name, figure in row["figures"].items() if name not in ("native", "auto")}
    name = min(others, key=lambda one: others[one]["middle"])
    return name, others[name]["middle"]


def speed() -> str:
    """The bars as an SVG: ours, and the fastest other one, in units of ours."""
    rows = {row["name"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]}
    found = [(words, rows[name]["figures"]["auto"]["middle"], *best_peer(rows[name])) for name, words in ROWS.items()]
    unit = (WIDTH - LEFT - 160) / max(peer / ours for _, ours, _, peer in found)
    blue = "#" + "".join(f"{part:02x}" for part in BLUE)
    shapes = []
    for n, (words, ours, name, peer) in enumerate(found):
        y, long = n * ROW + 8, round(unit * peer / ours)
        shapes += [
            f'<text x="{LEFT - 10}" y="{y + 20}" text-anchor="end">{words}</text>',
            f'<path fill="{blue}" d="M{LEFT} {y}h{round(unit)}v{BAR}h-{round(unit)}z"/>',
            f'<text x="{LEFT + round(unit) + 6}" y="{y + 12}">{ours:.3g} ms  Foveate</text>',
            f'<path fill="#b9c2c7" d="M{LEFT} {y + BAR + 1}h{long}v{BAR}h-{long}z"/>',
            f'<text x="{LEFT + long + 6}" y="{y + BAR + 13}">{peer:.3g} ms  {PEERS[name]}</text>',
        ]
    height = len(found) * ROW + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12" fill="#24292e">'
        f'<path fill="#fff" d="M0 0h{WIDTH}v{height}h-{WIDTH}z"/>{"".join(shapes)}</svg>\n'
    )
