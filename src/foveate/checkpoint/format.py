"""How a kind of model is written to a folder, as data: what config.json and the weights call what a module calls.

One table serves both directions. In a name, `*` stands for one part between dots, the same on both sides:

    "h.*.ln_1.*": "blocks.*.attention_norm.*"                   a name for a name
    "h.*.attn.c_attn.*": ("blocks.*.attention.query.*", …)      one tensor there is several here, one below the other
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from foveate.checkpoint.safetensors import TRANSFORMERS, Files
from foveate.errors import InvalidInput

Names = Mapping[str, str | tuple[str, ...]]  # theirs → ours


@dataclass(frozen=True)
class Codec:
    """A field that is another thing here than in config.json."""

    read: Callable[[Any], Any]
    write: Callable[[Any], Any]


@dataclass(frozen=True)
class Format:
    """How Hugging Face writes one kind of model (its `model_type`, or the class that diffusers has for it).

    A head is a module whose attribute `body` is the base model. `names` are those of the base model alone, without
    `prefix`, which they have in a head's file; `heads` are what a head adds, in full.
    """

    config: type
    architectures: Mapping[str, type[nn.Module]]
    fields: Mapping[str, str]  # of our Config → in config.json; a dot leads into an object in it
    names: Names | Callable[[Any], Names]  # or of a Config
    heads: Names = field(default_factory=dict)
    prefix: str = ""
    fixed: Mapping[str, object] = field(default_factory=dict)  # in config.json: the only value (a tuple: values) it has
    implied: Mapping[str, object] = field(default_factory=dict)  # of our Config: what no config.json of this kind says
    codecs: Mapping[str, Codec] = field(default_factory=dict)  # of our Config: fields that are written otherwise
    generation: tuple[str, ...] = ()  # of our Config: what generation_config.json may say better
    silent: tuple[str, ...] = ()  # those of them that are None where that file is there and does not speak of them
    also: Callable[[Any], Mapping[str, Any]] = lambda config: {}  # in config.json: said outright instead
    defaults: Mapping[str, object] = field(default_factory=dict)  # in config.json, where it says nothing
    transposed: tuple[str, ...] = ()  # their names of matrices that are [in, out]
    older: Mapping[str, str] = field(default_factory=dict)  # how their names began in older files → as they begin now
    ignored: tuple[str, ...] = ()  # their names of tensors without meaning: old buffers, the heads of pretraining
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = lambda found: found  # from what older files say
    kind_key: str = "model_type"  # in config.json: what says the kind
    files: Files = TRANSFORMERS


def prefixed(theirs: str, ours: str, names: Names) -> Names:
    """The table of a model that is a part of another one."""
    return {
        theirs + name: ours + here if isinstance(here, str) else tuple(ours + part for part in here)
        for name, here in names.items()
    }


@dataclass
class Entry:
    """One tensor of a file: the names here of its parts, one below the other, and whether it is [in, out] there."""

    parts: list[str]
    transposed: bool


@dataclass(frozen=True)
class Plan:
    """What the file of one model holds; `aliases` are more names of a tied tensor, with the one it is written by."""

    entries: dict[str, Entry]
    aliases: dict[str, str]


def plan(model: nn.Module, form: Format) -> Plan:
    """The tensors that this very model is written as, by their names there."""
    has_body = hasattr(model, "body")
    names = form.names(model.config) if callable(form.names) else form.names
    table = dict(prefixed(form.prefix, "body.", names)) if has_body else dict(names)
    if has_body:
        table |= form.heads
    lines = [
        (re.compile(_pattern(part)), place, count, theirs)
        for theirs, ours in table.items()
        for count, parts in [(1, [ours]) if isinstance(ours, str) else (len(ours), list(ours))]
        for place, part in enumerate(parts)
    ]
    transposed = [re.compile("(?:.*\\.)?" + _pattern(name)) for name in form.transposed]
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    entries: dict[str, Entry] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name in model.state_dict():
        theirs, place, count = _their_name(name, lines)
        known = first.setdefault(id(named[name]), theirs)
        if known != theirs:
            aliases[theirs] = known
            continue
        entry = entries.setdefault(theirs, Entry([""] * count, any(p.fullmatch(theirs) for p in transposed)))
        entry.parts[place] = name
    assert all(all(entry.parts) for entry in entries.values()), "a tensor of several parts lacks one"
    return Plan(entries, aliases)


def _their_name(name: str, lines: list[tuple[re.Pattern[str], int, int, str]]) -> tuple[str, int, int]:
    for pattern, place, count, theirs in lines:
        found = pattern.fullmatch(name)
        if found:
            for part in found.groups():
                theirs = theirs.replace("*", part, 1)
            return theirs, place, count
    raise AssertionError(f"the name table has no line for {name}")


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\*", "([^.]+)")


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name is one of those that the patterns stand for."""
    return any(re.fullmatch(_pattern(pattern), name) for pattern in patterns)


