"""A checkpoint's folder, written aside and then renamed, so that an interruption leaves what was there before."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foveate.checkpoint.safetensors import TRANSFORMERS, Files, Written, read_json, shards, write_safetensors
from foveate.errors import InvalidInput

CONFIG, GENERATION = "config.json", "generation_config.json"


def write_folder(
    target: Path,
    tensors: Mapping[str, Written],
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    shard_size: int,
    files: Files = TRANSFORMERS,
) -> None:
    """A checkpoint into a folder that is not there, holds none, or holds an older one of the same model."""
    fresh = not target.exists()
    parent = target.parent if fresh else target
    parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".saving-", dir=parent))
    try:
        _write(aside, tensors, shard_size, files, fresh=fresh)
        _write_json(aside / CONFIG, config)
        if generation:
            _write_json(aside / GENERATION, generation)
        if fresh:
            aside.chmod(0o777 & ~_umask())
            aside.rename(target)
        else:
            _move_in(aside, target, files)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(aside: Path, tensors: Mapping[str, Written], shard_size: int, files: Files, *, fresh: bool) -> None:
    """All files of weights; shards that go where others may be have names of their own."""
    groups = shards(tensors, shard_size)
    if len(groups) == 1:
        write_safetensors(aside / files.single, groups[0])
    else:
        stem = files.stem if fresh else f"{files.stem}-{aside.name.removeprefix('.saving-')}"
        names = [f"{stem}-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
        for file, group in zip(names, groups, strict=True):
            write_safetensors(aside / file, group)
        places = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        size = sum(tensor.bytes for tensor in tensors.values())
        _write_json(aside / files.index, {"metadata": {"total_size": size}, "weight_map": places})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _move_in(aside: Path, target: Path, files: Files) -> None:
    """The new files into a folder that exists, so that at every moment either the old ones count or the new ones.

    A single file counts before an index, shards count only where an index names them, and config.json is the same
    model's. What no checkpoint of ours wrote stays.
    """
    new = {path.name for path in aside.iterdir()}
    stale = {files.single, files.index, *_shards_of(target / files.index)} - new
    last = [name for name in (files.index, files.single) if name in new]
    for name in [*sorted(new - {*last, CONFIG}), *last]:
        os.replace(aside / name, target / name)
    for name in stale:
        (target / name).unlink(missing_ok=True)
    os.replace(aside / CONFIG, target / CONFIG)


def _shards_of(index: Path) -> set[str]:
    """The files of its folder that an index names."""
    try:
        return set(read_json(index)["weight_map"].values()) & {path.name for path in index.parent.iterdir()}
    except (InvalidInput, KeyError, AttributeError, TypeError):
        return set()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
