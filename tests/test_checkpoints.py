"""Folders: what is read is what was written, what is broken is one sentence, and no save leaves half a folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import transformers as hf
from torch import nn

import foveate as fv
from foveate import pretrained
from foveate.bench.memory import peak, start
from foveate.checkpoint import safetensors as ours
from foveate.installing import how_to_install
from foveate.models import dit, gpt2, llama

CONFIG = gpt2.Config(vocabulary=13, positions=11, dim=6, layers=2, heads=2, hidden=10)
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def made(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    return gpt2.LanguageModel(gpt2.Config(**{**vars(CONFIG), **more})).eval()


def equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fv.save_pretrained(made(), tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path, said: str) -> None:
    with pytest.raises(fv.InvalidInput, match=said) as caught:
        fv.from_pretrained(folder)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- reading


def test_the_file_is_what_safetensors_writes(folder: Path) -> None:
    found = safetensors.torch.load_file(folder / FILE)
    assert torch.equal(found["transformer.wte.weight"], made().body.word.weight)
    with safetensors.safe_open(folder / FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_dtype_and_shape_goes_there_and_back(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.arange(6).view(2, 3).to(dtype)
        for dtype in ours.WORDS
        if dtype not in (torch.float8_e4m3fn, torch.float8_e5m2)
    } | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "eighth": torch.ones(3).to(torch.float8_e4m3fn)}
    written = {name: ours.Written(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}
    ours.write_safetensors(tmp_path / FILE, written)
    for found in (
        safetensors.torch.load_file(tmp_path / FILE),
        {name: stored.read() for name, stored in ours.stored_in(tmp_path).items()},
    ):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_tensors_that_start_anywhere_are_read(tmp_path: Path) -> None:
    value = torch.randn(5)
    header = json.dumps({
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "x": {"dtype": "F32", "shape": [5], "data_offsets": [3, 23]},
    }).encode()  # fmt: skip
    (tmp_path / FILE).write_bytes(
        len(header).to_bytes(8, "little") + header + b"abc" + bytes(value.view(torch.uint8).tolist())
    )
    found = ours.stored_in(tmp_path)["x"].read()
    assert torch.equal(found, value)
    assert found.data_ptr() % 4 == 0


def test_weights_are_the_file_and_writing_into_them_is_not(folder: Path) -> None:
    before = (folder / FILE).read_bytes()
    model = fv.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (folder / FILE).read_bytes() == before
    assert equal(fv.from_pretrained(folder), made())


def test_dtype_and_device_are_chosen(folder: Path, tmp_path: Path) -> None:
    model = fv.from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert equal(model, made().to(torch.bfloat16))
    fv.save_pretrained(model, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in fv.from_pretrained(tmp_path / "half").parameters()} == {torch.bfloat16}
    assert {p.device.type for p in fv.from_pretrained(folder, device="meta").parameters()} == {"meta"}
    with pytest.raises(fv.InvalidInput, match=r"dtype is torch\.int64"):
        fv.from_pretrained(folder, dtype=torch.int64)


def test_a_model_that_is_to_be_filled_has_no_memory_of_its_own(folder: Path) -> None:
    with pretrained._Hollow():
        model = gpt2.LanguageModel(CONFIG)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_opening_draws_no_random_numbers(folder: Path) -> None:
    state = torch.get_rng_state()
    fv.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_weights_are_one_parameter(folder: Path) -> None:
    model = fv.from_pretrained(folder)
    assert model.head.weight is model.body.word.weight
    assert "lm_head.weight" not in safetensors.torch.load_file(folder / FILE)
    untied = made(tied=False)
    fv.save_pretrained(untied, folder.parent / "untied")
    assert equal(fv.from_pretrained(folder.parent / "untied"), untied)


def _rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = safetensors.torch.load_file(folder / FILE)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / FILE)


def test_a_tied_weight_may_be_there_twice_if_it_is_the_same(folder: Path) -> None:
    _rewritten(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    assert equal(fv.from_pretrained(folder), made())
    _rewritten(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}))
    refused(folder, "body.word.weight is tied, but the file has two different tensors for it")


def test_old_names_and_names_without_the_prefix_are_known(folder: Path) -> None:
    def old(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            older = name.removeprefix("transformer.")
            if ".ln_" in name:
                older = older.replace(".weight", ".gamma").replace(".bias", ".beta")
            tensors[older] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 11, 11)  # the mask of old files

    _rewritten(folder, old)
    assert equal(fv.from_pretrained(folder), made())
    _rewritten(folder, lambda t: t.update({"transformer.wpe.weight": t["wpe.weight"].clone()}))
    refused(folder, r"1 twice: (transformer\.)?wpe.weight beside (transformer\.)?wpe.weight")


@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_shards(writer: str, folder: Path, tmp_path: Path) -> None:
    if writer == "ours":
        fv.save_pretrained(made(), tmp_path / "sharded", shard_size=600)
    else:
        hf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="1KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    assert equal(fv.from_pretrained(tmp_path / "sharded"), made())
    back = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    assert torch.equal(back.transformer.wte.weight, made().body.word.weight)


def _as_bin(folder: Path, **more: Any) -> Path:
    torch.save(safetensors.torch.load_file(folder / FILE) | more.pop("added", {}), folder / "pytorch_model.bin", **more)
    (folder / FILE).unlink()
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files(folder: Path, zipped: bool) -> None:
    _as_bin(folder, _use_new_zipfile_serialization=zipped)
    assert equal(fv.from_pretrained(folder), made())


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("/tmp/should-not-exist-foveate",))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_bin_file_is_not_run(folder: Path, zipped: bool) -> None:
    _as_bin(folder, added={"evil": Evil()}, _use_new_zipfile_serialization=zipped)
    refused(folder, "holds more than tensors")
    assert not Path("/tmp/should-not-exist-foveate").exists()


def test_code_that_a_config_names_is_ignored_and_not_handed_on(folder: Path) -> None:
    said = json.loads((folder / "config.json").read_text())
    said |= {"auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True, "task": "kept"}
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "evil.py").write_text("raise SystemExit")
    model = fv.from_pretrained(folder)
    assert type(model) is gpt2.LanguageModel
    fv.save_pretrained(model, folder.parent / "again")
    again = json.loads((folder.parent / "again" / "config.json").read_text())
    assert "auto_map" not in again
    assert "trust_remote_code" not in again
    assert again["task"] == "kept"


# --------------------------------------------------------------------------------------------------------- bad input


def _config(folder: Path, **more: Any) -> None:
    said = json.loads((folder / "config.json").read_text()) | more
    (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not ...}))


def _cut(folder: Path, at: int) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:at])


def _header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = (folder / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = change(header)
    text = (text if isinstance(text, str) else json.dumps(header)).encode()
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _overlap(header: dict[str, Any]) -> None:
    first, second = sorted((v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"])[:2]
    size = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][1] - 4, first["data_offsets"][1] - 4 + size]


def _twice(header: dict[str, Any]) -> str:
    name = next(k for k in header if k != "__metadata__")
    return json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'


def _set(header: dict[str, Any], **values: Any) -> None:
    header["transformer.ln_f.bias"].update(values)


def _index(folder: Path, content: Any) -> None:
    (folder / INDEX).write_text(json.dumps(content))
    (folder / FILE).rename(folder / "one.safetensors")


def _map(folder: Path, **places: str) -> dict[str, Any]:
    names = safetensors.torch.load_file(folder / FILE)
    return {"weight_map": dict.fromkeys(names, "one.safetensors") | places}


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda d: (d / FILE).unlink(), "has no weights: wanted model.safetensors, "),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "holds a list: wanted a JSON object"),
    "config has bytes": (lambda d: (d / "config.json").write_bytes(b"\xff\x00"), "config.json is not JSON"),
    "a key twice": (
        lambda d: (d / "config.json").write_text('{"model_type": "gpt2", "model_type": "gpt2"}'), "'model_type' twice"
    ),
    "family": (lambda d: _config(d, model_type="gtp2"), "unknown family 'gtp2': did you mean 'gpt2'"),
    "no family": (lambda d: _config(d, model_type=...), "unknown family None: the known ones are .*gpt2"),
    "family is a list": (lambda d: _config(d, model_type=["gpt2"]), "unknown family"),
    "architecture": (
        lambda d: _config(d, architectures=["GPT2DoubleHeadsModel"]), "unknown architecture of gpt2 'GPT2DoubleHeads"
    ),
    "architectures": (lambda d: _config(d, architectures={"a": 1}), "unknown architecture of gpt2"),
    "quantized": (lambda d: _config(d, quantization_config={"bits": 4}), "quantized"),
    "a word for a number": (lambda d: _config(d, n_layer="two"), "n_layer is 'two': wanted int"),
    "true for a number": (lambda d: _config(d, n_layer=True), "n_layer is True: wanted int"),
    "a negative number": (lambda d: _config(d, n_layer=-1), "n_layer is -1: wanted a number from 0"),
    "null": (lambda d: _config(d, n_embd=None), "n_embd is None: wanted int"),
    "activation": (lambda d: _config(d, activation_function="mish"), "activation is 'mish'"),
    "setting": (
        lambda d: _config(d, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"
    ),
    "heads": (lambda d: _config(d, n_head=4), "dim 6 does not divide into 4 heads"),
    "shapes": (lambda d: _config(d, n_inner=9), r"6 of another shape: .*\[6, 10\] instead of \[6, 9\]"),
    "more layers": (lambda d: _config(d, n_layer=3), "12 missing: transformer.h.2.* and 2 more"),
    "fewer layers": (lambda d: _config(d, n_layer=1), "12 unexpected: transformer.h.1"),
    "cut in the length": (lambda d: _cut(d, 5), "cut short"),
    "cut in the header": (lambda d: _cut(d, 200), "cut short"),
    "cut in a tensor": (lambda d: _cut(d, -7), "is cut short"),
    "empty": (lambda d: _cut(d, 0), "cut short"),
    "longer": (lambda d: (d / FILE).write_bytes((d / FILE).read_bytes() + b"0"), "has bytes after its last tensor"),
    "overlap": (lambda d: _header(d, _overlap), "overlap"),
    "twice in a header": (lambda d: _header(d, _twice), "the header of .* has the key .* twice"),
    "dtype": (lambda d: _header(d, lambda h: _set(h, dtype="F31")), "dtype of transformer.ln_f.bias is F31"),
    "size": (lambda d: _header(d, lambda h: _set(h, shape=[7])), r"F32 \[7\] in bytes .*: wanted 28"),
    "negative shape": (lambda d: _header(d, lambda h: _set(h, shape=[-6])), "wanted dtype, shape and data_offsets"),
    "no offsets": (lambda d: _header(d, lambda h: _set(h, data_offsets=[0])), "wanted dtype, shape and data_offsets"),
    "negative offsets": (lambda d: _header(d, lambda h: _set(h, data_offsets=[-24, 0])), "in bytes -24 to 0"),
    "header is no object": (lambda d: _header(d, lambda h: "[1]"), "the header of .* holds a list"),
    "header is nested": (lambda d: _header(d, lambda h: "[" * 100000), "the header of .* is not JSON"),
    "index without a map": (lambda d: _index(d, {}), "has no weight_map"),
    "index of numbers": (lambda d: _index(d, {"weight_map": {"a": 1}}), "has no weight_map"),
    "index leaves": (lambda d: _index(d, _map(d, x="../one.safetensors")), "places tensors in '../one.safetensors'"),
    "index goes to the root": (lambda d: _index(d, _map(d, x="/etc/x.safetensors")), "wanted the name of a"),
    "index names another kind": (lambda d: _index(d, _map(d, x="pytorch_model.bin")), "wanted the name of a"),
    "a shard is lost": (lambda d: _index(d, _map(d, x="two.safetensors")), "two.safetensors, which is not in"),
    "a tensor is lost": (lambda d: _index(d, _map(d, x="one.safetensors")), "places x in one.safetensors, where there"),
    "bin is no file of torch": (
        lambda d: (_as_bin(d) / "pytorch_model.bin").write_bytes(b"hello"), "holds more than tensors|cannot be read"
    ),
    "bin is empty": (lambda d: (_as_bin(d) / "pytorch_model.bin").write_bytes(b""), "cannot be read"),
    "bin is cut": (
        lambda d: (_as_bin(d) / "pytorch_model.bin").write_bytes((d / "pytorch_model.bin").read_bytes()[:-300]),
        "cannot be read",
    ),
    "bin is a list": (lambda d: torch.save([torch.ones(1)], _as_bin(d) / "pytorch_model.bin"), "holds a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_sentence(name: str, folder: Path) -> None:
    break_it, said = BROKEN[name]
    break_it(folder)
    refused(folder, said)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    places = _map(folder)
    (folder / "two.safetensors").write_bytes((folder / FILE).read_bytes())
    places["weight_map"]["transformer.ln_f.bias"] = "two.safetensors"
    _index(folder, places)
    refused(folder, "has a tensor .* wanted each once")


def test_all_complaints_come_at_once(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["transformer.ln_f.bias"]
        tensors["extra"] = torch.ones(1)
        tensors["transformer.wpe.weight"] = torch.ones(11, 5)

    _rewritten(folder, change)
    refused(
        folder,
        r"1 missing: transformer.ln_f.bias; 1 unexpected: extra; 1 of another shape: transformer.wpe.weight \[11, 5\] "
        r"instead of \[11, 6\]",
    )


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "/nowhere", "a b", "", 7])
def test_what_is_no_folder_is_one_sentence(name: Any) -> None:
    with pytest.raises(fv.InvalidInput, match=r"no folder|wanted a folder"):
        fv.from_pretrained(name)


# --------------------------------------------------------------------------------------------------------------- hub


def test_ids_go_through_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.extend([name, *allow_patterns])
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert equal(fv.from_pretrained("someone/model"), made())
    assert asked[0] == "someone/model"
    assert not [pattern for pattern in asked if pattern.endswith((".py", "bin"))]
    _as_bin(folder)
    assert equal(fv.from_pretrained("someone/model"), made())
    assert "pytorch_model.bin" in asked


def test_without_the_hubs_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(fv.InvalidInput, match=re.escape(how_to_install("hf"))):
        fv.from_pretrained("someone/model")


def test_what_the_hub_has_not_is_one_sentence() -> None:
    with pytest.raises(fv.InvalidInput, match="the hub does not give it"):
        fv.from_pretrained("someone/model")


# ------------------------------------------------------------------------------------------------------------ saving


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("first", "second"), [(10**9, 600), (600, 10**9), (600, 900), (10**9, 10**9)])
def test_new_weights_take_the_place_of_the_old_ones(first: int, second: int, tmp_path: Path) -> None:
    target = tmp_path / "model"
    fv.save_pretrained(made(), target, shard_size=first)
    (target / "tokenizer.json").write_text("kept")
    (target / "model-of-mine.safetensors").write_text("kept")
    model = fv.from_pretrained(target)
    with torch.no_grad():
        model.body.norm.bias.add_(1)  # written while the old file is mapped
    fv.save_pretrained(model, target, shard_size=second)
    assert equal(fv.from_pretrained(target), model)
    assert torch.equal(hf.AutoModelForCausalLM.from_pretrained(target).transformer.ln_f.bias, torch.ones(CONFIG.dim))
    shards = {name for name in files(target) if name.startswith("model-")} - {"model-of-mine.safetensors"}
    if second == 10**9:
        assert files(target) == {"config.json", FILE, "tokenizer.json", "model-of-mine.safetensors"}
    else:
        assert shards == set(json.loads((target / INDEX).read_text())["weight_map"].values())
    assert (target / "tokenizer.json").read_text() == (target / "model-of-mine.safetensors").read_text() == "kept"


def made_for_diffusers() -> nn.Module:
    torch.manual_seed(0)
    return dit.ClassToImage(dit.Config(image=4, heads=1, head_dim=8, layers=1, classes=3)).eval()


SAVES = [
    *[(made, *sizes) for sizes in ((10**9, 600), (600, 10**9), (600, 600), (10**9, 10**9))],
    *[(made_for_diffusers, *sizes) for sizes in ((10**9, 9000), (9000, 10**9))],
]


@pytest.mark.parametrize(("make", "first", "second"), SAVES)
def test_an_interrupted_save_leaves_the_old_model_or_the_new_one(
    make: Callable[[], nn.Module], first: int, second: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make(), make()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1)
    steps = 0
    real = {name: getattr(os, name) for name in ("replace", "unlink", "fsync", "rename")}

    def stopping(name: str, after: int) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps > after:
                raise KeyboardInterrupt
            return real[name](*args, **kwargs)

        return step

    seen = set()
    for after in range(60):
        target = tmp_path / str(after)
        fv.save_pretrained(old, target, shard_size=first)
        steps = 0
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, stopping(name, after))
            try:
                fv.save_pretrained(new, target, shard_size=second)
                done = True
            except KeyboardInterrupt:
                done = False
        found = fv.from_pretrained(target)
        assert equal(found, old) or equal(found, new)
        seen.add(equal(found, new))
        if done:
            assert equal(found, new)
            break
    assert done
    assert seen == {True, False}


def test_a_killed_save_of_a_new_folder_leaves_none(tmp_path: Path) -> None:
    program = f"""
