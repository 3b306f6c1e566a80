"""On what it was measured: the machine, the versions, and the most the machine can do.

- date: UTC, ISO 8601
- machine: architecture, cpu, cores, features (of the instruction set), caches, torch_capability
- kernels: ours that run here, the best first; empty where none were compiled
- versions: python, torch, foveate, and the compiler of our kernels
- threads: that torch and our kernels use
- ceilings: GFLOP/s of "float32" and "bfloat16", GB/s of "read"; measured, 0 where unknown
- quick, runs: whether the shapes were the short ones of a test, and how many runs each row had
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from foveate import __version__

# What decides how fast a kernel can be, as Linux spells it.
_FEATURES = ("fma", "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16", "i8mm")


def ceilings(wanted: Iterable[str]) -> Mapping[str, float]:
    """The most this machine can do, for those that rows ask for; nothing without the compiled kernels."""
    try:
        from foveate import _native
    except ImportError:
        return {}
    known = sorted(set(wanted) & {"float32", "bfloat16", "read"})
    return {name: float(f"{_native.ceiling(name, torch.get_num_threads()):.4g}") for name in known}


def about(tops: Mapping[str, float], *, quick: bool, runs: int) -> dict[str, Any]:
    """Everything that a reader of a figure has to know about where it comes from."""
    kernels, compiler = _kernels()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "architecture": platform.machine(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "features": _features(),
            "caches": _caches(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "kernels": kernels,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "foveate": __version__,
            "compiler": compiler,
        },
        "threads": torch.get_num_threads(),
        "ceilings": tops,
        "quick": quick,
        "runs": runs,
    }


def _kernels() -> tuple[list[str], str | None]:
    try:
        from foveate import _native
    except ImportError:
        return [], None
    return _native.kernels(), _native.compiler


def _cpu() -> str:
    found = re.search(r"^model name\s*: (.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    if found:
        return found[1].strip()
    if sys.platform == "darwin":
        asked = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        return asked.stdout.strip() or platform.processor()
    return platform.processor() or platform.machine()


def _features() -> list[str]:
    found = re.search(r"^(?:flags|Features)\s*: (.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    has = set(found[1].split()) if found else set()
    return [name for name in _FEATURES if name in has]


def _caches() -> dict[str, str]:
    """Of the first core, as the machine reports them: {"L1d": "48K", "L2": "2048K"}."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_text(index / name).strip() for name in ("level", "type", "size"))
        if kind != "Instruction" and size:
            found[f"L{level}{'d' if kind == 'Data' else ''}"] = size
    return found


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
