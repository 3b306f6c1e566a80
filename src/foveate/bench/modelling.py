"""One row of the table of models: built, checked, timed in turn.

What comes out is compared with "sdpa" in float32 first: to 1e-4 of the largest value in float32; in bfloat16 it may be
twice as far from that as "sdpa" in bfloat16 is, and an eps of the largest value.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.bench.contestants import Turn
from foveate.bench.measuring import repeated, rounded, verdict
from foveate.bench.models import ModelRow
from foveate.bench.results import Figure, Measured
from foveate.integrations.torch import accelerate
from foveate.integrations.transformers import patch, register, unregister


def measure_model(row: ModelRow, *, runs: int, seconds: float) -> Measured:
    """Everything about one row; the arguments are those of `measuring.measure`."""
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
    model = _built(row, row.dtype, "eager" if row.weights_from else "sdpa")
    peer = _turn(row, model, "sdpa")()
    truth = peer if row.dtype == torch.float32 else _turn(row, _built(row, torch.float32, "sdpa", model), "sdpa")()
    turns: dict[str, Turn] = {}
    figures: dict[str, Figure] = {}
    for name in row.contestants:
        twin = model if name in ("sdpa", "accelerate") else _built(row, row.dtype, name, model)
        turn = _turn(row, twin, name)
        complaint = _complaint(turn(), peer, truth, row.dtype)
        if complaint:
            figures[name] = Figure(refused=f"wrong: {complaint}", wrong=name in ("foveate", "accelerate"))
        else:
            turns[name] = turn
    if not turns:
        return figures, None
    found, again = repeated(turns, runs, seconds)
    for name, each in found.items():
        figures[name] = Figure("ms", [rounded(1e3 * run) for run in each], rounded(1e3 * statistics.median(each)))
    return {name: figures[name] for name in row.contestants}, again


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


def _turn(row: ModelRow, model: nn.Module, name: str) -> Turn:
    """One turn of a contestant: what it computes is what is compared."""
    work = _WORKS[row.work](row, model)
    if name == "accelerate":

        def accelerated() -> tuple[Tensor, ...]:
            with accelerate():
                return work()

        return accelerated
    return work


def _drawn() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _ids(row: ModelRow, length: int) -> Tensor:
    vocabulary = row.config.get("vocab_size", 30522)
    return torch.randint(0, vocabulary, (row.sizes[0], length), generator=_drawn())


def _prefilling(row: ModelRow, model: Any) -> Turn:
    ids = _ids(row, row.sizes[3])
    return lambda: (model(ids, use_cache=False, logits_to_keep=1).logits,)


def _attending(row: ModelRow, model: Any) -> Turn:
    """The first layer's attention by itself, as transformers calls it."""
    from transformers import AttentionInterface

    batch, heads, key_heads, queries, keys, dim = row.sizes
    draw = _drawn()
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


def _decoded(row: ModelRow, model: Any) -> Turn:
    """Tokens one by one after a prompt that is in a dynamic cache already; their logits."""
    from transformers import DynamicCache

    tokens, prompt = row.sizes[3], row.sizes[4] - row.sizes[3]
    ids = _ids(row, prompt + tokens)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)

    def turn() -> tuple[Tensor, ...]:
        found = [
            model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
            for at in range(prompt, prompt + tokens)
        ]
        cache.crop(-tokens)
        return (torch.cat(found, 1),)

    return turn


def _encoded(row: ModelRow, model: Any) -> Turn:
    """The hidden states of what is no padding."""
    if row.model == "ViTModel":
        side = row.config["image_size"]
        pixels = torch.randn(row.sizes[0], 3, side, side, generator=_drawn())
        return lambda: (model(pixel_values=pixels).last_hidden_state,)
    batch, length = row.sizes[0], row.sizes[3]
    ids = _ids(row, length)
    least = max(1, length // 4)
    lengths = torch.randint(least, length + 1, (batch, 1), generator=_drawn())
    kept = (torch.arange(length) < lengths).long()
    return lambda: (model(input_ids=ids, attention_mask=kept).last_hidden_state * kept[..., None],)


def _stepped(row: ModelRow, model: Any) -> Turn:
    """The loss, and the gradient of the first layer's projections."""
    ids = _ids(row, row.sizes[3])
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
    ids = _ids(row, row.sizes[3])
    (place,) = row.weights_from
    ours = model.config._attn_implementation == "foveate"
    if ours:
        patch(model, weights_from=list(row.weights_from))

    def turn() -> tuple[Tensor, ...]:
        found = model(input_ids=ids, output_attentions=True)
        weights = [x for x in found.attentions if x is not None]
        return found.last_hidden_state, weights[0] if ours else weights[place]

    return turn


_WORKS: dict[str, Callable[[ModelRow, Any], Turn]] = {
    "prefill": _prefilling,
    "attention": _attending,
    "decoding": _decoded,
    "forward": _encoded,
    "training": _stepped,
    "weights": _weighed,
}


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
