"""A state or a cache comes back from a file and from a copy as it was, and `torch.load` needs no leave for it."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, build, left_padded
from torch import Tensor
from transformers import DynamicCache

import foveate as fv
from foveate.integrations.transformers import GrowingCache
from foveate.integrations.transformers.cache import _restored_layer


def by_torch(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save({"kept": thing, "step": 3}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["kept"]


WAYS: dict[str, Callable[[Any], Any]] = {
    "torch": by_torch,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "deepcopy": copy.deepcopy,
    "copy of a copy": lambda thing: by_torch(copy.deepcopy(by_torch(thing))),
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


def same(one: Any, other: Any) -> bool:
    """By kind and numbers; tensors never share memory."""
    if isinstance(one, Tensor):
        apart = one.data_ptr() != other.data_ptr() or not one.numel()
        return apart and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def attended(cache: fv.KeyValueCache, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    k, v = (torch.randn(2, 3, tokens, dim, generator=generator) for dim in (5, 7))
    with torch.no_grad():
        return fv.attention(torch.ones(2, 3, tokens, 5), *cache[1].append(k, v), fv.causal)


@EVERY_WAY
def test_a_growing_cache_goes_on_where_it_was(way: str) -> None:
    cache = fv.KeyValueCache(3)
    attended(cache, 11)
    attended(cache, 1)
    cache.once(2, lambda: (torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 7)))
    found = WAYS[way](cache)
    assert (len(found), found[1].length, found.length) == (3, 12, 0)
    assert found.once(2, lambda: pytest.fail("it was projected already"))[0].sum() == 120
    for _ in range(40):
        assert torch.equal(attended(found, 1), attended(cache, 1))
    assert found[0].append(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))[0].shape == (1, 1, 1, 1)
    assert cache[0].length == 0


def test_a_file_holds_what_is_kept_and_no_room() -> None:
    cache = fv.KeyValueCache(1)
    with torch.no_grad():
        for _ in range(2):
            cache[0].append(torch.ones(1, 1, 1000, 16), torch.ones(1, 1, 1000, 16))
    file = io.BytesIO()
    torch.save(cache, file)
    assert file.tell() < 1.1 * 2 * 2000 * 16 * 4


STATES: dict[str, Callable[[], Any]] = {
    "linear": lambda: fv.LinearState(torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5)),
    "linear without a normaliser": lambda: fv.LinearState(torch.randn(2, 3, 5, 7), None),
    "mixer": lambda: fv.nn.mixing.MixerState(fv.LinearState(torch.ones(2, 3), None), None, torch.tensor([3, 5])),
    "a layer": lambda: fv.nn.GatedDeltaNet(24, 3)(torch.randn(2, 7, 24))[1],
    "decoder": lambda: fv.nn.decoder.DecoderState(torch.ones(1, 2, 3), None, torch.ones(2, 3), 4),
    "context": lambda: fv.nn.attention.KeysValues(torch.ones(2, 3), torch.ones(3, 2)),
    "angles": lambda: fv.nn.Rotary(8).angles(torch.arange(7), torch.float32),
}


@EVERY_WAY
@pytest.mark.parametrize("name", STATES)
def test_a_state_is_what_it_was(name: str, way: str) -> None:
    with torch.no_grad():
        state = STATES[name]()
    assert same(WAYS[way](state), state)


def hybrid(kind: str) -> Any:
    """Models whose layers keep a state beside keys, or keys of an indexer."""
    if kind == "deepseek_v32":
        return build(kind)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 29, "max_position_embeddings": 64}  # fmt: skip
    if kind == "falcon_h1":
        config: Any = transformers.FalconH1Config(
            **sizes, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=5, mamba_chunk_size=8,
        )  # fmt: skip
    else:
        config = transformers.Qwen3NextConfig(
            **sizes, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
            shared_expert_intermediate_size=24, linear_num_key_heads=2, linear_num_value_heads=4,
            linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
        )  # fmt: skip
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


PLAIN = transformers.DynamicLayer.update
KINDS = ["llama", "mistral", "gemma2", "deepseek_v32", "falcon_h1", "qwen3_next"]


@pytest.mark.parametrize("name", KINDS)
def test_a_cache_of_transformers_is_what_it_was_and_has_room(name: str) -> None:
    network = build(name) if name in FAMILIES else hybrid(name)
    ids = left_padded()["input_ids"]
    with torch.no_grad(), fv.patch(network):
        grown, plain = (kind(config=network.config) for kind in (GrowingCache, DynamicCache))
        for cache in (grown, plain):
            network(ids, past_key_values=cache)
        for way in WAYS.values():
            found = way(grown)
            assert type(found) is GrowingCache
            assert [type(layer).__name__ for layer in found.layers] == [type(layer).__name__ for layer in plain.layers]
            expected = copy.deepcopy(plain)
            for step in range(3):
                more = (network(ids[:, step : step + 1], past_key_values=cache).logits for cache in (found, expected))
                assert torch.equal(*more)
            grows = [layer for layer in found.layers if hasattr(layer, "_kept")]
            assert len(grows) == sum(getattr(type(layer), "update", None) is PLAIN for layer in plain.layers)
            places = {layer.keys.data_ptr() for layer in grows}
            network(ids[:, :1], past_key_values=found)
            assert {layer.keys.data_ptr() for layer in grows} == places  # nothing was copied


def test_a_file_cannot_name_what_is_no_layer_of_a_cache() -> None:
    for module, name in (("os", "system"), ("transformers.cache_utils", "DynamicCache"), ("transformers.x", "Layer")):
        with pytest.raises((fv.InvalidInput, ModuleNotFoundError)):
            _restored_layer(module, name, {})


@pytest.mark.parametrize("order", ["import foveate, torch", "import torch, foveate"])
def test_another_process_reads_it_without_having_used_any(order: str, tmp_path: Path) -> None:
    cache = fv.KeyValueCache(1)
    cache[0].append(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    torch.save((cache, fv.LinearState(torch.ones(2), None)), tmp_path / "states.pt")
    code = (
        f"{order}\n"
        "import sys; assert 'foveate.generation.cache' not in sys.modules\n"
        "cache, state = torch.load('states.pt'); assert cache.length == 3 and state.s.sum() == 2"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
