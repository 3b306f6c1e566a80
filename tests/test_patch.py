"""`register` and `patch`: a loaded model goes through foveate, wholly or not at all, and comes back."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, IMAGE, build, left_padded, right_padded
from torch import Tensor, nn

import foveate as fv
from foveate.integrations import recomputing
from foveate.integrations.transformers import NAME
from foveate.integrations.transformers.layers import kind_of


def logits(network: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(**inputs).logits
    return found


def test_patch_reaches_every_layer_and_unpatch_gives_them_back() -> None:
    network = build("bert")
    before = logits(network, **right_padded())
    patched = fv.patch(network)
    assert repr(patched) == "<Patched BertForMaskedLM: 2 attention layers>"
    assert patched.layers == ["bert.encoder.layer.0.attention.self", "bert.encoder.layer.1.attention.self"]
    with fv.watch(network) as seen:
        logits(network, **right_padded())
    assert len(seen) == 2
    assert network.config._attn_implementation == NAME
    fv.unpatch(network)
    assert network.config._attn_implementation == "eager"
    assert torch.equal(logits(network, **right_padded()), before)
    with pytest.raises(fv.FoveateError, match="BertForMaskedLM is not patched: nothing to undo"):
        fv.unpatch(network)


@pytest.mark.parametrize("name", ["t5", "llava", "detr"])
def test_every_attention_of_a_model_of_several_parts_is_reached(name: str) -> None:
    network = build(name)
    with fv.patch(network) as patched, fv.watch(network) as seen:
        network(**FAMILIES[name].inputs())
    assert len(seen) == len(patched.layers) == {"t5": 6, "llava": 4, "detr": 6}[name]
    configs = [part.config for part in network.modules() if isinstance(part, transformers.PreTrainedModel)]
    assert {config._attn_implementation for config in configs} == {"eager"}


def test_an_exception_inside_gives_the_model_back() -> None:
    network = build("bert")
    with pytest.raises(KeyError), fv.patch(network):
        raise KeyError
    assert network.config._attn_implementation == "eager"


def test_a_model_is_patched_once() -> None:
    network = build("bert")
    with fv.patch(network):
        for again, said in (
            (network, "BertForMaskedLM is patched already: unpatch it first"),
            (network.bert, "BertForMaskedLM, which BertModel is a part of, is patched already: unpatch that first"),
        ):
            with pytest.raises(fv.InvalidInput, match=said):
                fv.patch(again)
    said = "BertModel, a part of BertForMaskedLM, is patched already: unpatch that first"
    with fv.patch(network.bert), pytest.raises(fv.InvalidInput, match=said):
        fv.patch(network)


def test_what_the_program_chose_meanwhile_stays() -> None:
    network: Any = build("llava")
    with fv.patch(network):
        network.model.language_model.set_attn_implementation("sdpa")
    assert network.config.text_config._attn_implementation == "sdpa"
    assert network.config.vision_config._attn_implementation == "eager"
    assert network.config._attn_implementation == "eager"


def test_the_end_of_a_patch_undoes_no_other() -> None:
    network = build("bert")
    with fv.patch(network):
        fv.unpatch(network)
    with fv.patch(network):
        fv.unpatch(network)
        later = fv.patch(network, fv.window(3))
    assert network.config._attn_implementation == NAME
    with later:
        pass
    assert network.config._attn_implementation == "eager"
    with fv.watch(network):
        fv.unpatch(network)
        fv.patch(network)
    assert network.config._attn_implementation == NAME
    fv.unpatch(network)


def test_a_copy_of_a_patched_model_computes_the_same() -> None:
    network = build("llama")
    with fv.patch(network, fv.window(3)):
        twin = copy.deepcopy(network)
        assert torch.equal(logits(twin, **left_padded()), logits(network, **left_padded()))


def test_a_model_that_is_gone_is_forgotten() -> None:
    import gc

    gc.collect()
    others = recomputing.in_force()
    network = build("bert")
    fv.patch(network)
    assert len(recomputing.in_force()) == len(others) + 1
    del network
    gc.collect()
    assert recomputing.in_force() == others


def test_a_window_makes_of_llama_what_mistral_is() -> None:
    mistral = build("mistral")
    llama: Any = FAMILIES["llama"].make().eval()
    llama.load_state_dict(mistral.state_dict())
    kept = left_padded()["attention_mask"].bool()
    truth = logits(mistral, **left_padded())[kept]
    assert (logits(llama, **left_padded())[kept] - truth).abs().max() > 1e-2
    with fv.patch(llama, pattern=fv.window(5)):
        found = logits(llama, **left_padded())[kept]
        tokens = llama.generate(**left_padded(), max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
    theirs = mistral.generate(**left_padded(), max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(tokens, theirs)


@pytest.mark.parametrize("narrow", [fv.streaming(1, 4), fv.window(3), fv.chunks(5)], ids=repr)
@pytest.mark.parametrize("layers", [[1], [-1], ["model.layers.1"], ["layers.1.self_attn"]])
def test_a_pattern_holds_in_the_layers_that_were_chosen(layers: list[int | str], narrow: fv.Pattern) -> None:
    network = build("llama")
    with fv.patch(network, narrow, layers=layers), fv.watch(network) as seen:
        logits(network, input_ids=left_padded()["input_ids"])
    assert not any(hasattr(module, "foveate_plan") for module in network.modules())
    first, second = (call.pattern for call in seen.calls)
    assert repr(first) == "causal"
    assert second is not None
    assert torch.equal(second.dense(17, 17), (fv.causal & narrow).dense(17, 17))


def test_a_pattern_counts_beside_a_mask_of_the_caller_too() -> None:
    network = build("llama")
    ids = left_padded()["input_ids"]
    with torch.no_grad(), fv.patch(network, fv.window(3)):
        whole = network(ids, use_cache=True)
        cache = network(ids[:, :13], use_cache=True).past_key_values
        seen = fv.causal.dense(4, 17).expand(2, -1, -1, -1)
        rest = network(ids[:, 13:], past_key_values=cache, attention_mask=seen)
    assert (rest.logits - whole.logits[:, 13:]).abs().max() <= 1e-5 * whole.logits.abs().max()


def test_weights_come_from_the_layers_that_were_chosen() -> None:
    for name, count in (("bert", 1), ("gpt2", 1), ("t5", 1)):
        network = build(name)
        truth = network(**FAMILIES[name].inputs(), output_attentions=True)
        with fv.patch(network, weights_from=[1]):
            found = network(**FAMILIES[name].inputs(), output_attentions=True)
        key = "encoder_attentions" if name == "t5" else "attentions"
        assert len(found[key]) == count
        kept = FAMILIES[name].inputs()["attention_mask"].bool()[:, None, :, None].expand(found[key][0].shape)
        torch.testing.assert_close(found[key][0][kept], truth[key][1][kept], atol=1e-5, rtol=0)


def test_a_pattern_cannot_count_from_keys_that_a_cache_let_go_of() -> None:
    network = build("mistral")
    ids = left_padded()["input_ids"]
    with fv.patch(network, fv.streaming(2, 4)):
        cache = network(ids, use_cache=True).past_key_values
        with pytest.raises(fv.FoveateError, match=r"counts positions from the first key, but the cache of Mistral"):
            network(ids[:, :1], past_key_values=cache)
    with fv.patch(network, fv.window(3)):  # a distance is the same wherever positions start
        whole = logits(network, input_ids=ids)
        cache = network(ids[:, :13], use_cache=True).past_key_values
        rest = logits(network, input_ids=ids[:, 13:], past_key_values=cache)
    assert (rest - whole[:, 13:]).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("llama", {"pattern": ~fv.causal}, r"~causal contradicts the causal mask of model.layers.0.self_attn"),
        ("mistral", {"pattern": ~fv.window(5)}, r"~window\(5\) contradicts the causal mask of"),
        ("llama", {"pattern": "window"}, "the pattern is a str: wanted a pattern"),
        ("llama", {"pattern": fv.window(3), "layers": [2]}, "layers names 2, which is no attention layer: wanted 0"),
        ("llama", {"pattern": fv.window(3), "layers": ["decoder"]}, "layers names 'decoder', which is no"),
        ("llama", {"pattern": fv.window(3), "layers": 1}, "layers is 1: wanted a list of numbers or names"),
        ("llama", {"layers": [1]}, r"layers is \[1\] but no pattern was given"),
        ("llama", {"weights_from": [5]}, "weights_from names 5, which is no attention layer"),
        ("t5", {"pattern": fv.window(3)}, r"attention of several kinds \(T5Attention\): say by layers="),
        ("llava", {"pattern": fv.window(3)}, r"several kinds \(CLIPAttention, LlamaAttention\): say by layers="),
    ],
)  # fmt: skip
def test_what_patch_refuses_leaves_the_model_as_it_was(name: str, more: dict[str, Any], message: str) -> None:
    network = build(name)
    with pytest.raises(fv.InvalidInput, match=message):
        fv.patch(network, **more)
    assert network.config._attn_implementation == "eager"
    assert not any(hasattr(module, "foveate_plan") for module in network.modules())
    with fv.patch(network):
        pass


def test_what_is_no_hugging_face_model_is_refused() -> None:
    with pytest.raises(fv.InvalidInput, match="patch was given a Linear: wanted a model of Hugging Face transformers"):
        fv.patch(nn.Linear(2, 2))


def test_a_model_that_computes_its_own_attention_is_refused_by_name() -> None:
    config = transformers.LongformerConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=29, attention_window=4,
        vocab_size=97, max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(fv.InvalidInput, match=r"LongformerModel has no layer .* LongformerSelfAttention compute their"):
        fv.patch(transformers.LongformerModel(config))


def hybrid(kind: str) -> Any:
    """Models that have attention layers where their configuration asks for some, and here it does not."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 29}  # fmt: skip
    more: dict[str, Any] = {
        "Bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 5, "attn_layer_indices": []},
        "Lfm2": {"layer_types": ["conv", "conv"]},
        "RecurrentGemma": {"block_types": ["recurrent"], "lru_width": 32},
    }
    config = getattr(transformers, f"{kind}Config")(**sizes, **more[kind])
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["Bamba", "Lfm2", "RecurrentGemma"])
def test_a_hybrid_without_an_attention_layer_is_told_apart(kind: str) -> None:
    said = f"{kind}ForCausalLM has no attention layer, for its configuration makes none: there is nothing to patch"
    for switch in (fv.patch, lambda model: fv.watch(model).__enter__()):
        with pytest.raises(fv.InvalidInput, match=f"{said}; patch reaches {kind}Attention where a configuration asks"):
            switch(hybrid(kind))


