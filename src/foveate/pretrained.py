"""Folders of Hugging Face, read and written: config.json and the weights, by the name table of each family.

A model is built without memory for its weights, everything is checked by the headers of the files, and only then do
the weights take their places: as they lie in the file where they can, else as one copy each.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from foveate.checkpoint.folder import CONFIG, GENERATION, write_folder
from foveate.checkpoint.format import Entry, Format, Plan, config_from, config_to, generation_to, matches, plan
from foveate.checkpoint.safetensors import DIFFUSERS, TRANSFORMERS, Stored, Written, listed, read_json, stored_in
from foveate.errors import InvalidInput, unknown_name
from foveate.installing import how_to_install
from foveate.models import FAMILIES, formats, kind_of
from foveate.values import whole
from foveate.words import explained

PIPELINE = "model_index.json"  # of a folder of diffusers that has models in folders of its own


@explained
def from_pretrained(
    path_or_id: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """The model in a folder that Hugging Face wrote (or in a repository of its hub), in eval mode.

    On the CPU, weights that keep their dtype are the file itself, mapped into memory: opening is instant, and only
    what is used is read. Do not change that file in place while the model lives; `save_pretrained` never does.
    Code that a folder brings (`auto_map`) is not run.

    Args:
        path_or_id: a folder with config.json and safetensors (sharded or not) or `.bin` weights; or the id of a
            repository, for which huggingface_hub has to be installed.
        dtype: what floating-point weights are turned into; None = each as it is stored.
        device: where they go; None = the CPU.

    Raises:
        InvalidInput: no such folder, a family that is not known, a file that is broken, or tensors that are missing,
            unexpected or of another shape, all of them listed. Nothing partly loaded is returned.

    >>> import tempfile
    >>> import foveate as fv
    >>> from foveate.models import gpt2
    >>> model = gpt2.LanguageModel(gpt2.Config(vocabulary=11, positions=8, dim=4, layers=1, heads=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fv.save_pretrained(model, folder)
    ...     type(fv.from_pretrained(folder))
    <class 'foveate.models.gpt2.LanguageModel'>
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InvalidInput(f"dtype is {dtype!r}: wanted a floating-point torch.dtype, or None for what is stored")
    folder = _folder(path_or_id)
    form, architecture, config = _described(folder)
    stored = stored_in(folder, form.files)
    with torch.random.fork_rng(devices=[]), _Hollow():
        model = form.architectures[architecture](config)
    wanted = plan(model, form)
    hollow = model.state_dict()
    sources = _matched(stored, wanted, hollow, form, str(folder))
    values: dict[str, Tensor] = {}
    for theirs, entry in _shown(wanted.entries.items(), f"Loading {folder.name}"):
        values.update(_taken(sources[theirs], entry, hollow, dtype, device))
    _assign(model, values)
    return model.eval()


@explained
def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], *, shard_size: int = 5 * 10**9) -> None:
    """Writes config.json and safetensors, which Hugging Face and `from_pretrained` read.

    Everything is written aside and then renamed, so that an interruption leaves what was there before. A folder that
    holds this model already gets its new weights; one that holds another model is refused.

    Args:
        shard_size: the most bytes of one file; a larger model becomes several with an index.

    Raises:
        InvalidInput: the model is of no family here, or the folder holds something else.
    """
    form, architecture = _format_of(model)
    target = Path(folder).expanduser()
    if target.exists() and not target.is_dir():
        raise InvalidInput(f"{target} is a file: wanted a folder")
    whole(shard_size, "shard_size", 1)
    wanted = plan(model, form)
    state = model.state_dict()
    tensors = {theirs: _made(entry, state) for theirs, entry in wanted.entries.items()}
    written = config_to(form, model.config)
    if form.kind_key == "model_type":  # where the kind is the class, it says all
        written["architectures"] = [architecture]
        dtypes = {tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point}
        if len(dtypes) == 1:
            written["dtype"] = str(dtypes.pop()).removeprefix("torch.")
    if target.is_dir():
        _check_free(target, form, architecture, model.config)
    settings = generation_to(form, model.config) if hasattr(model, "generate") else {}
    write_folder(target, tensors, written, settings, shard_size, form.files)


