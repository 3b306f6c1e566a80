"""Copies of a patched model are patched and undone by themselves; what is saved is the model as it was before."""

from __future__ import annotations

import copy
import gc
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
from torch import Tensor, nn

import foveate as fv
from foveate.integrations import recomputing
from foveate.integrations.transformers import is_patched

NARROW = fv.window(3)


def logits(network: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(**left_padded()).logits
    return found


def unasked() -> Any:
    """A model that nobody has asked for its weights yet: the hooks that transformers then sets are in no file."""
    network = FAMILIES["llama"].make().eval()
    network.load_state_dict(build("llama").state_dict())
    return network


def near(one: Tensor, other: Tensor) -> bool:
    """In the rows of text: in those of padding a patched model has 0 where eager has a mean of what is hidden."""
    kept = left_padded()["attention_mask"].bool()
    return bool((one - other)[kept].abs().max() <= 1e-5 * other[kept].abs().max())


def implementations(network: nn.Module) -> set[str]:
    return {part.config._attn_implementation for part in network.modules() if hasattr(part, "config")}


@pytest.mark.parametrize("first", ["twin", "original"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_copy_is_patched_as_the_original_is_and_each_is_undone_by_itself(name: str, first: str) -> None:
    network = build(name)
    plain, others = logits(network), recomputing.in_force()
    fv.patch(network, NARROW)
    narrow = logits(network)
    assert not near(narrow, plain)
    twin = copy.deepcopy(network)
    assert torch.equal(logits(twin), narrow)
    assert is_patched(twin)
    with pytest.raises(fv.InvalidInput, match="is patched already"):
        fv.patch(twin)
    undone, left = (twin, network) if first == "twin" else (network, twin)
    fv.unpatch(undone)
    assert near(logits(undone), plain)
    assert torch.equal(logits(left), narrow)
    with pytest.raises(fv.FoveateError, match="is not patched: nothing to undo"):
        fv.unpatch(undone)
    fv.unpatch(left)
    assert torch.equal(logits(left), plain)
    assert implementations(network) == implementations(twin) == {"eager"}
    assert all(change in others for change in recomputing.in_force())


def test_a_copy_outlives_the_with_of_the_original_and_is_copied_on() -> None:
    network = build("llama")
    plain = logits(network)
    with fv.patch(network, NARROW, layers=[1]):
        narrow = logits(network)
        twin = copy.deepcopy(network)
    del network
    gc.collect()
    third = copy.deepcopy(twin)
    fv.unpatch(twin)
    assert torch.equal(logits(twin), plain)
    assert torch.equal(logits(third), narrow)
    with pytest.raises(fv.FoveateError, match="foveate still computes for LlamaForCausalLM"):
        __import__("foveate.integrations.transformers", fromlist=["unregister"]).unregister()
    fv.unpatch(third)
    assert torch.equal(logits(third), plain)


@pytest.mark.parametrize("name", ["t5", "llava", "clip"])
def test_all_configurations_of_a_copy_come_back(name: str) -> None:
    network = build(name)
    before = copy.deepcopy(network)
    inputs = FAMILIES[name].inputs()
    with torch.no_grad(), fv.patch(network):
        truth = network(**inputs)[0]
        twin = copy.deepcopy(network)
        with fv.watch(twin) as seen:
            assert torch.equal(twin(**inputs)[0], truth)
        assert len(seen)
        fv.unpatch(twin)
        assert implementations(twin) == {"eager"}
        assert torch.equal(twin(**inputs)[0], before(**inputs)[0])
        assert torch.equal(network(**inputs)[0], truth)


def test_a_copy_of_a_part_is_a_patched_model_of_its_own() -> None:
    network = build("llama")
    with fv.patch(network, NARROW):
        part = copy.deepcopy(network.model)
        layer = copy.deepcopy(network.model.layers[0].self_attn)
        with torch.no_grad():
            narrow = network.model(**left_padded())[0]
            assert torch.equal(part(**left_padded())[0], narrow)
            fv.unpatch(part)
            assert not torch.allclose(part(**left_padded())[0], narrow)
            assert torch.equal(network.model(**left_padded())[0], narrow)
        fv.unpatch(layer)
        assert layer.config._attn_implementation == part.config._attn_implementation == "eager"
        with pytest.raises(fv.FoveateError, match="LlamaModel is not patched"):
            fv.unpatch(network.model)  # the model around it is


def test_weights_from_some_layers_are_copied_too() -> None:
    network = build("llama")
    with fv.patch(network, weights_from=[1]):
        twin = copy.deepcopy(network)
    with torch.no_grad():
        assert len(twin(**left_padded(), output_attentions=True).attentions) == 1
    fv.unpatch(twin)
    with torch.no_grad():
        assert len(twin(**left_padded(), output_attentions=True).attentions) == 2


def test_two_models_of_one_configuration_are_undone_in_any_order() -> None:
    config = build("llama").config
    config._attn_implementation = "eager"
    one, other = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    plain = logits(one), logits(other)
    fv.patch(one, NARROW)
    fv.patch(other, NARROW)
    narrow = logits(other)
    fv.unpatch(one)
    assert torch.equal(logits(other), narrow)
    assert near(logits(one), plain[0])
    fv.unpatch(other)
    assert torch.equal(logits(one), plain[0])
    assert torch.equal(logits(other), plain[1])
    assert config._attn_implementation == "eager"


class Watchful(pickle.Unpickler):
    """Hears of every module that a file asks for."""

    asked: set[str]

    def find_class(self, module: str, name: str) -> Any:
        self.asked.add(module.partition(".")[0])
        return super().find_class(module, name)


def by_torch(network: Any) -> Any:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_pickle(network: Any) -> Any:
    reader = Watchful(io.BytesIO(pickle.dumps(network)))
    reader.asked = set()
    found = reader.load()
    assert "foveate" not in reader.asked
    return found


@pytest.mark.parametrize("save", [by_torch, by_pickle])
@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_what_is_saved_is_the_model_without_the_patch(before: str, save: Callable[[Any], Any]) -> None:
    network = unasked()
    network.set_attn_implementation(before)
    plain = logits(network)
    with fv.patch(network, NARROW):
        narrow = logits(network)
        found = save(network)
        part = save(network.model.layers[1].self_attn)
        assert part.config._attn_implementation == before
        assert torch.equal(logits(network), narrow)
    assert implementations(found) == {before}
    assert not is_patched(found)
    assert torch.equal(logits(found), plain)
    with fv.patch(found, NARROW):
        assert torch.equal(logits(found), narrow)
    assert torch.equal(logits(found), plain)


@pytest.mark.slow
def test_a_file_loads_where_there_is_no_foveate(tmp_path: Path) -> None:
    network = unasked()
    truth = logits(network)
    with fv.patch(network, NARROW):
        torch.save(network, tmp_path / "model.pt")
        network.save_pretrained(tmp_path / "folder")
    torch.save(left_padded(), tmp_path / "inputs.pt")
    torch.save(truth, tmp_path / "truth.pt")
    code = (
        "import sys; sys.modules['foveate'] = None; import torch, transformers\n"
        "inputs, truth = torch.load('inputs.pt'), torch.load('truth.pt')\n"
        "for one in (torch.load('model.pt', weights_only=False), transformers.AutoModelForCausalLM.from_pretrained(\n"
        "        'folder', attn_implementation='eager')):\n"
        "    assert torch.equal(one(**inputs).logits, truth)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert "foveate" not in (tmp_path / "folder" / "config.json").read_text()