def test_attention_of_a_kind_that_has_no_softmax_is_somebodys_own() -> None:
    config = transformers.YosoConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=29)
    with pytest.raises(fv.InvalidInput, match=r"YosoForMaskedLM has no layer .* YosoSelfAttention compute their own"):
        fv.patch(transformers.YosoForMaskedLM(config))


def test_a_model_of_a_kind_without_attention_is_told_apart() -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    with pytest.raises(fv.InvalidInput, match="ResNetModel has no attention layer: there is nothing to patch"):
        fv.patch(transformers.ResNetModel(config))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "qwen3"])
def test_a_decoder_that_was_made_bidirectional_may_look_ahead_alone(name: str) -> None:
    network = build(name)
    network.config.is_causal = False
    kept = left_padded()["attention_mask"].bool()
    truth = logits(network, **left_padded(), use_cache=False)[kept]
    with fv.patch(network):
        assert (logits(network, **left_padded(), use_cache=False)[kept] - truth).abs().max() <= 1e-5 * truth.abs().max()
    with fv.patch(network, ~fv.causal), fv.watch(network) as seen:
        found = logits(network, **left_padded(), use_cache=False)[kept]
    assert (found - truth).abs().max() > 1e-2 * truth.abs().max()
    for call in seen.calls:
        assert call.pattern is not None
        visible = call.pattern.dense(17, 17, query_start=0, batch=2)
        assert not visible.tril().any()
        assert visible.any()


