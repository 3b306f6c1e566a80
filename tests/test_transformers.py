"""The mask functions of Hugging Face transformers become patterns, and nothing about a mask is lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, build, left_padded, right_padded
from torch import Tensor
from transformers import masking_utils as known

import foveate as fv
from foveate.integrations.transformers import Mask, attention, mask
from foveate.see.text import bundled_model

IDS = torch.tensor([[0] * 5 + [1] * 6, [0] * 3 + [1] * 4 + [2] * 4])
POSITIONS = torch.tensor([[*range(5), *range(6)], [*range(3), *range(4), *range(4)]])
BLOCKS = torch.tensor([[-1, -1, 0, 0, 0, -1, -1, 1, 1, -1, -1], [-1, 0, 0, 0, -1, 1, 1, 1, 1, -1, -1]])
NO_LEFT, LEFT = torch.tensor([0, 0]), torch.tensor([0, 2])
WINDOW, CHUNKS = known.sliding_window_causal_mask_function(3), known.chunked_causal_mask_function(4, NO_LEFT)

FUNCTIONS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "causal": (known.causal_mask_function, "causal"),
    "everyone": (known.bidirectional_mask_function, "None"),
    "window": (WINDOW, "causal & window(3)"),
    "two-sided window": (known.sliding_window_bidirectional_mask_function(3), "window(4)"),
    "chunks": (CHUNKS, "causal & chunks(4)"),
    "chunks after padding": (known.chunked_causal_mask_function(4, LEFT), "causal & documents(<int64 2×11>)"),
    "packed": (
        known.packed_sequence_compatibility_function(known.causal_mask_function, POSITIONS, IDS),
        "causal & documents(<int64 2×11>)",
    ),
    "packed, window": (
        known.packed_sequence_compatibility_function(WINDOW, POSITIONS, IDS),
        "causal & documents(<int64 2×11>) & window(3)",
    ),
    "packed, chunks": (
        known.packed_sequence_compatibility_function(CHUNKS, POSITIONS, IDS),
        "causal & documents(<int64 2×11>) & documents(<int64 2×11>)",
    ),
    "packed, everyone": (
        known.packed_sequence_compatibility_function(known.bidirectional_mask_function, POSITIONS, IDS),
        "documents(<int64 2×11>)",
    ),
    "ids below zero": (known.packed_sequence_mask_function(IDS - 1), "documents(<int64 2×11>)"),
    "images in text": (
        known.or_masks(known.causal_mask_function, known.blockwise_overlay(BLOCKS)), "causal | documents(<int64 2×11>)"
    ),
    "images in text, window": (
        known.and_masks(known.or_masks(WINDOW, known.blockwise_overlay(BLOCKS)), known.sliding_window_overlay(3)),
        "(causal & window(3) | documents(<int64 2×11>)) & window(left=2, right=None)",
    ),
    "or everyone": (known.or_masks(WINDOW, known.bidirectional_mask_function), "None"),
    "padding": (known.padding_mask_function(IDS > 0), "padding(<bool 2×11>)"),
}  # fmt: skip


def rows_with_a_key(seen: Tensor) -> Tensor:
    return seen.any(-1, keepdim=True).expand(seen.shape)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("first", "keys"), [(0, 11), (4, 7)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mask_is_a_pattern_and_never_a_matrix(name: str, first: int, keys: int, padded: bool) -> None:
    """For a whole text, and where a rolling cache has let go of the first keys."""
    function, written = FUNCTIONS[name]
    kept = torch.ones(2, 11, dtype=torch.bool)
    if padded:
        kept[1, :2] = False
    truth = known.sdpa_mask(2, keys, keys, first, first, function, kept, allow_is_causal_skip=False)
    made = mask(2, keys, keys, first, first, function, kept)
    assert made.query_start == 0
    seen = torch.ones(2, 1, keys, keys, dtype=torch.bool)
    if made.pattern is not None:
        seen = made.pattern.dense(keys, keys, query_start=0, batch=2)
    # In chunks, what is padding belongs to no chunk: such a row has no use for its keys.
    rows = rows_with_a_key(seen) if name == "chunks after padding" else torch.ones_like(seen)
    assert torch.equal(seen[rows], truth.expand(seen.shape)[rows])
    assert "from_mask" not in repr(made.pattern)
    if first == 0 and not padded:
        assert repr(made.pattern) == written


def test_queries_start_where_the_cache_ends() -> None:
    made = mask(2, 5, 9, q_offset=4, mask_function=known.causal_mask_function)
    assert (made.pattern, made.query_start) == (fv.causal, 4)
    static = mask(2, 1, 9, q_offset=torch.tensor(4), mask_function=known.causal_mask_function)
    assert torch.equal(torch.as_tensor(static.query_start), torch.tensor([4]))


@pytest.mark.parametrize("use_vmap", [False, True])
def test_an_unknown_mask_function_becomes_a_matrix(use_vmap: bool) -> None:
    kept = torch.tensor([[True] * 4, [False] + [True] * 3])
    made = mask(
        2, 4, 4, q_offset=1, mask_function=lambda batch, head, query, key: (query - key) % 2 == 0, attention_mask=kept,
        use_vmap=use_vmap,
    )  # fmt: skip
    assert repr(made.pattern) == "from_mask(<bool 2×1×4×4>)"
    assert made.pattern is not None
    seen = [[[(q + 1 - k) % 2 == 0 and bool(row[k]) for k in range(4)] for q in range(4)] for row in kept]
    assert made.pattern.dense(4, 4, batch=2)[:, 0].tolist() == seen


def test_a_layer_that_does_arithmetic_finds_the_matrix_of_eager() -> None:
    how = {"q_offset": 2, "mask_function": WINDOW, "attention_mask": torch.tensor([[True] * 5, [False] + [True] * 4])}
    truth = known.eager_mask(2, 3, 5, **how)
    made = mask(2, 3, 5, **how)
    scores = torch.randn(2, 7, 3, 5)
    assert torch.equal(scores + made, scores + truth)
    assert torch.equal(made[:, :, :2], truth[:, :, :2])
    assert torch.equal(made.to(torch.float64), truth.to(torch.float64))
    assert made.shape == truth.shape
    assert torch.equal(torch.maximum(made, truth), truth)
    assert torch.equal(torch.cat([made, truth], -1), torch.cat([truth, truth], -1))
    everyone = mask(2, 3, 5, mask_function=known.bidirectional_mask_function)
    assert torch.equal(scores + everyone, scores)


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


def test_offsets_may_differ_where_queries_look_at_other_texts() -> None:
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4)
    ends = {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "cu_seq_lens_k": torch.tensor([0, 4, 7])}
    layer = torch.nn.Module()
    out, _ = attention(layer, q, k, k, None, is_causal=False, **ends)
    truth = torch.cat([fv.attention(q[:, :, :2], k[:, :, :4], k[:, :, :4]),
                       fv.attention(q[:, :, 2:], k[:, :, 4:], k[:, :, 4:])], 2)  # fmt: skip
    torch.testing.assert_close(out.transpose(1, 2), truth)
    with pytest.raises(fv.FoveateError, match="cu_seq_lens differ for queries and keys under the mask causal"):
        attention(layer, q, k, k, None, is_causal=True, **ends)


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


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_padding_holds_never_matters(name: str) -> None:
    network = build(name)
    inputs = right_padded() if name == "bert" else left_padded()
    kept = inputs["attention_mask"].bool()
    states = network.get_input_embeddings()(inputs["input_ids"]).detach()
    planted = states.masked_fill(~kept[..., None], float("nan"))
    with torch.no_grad():
        truth = logits(network, inputs_embeds=states, attention_mask=kept)[kept]
        with fv.patch(network):
            found = logits(network, inputs_embeds=planted, attention_mask=kept)[kept]
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_a_row_without_a_key_is_finite_and_has_no_gradient() -> None:
    network = build("bert")
    kept = torch.tensor([[1] * 17, [0] * 17])
    with fv.patch(network):
        inputs = {"input_ids": right_padded()["input_ids"], "attention_mask": kept}
        whole = network(**inputs, output_attentions=True)
        whole.logits.sum().backward()
    assert whole.logits.isfinite().all()
    assert all(bool((weights[1] == 0).all()) for weights in whole.attentions)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in network.parameters())


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
    from foveate.integrations.transformers.masks import _compiled

    plain = {"local_size": 5, "config": network.config, "allow_is_causal_skip": True}
    assert repr(_compiled(known.sliding_window_causal_mask_function(5), plain)) == "causal & window(5)"


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


def test_queries_that_all_rows_share_are_repeated() -> None:
    q, k = torch.randn(1, 2, 3, 4), torch.randn(5, 2, 7, 4)
    out, weights = attention(torch.nn.Module(), q, k, k, None, is_causal=False)
    assert weights is None
    torch.testing.assert_close(out.transpose(1, 2), fv.attention(q.expand(5, -1, -1, -1), k, k))


def test_a_layer_without_a_mask_is_causal_if_it_says_so() -> None:
    q = torch.randn(1, 2, 5, 4)
    layer = torch.nn.Module()
    for more, pattern in (
        ({}, fv.causal),
        ({"is_causal": False}, None),
        ({"sliding_window": 2}, fv.causal & fv.window(2)),
    ):
        out, weights = attention(layer, q, q, q, None, output_attentions=True, scaling=3.0, **more)
        torch.testing.assert_close(out.transpose(1, 2), fv.attention(q, q, q, pattern, scale=3.0))
        torch.testing.assert_close(weights, fv.weights(q, q, q, pattern, scale=3.0))


def test_one_query_without_a_mask_stands_at_the_last_key() -> None:
    from foveate.integrations.transformers.attending import PLAN, Plan

    q, k = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 7, 4)
    layer = torch.nn.Module()
    setattr(layer, PLAN, Plan(fv.window(3), gives_weights=True))
    out, _ = attention(layer, q, k, k, None)
    torch.testing.assert_close(out.transpose(1, 2), fv.attention(q, k[:, :, 4:], k[:, :, 4:]))


def test_a_mask_stays_a_pattern_where_it_is_already() -> None:
    made = mask(1, 4, 4)
    assert made.to("cpu") is made
    assert made.to(torch.device("cpu")) is made
    assert isinstance(made.to("meta"), Tensor)


def test_a_mask_is_handed_on_by_transformers() -> None:
    made = mask(1, 4, 4)
    assert mask(1, 4, 4, attention_mask=made) is made  # type: ignore[arg-type]
    assert made.contiguous() is made
    assert made.ndim == made.dim() == 4
    assert "matrix" not in vars(made)
    assert isinstance(made, Mask)


def test_a_sink_for_every_query_takes_its_share() -> None:
    """As Inkling 2 has: a logit of each query, with no value behind it."""
    q, k = torch.randn(2, 6, 5, 4, dtype=torch.float64), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    logit = torch.randn(2, 6, 5, 1, dtype=torch.float64)
    given = [x.requires_grad_() for x in (q, k, logit)]
    out, weights = attention(torch.nn.Module(), q, k, k, None, sinks=logit, output_attentions=True)
    scores = q @ k.repeat_interleave(2, 1).mT / 2
    scores = scores.masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    shares = torch.cat([scores, logit], -1).softmax(-1)[..., :-1]
    truth = (shares @ k.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(weights, shares)
    mine, theirs = (torch.autograd.grad((x**2).sum(), given, retain_graph=True) for x in (out, truth))
    torch.testing.assert_close(mine, theirs)


def test_a_layer_that_changes_its_keys_under_the_mask_is_refused() -> None:
    q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 6, 8)
    with pytest.raises(fv.FoveateError, match="Module attends from 4 queries to 6 keys under a mask made for 4 and 4"):
        attention(torch.nn.Module(), q, k, k, mask(1, 4, 4))


def test_what_an_indexer_of_blocks_chose_is_refused() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(
        fv.FoveateError, match="Linear uses blocks of keys that an indexer chose, which foveate does not"
    ):
        attention(torch.nn.Linear(1, 1), q, q, q, None, block_indices=torch.zeros(1, 2, 1))


def test_a_paged_cache_is_refused() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(fv.FoveateError, match="Linear uses a paged cache, which foveate does not take"):
        attention(torch.nn.Linear(1, 1), q, q, q, None, cache=object())