NEVER = ("auto_map", "trust_remote_code", "torch_dtype", "dtype", "transformers_version", "model_type", "architectures",
         "_class_name", "_diffusers_version")  # fmt: skip


def config_from(form: Format, kind: str, found: Mapping[str, Any], generation: Mapping[str, Any]) -> Any:
    """The Config that a config.json and a generation_config.json stand for; what the first says beside is `other`."""
    said = {**form.defaults, **form.upgrade(dict(found))}
    for name in form.generation if generation else ():
        key = form.fields[name]
        if key in generation or name in form.silent:
            said[key] = generation.get(key)
    if "num_labels" in form.fields.values() and isinstance(said.get("id2label"), dict):
        said["num_labels"] = len(said["id2label"])
    for key, wanted in form.fixed.items():
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if _at(said, key, allowed[0]) not in allowed:
            raise InvalidInput(
                f"config.json says {key} is {_at(said, key)!r}: this {kind} computes {allowed[0]!r} alone"
            )
    hints = typing.get_type_hints(form.config)
    values = dict(form.implied)
    for name, key in form.fields.items():
        value = _at(said, key, dataclasses.MISSING)
        if value is dataclasses.MISSING:
            continue
        if isinstance(value, list):
            value = tuple(value)
        if name in form.codecs:
            value = form.codecs[name].read(value)
        if not _fits(value, hints[name]):
            raise InvalidInput(f"config.json says {key} is {value!r}: wanted {_spoken(hints[name])}")
        if hints[name] is int and int(value) < 0:
            raise InvalidInput(f"config.json says {key} is {value}: wanted a number from 0")
        values[name] = value
    taken = {*form.fields.values(), *NEVER}
    other = {key: value for key, value in said.items() if key not in taken}
    return form.config(**values, kind=kind, other=other)


def config_to(form: Format, config: Any) -> dict[str, Any]:
    """What config.json says of a Config, `architectures` and `dtype` aside."""
    for name, value in form.implied.items():
        if getattr(config, name) != value:
            raise InvalidInput(f"{name} is {getattr(config, name)!r}: a {config.kind} has {value!r}")
    written: dict[str, Any] = {form.kind_key: config.kind, **config.other}
    for name, key in form.fields.items():
        at, *path = key.split(".")[::-1]
        inner = written
        for part in reversed(path):
            inner[part] = dict(inner.get(part) or {})
            inner = inner[part]
        value = getattr(config, name)
        inner[at] = form.codecs[name].write(value) if name in form.codecs else value
    if "id2label" in written:
        written.pop("num_labels", None)
    return {**written, **form.also(config)}


def generation_to(form: Format, config: Any) -> dict[str, Any]:
    """What generation_config.json says of a Config; empty where config.json says it all."""
    said = config_to(form, config)
    keys = [form.fields[name] for name in form.generation]
    return {key: said[key] for key in ("bos_token_id", *keys) if keys and said.get(key) is not None}


def _at(found: Mapping[str, Any], key: str, otherwise: Any = None) -> Any:
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return otherwise
        found = found[part]
    return found


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    for kind in _kinds(hint):
        plain = typing.get_origin(kind) or kind
        if plain is int and isinstance(value, bool):
            continue
        if isinstance(value, plain) or (plain is float and isinstance(value, int) and not isinstance(value, bool)):
            return True
    return False


def _spoken(hint: Any) -> str:
    words = [getattr(typing.get_origin(kind) or kind, "__name__", str(kind)) for kind in _kinds(hint)]
    return " or ".join(word.replace("NoneType", "null") for word in words)
