"""Hugging Face models compute the same with foveate's attention as with their own eager one."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

import foveate as fv
from foveate.integrations.transformers import Mask, mask, register

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 97}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "bert": lambda: transformers.BertConfig(**SIZES, intermediate_size=59),
    "gpt2": lambda: transformers.GPT2Config(n_embd=48, n_layer=3, n_head=6, vocab_size=97),
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=59),
    "mistral": lambda: transformers.MistralConfig(
        **SIZES, num_key_value_heads=2, intermediate_size=59, sliding_window=5
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, intermediate_size=59, sliding_window=5, attn_logit_softcapping=2.0
    ),
    "vit": lambda: transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=6, intermediate_size=59, image_size=16, patch_size=4
    ),
}


def _model(name: str) -> nn.Module:
    """A random model whose attention is far from uniform, so that a lost mask or window shows."""
    torch.manual_seed(3)
    model = AutoModel.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    for key, parameter in model.named_parameters():
        if any(part in key for part in ("query", "q_proj", "key", "k_proj", "c_attn")) and key.endswith("weight"):
            parameter.data *= 12
    return model


def _inputs(name: str) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(5))
    kept = torch.ones(2, 17, dtype=torch.int64)
    if name == "bert":
        kept[1, 11:] = 0
    else:
        kept[1, :6] = 0  # decoders are padded on the left
    return {"input_ids": ids, "attention_mask": kept}


def _hidden(model: nn.Module, implementation: str, inputs: dict[str, Tensor]) -> Tensor:
    model.set_attn_implementation(implementation)
    hidden = model(**inputs).last_hidden_state
    kept = inputs.get("attention_mask")
    return hidden if kept is None else hidden[kept.bool()]


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_and_gradients_equal_eager(name: str) -> None:
    register()
    model, inputs = _model(name), _inputs(name)
    truth = _hidden(model, "eager", inputs)
    found = _hidden(model, "foveate", inputs)
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
    # Not a norm: after a normalisation its gradient would be nothing but noise.
    shares = torch.randn(truth.shape, generator=torch.Generator().manual_seed(7))
    parameters = [p for p in model.parameters() if p.requires_grad]
    mine, theirs = (torch.autograd.grad((x * shares).sum(), parameters, allow_unused=True) for x in (found, truth))
    assert [x is None for x in mine] == [x is None for x in theirs]
    largest = max(x.abs().max() for x in theirs if x is not None)
    for found_gradient, true_gradient in zip(mine, theirs, strict=True):
        if found_gradient is not None:
            assert (found_gradient - true_gradient).abs().max() <= 1e-4 * largest


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
def test_a_decoder_cannot_see_its_future(name: str) -> None:
    register()
    model = _model(name)
    model.set_attn_implementation("foveate")
    ids = torch.arange(17)[None]
    changed = ids.clone()
    changed[0, -1] = 42
    with torch.no_grad():
        before, after = (model(x).last_hidden_state for x in (ids, changed))
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1], atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_decoding_with_a_cache_equals_one_pass(name: str) -> None:
    register()
    model = _model(name)
    model.set_attn_implementation("foveate")
    ids = torch.arange(13)[None]
    with torch.no_grad():
        whole = model(ids).last_hidden_state
        cache, parts = None, []
        for part in ids.split([7, 1, 3, 1, 1], 1):
            step = model(part, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            parts.append(step.last_hidden_state)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_generated_tokens_equal_eager(name: str, cache: str) -> None:
    register()
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    inputs = _inputs(name)
    tokens = []
    for implementation in ("eager", "foveate"):
        model.set_attn_implementation(implementation)
        plain = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        tokens.append(model.generate(**inputs, **plain, cache_implementation=cache))
    assert torch.equal(*tokens)


def test_weights_are_returned_when_asked_for() -> None:
    register()
    model, inputs = _model("bert"), _inputs("bert")
    truth = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("foveate")
    found = model(**inputs, output_attentions=True).attentions
    for mine, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_mask_is_a_pattern_and_never_a_matrix() -> None:
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    assert mask(2, 5, 9, q_offset=4, mask_function=causal_mask_function) == Mask(fv.causal, 4)
    window = mask(2, 5, 9, q_offset=4, mask_function=sliding_window_causal_mask_function(3)).pattern
    assert window is not None
    assert torch.equal(window.dense(5, 9), (fv.causal & fv.window(3)).dense(5, 9))
    kept = torch.tensor([[True] * 9, [False] * 4 + [True] * 5])
    padded = mask(2, 5, 9, q_offset=4, mask_function=causal_mask_function, attention_mask=kept).pattern
    assert repr(padded) == "causal & padding(<bool 2×9>)"


def test_an_unknown_mask_function_becomes_a_rule() -> None:
    made = mask(1, 4, 4, mask_function=lambda batch, head, query, key: (query - key) % 2 == 0)
    assert repr(made.pattern).startswith("rule(")
    assert made.pattern is not None
    assert made.pattern.dense(4, 4)[0, 0].tolist() == [[(q - k) % 2 == 0 for k in range(4)] for q in range(4)]
