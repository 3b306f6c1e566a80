"""`narrow` narrows what attends among its own tokens, all of it and nothing else, or says why not."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import io
import math
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import denoisers
import jaxtyping
import pytest
import torch
from denoisers import IMAGE, TEXT, Denoiser, made
from torch import Tensor, nn

import foveate as fv
from foveate.integrations.diffusers import narrow, undo

NAMES = [each.__name__ for each in denoisers.ALL]
NEAR = fv.window(2)


def grid(places: int) -> fv.Pattern:
    return fv.neighborhood(2, math.isqrt(places))


def near(queries: int, keys: int) -> Tensor:
    """Keys beyond as many as there are queries are others' and stand first: all see them."""
    seen = NEAR.dense(queries, queries).view(queries, queries)
    return torch.cat([torch.ones(queries, keys - queries, dtype=torch.bool), seen], 1)


def assert_alike(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def assert_differ(found: Tensor, other: Tensor) -> None:
    assert (found - other).abs().max() > 1e-3 * other.abs().max()


@contextmanager
def processors(model: nn.Module, new: Any, *parts: str) -> Iterator[None]:
    layers = [layer for name, layer in model.named_modules() if hasattr(layer, "set_processor")
              and (not parts or any(f".{part}." in f".{name}." for part in parts))]  # fmt: skip
    own = [layer.processor for layer in layers]
    for layer in layers:
        layer.set_processor(new)
    yield
    for layer, processor in zip(layers, own, strict=True):
        layer.set_processor(processor)


def refused(match: str) -> Any:
    return pytest.raises(fv.InvalidInput, match=match)


@pytest.mark.parametrize("name", NAMES)
def test_what_attends_among_its_own_tokens_is_narrowed(name: str) -> None:
    one = made(name)
    plain = one.out()
    with narrow(one.model, NEAR) as narrowed:
        found = one.out()
        assert list(narrowed.layers) == one.layers()
    assert_alike(found, one.masked(near, one.layers()))
    assert_differ(found, plain)
    assert torch.equal(one.out(), plain)


@pytest.mark.parametrize("family", [denoisers.ltx, denoisers.wan, denoisers.any_flow, denoisers.pixart])
def test_a_text_as_long_as_the_picture_is_still_no_picture(family: Any) -> None:
    one: Denoiser = family(text=IMAGE)
    with narrow(one.model, grid) as narrowed:
        found = one.out()
        assert list(narrowed.layers) == one.layers()
    assert_alike(found, one.masked(lambda queries, _: grid(queries).dense(queries, queries), one.layers()))


@pytest.mark.parametrize("name", ["ltx", "wan", "any_flow"])
def test_a_layer_that_attends_to_the_text_is_narrowed_by_name(name: str) -> None:
    one = made(name)
    with narrow(one.model, fv.prefix(3), layers=["attn2"]) as narrowed:
        found = one.out()
        assert list(narrowed.layers) == one.layers("attn2")
    to_text = one.masked(lambda queries, keys: fv.prefix(3).dense(queries, keys, query_start=0), one.layers("attn2"))
    assert_alike(found, to_text)
    assert_differ(found, one.out())


def test_layers_that_only_attend_to_a_text_are_not_narrowed_in_silence() -> None:
    """SanaWM has processors for those alone."""
    from diffusers.models.transformers.transformer_sana_wm import MultiHeadCrossAttention

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross_attn = MultiHeadCrossAttention(16, 2)

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            return self.cross_attn(x, text)

    torch.manual_seed(0)
    block, x, text = Block(), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    with (
        narrow(block, NEAR),
        refused(r"narrowed nothing: .* \(cross_attn\); say by layers="),
    ):
        block(x, text)
    with narrow(block, NEAR, layers=["cross_attn"]):
        found = block(x, text)
    with denoisers.masked(block, near, ["cross_attn"]):
        assert_alike(found, block(x, text))


def _other_ways() -> dict[str, Any]:
    from diffusers.models import attention_processor as those

    class Own:
        def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return attn.to_out[0](attn.to_v(hidden_states))

    return {
        "AttnProcessor": those.AttnProcessor(),
        "SlicedAttnProcessor": those.SlicedAttnProcessor(1),
        "CustomDiffusionAttnProcessor": those.CustomDiffusionAttnProcessor(False, False, 16),
        "SanaLinearAttnProcessor2_0": those.SanaLinearAttnProcessor2_0(),
        "Own": Own(),
    }


@pytest.mark.parametrize(
    "way",
    ["AttnProcessor", "SlicedAttnProcessor", "CustomDiffusionAttnProcessor", "SanaLinearAttnProcessor2_0", "Own"],
)
@pytest.mark.parametrize("named", [False, True])
def test_a_processor_that_attends_in_another_way_is_an_error(way: str, named: bool) -> None:
    one = made("pixart")
    layers = ["attn1"] if named else None
    said = rf"^transformer_blocks\.0\.attn1 \(Attention with {way}\) did not call .*scaled_dot_product_attention"
    with processors(one.model, _other_ways()[way], "attn1"), narrow(one.model, NEAR, layers=layers), refused(said):
        one.out()
    with narrow(one.model, NEAR), processors(one.model, _other_ways()[way], "attn1"), refused(said):
        one.out()


def test_other_processors_of_what_is_not_narrowed_are_no_matter() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    one = made("pixart")
    want = one.masked(near, one.layers())
    with processors(one.model, AttnProcessor(), "attn2"), narrow(one.model, NEAR):
        assert_alike(one.out(), want)


def test_processors_may_change_meanwhile() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    one = made("pixart")
    want = one.masked(near, one.layers())
    with narrow(one.model, NEAR), processors(one.model, AttnProcessor2_0()):
        assert_alike(one.out(), want)


def test_slicing_and_added_keys_without_it_are_errors() -> None:
    from diffusers.models.attention_processor import AttnAddedKVProcessor

    one = denoisers.added_keys()
    with (
        narrow(one.model, NEAR),
        processors(one.model, AttnAddedKVProcessor()),
        refused("with AttnAddedKVProcessor\\) did not call"),
    ):
        one.out()
    one.model.set_attention_slice("max")
    with (
        narrow(one.model, NEAR),
        refused("with SlicedAttnAddedKVProcessor\\) did not call"),
    ):
        one.out()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")  # by diffusers
@pytest.mark.parametrize("name", ["ltx", "flux", "qwen_image"])
def test_another_backend_of_diffusers_is_an_error_and_native_ones_are_none(name: str) -> None:
    one = denoisers.__dict__[name]()
    want = one.masked(near, one.layers())
    one.model.set_attention_backend("flex")
    with (
        narrow(one.model, NEAR),
        refused(r"^transformer_blocks\.0\.attn1? .* on flex\) did"),
    ):
        one.out()
    one.model.set_attention_backend("_native_math")
    with narrow(one.model, NEAR):
        assert_alike(one.out(), want)


def test_an_ip_adapter_leaves_what_is_narrowed_narrowed() -> None:
    """In Flux the picture's tokens also attend to those of an image prompt, as many as they like: these stay seen."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    one = denoisers.flux()
    torch.manual_seed(0)
    adapter = FluxIPAdapterAttnProcessor(16, 13, num_tokens=(IMAGE,))
    prompt = {"ip_hidden_states": [torch.randn(2, IMAGE, 13)]}
    one.model.encoder_hid_proj = lambda states: states
    one.inputs["joint_attention_kwargs"] = prompt
    with processors(one.model, adapter, "transformer_blocks"):
        want = one.masked(lambda queries, keys: near(queries, keys) if keys > IMAGE else None, one.layers())
        for layers in (None, ["attn"]):
            with narrow(one.model, NEAR, layers=layers):
                assert_alike(one.out(), want)


def test_a_text_and_an_image_prompt_cannot_both_be_meant() -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0

    one = denoisers.pixart()
    torch.manual_seed(0)
    for kind, said in (
        (IPAdapterAttnProcessor2_0, "attends to several sequences"),
        (IPAdapterAttnProcessor, "did not call"),
    ):
        layer = one.model.transformer_blocks[0].attn2
        layer.set_processor(kind(16, 16, num_tokens=(3,)))
        given = torch.randn(2, IMAGE, 16), (torch.randn(2, TEXT, 16), [torch.randn(2, 1, 3, 16)])
        plain = layer(*given)
        with narrow(layer, NEAR, layers=[""]), refused(rf"{kind.__name__}\) {said}"):
            layer(*given)
        assert torch.equal(layer(*given), plain)


def test_what_a_cache_gives_was_narrowed_when_it_was_computed() -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    one = denoisers.cogvideox()
    want = one.masked(near, one.layers())
    every_other = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: 500, spatial_attention_block_identifiers=("transformer_blocks",),
    )  # fmt: skip
    one.model.enable_cache(every_other)
    with narrow(one.model, NEAR):
        for _ in range(3):
            assert_alike(one.out(), want)


PLACES = {
    "sd3": "last",
    "hunyuan_video": "last",
    "flux": "first",
    "qwen_image": "first",
    "cogvideox": "first",
    "lumina2": "first",
}
JOINT = {"hunyuan_video": ["transformer_blocks", "single_transformer_blocks"], "lumina2": ["layers"]}


def around(place: str) -> Tensor:
    """Joint attention: the grid among the picture's tokens; text sees all and is seen by all."""
    seen = torch.ones(IMAGE + TEXT, IMAGE + TEXT, dtype=torch.bool)
    start = TEXT if place == "first" else 0
    seen[start : start + IMAGE, start : start + IMAGE] = grid(IMAGE).dense(IMAGE, IMAGE).view(IMAGE, IMAGE)
    return seen


@pytest.mark.parametrize("name", PLACES)
def test_a_pattern_may_be_about_the_picture_in_joint_attention(name: str) -> None:
    one, place = made(name), PLACES[name]
    layers = JOINT.get(name)
    joint = one.layers(*layers or ())
    want = one.masked(lambda *_: around(place), joint)
    assert_differ(want, one.out())
    behind, before = (slice(TEXT, None), slice(-IMAGE, None)), (slice(None, -TEXT), slice(0, IMAGE))
    for image in behind if place == "first" else before:
        with narrow(one.model, grid, layers=layers, image=image):
            assert_alike(one.out(), want)
    if name != "lumina2":  # whose layers get text and picture as one
        wrong = before[0] if place == "first" else behind[0]
        with (
            narrow(one.model, grid, layers=layers, image=wrong),
            refused(rf"has its own {IMAGE} tokens at image=slice\("),
        ):
            one.out()


@pytest.mark.parametrize("name", ["sd3", "hunyuan_video", "lumina2"])
def test_layers_without_a_text_are_noticed(name: str) -> None:
    """SD3.5 has layers among the picture alone, refiners are among the picture or the text alone."""
    one = denoisers.sd3(dual=(1,)) if name == "sd3" else made(name)
    image = slice(TEXT, None) if PLACES[name] == "first" else slice(None, -TEXT)
    with narrow(one.model, grid, image=image), refused("layers="):
        one.out()


def test_the_picture_alone_is_narrowed_under_gradients_and_masks() -> None:
    from foveate.integrations.sdpa_with_pattern import narrowed_among

    q, k, v = (torch.randn(2, 3, 11, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 1, 11, 11) < 0.8
    added = torch.randn(11, 11, dtype=torch.float64)
    within = torch.ones(11, 11, dtype=torch.bool)
    within[2:9, 2:9] = NEAR.dense(7, 7).view(7, 7)
    for given, seen in ((None, within), (mask, within & mask), (added, added.masked_fill(~within, -torch.inf))):
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
        found = narrowed_among(range(2, 9), NEAR, q, k, v, given)
        assert (found - want).abs().max() < 1e-13
        for mine, theirs in zip(
            *(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, want)), strict=True
        ):
            assert (mine - theirs).abs().max() < 1e-12 * theirs.abs().max()
    with refused("a causal call"):
        narrowed_among(range(2, 9), NEAR, q, k, v, is_causal=True)


def test_a_wrong_image_is_one_sentence() -> None:
    one = made("flux")
    for image in (7, slice(0, 9, 2)):
        with refused(r"wanted where its tokens stand, such as slice\(77, None\)"):
            narrow(one.model, grid, image=image)  # type: ignore[arg-type]
    with (
        narrow(one.model, grid, image=slice(900, None)),
        refused(r"of which image=.* are 0"),
    ):
        one.out()
    with narrow(one.model, grid, image=slice(TEXT, None)), refused("is narrowed with image=slice"):
        narrow(one.model, grid)


def test_two_narrowings_hold_both_and_end_in_any_order() -> None:
    one = made("ltx")
    plain, wide = one.out(), fv.window(5)
    first, second = narrow(one.model, NEAR, layers=["attn1"]), narrow(one.model, grid)
    both = one.out()
    first.undo()
    first.undo()
    with_second = one.out()
    second.undo()
    assert torch.equal(one.out(), plain)
    assert not [module for module in one.model.modules() if type(module).__module__.startswith("foveate")]
    pattern = NEAR & grid(IMAGE)
    assert_alike(both, one.masked(lambda queries, _: pattern.dense(queries, queries), one.layers()))
    assert_alike(with_second, one.masked(lambda queries, _: grid(queries).dense(queries, queries), one.layers()))
    with narrow(one.model, wide), pytest.raises(ZeroDivisionError), narrow(one.model, NEAR):
        raise ZeroDivisionError
    assert torch.equal(one.out(), plain)


def test_a_copy_is_narrowed_as_the_original_is_and_what_is_saved_is_not() -> None:
    one = made("wan")
    plain = one.out()
    with narrow(one.model, NEAR):
        found = one.out()
        twin = Denoiser(copy.deepcopy(one.model), one.inputs, one.own)
        saved = io.BytesIO()
        torch.save(one.model, saved)
    assert b"foveate" not in saved.getvalue()
    saved.seek(0)
    assert torch.equal(Denoiser(torch.load(saved, weights_only=False), one.inputs, ()).out(), plain)
    assert torch.equal(one.out(), plain)
    assert torch.equal(twin.out(), found)
    undo(twin.model)
    assert torch.equal(twin.out(), plain)
    assert type(twin.model) is type(one.model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_after_the_end_recomputes_what_the_forward_was(reentrant: bool) -> None:
    """Activation checkpointing: narrowed forwards are recomputed narrowed, and others as they were."""
    from torch.utils.checkpoint import checkpoint

    one = denoisers.sd3()
    inputs = {name: x.clone().requires_grad_() for name, x in one.inputs.items()}

    def gradients(narrowed: tuple[bool, bool]) -> list[Tensor]:
        one.model.zero_grad()
        narrowing = narrow(one.model, NEAR) if narrowed[0] else None
        loss = one.model(**inputs).sample.square().sum()
        if narrowing and not narrowed[1]:
            narrowing.undo()
        elif narrowed[1] and not narrowing:
            narrowing = narrow(one.model, NEAR)
        loss.backward()
        if narrowing:
            narrowing.undo()
        return [weight.grad for weight in one.model.parameters() if weight.grad is not None]

    want = {forward: gradients((forward, forward)) for forward in (True, False)}
    one.model.train()
    again = functools.partial(checkpoint, use_reentrant=reentrant)
    one.model.enable_gradient_checkpointing(lambda block, *given: again(block.__call__, *given))
    for forward, backward in ((True, True), (True, False), (False, False), (False, True), (True, False)):
        found = gradients((forward, backward))
        for mine, theirs in zip(found, want[forward], strict=True):
            assert_alike(mine, theirs)


@pytest.fixture
def _shapes_unchecked() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)  # the tracer cannot follow the run-time checks of shapes
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def compiled_whole(one: Denoiser) -> Denoiser:
    return Denoiser(torch.compile(one.model, fullgraph=True, backend="aot_eager"), one.inputs, one.own)


@pytest.mark.slow
@pytest.mark.usefixtures("_shapes_unchecked")
def test_a_compiled_model_is_narrowed_and_freed() -> None:
    one = denoisers.ltx(text=IMAGE)
    del one.model.transformer_blocks[1]
    compiled = compiled_whole(one)
    plain = one.out()
    assert_alike(compiled.out(), plain)
    with narrow(one.model, NEAR):
        want = one.out()
        assert_alike(compiled.out(), want)
        within = compiled_whole(one)
        assert_alike(within.out(), want)
    assert_alike(compiled.out(), plain)
    assert_alike(within.out(), plain)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "image"), [("flux", slice(TEXT, None)), ("sd3", slice(None, -TEXT))])