class _Hollow(TorchFunctionMode):
    """Weights without memory: torch.empty, which modules make theirs of, gives shapes alone; all else is real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def _folder(path_or_id: str | os.PathLike[str]) -> Path:
    """The folder itself, or that of the hub's files on this machine."""
    if not isinstance(path_or_id, str | os.PathLike):
        raise InvalidInput(f"from_pretrained was given a {type(path_or_id).__name__}: wanted a folder or the hub's id")
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_id)
    if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name:
        raise InvalidInput(f"{name} is no folder: wanted one with {CONFIG} and weights in it")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise InvalidInput(f"{name} is no folder here; to look for it on the hub: {how_to_install('hf')}") from None
    try:
        both = TRANSFORMERS, DIFFUSERS
        tensors = [name for files in both for name in (files.single, files.index, f"{files.stem}-*.safetensors")]
        found = Path(snapshot_download(name, allow_patterns=[CONFIG, GENERATION, *tensors]))
        if not any((found / name).exists() for files in both for name in (files.single, files.index)):
            pickled = [
                name for files in both for name in (files.single_bin, files.index_bin, f"{files.stem_bin}-*.bin")
            ]
            found = Path(snapshot_download(name, allow_patterns=[CONFIG, GENERATION, *pickled]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidInput(f"{name} is no folder here, and the hub does not give it: {reason}") from None
    return found


def _described(folder: Path) -> tuple[Format, str, Any]:
    """What config.json says: the format of the family, the architecture, and the Config."""
    if (folder / PIPELINE).is_file():
        raise InvalidInput(f"{folder} is a pipeline of diffusers: wanted one of its parts, as {folder / 'transformer'}")
    if not (folder / CONFIG).is_file():
        raise InvalidInput(f"{folder} has no {CONFIG}: wanted a folder that save_pretrained or Hugging Face wrote")
    found = read_json(folder / CONFIG)
    kind = kind_of(found)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise unknown_name("family", kind, FAMILIES)
    if found.get("quantization_config"):
        raise InvalidInput(f"{folder} holds quantized weights: wanted them in a floating-point dtype")
    form = formats(kind)[kind]
    said = found.get("architectures") or list(form.architectures)
    architecture = said[0] if isinstance(said, list) and isinstance(said[0], str) else str(said)
    if architecture not in form.architectures:
        raise unknown_name(f"architecture of {kind}", architecture, form.architectures)
    settings = read_json(folder / GENERATION) if form.generation and (folder / GENERATION).is_file() else {}
    return form, architecture, config_from(form, kind, found, settings)


def _matched(
    stored: dict[str, Stored], wanted: Plan, hollow: dict[str, Tensor], form: Format, where: str
) -> dict[str, list[Stored]]:
    """The stored tensors for every entry (several where a tied one is there under several names), or one sentence."""
    found: dict[str, list[Stored]] = {}
    told: dict[str, str] = {}
    unexpected, twice = [], []
    for name, tensor in stored.items():
        known = next((n for n in _spellings(name, form) if n in wanted.entries or n in wanted.aliases), None)
        if known is None:
            if not any(matches(n, form.ignored) for n in _spellings(name, form)):
                unexpected.append(name)
        elif known in told:
            twice.append(f"{name} beside {told[known]}")
        else:
            told[known] = name
            found.setdefault(wanted.aliases.get(known, known), []).append(tensor)
    missing = [name for name in wanted.entries if name not in found]
    misshaped = []
    for theirs, tensors in found.items():
        want = _shape(wanted.entries[theirs], hollow)
        misshaped += [f"{theirs} {list(t.shape)} instead of {list(want)}" for t in tensors if t.shape != want]
    complaints = [
        f"{len(names)} {what}: {listed(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped),
                            ("twice", twice))
        if names
    ]  # fmt: skip
    if complaints:
        raise InvalidInput(f"the tensors in {where} are not those of its {CONFIG}; {'; '.join(complaints)}")
    return found


def _spellings(name: str, form: Format) -> Iterator[str]:
    """A name as it is, with and without the prefix of the base model, and as older files have it."""
    modern = name.removesuffix(".gamma") + ".weight" if name.endswith(".gamma") else name
    modern = name.removesuffix(".beta") + ".bias" if name.endswith(".beta") else modern
    older = [now + modern.removeprefix(then) for then, now in form.older.items() if modern.startswith(then)]
    for spelled in dict.fromkeys((name, modern, *older)):
        yield from (spelled, form.prefix + spelled, spelled.removeprefix(form.prefix))


def _shape(entry: Entry, state: dict[str, Tensor]) -> tuple[int, ...]:
    """What an entry's tensor is in the file."""
    parts = [tuple(state[part].shape) for part in entry.parts]
    whole = parts[0] if len(parts) == 1 else (sum(part[0] for part in parts), *parts[0][1:])
    return whole[::-1] if entry.transposed else whole


def _taken(
    sources: list[Stored],
    entry: Entry,
    hollow: dict[str, Tensor],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Iterator[tuple[str, Tensor]]:
    """The parts of one tensor in the file, in the dtype and on the device that were asked for."""
    tensor = sources[0].read()
    for other in sources[1:]:
        if not torch.equal(tensor, other.read()):
            raise InvalidInput(f"{entry.parts[0]} is tied, but the file has two different tensors for it")
    whole = tensor.mT if entry.transposed else tensor
    cast = dtype if tensor.dtype.is_floating_point else None
    pieces = whole.split([hollow[part].shape[0] for part in entry.parts]) if len(entry.parts) > 1 else (whole,)
    parts = [piece.to(device=device, dtype=cast).contiguous() for piece in pieces]
    kept = any(part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for part in parts)
    for source in sources[1 if kept else 0 :]:
        source.release()
    yield from zip(entry.parts, parts, strict=True)


def _assign(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Puts the values in the places of the hollow weights; what was tied stays one parameter."""
    kept = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    full: dict[int, Tensor] = {
        id(kept[name]): nn.Parameter(value, kept[name].requires_grad) if isinstance(kept[name], nn.Parameter) else value
        for name, value in values.items()
    }
    for name, hollow in kept.items():
        if id(hollow) in full:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, full[id(hollow)])
        else:
            assert hollow.device.type != "meta", f"{name} has no value: build buffers without torch.empty"


def _shown(items: Collection[Any], what: str) -> Iterable[Any]:
    """The items, with a progress bar on a terminal where rich is installed."""
    if not sys.stderr.isatty():
        return items
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return items
    return track(items, what, console=Console(stderr=True), transient=True)


def _format_of(model: nn.Module) -> tuple[Format, str]:
    """How a model is written, and what its architecture is called there."""
    config = getattr(model, "config", None)
    kind = getattr(config, "kind", None)
    if kind in FAMILIES:
        form = formats(kind)[kind]
        for name, made in form.architectures.items():
            if type(model) is made:
                return form, name
    raise InvalidInput(f"{type(model).__name__} is no model of foveate.models: save its state_dict with torch.save")


def _made(entry: Entry, state: dict[str, Tensor]) -> Written:
    """The tensor of a file that is put together from its parts when it is written."""

    def make() -> Tensor:
        parts = [state[part].detach() for part in entry.parts]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.mT if entry.transposed else whole

    return Written(_shape(entry, state), state[entry.parts[0]].dtype, make)


def _check_free(folder: Path, form: Format, architecture: str, config: Any) -> None:
    """Refuses a folder that holds the checkpoint of another model."""
    if not (folder / CONFIG).exists():
        return
    try:
        same = _described(folder) == (form, architecture, config)
    except InvalidInput:
        same = False
    if not same:
        raise InvalidInput(f"{folder} holds another model: choose another folder, or delete what is in this one")