def test_an_encoder_may_look_ahead_alone_but_never_at_nothing() -> None:
    network = build("bert")
    with fv.patch(network, ~fv.causal):
        assert logits(network, **right_padded()).isfinite().all()
    with pytest.raises(fv.InvalidInput, match=r"the pattern causal & ~causal leaves no query of bert.* any key"):
        fv.patch(network, fv.causal & ~fv.causal)


def test_layers_that_only_say_that_they_are_not_causal_keep_their_mask() -> None:
    network = build("llama")
    for layer in network.model.layers:
        layer.self_attn.is_causal = False
    with (
        fv.patch(network, ~fv.causal),
        pytest.raises(
            fv.FoveateError, match="says that it is not causal, but its mask is, which the pattern ~causal contradicts"
        ),
    ):
        logits(network, **left_padded())


def test_rows_of_padding_reach_what_mixes_along_time_as_with_sdpa() -> None:
    """RecurrentGemma's recurrence carries on what attention left in the rows of padding before a text."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 29, "lru_width": 32}  # fmt: skip
    torch.manual_seed(3)
    config = transformers.RecurrentGemmaConfig(**sizes, block_types=["attention", "recurrent"])
    network = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    found: dict[str, list[Tensor]] = {}
    for name in ("eager", "sdpa", "foveate"):
        fv.register()
        network.set_attn_implementation(name)
        found[name] = [
            logits(network, **inputs, use_cache=False)[inputs["attention_mask"].bool()]
            for inputs in (left_padded(), right_padded())
        ]
    for ours, sdpa in zip(found["foveate"], found["sdpa"], strict=True):
        assert (ours - sdpa).abs().max() <= 1e-5 * sdpa.abs().max()
    (left, right), (left_eager, right_eager) = found["foveate"], found["eager"]
    assert (left - left_eager).abs().max() > 1e-2 * left_eager.abs().max()
    assert (right - right_eager).abs().max() <= 1e-5 * right_eager.abs().max()


def git() -> nn.Module:
    """A vision tower that calls the interface, and text layers that add the mask to scores of their own."""
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 29,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    config = transformers.GitConfig(
        vision_config=vision, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=29,
        vocab_size=97, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    return transformers.GitForCausalLM(config)


def reading() -> nn.Module:
    """A vision encoder that calls the interface, and a decoder of a class that transformers cannot switch at all."""
    vision = transformers.ViTConfig(**IMAGE)
    text = transformers.TrOCRConfig(
        vocab_size=97, d_model=24, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=29, pad_token_id=0,
        max_position_embeddings=64, cross_attention_hidden_size=48, is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    return transformers.VisionEncoderDecoderModel(config=config)


@pytest.mark.parametrize(("make", "own"), [(git, "GitSelfAttention"), (reading, "TrOCRAttention")])
def test_layers_that_compute_their_own_are_named_once_and_keep_working(
    make: Any, own: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(3)
    network = make().eval()
    network.set_attn_implementation("eager")
    size = 8 if make is git else 16
    text = left_padded() if make is git else {f"decoder_{key}": value for key, value in right_padded().items()}
    inputs = {**text, "pixel_values": torch.randn(2, 3, size, size)}
    truth = logits(network, **inputs)
    logging.getLogger("transformers").addHandler(caplog.handler)
    caplog.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patched = fv.patch(network)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.messages == []
    name = type(network).__name__
    assert [str(one.message) for one in said] == [
        f"{name}: {own} compute their own attention and are not reached by foveate"
    ]
    assert repr(patched) == f"<Patched {name}: 2 attention layers, not {own}>"
    found = logits(network, **inputs)
    fv.unpatch(network)
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_a_class_is_what_its_forward_is_and_not_what_it_inherits() -> None:
    class OwnAttention(transformers.models.bert.modeling_bert.BertSelfAttention):
        def forward(self, states: Tensor, **more: Any) -> tuple[Tensor, None]:
            return (states @ states.mT).softmax(-1) @ states, None

    class SameAttention(transformers.models.bert.modeling_bert.BertSelfAttention):
        pass

    assert kind_of(OwnAttention) == "bypassed"
    assert kind_of(SameAttention) == "reached"
    assert kind_of(nn.MultiheadAttention) == "bypassed"
    assert kind_of(nn.Linear) == ""


def test_weights_come_where_an_older_transformers_collects_them_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build("bert")
    with fv.patch(network):
        network(**right_padded(), output_attentions=True)  # loads what is taken away now
        monkeypatch.setitem(sys.modules, "transformers.utils.output_capturing", None)
        assert len(network(**right_padded(), output_attentions=True).attentions) == 2


def test_a_failure_half_way_leaves_nothing_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = build("llava")

    def fails(self: Any, name: str) -> None:
        network.config.text_config._attn_implementation = name
        raise ValueError("half way")

    monkeypatch.setattr(type(network), "set_attn_implementation", fails)
    with pytest.raises(ValueError, match="half way"):
        fv.patch(network)
    assert network.config.text_config._attn_implementation == "eager"
    monkeypatch.undo()
    with fv.patch(network):
        pass


def test_a_warning_that_is_an_error_leaves_nothing_patched() -> None:
    network = git()
    network.set_attn_implementation("eager")
    with pytest.raises(UserWarning, match="GitSelfAttention compute their own attention"):  # as all are in these tests
        fv.patch(network, fv.causal, layers=["git.image_encoder"], weights_from=[0])
    assert network.config._attn_implementation == "eager"
    assert not any(hasattr(module, "foveate_plan") for module in network.modules())
    with pytest.warns(UserWarning, match="GitSelfAttention"), fv.patch(network):
        pass
