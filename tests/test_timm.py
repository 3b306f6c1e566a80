"""timm's models of random weights: the same on our layer and under `accelerate()`, and patterns that narrow them."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vision import load_timm

import foveate as fv
from foveate.installing import how_to_install
from foveate.integrations.timm import attention

if find_spec("timm") is None:
    pytest.skip("timm is not installed: make test-timm runs these", allow_module_level=True)

SIDE = 5  # patches
TOKENS = SIDE * SIDE + 1
VIT = {"img_size": 16 * SIDE, "depth": 2, "embed_dim": 48, "num_heads": 4, "num_classes": 7}


def picture(side: int = 16 * SIDE) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def sharpened(model: Any) -> Any:
    """Far from uniform weights, or a fault would not be seen."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("qkv.weight"):
                weight[: 2 * len(weight) // 3] *= 20
    return model.eval()


def made(name: str = "vit_tiny_patch16_224", **more: Any) -> Any:
    torch.manual_seed(0)
    return sharpened(load_timm().create_model(name, **{**VIT, **more}))


def pair(pattern: fv.Pattern | None = None, **more: Any) -> tuple[Any, Any]:
    """A model as timm makes it, and one of the same weights on our layer."""
    theirs, ours = made(**more), made(**more, attn_layer=attention(pattern))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def results(model: Any, x: Tensor, **more: Any) -> list[Tensor]:
    """The output, and the gradients of all parameters."""
    out = model(x, **more)
    parameters = [weight for _, weight in sorted(model.named_parameters())]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), parameters)]


def assert_alike(found: list[Tensor], wanted: list[Tensor]) -> None:
    """The output to 1e-5 of its largest value, gradients to 1e-4 of theirs."""
    for tolerance, mine, theirs in ((1e-5, found[:1], wanted[:1]), (1e-4, found[1:], wanted[1:])):
        most = max((x.abs().max() for x in theirs), default=0)
        for one, other in zip(mine, theirs, strict=True):
            assert (one - other).abs().max() <= tolerance * most


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"qk_norm": True},
        {"qkv_bias": False},
        {"scale_attn_norm": True},
        {"reg_tokens": 2},
    ],
    ids=str,
)
def test_our_layer_computes_what_timms_does(more: dict[str, Any]) -> None:
    theirs, ours = pair(**more)
    assert_alike(results(ours, picture()), results(theirs, picture()))


@pytest.mark.parametrize("name", ["pattern", "function of all"])
def test_a_pattern_does_what_its_mask_would(name: str) -> None:
    pattern = fv.neighborhood(2, SIDE, start=1) | fv.global_tokens([0]) if name == "pattern" else ~fv.prefix(3)
    theirs, ours = pair(pattern)
    mask = pattern.dense(TOKENS, TOKENS)
    found = results(ours, picture())
    assert_alike(found, results(theirs, picture(), attn_mask=mask))
    whole = theirs(picture())
    assert (found[0] - whole).abs().max() > 1e-2 * whole.abs().max()


def test_it_is_narrowed_whatever_timm_fuses() -> None:
    """`set_fused_attn(False)` makes timm's own layers compute without PyTorch's attention; ours it does not touch."""
    layers = load_timm().layers
    pattern = fv.neighborhood(2, SIDE, start=1) | fv.global_tokens([0])
    want = results(pair(pattern)[1], picture())
    layers.set_fused_attn(False)
    try:
        theirs, ours = pair(pattern)
    finally:
        layers.set_fused_attn(True)
    assert not theirs.blocks[0].attn.fused_attn
    assert all(map(torch.equal, results(ours, picture()), want))
    assert_alike(want, results(theirs, picture(), attn_mask=pattern.dense(TOKENS, TOKENS)[0, 0]))


