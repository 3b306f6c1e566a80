"""`GrowingCache` holds what `DynamicCache` holds, after every operation, and does not copy it for every token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import build, left_padded
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig

import foveate as fv
from foveate.integrations.transformers import GrowingCache

Operation = Callable[[Cache], Any]


def states(tokens: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(tokens + seed)
    k, v = torch.randn(2, batch, 3, tokens, 5, generator=draw)
    return k, v


def put(tokens: int, batch: int = 2, layers: int = 2) -> Operation:
    return lambda cache: [cache.update(*states(tokens, batch, n), n) for n in range(layers)]


OPERATIONS: dict[str, list[Operation]] = {
    "tokens": [put(7), put(1), put(1), put(40), put(1)],
    "crop": [put(7), put(1), lambda c: c.crop(-3), put(2), put(1), lambda c: c.crop(-1), put(1)],
    "crop the prompt": [put(7), lambda c: c.crop(-2), put(1), put(1)],
    "crop twice": [put(7), put(4), lambda c: c.crop(-1), lambda c: c.crop(-2), put(3)],
    "beams": [put(7), lambda c: c.reorder_cache(torch.tensor([1, 1])), put(1), put(1)],
    "repeat": [put(7), put(1), lambda c: c.batch_repeat_interleave(3), put(1, batch=6), put(1, batch=6)],
    "select": [put(7), put(1), lambda c: c.batch_select_indices(torch.tensor([1])), put(1, batch=1)],
    "reset": [put(7), put(1), lambda c: c.reset(), put(3), put(1)],
}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_it_holds_what_a_dynamic_cache_holds(name: str, known: bool) -> None:
    config = LlamaConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2)
    how = {"config": config} if known else {}
    ours, theirs = GrowingCache(**how), DynamicCache(**how)
    with torch.no_grad():
        for operation in OPERATIONS[name]:
            found, wanted = operation(ours), operation(theirs)
            for mine, true in zip(found or [], wanted or [], strict=True):
                assert all(map(torch.equal, mine, true))
            assert ours.get_seq_length() == theirs.get_seq_length()
            if theirs.get_seq_length():
                for mine, true in zip(ours, theirs, strict=True):
                    assert torch.equal(mine[0], true[0])
                    assert torch.equal(mine[1], true[1])


def test_the_keys_of_an_indexer_have_room_too() -> None:
    """DeepSeek-V3.2 keeps one more row of keys, by which it chooses among the others."""
    config, generator = build("deepseek_v32").config, torch.Generator().manual_seed(3)
    ours, theirs = GrowingCache(config=config), DynamicCache(config=config)
    places = set()

    def index(tokens: int, batch: int = 2) -> None:
        put(tokens, batch)(ours)
        put(tokens, batch)(theirs)
        new = torch.randn(batch, tokens, 7, generator=generator)
        assert torch.equal(ours.layers[1].update_indexer(new), theirs.layers[1].update_indexer(new))
        places.add(ours.layers[1].indexer_keys.data_ptr())

    with torch.no_grad():
        for tokens in (7, 1, 40, 1, 1, 1):
            index(tokens)
        assert len(places) <= 4
        for operation in (lambda c: c.crop(-3), lambda c: c.crop(-1), lambda c: c.reorder_cache(torch.tensor([1, 1]))):
            for cache in (ours, theirs):
                operation(cache)
            index(2)
        for cache in (ours, theirs):
            cache.reset()
        index(5, batch=1)


def test_nothing_is_copied_for_a_token() -> None:
    cache, places = GrowingCache(), set()
    with torch.no_grad():
        put(50)(cache)
        for _ in range(500):
            put(1)(cache)
            places.add(cache.layers[1].keys.data_ptr())
        cache.crop(-100)
        for _ in range(100):
            put(1)(cache)
            places.add(cache.layers[1].keys.data_ptr())
    assert len(places) <= 7  # room grows by half


def test_a_copy_goes_its_own_way() -> None:
    one, other = GrowingCache(), None
    with torch.no_grad():
        put(5)(one), put(1)(one)
        other = copy.deepcopy(one)
        before = other.layers[0].keys.clone()
        put(3)(one)
        assert torch.equal(other.layers[0].keys, before)
        put(2)(other)
    assert torch.equal(other.layers[0].keys, torch.cat([before, states(2)[0]], 2))


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True}])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_generate_finds_the_same_tokens(name: str, how: dict[str, Any]) -> None:
    model: Any = build(name)
    found = []
    with fv.patch(model):
        for kind in (DynamicCache, GrowingCache):
            torch.manual_seed(0)
            cache = kind(config=model.config)
            how = {"do_sample": False, **how, "max_new_tokens": 9, "past_key_values": cache}
            found.append(model.generate(**left_padded(), **how))
    assert torch.equal(*found)
