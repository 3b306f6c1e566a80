"""Models that call PyTorch's attention compute the same under `accelerate()`: nn.Transformer's parts, Hugging Face."""

from __future__ import annotations

import pytest
import torch
from sdpa_calls import made, only_hides, padded
from torch import Tensor, nn

import foveate as fv

pytestmark = pytest.mark.usefixtures("_nothing_stays")


def models() -> dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, object]]]:
    """PyTorch's own modules, with padding, masks, and both."""
    torch.manual_seed(0)
    x, y = made(2, 67, 24, seed=1), made(2, 41, 24, seed=2)
    pad = ~padded(2, 67)[:, 0, 0]
    future = nn.Transformer.generate_square_subsequent_mask(67)
    layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(24, 4, 48, dropout=0.0, batch_first=True), 2)
    first = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True, norm_first=True)
    both = nn.Transformer(24, 4, 1, 1, 48, dropout=0.0, batch_first=True)
    attention = nn.MultiheadAttention(24, 4, batch_first=True)
    return {
        "attention": (attention, (x, y, y), {"need_weights": False}),
        "attention, padded": (attention, (x, x, x), {"need_weights": False, "key_padding_mask": pad}),
        "attention, weights": (attention, (x, x, x), {"attn_mask": future}),
        "encoder": (encoder, (x,), {}),
        "encoder, padded": (encoder, (x,), {"src_key_padding_mask": pad}),
        "encoder, causal": (encoder, (x,), {"mask": future, "is_causal": True}),
        "encoder, causal and padded": (encoder, (x,), {"mask": future, "src_key_padding_mask": only_hides(~pad)}),
        "encoder, norm first": (nn.TransformerEncoder(first, 2, enable_nested_tensor=False), (x,), {"mask": future}),
        "transformer": (both, (x, y), {"src_key_padding_mask": pad, "memory_key_padding_mask": pad}),
        "decoder": (decoder, (y, x), {"memory_key_padding_mask": pad, "tgt_is_causal": True,
                                      "tgt_mask": nn.Transformer.generate_square_subsequent_mask(41)}),
    }  # fmt: skip


def first(found: object) -> Tensor:
    out = found[0] if isinstance(found, tuple) else found
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", models())
@pytest.mark.usefixtures("_ours")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_modules_of_pytorch(name: str, training: bool) -> None:
    model, inputs, options = models()[name]
    model.train(training)

    def gradients() -> list[Tensor]:
        out = first(model(*inputs, **options))
        parameters = [x for x in model.parameters() if x.requires_grad]
        return [out.detach(), *torch.autograd.grad(out.square().mean(), parameters)]

    with torch.no_grad():
        quick = first(model(*inputs, **options))
    before = gradients()
    with fv.accelerate() as acceleration:
        during = gradients()
        with torch.no_grad():
            without = first(model(*inputs, **options))
    assert all(map(torch.equal, before, gradients()))
    assert (during[0] - before[0]).abs().max() <= 1e-5 * before[0].abs().max()
    largest = max(x.abs().max() for x in before[1:])
    assert all((x - y).abs().max() <= 1e-4 * largest for x, y in zip(during[1:], before[1:], strict=True))
    assert (quick - without).abs().max() <= 1e-5 * quick.abs().max()
    assert bool(acceleration.report().foveate) == (name != "attention, weights")
    assert not acceleration.report().pytorch


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.usefixtures("_ours")
def test_dropout_of_a_module_of_pytorch_is_what_it_was(training: bool) -> None:
    """To the bit: PyTorch draws it, from the same stream."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.3, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).train(training)
    x, pad = made(2, 67, 24, seed=1), ~padded(2, 67)[:, 0, 0]

    def found() -> Tensor:
        torch.manual_seed(7)
        out: Tensor = encoder(x, src_key_padding_mask=pad)
        return out

    before = found()
    with fv.accelerate() as acceleration:
        during = found()
    if training:
        assert torch.equal(during, before)
        assert not acceleration.report().foveate
        assert all(why.startswith("dropout") for _, why in acceleration.report().pytorch)
    else:
        assert (during - before).abs().max() <= 1e-5 * before.abs().max()
        assert acceleration.report().foveate == {("forward", ""): 2}


def hugging_face() -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    ids = torch.randint(0, 61, (2, 67))
    size = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    kept = torch.ones(2, 67, dtype=torch.int64)
    kept[0, :23] = 0
    bert = BertModel(BertConfig(**size, num_attention_heads=4, attn_implementation="sdpa"))
    llama = LlamaModel(LlamaConfig(**size, num_attention_heads=6, num_key_value_heads=2, attn_implementation="sdpa"))
    return {
        "bert": (bert, {"input_ids": ids}),
        "bert, padded": (bert, {"input_ids": ids, "attention_mask": kept}),
        "llama": (llama, {"input_ids": ids}),
        "llama, padded": (llama, {"input_ids": ids, "attention_mask": kept}),
    }


@pytest.mark.parametrize("name", ["bert", "bert, padded", "llama", "llama, padded"])
@pytest.mark.usefixtures("_ours")
def test_hugging_face_models(name: str) -> None:
    model, inputs = hugging_face()[name]
    model.eval()
    for weight in (w for n, w in model.named_parameters() if "query" in n or "q_proj" in n):
        weight.data *= 30  # far from uniform weights, or nothing would be seen of a fault

    def gradients() -> list[Tensor]:
        out = model(**inputs).last_hidden_state
        leaves = [x for x in model.parameters() if x.requires_grad]
        slopes = torch.autograd.grad(out.square().mean(), leaves, allow_unused=True)
        return [out.detach(), *(slope for slope in slopes if slope is not None)]

    before = gradients()
    with fv.accelerate() as acceleration:
        during = gradients()
        with torch.inference_mode():
            quick = model(**inputs).last_hidden_state
    assert (during[0] - before[0]).abs().max() <= 1e-5 * before[0].abs().max()
    for one, other in zip(before[1:], during[1:], strict=True):
        most = one.abs().max().item()
        torch.testing.assert_close(one, other, atol=1e-4 * most + 1e-7, rtol=0)
    torch.testing.assert_close(quick, before[0], atol=1e-5 * before[0].abs().max().item(), rtol=0)
    assert acceleration.report().foveate == {("forward", ""): 4, ("backward", ""): 2}
    assert not acceleration.report().pytorch


@pytest.mark.usefixtures("_ours")
def test_grouped_heads_are_decoded_on_our_kernels() -> None:
    """`generate()` with a cache: the prompt, then one query for each token, its keys read once for all their heads."""
    model, _ = hugging_face()["llama"]
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    writer = LlamaForCausalLM(model.config).eval()
    ids = torch.randint(0, 61, (1, 300), generator=torch.Generator().manual_seed(1))
    how = {"max_new_tokens": 7, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    truth = writer.generate(ids, **how)
    with fv.accelerate() as acceleration:
        found = writer.generate(ids, **how)
    assert torch.equal(found.sequences, truth.sequences)
    for mine, theirs in zip(found.logits, truth.logits, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert acceleration.report().foveate == {("forward", ""): 2 * 7}
    assert not acceleration.report().pytorch
