"""Models of transformers on foveate: packed texts, images in texts, training, pipelines, compiled graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, GROUPED, build, left_padded, right_padded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils as known

import foveate as fv
from foveate.see.text import bundled_model


def logits(network: Any, **inputs: Any) -> Tensor:
    found: Tensor = network(**inputs).logits
    return found


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "collator"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_packed_texts_are_each_alone(name: str, how: str) -> None:
    network = build(name)
    ids = left_padded()["input_ids"]
    parts = [ids[:1, :7], ids[1:, :10]]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    packed: dict[str, Any] = {"input_ids": torch.cat(parts, 1), "use_cache": False}
    if how == "position_ids":
        packed["position_ids"] = torch.cat([torch.arange(7), torch.arange(10)])[None]
    with torch.no_grad(), fv.patch(network), fv.watch(network) as seen:
        alone = torch.cat([logits(network, input_ids=part) for part in parts], 1)
        del seen.calls[:]
        if how == "cu_seq_lens":
            ends = torch.tensor([0, 7, 17], dtype=torch.int32)
            positions = torch.cat([torch.arange(7), torch.arange(10)])[None]
            packed |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends.clone(), "position_ids": positions}
            packed |= {"attention_mask": torch.ones(1, 17, dtype=torch.int64)}  # so that the offsets alone tell
        if how == "collator":
            packed |= collate([{"input_ids": part[0].tolist()} for part in parts])
            packed.pop("labels")
        found = logits(network, **packed)
    assert (found - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert all("documents" in repr(call.pattern) for call in seen.calls)


HANDED = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss", "deepseek_v3", "gpt2", "opt"]


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
@pytest.mark.parametrize("name", HANDED)
def test_packed_texts_are_each_alone_in_the_call_that_fills_a_cache(name: str, cache: str) -> None:
    """Two rows, with texts of other lengths each; the positions tell, as long as no mask says that a row is one."""
    network = build(name)
    ids = left_padded()["input_ids"]
    cuts = (7, 4)
    positions = torch.stack([torch.cat([torch.arange(cut), torch.arange(17 - cut)]) for cut in cuts])
    more: dict[str, Any] = {"use_cache": cache != "none", "position_ids": positions}
    if cache == "static":
        more["past_key_values"] = transformers.StaticCache(config=network.config, max_cache_len=23)
    with torch.no_grad(), fv.patch(network):
        alone = torch.cat([
            torch.cat([logits(network, input_ids=row[None, :cut]), logits(network, input_ids=row[None, cut:])], 1)
            for row, cut in zip(ids, cuts, strict=True)
        ])  # fmt: skip
        found = logits(network, input_ids=ids, **more)
        whole = logits(network, input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids))
    assert (found - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert (whole - alone).abs().max() > 1e-2 * alone.abs().max()


def windowed(kind: str, **values: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**GROUPED, **values)
    torch.manual_seed(3)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("Qwen2Moe", MOE),
        ("Qwen2Moe", {**MOE, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5}),
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 5}),
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": None}),
        ("Qwen3", {"use_sliding_window": False, "sliding_window": 0}),
        ("Mistral", {"sliding_window": None}),
        ("Phi3", {"sliding_window": 5}),
        ("SmolLM3", {"sliding_window": 0}),
        ("SmolLM3", {"sliding_window": -1}),
        ("Olmo3", {"sliding_window": 1}),
    ],
)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_windows_that_no_layer_uses_hide_nothing(kind: str, values: dict[str, Any], compiled: bool) -> None:
    """Qwen2-MoE by its defaults makes a mask with a window of 0, and attends by another."""
    network = windowed(kind, **values)
    network.set_attn_implementation("eager")
    kept = left_padded()["attention_mask"].bool()
    with torch.no_grad():
        truth = logits(network, **left_padded())[kept]
        for switch in (fv.patch, fv.watch):
            torch._dynamo.reset()
            with switch(network):
                call = torch.compile(network, backend="eager") if compiled else network
                assert (logits(call, **left_padded())[kept] - truth).abs().max() <= 1e-5 * truth.abs().max()
        fv.register()
        network.set_attn_implementation("foveate")
        assert (logits(network, **left_padded())[kept] - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize(
    ("kind", "values"),
    [("Mistral", {}), ("Qwen2Moe", {**MOE, "use_sliding_window": True}), ("Gemma2", {"head_dim": 8}), ("Phi3", {})],
)
def test_a_layer_with_a_window_that_shows_nothing_is_refused(kind: str, values: dict[str, Any], size: int) -> None:
    network = windowed(kind, **values, sliding_window=size)
    for cache in (False, True):
        with (
            fv.patch(network),
            pytest.raises(
                fv.FoveateError,
                match=f"{kind}Attention has a sliding window of {size}, through which no query sees a key",
            ),
        ):
            network(**left_padded(), use_cache=cache)


def test_positions_that_rise_are_one_text() -> None:
    network = build("llama")
    ids = left_padded()["input_ids"]
    with torch.no_grad(), fv.patch(network), fv.watch(network) as seen:
        for first in (0, 5):
            network(ids, position_ids=torch.arange(first, first + 17)[None])
    assert {repr(call.pattern) for call in seen.calls} == {"causal"}


def test_images_see_each_other_both_ways() -> None:
    """Gemma 3 with an image: its tokens are one block, in every layer."""
    text = {**build("gemma3").config.to_dict(), "vocab_size": 97}
    vision = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 59,
              "image_size": 16, "patch_size": 4, "vision_use_head": False}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=96, boi_token_index=95,
        eoi_token_index=94, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(3)
    network = transformers.Gemma3ForConditionalGeneration(config).eval()
    ids = left_padded()["input_ids"].clamp(max=90)
    ids[:, 7:11] = 96
    inputs = {"input_ids": ids, "token_type_ids": (ids == 96).long(), "pixel_values": torch.randn(2, 3, 16, 16),
              "attention_mask": left_padded()["attention_mask"]}  # fmt: skip
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        truth = logits(network, **inputs)[kept]
        with fv.watch(network) as seen:
            found = logits(network, **inputs)[kept]
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
    assert {repr(call.pattern) for call in seen.calls} == {
        "None",
        "(causal | documents(<int64 2×17>)) & padding(<bool 2×17>)",
        "(causal | documents(<int64 2×17>)) & window(left=4, right=None) & padding(<bool 2×17>)",
    }


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_mask_of_the_caller_is_taken_as_it_is(kind: str) -> None:
    network = build("llama")
    seen = torch.rand(2, 1, 17, 17, generator=torch.Generator().manual_seed(3)) < 0.5
    seen = seen.tril() | torch.eye(17, dtype=torch.bool)
    additive = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    ids = left_padded()["input_ids"]
    with torch.no_grad():
        truth = logits(network, input_ids=ids, attention_mask=additive)
        with fv.patch(network):
            found = logits(network, input_ids=ids, attention_mask=seen if kind == "boolean" else additive)
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gemma2", "t5"])
def test_training_with_checkpoints_equals_eager(name: str, reentrant: bool) -> None:
    network = build(name).train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    network.activation_checkpointing_enable({"use_reentrant": reentrant})
    inputs = FAMILIES[name].inputs()
    labels = inputs.get("decoder_input_ids")
    if labels is None:  # what stands in padding predicts nothing
        kept = inputs["attention_mask"].bool()
        labels = inputs["input_ids"].masked_fill(~(kept & kept.roll(1, 1)), -100)

    def gradients() -> list[Tensor]:
        network.zero_grad()
        network(**inputs, labels=labels, use_cache=False).loss.backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    truth = gradients()
    with fv.patch(network):
        found = gradients()
    largest = max(x.abs().max() for x in truth)
    for mine, theirs in zip(found, truth, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * largest


def test_dropout_falls_in_training_and_never_in_eval() -> None:
    network = build("bert")
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    for layer in network.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    with torch.no_grad(), fv.patch(network):
        inputs = right_padded()
        still = logits(network, **inputs)
        assert torch.equal(logits(network, **inputs), still)
        network.train()
        assert not torch.allclose(logits(network, **inputs), still)


COMPILED = ["bert", "mistral", "t5", "llama4"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_model_is_one_graph_and_equals_eager(name: str) -> None:
    network, inputs = build(name), FAMILIES[name].inputs()
    kept = inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()
    truth = network(**inputs, output_attentions=True)
    torch._dynamo.reset()
    with fv.patch(network):
        graph = torch.compile(network, backend="aot_eager", fullgraph=True)
        found = graph(**inputs, output_attentions=True)
    mine, theirs = found.logits[kept], truth.logits[kept]
    assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    parameters = [p for p in network.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad((x**2).sum(), parameters, allow_unused=True) for x in (mine, theirs)]
    largest = max(x.abs().max() for x in gradients[1] if x is not None)
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).abs().max() <= 1e-4 * largest


def test_a_compiled_window_stays_a_pattern_and_packed_texts_stay_apart() -> None:
    network = build("mistral")
    ids = left_padded()["input_ids"]
    positions = torch.cat([torch.arange(7), torch.arange(10)])[None].expand(2, -1)
    torch._dynamo.reset()
    with torch.no_grad(), fv.patch(network):
        truth = logits(network, input_ids=ids, position_ids=positions, use_cache=False)
        graph = torch.compile(network, backend="eager", fullgraph=True)
        found = logits(graph, input_ids=ids, position_ids=positions, use_cache=False)
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
    from foveate.integrations.transformers.masks import Keys, _compiled

    plain = {"local_size": 5, "config": network.config, "allow_is_causal_skip": True}
    keys = Keys(1, 9, 0, "cpu")
    assert repr(_compiled(known.sliding_window_causal_mask_function(5), keys, plain)) == "causal & window(5)"


def test_the_bundled_model_gives_the_same_embeddings_through_a_pipeline() -> None:
    texts = ["The animal didn't cross the street because it was too tired.", "A short one.", "Another"]
    place = bundled_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    found = []
    for implementation in ("eager", "foveate"):
        network = transformers.AutoModel.from_pretrained(place, attn_implementation=implementation).eval()
        found.append(transformers.pipeline("feature-extraction", model=network, tokenizer=tokenizer, batch_size=3))
    real = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    mine, theirs = (
        torch.cat([torch.tensor(rows)[0, :count] for rows, count in zip(pipe(texts), real, strict=True)])
        for pipe in found
    )
    assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_texts_are_generated_through_a_pipeline() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled_model(), padding_side="left")
    torch.manual_seed(3)
    small = {**build("gemma2").config.to_dict(), "vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 102}
    network = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**small)).eval()
    network.generation_config = transformers.GenerationConfig(max_new_tokens=9, pad_token_id=0, do_sample=False)
    pipe = transformers.pipeline("text-generation", model=network, tokenizer=tokenizer, batch_size=2)
    texts = ["The animal didn't cross the street because it was too tired.", "A short one."]
    network.set_attn_implementation("eager")
    truth = pipe(texts)
    with fv.patch(network):
        assert pipe(texts) == truth


@pytest.mark.parametrize("name", ["bert", "gemma2", "t5"])
def test_half_precision_is_as_near_to_the_truth_as_eager(name: str) -> None:
    inputs = FAMILIES[name].inputs()
    if name == "gemma2":  # in float64 eager gives NaN to every row beside one of padding
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    kept = inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()
    with torch.no_grad():
        truth = logits(build(name).double(), **inputs)[kept]
        network = build(name).bfloat16()
        plain = (logits(network, **inputs)[kept] - truth).abs().max()
        with fv.patch(network):
            ours = (logits(network, **inputs)[kept] - truth).abs().max()
    assert ours <= 2 * plain


class Matrices(TorchDispatchMode):
    """Hears of every tensor that an operator of PyTorch makes with a place for each pair of positions."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.shape[-2:] == (self.length, self.length):
                self.made.append(func.name())
        return out


@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "gemma2", "gpt_oss", "llama4"])
def test_no_matrix_of_all_pairs_is_ever_made(name: str) -> None:
    network: Any = build(name)
    length = 61  # a prime, which no other axis has
    ids = left_padded()["input_ids"].repeat(1, 4)[:, :length]
    kept = (torch.arange(length) >= torch.tensor([[0], [23]])).long()
    how = {"input_ids": ids, "attention_mask": kept if name != "bert" else kept.flip(1)}
    with torch.no_grad(), Matrices(length) as theirs:
        network(**how)
    with torch.no_grad(), fv.patch(network), Matrices(length) as ours:
        network(**how)
    assert theirs.made
    assert not ours.made
