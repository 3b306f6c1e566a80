"""What a window costs: foveate against PyTorch's SDPA with the same window as a boolean mask.

Both run in one process, in turn, after their results were found equal. A row is the median of each and the ratio of
the medians; the A/A column, SDPA against itself, shows the noise. Of three runs the worst ratio counts.

    python benchmarks/window.py            # writes benchmarks/results/window.json
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import foveate as fv

LENGTHS = (2048, 4096, 8192)
FOVEATE = ("native", "chunked")
WINDOW, HEADS, DIM, ROUNDS, RUNS = 256, 8, 64, 5, 3
RESULTS = Path(__file__).parent / "results" / "window.json"


def _seconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _measure(length: int) -> dict[str, float]:
    """Medians in milliseconds, over rounds in which each contestant runs once."""
    q, k, v = (torch.randn(1, HEADS, length, DIM) for _ in range(3))
    pattern = fv.causal & fv.window(WINDOW)
    mask = pattern.dense(length, length)

    def sdpa() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    def named(backend: str) -> Callable[[], Tensor]:
        return lambda: fv.attention(q, k, v, pattern, backend=backend)

    contestants = {"native": named("native"), "chunked": named("chunked"), "sdpa": sdpa, "sdpa again": sdpa}
    truth = fv.attention(q.double(), k.double(), v.double(), pattern, backend="chunked")
    for run in contestants.values():
        torch.testing.assert_close(run().double(), truth, atol=1e-5, rtol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            times[name].append(_seconds(run))
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Measure, print the table, and write it down with the machine and the versions."""
    rows = []
    with torch.no_grad():
        for length in track(LENGTHS, "measuring"):
            runs = [_measure(length) for _ in range(RUNS)]
            rows.append({
                "length": length,
                **{f"{name} ms": round(statistics.median(run[name] for run in runs), 2) for name in runs[0]},
                **{f"sdpa / {name}": round(min(run["sdpa"] / run[name] for run in runs), 2) for name in FOVEATE},
                "A/A": round(max(run["sdpa"] / run["sdpa again"] for run in runs), 2),
            })  # fmt: skip
    about = {
        "what": f"float32, forward, 1 × {HEADS} × length × {DIM}, causal & window({WINDOW}); worst of {RUNS} runs",
        "machine": platform.machine(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "foveate": fv.__version__,
    }
    RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    table = Table(*rows[0], title=about["what"])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
