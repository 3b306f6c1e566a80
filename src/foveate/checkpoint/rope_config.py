"""Rotary positions as config.json says them: which law stretches the frequencies, and by how much.

{"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, …}    ↔    base=500000.0, scaling=Llama3(8.0, …)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.checkpoint.format import Codec
from foveate.errors import InvalidInput, unknown_name
from foveate.rotary import DynamicNTK, Linear, Llama3, Scaling, YaRN

LENGTH = "original_max_position_embeddings"
# rope_type → the law, and what its fields are called there.
LAWS: Mapping[str, tuple[type[Any], Mapping[str, str]]] = {
    "linear": (Linear, {"factor": "factor"}),
    "dynamic": (DynamicNTK, {"factor": "factor", "original_length": LENGTH}),
    "yarn": (YaRN, {
        "factor": "factor", "original_length": LENGTH, "beta_fast": "beta_fast", "beta_slow": "beta_slow",
        "attention_factor": "attention_factor", "whole": "truncate",
    }),
    "llama3": (Llama3, {
        "factor": "factor", "original_length": LENGTH, "slow": "low_freq_factor", "fast": "high_freq_factor",
    }),
}  # fmt: skip
NEEDED = ("factor", LENGTH, "low_freq_factor", "high_freq_factor")  # the others are written where they are unusual


def upgraded(found: dict[str, Any]) -> dict[str, Any]:
    """A config.json with all about rotary positions in `rope_parameters`, where older ones have it in two places."""
    scaling, base = found.pop("rope_scaling", None), found.pop("rope_theta", 10000.0)
    rope = dict(found.get("rope_parameters") or scaling or {})
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", base)
    if rope["rope_type"] == "dynamic" or (LENGTH not in rope and rope["rope_type"] in ("yarn", "llama3")):
        rope[LENGTH] = found.get("max_position_embeddings")
    return {**found, "rope_parameters": rope}


def upgraded_by_type(found: dict[str, Any]) -> dict[str, Any]:
    """A config.json as Gemma 3 has it, with one such object for layers that see everything and one for the others."""
    every = found.pop("sliding_window_pattern", None) or found.pop("_sliding_window_pattern", 6)
    types = [f"{'full' if (n + 1) % every == 0 else 'sliding'}_attention" for n in range(found["num_hidden_layers"])]
    base, near = found.pop("rope_theta", 1000000.0), found.pop("rope_local_base_freq", 10000.0)
    said, scaling = found.get("rope_parameters") or {}, found.pop("rope_scaling", None)
    length = found.get("max_position_embeddings")
    rope = {
        kind: upgraded({"rope_theta": theta, "rope_parameters": given, "max_position_embeddings": length})
        for kind, theta, given in (
            ("full_attention", base, said.get("full_attention") or scaling),
            ("sliding_attention", near, said.get("sliding_attention")),
        )
    }
    if read_scaling(rope["sliding_attention"]["rope_parameters"]) is not None:
        raise InvalidInput("config.json says a rope_type for sliding_attention: here their frequencies are the paper's")
    return {
        **found,
        "layer_types": found.get("layer_types") or types,
        "rope_parameters": {kind: made["rope_parameters"] for kind, made in rope.items()},
    }


def read_scaling(rope: Mapping[str, Any]) -> Scaling | None:
    """The law that an object like `rope_parameters` says; None where the frequencies are as in the paper."""
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InvalidInput("config.json says partial_rotary_factor: here every entry of a head turns")
    if kind == "default":
        return None
    if kind not in LAWS:
        raise unknown_name("rope_type", kind, ["default", *LAWS])
    law, names = LAWS[kind]
    given = {ours: rope[theirs] for ours, theirs in names.items() if rope.get(theirs) is not None}
    missing = [names[ours] for ours in ("factor", "original_length") if ours in names and ours not in given]
    if missing:
        raise InvalidInput(f"config.json says rope_type {kind!r} without {', '.join(missing)}: add it")
    made: Scaling = law(**given)
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    if isinstance(made, YaRN) and above and below and "attention_factor" not in given:
        grown = made.attention_factor - 1.0
        made = law(**given, attention_factor=(1.0 + above * grown) / (1.0 + below * grown))
    return made


def write_scaling(scaling: Scaling | None) -> dict[str, Any]:
    """What `read_scaling` reads, without `rope_theta`."""
    if scaling is None:
        return {"rope_type": "default"}
    kind, (law, names) = next((kind, entry) for kind, entry in LAWS.items() if type(scaling) is entry[0])
    said = {theirs: getattr(scaling, ours) for ours, theirs in names.items()}
    usual = law(**{ours: said[names[ours]] for ours in ("factor", "original_length") if ours in names})
    kept = {
        theirs: said[theirs]
        for ours, theirs in names.items()
        if theirs in NEEDED or said[theirs] != getattr(usual, ours)
    }
    if kind == "dynamic":
        kept.pop(LENGTH)  # there it is always max_position_embeddings
    return {"rope_type": kind, **kept}


SCALING = Codec(read_scaling, write_scaling)


def check_length(scaling: Scaling | None, positions: int) -> None:
    """Refuse a law of another length than the model's where config.json has one word for both."""
    if isinstance(scaling, DynamicNTK) and scaling.original_length != positions:
        raise InvalidInput(f"{scaling} is for a model of {scaling.original_length} positions: this one has {positions}")