@pytest.mark.usefixtures("_shapes_unchecked")
def test_a_compiled_model_is_narrowed_among_the_picture(name: str, image: slice) -> None:
    one = made(name)
    compiled = compiled_whole(one)
    with narrow(one.model, grid, image=image):
        assert_alike(compiled.out(), one.out())


@pytest.mark.slow
def test_errors_of_a_compiled_model_are_the_same() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    one = denoisers.pixart()
    compiled = Denoiser(torch.compile(one.model, backend="aot_eager"), one.inputs, one.own)
    with (
        processors(one.model, AttnProcessor(), "attn1"),
        narrow(one.model, NEAR),
        refused("with AttnProcessor\\) did not call"),
    ):
        compiled.out()


def test_what_a_pattern_may_be_is_checked_at_once() -> None:
    one = made("ltx")
    with refused("the pattern is a str: wanted a pattern"):
        narrow(one.model, "causal")  # type: ignore[arg-type]
    with narrow(one.model, lambda places: places), refused("gave a int: wanted a pattern"):  # type: ignore[arg-type, return-value]
        one.out()
    for layers in ("attn1", [], [1]):
        with refused("wanted a list of names"):
            narrow(one.model, NEAR, layers=layers)  # type: ignore[arg-type]
    with refused("no attention layer is named 'attn3': there are transformer_blocks"):
        narrow(one.model, NEAR, layers=["attn1", "attn3"])


def test_every_attention_class_is_given_its_own_tokens_first() -> None:
    """What `narrow` rests on, for all classes of diffusers' models that have processors."""
    import diffusers.models as root

    first: dict[str, set[str]] = {}
    for found in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
        module = importlib.import_module(found.name)
        for name, kind in vars(module).items():
            if inspect.isclass(kind) and issubclass(kind, nn.Module) and hasattr(kind, "set_processor"):
                first.setdefault(list(inspect.signature(kind.forward).parameters)[1], set()).add(name)
    assert sum(map(len, first.values())) >= 48
    assert first.pop("und_seq") == {"Cosmos3PackedMoTAttention"}  # two sequences of tokens, and refused when it runs
    assert set(first) == {"hidden_states", "norm_hidden_states", "values", "x"}