def test_a_model_that_takes_our_layer_and_does_not_use_it_shows_no_pattern() -> None:
    """Blocks that attend beside their MLP (`vit_…_xp`) ignore attn_layer, in timm as well."""
    assert made(attn_layer=attention(fv.window(2))).__repr__().count("pattern=window(2)") == 2
    assert "pattern=" not in repr(made("vit_base_patch16_xp_224", attn_layer=attention(fv.window(2))))


def test_a_mask_of_the_caller_and_the_pattern_hold_both() -> None:
    pattern = fv.neighborhood(2, SIDE, start=1) | fv.global_tokens([0])
    theirs, ours = pair(pattern)
    keep = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.7
    keep[:, 0] = True
    both = keep & pattern.dense(TOKENS, TOKENS)
    added = torch.zeros(TOKENS, TOKENS).masked_fill(~keep, -math.inf)
    want = results(theirs, picture(), attn_mask=both)
    for mask in (keep, added):
        assert_alike(results(ours, picture(), attn_mask=mask), want)


def test_grouped_heads_equal_repeated_ones() -> None:
    """Of a model with fewer key heads, against timm's own with each of them repeated."""
    few = made(attn_layer=attention(key_heads=2))
    theirs = made()
    state = few.state_dict()
    for name in [name for name in state if ".qkv." in name]:
        parts = state[name].split((48, 24, 24))
        repeated = [x.unflatten(0, (2, 12)).repeat_interleave(2, 0).flatten(0, 1) for x in parts[1:]]
        state[name] = torch.cat([parts[0], *repeated])
    theirs.load_state_dict(state)
    assert few.blocks[0].attn.qkv.out_features == 96
    assert_alike([few(picture()).detach()], [theirs(picture()).detach()])


def test_key_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(fv.InvalidInput, match="key_heads is 3: wanted a number that divides the 4 heads"):
        made(attn_layer=attention(key_heads=3))
    with pytest.raises(fv.InvalidInput, match="key_heads"):
        attention(key_heads=0)


def test_without_timm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.layers", None)
    with pytest.raises(fv.InvalidInput, match=re.escape(f"needs timm: {how_to_install('timm')}")):
        attention()


def test_what_the_page_shows_runs() -> None:
    load_timm()
    page = (Path(__file__).parent.parent / "docs" / "use-it.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(import timm\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(block, {})


@pytest.mark.parametrize("name", ["vit", "swin"])
@pytest.mark.usefixtures("_nothing_stays", "_ours")
def test_accelerate_reaches_timm(name: str) -> None:
    """Its Swin calls PyTorch's attention where `set_fused_attn(True, experimental=True)` asks for it."""
    timm = load_timm()
    if name == "vit":
        model, x = made(), picture()
    else:
        timm.layers.set_fused_attn(True, experimental=True)
        torch.manual_seed(0)
        sizes = {"img_size": 56, "window_size": 7, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)}
        model = sharpened(timm.create_model("swin_tiny_patch4_window7_224", num_classes=7, **sizes))
        timm.layers.set_fused_attn(True)
        x = picture(56)
    before = results(model, x)
    with fv.accelerate() as acceleration, torch.no_grad():
        quick = model(x)
    count = {"vit": 2, "swin": 4}[name]
    assert acceleration.report().foveate == {("forward", ""): count}
    assert_alike([quick], before[:1])
    with fv.accelerate() as acceleration:
        during = results(model, x)
    assert_alike(during, before)
    # Swin learns its bias by position, and only PyTorch's formula has a gradient of a mask.
    learned = {("forward", "the mask needs a gradient"): count}
    assert acceleration.report().pytorch == ({} if name == "vit" else learned)
    assert all(map(torch.equal, results(model, x), before))


@pytest.mark.parametrize("key_heads", [None, 2])
def test_copies_and_files_of_a_model_compute_the_same(key_heads: int | None) -> None:
    load_timm()
    pattern = fv.neighborhood(2, SIDE, start=1) | fv.global_tokens([0])
    model = made(attn_layer=attention(pattern, key_heads=key_heads))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(picture()), model(picture()))
        assert repr(twin) == repr(model)
