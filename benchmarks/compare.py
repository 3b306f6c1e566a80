"""Two checkouts beside each other: is any row of the tables slower than it was?

    python benchmarks/compare.py ../before                 seven rounds of every row; `make demo` was run in ../before
    python benchmarks/compare.py ../before --only decode   some rows

A round is three processes, one after the other: before, now, before once more. Each times every row through the public
functions, as the median of turns that fill two milliseconds. The ratio of a row is the median over the rounds of now /
before; before / before shows the noise. A row counts as slower beyond 3 % or the upper quartile of its own noise,
whichever is more.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

TURN, SECONDS = 0.002, 0.15  # of a turn; of a row in one process
SLOWER = 0.03

Row = dict[str, object]


def rows() -> Iterator[Row]:
    """Every row of ours in the tables of this checkout, as data that both can read."""
    from foveate.bench.linear import table as linear
    from foveate.bench.sparse import table as sparse
    from foveate.bench.tables import softmax

    for row in softmax():
        for backend in ("native", "auto"):
            if backend in row.contestants and not row.weighs_memory:
                yield _data("softmax", row, backend=backend, pattern=None if row.pattern is None else repr(row.pattern))
    for row in linear():
        yield {**_data("linear", row, form=row.form), "queries": row.steps}
    for row in sparse():
        if row.weighs_memory or getattr(row, "weighs", False):
            continue
        for kind in set(row.contestants) & {"blocks", "additive"}:
            size, chosen = getattr(row, "size", 0), getattr(row, "chosen", 0)
            yield _data("sparse", row, kind=kind, size=size, chosen=chosen)


def _data(table: str, row: object, **more: object) -> Row:
    names = ("name", "work", "batch", "heads", "key_heads", "queries", "keys", "dim")
    found = {name: getattr(row, name) for name in names if hasattr(row, name)}
    return {"table": table, **found, "dtype": str(row.dtype).removeprefix("torch."), **more}  # type: ignore[attr-defined]


def turn(row: Row) -> Callable[[], object]:
    """One call of a row, through public functions alone."""
    import foveate as fv

    dtype, trains = getattr(torch, str(row["dtype"])), row["work"] == "forward + backward"
    draw = torch.Generator().manual_seed(7)
    heads = row.get("key_heads", row["heads"])
    shapes = [
        (row["heads"], row["queries"]),
        *[(heads, row.get("keys", row["queries"]))] * 2,
        (row["heads"], row["queries"]),
    ]
    q, k, v, upstream = (torch.randn(row["batch"], h, n, row["dim"], generator=draw).to(dtype) for h, n in shapes)
    leaves = [x.requires_grad_(trains) for x in (q, k, v)]
    if row["table"] == "softmax":
        pattern = eval(str(row["pattern"]), {name: getattr(fv, name) for name in dir(fv)}) if row["pattern"] else None
        call = lambda: fv.attention(q, k, v, pattern, backend=row["backend"])  # noqa: E731
    elif row["table"] == "linear":
        k = torch.nn.functional.normalize(k.detach(), dim=-1).requires_grad_(trains)
        options: dict[str, object] = {"delta_rule": row["form"] != "linear"}
        if row["form"] != "linear":
            channels = (row["dim"],) if row["form"] == "kimi delta" else ()
            options["decay"] = -torch.rand(*q.shape[:3], *channels, generator=draw)
            options["beta"] = torch.rand(q.shape[:3], generator=draw)
        if row["work"] == "decode":
            state = torch.randn(*q.shape[:2], row["dim"], row["dim"], generator=draw)
            options["state"] = fv.linear_attention(q, k, v, **options)[1]._replace(s=state)
        leaves = [q, k, v]
        call = lambda: fv.linear_attention(q, k, v, **options)[0]  # noqa: E731
    elif row["kind"] == "additive":
        vector = (torch.randn(row["dim"], generator=draw) / row["dim"] ** 0.5).requires_grad_(trains)
        leaves.append(vector)
        call = lambda: fv.additive_attention(q, k, v, vector)  # noqa: E731
    else:

        def call() -> torch.Tensor:
            with torch.no_grad():
                chosen = fv.selection.moba(q, k, block=row["size"], top_k=row["chosen"] // row["size"], shared=True)
            return fv.attention(q, k, v, chosen, backend="native")

    if not trains:
        return call
    return lambda: torch.autograd.grad(call(), leaves, upstream)


def timed(row: Row) -> float:
    """The median seconds of one call."""
    with torch.set_grad_enabled(row["work"] == "forward + backward"):
        call = turn(row)
        call()
        once = _seconds(call, 1)
        calls = max(1, min(200, round(TURN / once)))
        turns = max(3, min(100, int(SECONDS / (once * calls))))
        return statistics.median(_seconds(call, calls) for _ in range(turns))


def _seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def process(python: Path, work: list[Row]) -> list[float]:
    """Seconds of every row in a process of its own."""
    done = subprocess.run(
        [python, __file__, "--time"], input=json.dumps(work), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{python} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: list[float] = json.loads(done.stdout)
    return found


def compare(before: Path, work: list[Row], rounds: int) -> dict[str, object]:
    """Every row with its ratio and its noise, and what they come to."""
    python = before / ".venv" / "bin" / "python"
    if not python.exists():
        sys.exit(f"{python} is not there: run `make demo` in {before}")
    ratios: list[list[float]] = [[] for _ in work]
    noise: list[list[float]] = [[] for _ in work]
    for number in range(rounds):
        first, now, again = (process(path, work) for path in (python, Path(sys.executable), python))
        for place, (a, b, c) in enumerate(zip(first, now, again, strict=True)):
            ratios[place].append(b / statistics.mean((a, c)))
            noise[place].append(c / a)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    found = []
    for row, mine, twice in zip(work, ratios, noise, strict=True):
        spread = sorted(abs(x - 1) for x in twice)[math.ceil(0.75 * rounds) - 1]
        ratio = statistics.median(mine)
        slower = ratio > 1 + max(SLOWER, spread)
        label = row.get("backend", row.get("kind", row.get("form")))
        found.append({
            "table": row["table"], "name": row["name"], "who": label, "ratio": round(ratio, 4),
            "noise": round(spread, 4), "slower": slower,
        })  # fmt: skip
    tables = dict.fromkeys(str(row["table"]) for row in found)
    means = {
        table: round(statistics.geometric_mean(row["ratio"] for row in found if row["table"] == table), 4)
        for table in tables
    }
    return {"rounds": rounds, "threads": torch.get_num_threads(), "geometric means": means, "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", type=Path, help="another checkout, installed by make")
    parser.add_argument("--only", help="rows with this text in their table or name")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write what was found as JSON")
    parser.add_argument("--time", action="store_true", help=argparse.SUPPRESS)  # one of the processes
    arguments = parser.parse_args()
    if arguments.time:
        print(json.dumps([timed(row) for row in json.load(sys.stdin)]))
        return
    if arguments.before is None:
        parser.error("name the other checkout")
    if arguments.out:
        from foveate.paths import checked

        checked(arguments.out, (".json",))  # before half an hour of measuring
    work = [row for row in rows() if not arguments.only or arguments.only in f"{row['table']}: {row['name']}"]
    found = compare(arguments.before, work, arguments.rounds)
    for row in sorted(found["rows"], key=lambda row: -row["ratio"]):  # type: ignore[arg-type,index]
        mark = "slower" if row["slower"] else ""
        print(f"{row['ratio']:7.3f} ± {row['noise']:.3f}  {row['table']:8} {row['who'] or '':14} {row['name']} {mark}")
    print(f"geometric means: {found['geometric means']}")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(any(row["slower"] for row in found["rows"]))  # type: ignore[arg-type,union-attr]


if __name__ == "__main__":
    main()
