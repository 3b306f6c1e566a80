"""docs/benchmarks.md: its text, and how many targets the committed results met."""

from __future__ import annotations

import json
from pathlib import Path

from making.filling import filled

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def benchmarks() -> str:
    """The page, with a row for each file of results that has claims."""
    lines = ["| results | targets met |", "|:--|--:|"]
    for path in sorted(RESULTS.glob("*/*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        met = [claim["met"] for row in rows for claim in row.get("claims", []) if claim.get("met") is not None]
        if met:
            lines.append(f"| `{path.parent.name}/{path.name}` | {sum(met)} of {len(met)} |")
    return filled("benchmarks.md", targets="\n".join(lines) + "\n")
