"""One row of the table of models: built, checked, timed in turn.

What comes out is compared with "sdpa" in float32 first: to 1e-4 of the largest value in float32; in bfloat16 it may be
twice as far from that as "sdpa" in bfloat16 is, and an eps of the largest value.

A turn lasts seconds, so a run is one turn of each contestant, more where they are short. Whom no claim names takes part
in the first run alone, and so does the peer that is timed a second time.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.bench.contestants import Turn
from foveate.bench.given import drawn, images, padded, remembered, words
from foveate.bench.measuring import AGAIN, first_peer, rounded, verdict
from foveate.bench.memory import megabytes_of_model
from foveate.bench.models import ModelRow
from foveate.bench.own import OWN_TURNS, opened
from foveate.bench.results import Figure, Measured
from foveate.errors import Unsupported
from foveate.integrations.torch import accelerate
from foveate.integrations.transformers import patch, register, unregister


def measure_model(row: ModelRow, *, runs: int, seconds: float) -> Measured:
    """Everything about one row; the arguments are those of `measuring.measure`."""
    if row.weighs_memory:
        figures, again = {name: _memory(row, name) for name in row.contestants}, None
    else:
        register()
        try:
            with torch.set_grad_enabled(row.work == "training"):
                figures, again = _figures(row, runs, seconds)
        finally:
            unregister()
    batch, heads, key_heads, queries, keys, dim = row.sizes
    return Measured(
        row.section, row.name, row.work, str(row.dtype).removeprefix("torch."), batch, heads, key_heads, queries, keys,
        dim, row.pattern, 1.0, "", figures, [verdict(claim, figures, again) for claim in row.claims], again,
    )  # fmt: skip


def _figures(row: ModelRow, runs: int, seconds: float) -> tuple[dict[str, Figure], float | None]:
    base = "eager" if row.weights_from else "sdpa"
    model = _built(row, row.dtype, base)
    turns: dict[str, Turn] = {base: _turn(row, model, base)}
    start = time.perf_counter()
    peer = turns[base]()
    rounds = max(1, min(_MOST, int(seconds / (time.perf_counter() - start))))
    truth = peer if row.dtype == torch.float32 else _turn(row, _built(row, torch.float32, base, model), base)()
    figures: dict[str, Figure] = {}
    for name in row.contestants:
        if name == base:
            continue
        if name in OWN_TURNS:
            turn = OWN_TURNS[name](row, opened(model))
        else:
            turn = _turn(row, model if name == "accelerate" else _built(row, row.dtype, _attention(name), model), name)
        complaint = _complaint(turn(), peer, truth, row.dtype)
        if complaint:
            figures[name] = Figure(refused=f"wrong: {complaint}", wrong=name != "eager")
        else:
            turns[name] = turn
    aside = first_peer(turns)
    turns[AGAIN] = turns[aside]
    named = {aside, *(name for claim in row.claims for name in (claim.contestant, claim.against))}
    often = {name: turn for name, turn in turns.items() if name in named}
    found = [_medians(often if run else turns, rounds) for run in range(runs)]
    for name in turns.keys() - {AGAIN}:
        each = [run[name] for run in found if name in run]
        figures[name] = Figure("ms", [rounded(1e3 * run) for run in each], rounded(1e3 * statistics.median(each)))
    again = max(found[0][aside] / found[0][AGAIN], found[0][AGAIN] / found[0][aside])
    return {name: figures[name] for name in row.contestants}, rounded(again)


def _medians(turns: Mapping[str, Turn], rounds: int) -> dict[str, float]:
    """The median seconds of a turn of each, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    gc.collect()  # now, so that it falls on nobody
    for _ in range(rounds):
        for name, turn in turns.items():
            start = time.perf_counter()
            turn()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def _memory(row: ModelRow, name: str) -> Figure:
    """Once: it is the same each time. What a turn computes is checked in the row about its time."""
    try:
        grown = rounded(megabytes_of_model(row.name, name))
    except Unsupported as refusal:
        return Figure("MB", refused=str(refusal))
    return Figure("MB", [grown], grown)


def turn_alone(row: ModelRow, name: str) -> Turn:
    """One contestant's turn, by itself; it needs `register` before."""
    return _turn(row, _built(row, row.dtype, _attention(name)), name)


def _built(row: ModelRow, dtype: torch.dtype, attention: str, like: nn.Module | None = None) -> nn.Module:
    """The row's model; with the weights of another one, in the same memory where the dtype is the same."""
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, row.model)
    config = kind.config_class(**row.config, attn_implementation=attention)
    model: nn.Module = kind(config).to(dtype)
    if like is not None:
        model.load_state_dict({name: x.to(dtype) for name, x in like.state_dict().items()}, assign=True)
        model.tie_weights()  # type: ignore[operator]
    return model.train(row.work == "training")


def _attention(name: str) -> str:
    """What a contestant's attention is called."""
    return "foveate" if name in _SPECIAL else name


def _turn(row: ModelRow, model: nn.Module, name: str) -> Turn:
    """One turn of a contestant: what it computes is what is compared."""
    work = _SPECIAL.get(name, _WORKS[row.work])(row, model)
    if name == "accelerate":

        def accelerated() -> tuple[Tensor, ...]:
            with accelerate():
                return work()

        return accelerated
    return work


