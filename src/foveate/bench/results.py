"""What was found, as data: written as JSON and CSV, read back, compared.

The JSON is one object: "schema" (1), "about" (machine, versions, ceilings; see `about`), and "rows". A row has

- section, name, work, dtype, batch, heads, key_heads, queries, keys, dim, pattern, density, sweep
- figures: contestant → unit ("ms" or "MB"), runs (the median of each run), middle (the median of those), gflops, gbytes
  (GB/s), percent (of the ceiling), refused (why there is no figure), wrong (because our own result was not the truth)
- claims: contestant, against, unit ("×", "%" or "MB"), bound, target, aim, runs, worst, met, aim_met
- again: the first peer over itself, the larger way round, worst of all runs: the noise

A ratio is the time of the peer over the time of ours: above 1, ours is faster. What is not known is null.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foveate.errors import InvalidInput

SCHEMA = 1
_ABOUT = ("date", "machine", "kernels", "versions", "threads", "ceilings", "quick", "runs")


@dataclass(frozen=True)
class Figure:
    """What one contestant of a row took, or why there is no figure."""

    unit: str = "ms"
    runs: list[float] = field(default_factory=list)
    middle: float | None = None
    gflops: float | None = None
    gbytes: float | None = None
    percent: float | None = None
    refused: str | None = None
    wrong: bool = False


@dataclass(frozen=True)
class Verdict:
    """A claim, and what came out."""

    contestant: str
    against: str
    unit: str
    bound: str
    target: float | None
    aim: float | None
    runs: list[float]
    worst: float | None
    met: bool | None
    aim_met: bool | None


@dataclass(frozen=True)
class Measured:
    """A row of a table with everything that was found."""

    section: str
    name: str
    work: str
    dtype: str
    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    dim: int
    pattern: str | None
    density: float
    sweep: str
    figures: dict[str, Figure]
    claims: list[Verdict]
    again: float | None


@dataclass(frozen=True)
class Results:
    """A whole run of the benchmark."""

    about: Mapping[str, Any]
    rows: list[Measured]

    def wrong(self) -> list[str]:
        """Each contestant whose result was not the truth."""
        return [
            f"{row.name}: {name}: {figure.refused}"
            for row in self.rows
            for name, figure in row.figures.items()
            if figure.wrong
        ]


def to_json(results: Results) -> str:
    """The results as JSON, with the keys that the top of this file names."""
    tree = {"schema": SCHEMA, "about": dict(results.about), "rows": [asdict(row) for row in results.rows]}
    return json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(results: Results) -> str:
    """One line for each claim, the three runs in one cell."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow([
        "section", "row", "contestant", "against", "unit", "bound", "target", "aim", "worst", "met", "aim met", "runs",
        "A/A", "contestant's median", "peer's median", "GFLOP/s", "GB/s", "percent of ceiling", "refused",
    ])  # fmt: skip
    for row in results.rows:
        for claim in row.claims:
            mine, peer = row.figures[claim.contestant], row.figures.get(claim.against, Figure())
            refused = " / ".join(why for why in (mine.refused, peer.refused) if why)
            out.writerow([
                row.section, row.name, claim.contestant, claim.against, claim.unit, claim.bound, claim.target,
                claim.aim, claim.worst, claim.met, claim.aim_met, " ".join(map(str, claim.runs)), row.again,
                mine.middle, peer.middle, mine.gflops, mine.gbytes, mine.percent, refused,
            ])  # fmt: skip
    return text.getvalue()


def read(path: Path) -> Results:
    """The results in a JSON file; raises `InvalidInput` where it holds something else."""
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidInput(
            f"{path} is not JSON: wanted results that `foveate bench … --out FILE.json` wrote"
        ) from error
    if not isinstance(tree, dict) or tree.get("schema") != SCHEMA:
        given = tree.get("schema", "nothing") if isinstance(tree, dict) else "nothing"
        raise InvalidInput(f"{path} has schema {given}: wanted results of schema {SCHEMA}; measure again")
    try:
        for name in _ABOUT:
            tree["about"][name]
        return Results(tree["about"], [_measured(row) for row in tree["rows"]])
    except (TypeError, KeyError, AttributeError) as error:
        raise InvalidInput(f"{path} is damaged ({error}): wanted results of schema {SCHEMA}; measure again") from error


def _measured(row: dict[str, Any]) -> Measured:
    figures = {name: Figure(**figure) for name, figure in row["figures"].items()}
    return Measured(**{**row, "figures": figures, "claims": [Verdict(**claim) for claim in row["claims"]]})


def before(old: Results) -> dict[tuple[str, str, str], float]:
    """(row, contestant, against) → the worst value that was found then."""
    return {
        (row.name, claim.contestant, claim.against): claim.worst
        for row in old.rows
        for claim in row.claims
        if claim.worst is not None
    }


def counted(number: int, thing: str) -> str:
    """1 run, 2 runs."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
