"""Where our kernels are at least as fast as PyTorch's: a table for choosing, taken from results.

Data and nothing else: rows of the same kind, dtype and class are one entry, and "native" stands there only if it was at
least as fast in the worst run of each of them.
"""

from __future__ import annotations

from typing import Any

from foveate.bench.results import Results
from foveate.errors import InvalidInput

_CLASSES = ((256, "up to 256"), (1024, "up to 1024"))


def preferences(results: Results) -> list[dict[str, Any]]:
    """Entries with work, dtype, kernel (the one that ran), causal, keys (a class of lengths), dim, prefer, worst.

    `prefer` is "native" or "sdpa"; `worst` is the smallest ratio of all rows of the entry, sdpa over native.
    """
    kernels = results.about["kernels"]
    found: dict[tuple[Any, ...], float] = {}
    for row in results.rows:
        for claim in row.claims:
            if (claim.contestant, claim.against) == ("native", "sdpa") and claim.worst is not None:
                causal = row.pattern is not None and row.work != "decode"
                entry = row.work, row.dtype, causal, _class(row.keys), row.dim
                found[entry] = min(claim.worst, found.get(entry, claim.worst))
    if not found:
        raise InvalidInput("these results have no row of native against sdpa: measure without --only")
    return [
        {
            "work": work, "dtype": dtype, "kernel": kernels[0] if kernels else None, "causal": causal, "keys": keys,
            "dim": dim, "prefer": "native" if worst >= 1 else "sdpa", "worst": worst,
        }
        for (work, dtype, causal, keys, dim), worst in found.items()
    ]  # fmt: skip


def _class(keys: int) -> str:
    return next((name for most, name in _CLASSES if keys <= most), "longer")