def _prefilling(row: ModelRow, model: Any) -> Turn:
    ids = words(row, row.sizes[3])
    return lambda: (model(ids, use_cache=False, logits_to_keep=1).logits,)


def _attending(row: ModelRow, model: Any) -> Turn:
    """The first layer's attention by itself, as transformers calls it."""
    from transformers import AttentionInterface

    batch, heads, key_heads, queries, keys, dim = row.sizes
    draw = drawn()
    q, k, v = (
        torch.randn(batch, count, length, dim, generator=draw).to(row.dtype)
        for count, length in ((heads, queries), (key_heads, keys), (key_heads, keys))
    )
    layer = model.model.layers[0].self_attn
    attend = AttentionInterface()[model.config._attn_implementation] if _named(model) else _eager_of(layer)
    hidden = None if _named(model) else _future(queries, keys, row.dtype)
    return lambda: (attend(layer, q, k, v, hidden, scaling=layer.scaling)[0],)


def _named(model: Any) -> bool:
    return bool(model.config._attn_implementation != "eager")


def _eager_of(layer: nn.Module) -> Callable[..., Any]:
    """The function that a layer calls when it is "eager": a name of its own module."""
    found: Callable[..., Any] = vars(sys.modules[type(layer).__module__])["eager_attention_forward"]
    return found


def _future(queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    return torch.zeros(1, 1, queries, keys, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


def _decoded(row: ModelRow, model: Any, *, grown: bool = False) -> Turn:
    """Tokens one by one after random keys and values that are in a cache already; their logits."""
    from transformers import DynamicCache

    from foveate.integrations.transformers import GrowingCache

    cache, tokens = (GrowingCache if grown else DynamicCache)(config=model.config), row.sizes[3]
    for layer, (k, v) in enumerate(remembered(row, model.config.num_hidden_layers)):
        cache.update(k.to(model.dtype), v.to(model.dtype), layer)
    ids = words(row, tokens)

    def turn() -> tuple[Tensor, ...]:
        found = [model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits for at in range(tokens)]
        cache.crop(-tokens)
        return (torch.cat(found, 1),)

    return turn


def _encoded(row: ModelRow, model: Any) -> Turn:
    """The hidden states of what is no padding."""
    if row.model == "ViTModel":
        pixels = images(row)
        return lambda: (model(pixel_values=pixels).last_hidden_state,)
    if row.pattern is None:
        ids = words(row, row.sizes[3])
        return lambda: (model(input_ids=ids).last_hidden_state,)
    ids, kept = padded(row)
    return lambda: (model(input_ids=ids, attention_mask=kept.long()).last_hidden_state * kept[..., None],)


def _packed(row: ModelRow, model: Any) -> Turn:
    """The same from the texts without their padding, end to end in one row that `documents` keeps apart."""
    ids, kept = padded(row)

    def turn() -> tuple[Tensor, ...]:
        ends = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
        positions = torch.arange(ids.shape[1]).expand_as(ids)[kept][None]
        found = model(
            input_ids=ids[kept][None], position_ids=positions, cu_seq_lens_q=ends, cu_seq_lens_k=ends
        ).last_hidden_state[0]
        laid_out = found.new_zeros(*ids.shape, found.shape[1])
        laid_out[kept] = found
        return (laid_out,)

    return turn


def _stepped(row: ModelRow, model: Any) -> Turn:
    """The loss, and the gradient of the first layer's projections."""
    ids = words(row, row.sizes[3])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)

    def turn() -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        logits = model(ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        loss.backward()
        optimizer.step()
        return loss.detach(), model.transformer.h[0].attn.c_attn.weight.grad.clone()

    return turn


def _weighed(row: ModelRow, model: Any) -> Turn:
    """The hidden states, and one layer's weights; "eager" can but give those of all."""
    ids = words(row, row.sizes[3])
    (place,) = row.weights_from
    ours = model.config._attn_implementation == "foveate"
    if ours:
        patch(model, weights_from=list(row.weights_from))

    def turn() -> tuple[Tensor, ...]:
        found = model(input_ids=ids, output_attentions=True)
        weights = [x for x in found.attentions if x is not None]
        return found.last_hidden_state, weights[0] if ours else weights[place]

    return turn


_MOST = 20  # turns of a run
_WORKS: dict[str, Callable[[ModelRow, Any], Turn]] = {
    "prefill": _prefilling,
    "attention": _attending,
    "decoding": _decoded,
    "forward": _encoded,
    "training": _stepped,
    "weights": _weighed,
    "memory": _weighed,
}
_SPECIAL: dict[str, Callable[[ModelRow, Any], Turn]] = {"packed": _packed, "grown": partial(_decoded, grown=True)}


def _complaint(
    found: tuple[Tensor, ...], peer: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: torch.dtype
) -> str:
    """What is wrong with a result; empty if nothing is."""
    for place, (mine, theirs, true) in enumerate(zip(found, peer, truth, strict=True)):
        most = float(true.abs().max())
        allowed = 1e-4 * most
        if dtype != torch.float32:
            allowed = 2 * float((theirs.float() - true).abs().max()) + torch.finfo(dtype).eps * most
        off = float((mine.float() - true).abs().max())
        if not off <= allowed:  # a NaN is smaller than nothing
            return f"result {place} is off by {off:.2g}, allowed {allowed:.2g}"
    return ""