import os, signal
import foveate as fv
from foveate.checkpoint import folder
from foveate.models import gpt2
write = folder.write_safetensors
def killed(path, tensors):
    write(path, tensors)
    os.kill(os.getpid(), signal.SIGKILL)
folder.write_safetensors = killed
model = gpt2.LanguageModel(gpt2.Config(vocabulary=13, positions=11, dim=6, layers=2, heads=2))
fv.save_pretrained(model, {str(tmp_path / "model")!r})
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert not (tmp_path / "model").exists()
    fv.save_pretrained(made(), tmp_path / "model")
    assert equal(fv.from_pretrained(tmp_path / "model"), made())


def test_another_model_is_not_overwritten(folder: Path) -> None:
    for other in (made(layers=1), gpt2.Model(CONFIG)):
        with pytest.raises(fv.InvalidInput, match="holds another model"):
            fv.save_pretrained(other, folder)
    assert equal(fv.from_pretrained(folder), made())


def test_a_folder_with_other_files_is_filled(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("kept")
    fv.save_pretrained(made(), tmp_path)
    assert files(tmp_path) == {"notes.txt", "config.json", FILE}
    assert equal(fv.from_pretrained(tmp_path), made())


def test_what_cannot_be_saved_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(fv.InvalidInput, match=r"Linear is no model of foveate\.models"):
        fv.save_pretrained(nn.Linear(2, 2), tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(fv.InvalidInput, match="is a file"):
        fv.save_pretrained(made(), tmp_path / "file")
    with pytest.raises(fv.InvalidInput, match="shard_size is 0"):
        fv.save_pretrained(made(), tmp_path / "x", shard_size=0)
    assert not (tmp_path / "x").exists()


def test_the_progress_bar_is_for_terminals_with_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretrained._shown([1, 2], "Loading") == [1, 2]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(pretrained._shown([1, 2], "Loading")) == [1, 2]
    assert pretrained._shown([1, 2], "Loading") != [1, 2]
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert pretrained._shown([1, 2], "Loading") == [1, 2]


LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a while is asked of Linux")


@LINUX
def test_opening_takes_no_memory_and_reading_each_weight_once(folder: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = llama.LanguageModel(llama.Config(vocabulary=5000, dim=512, layers=4, heads=8, hidden=1365))
    fv.save_pretrained(model.to_empty(device="cpu"), tmp_path / "large")
    size = (tmp_path / "large" / FILE).stat().st_size
    assert size > 60e6
    del model
    fv.from_pretrained(folder)  # what is loaded and started once
    before = start()
    model = fv.from_pretrained(tmp_path / "large")
    assert peak() - before < 0.1 * size
    for parameter in model.parameters():
        parameter.detach().view(torch.uint8).max()
    assert peak() - before < 1.1 * size


LLAMA = llama.LanguageModel, llama.Config(vocabulary=5000, dim=1024, layers=19, heads=16, hidden=2730)
GPT2 = gpt2.LanguageModel, gpt2.Config(vocabulary=5000, dim=1024, layers=19, heads=16, tied=False)


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize(("kind", "opening"), [(LLAMA, 0.05), (GPT2, 1.05)])
def test_opening_a_gigabyte_makes_no_second_copy(kind: Any, opening: float, folder: Path, tmp_path: Path) -> None:
    """Most weights are the file's own pages; GPT-2's matrices lie the other way there, and each is copied once.

    In a process of its own, the peak beyond what was held before: opened; all of it read; narrowed to two bytes.
    """
    module, config = kind
    with torch.device("meta"):
        model = module(config)
    fv.save_pretrained(model.to_empty(device="cpu"), tmp_path / "large")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert 0.95e9 < size < 1.05e9
    del model
    program = f"""
import torch
import foveate as fv
from foveate.bench.memory import peak, start

fv.from_pretrained({str(folder)!r})  # what is loaded and started once
large, before = {str(tmp_path / "large")!r}, start()
model = fv.from_pretrained(large)
opened = peak() - before
for parameter in model.parameters():
    parameter.detach().view(torch.uint8).max()
read = peak() - before
del model, parameter
before = start()
fv.from_pretrained(large, dtype=torch.bfloat16)
print(opened, read, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    opened, read, narrowed = (int(grown) / size for grown in done.stdout.split())
    assert opened < opening
    assert read < 1.05
    assert narrowed < 0.75
