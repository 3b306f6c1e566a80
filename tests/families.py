"""One small model of random weights for every family that is compared with its own eager attention.

Nothing is downloaded. Random projections attend almost evenly, which hides a lost mask, so `sharpen` multiplies what
makes the scores until the largest weight of a row is large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

Inputs = dict[str, Tensor]

TEXT = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "pad_token_id": 0}
DECODER = {**TEXT, "intermediate_size": 59, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**DECODER, "num_key_value_heads": 2}
PAIR = {
    "vocab_size": 97, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 6,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 59, "decoder_ffn_dim": 53, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
IMAGE = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 59, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
LENGTH = 17


def _tokens(length: int, seed: int) -> Tensor:
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(seed))


def _kept(length: int, padded: int, *, left: bool) -> Tensor:
    kept = torch.ones(2, length, dtype=torch.int64)
    kept[1, slice(0, padded) if left else slice(length - padded, None)] = 0
    return kept


def left_padded() -> Inputs:
    """Two texts for a decoder, the second padded on the left."""
    return {"input_ids": _tokens(LENGTH, 5), "attention_mask": _kept(LENGTH, 6, left=True)}


def right_padded() -> Inputs:
    """Two texts for an encoder, the second padded on the right."""
    return {"input_ids": _tokens(LENGTH, 5), "attention_mask": _kept(LENGTH, 6, left=False)}


def pairs() -> Inputs:
    """Two padded texts for an encoder, and two more for its decoder."""
    more = {"decoder_input_ids": _tokens(11, 6), "decoder_attention_mask": _kept(11, 3, left=False)}
    return {**right_padded(), **more}


def _pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def image() -> Inputs:
    """Two images."""
    return {"pixel_values": _pixels(2, 3, 16, 16)}


def padded_images() -> Inputs:
    """Two images, the second smaller than its frame."""
    kept = torch.ones(2, 128, 128, dtype=torch.int64)
    kept[1, :, 64:] = 0
    return {"pixel_values": _pixels(2, 3, 128, 128), "pixel_mask": kept}


def sound() -> Inputs:
    """Two spectrograms, and the texts of its decoder."""
    return {"input_features": _pixels(2, 8, 40), "decoder_input_ids": _tokens(11, 6)}


def image_and_text() -> Inputs:
    """Two images and a text for each."""
    return {**image(), **right_padded()}


def image_in_text() -> Inputs:
    """A text with the 16 places of an image in it."""
    ids = torch.cat([_tokens(3, 5), torch.full((2, 16), 96), _tokens(9, 6).clamp(max=95)], 1)
    ids[:, :3].clamp_(max=95)
    return {**image(), "input_ids": ids, "attention_mask": _kept(28, 2, left=True)}


@dataclass(frozen=True)
class Family:
    """A family: how to make its model and inputs, what about its attention matters, and which weights make the scores.

    `parts` are those without which the output has to change: mask, window, chunks, selection, cap, sinks, bias, or the
    mask of the cross-attention.
    """

    label: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    parts: tuple[str, ...]
    sharp: tuple[str, ...] = ("q_proj", "k_proj")
    generates: bool = field(default=False)


def _config(name: str, **values: Any) -> Any:
    return getattr(hf, f"{name}Config")(**values)


def _of(model: str, config: str | None = None, **values: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        name = config or model.removesuffix("ForCausalLM").removesuffix("ForMaskedLM")
        network: nn.Module = getattr(hf, model)(_config(name, attn_implementation="eager", **values))
        return network

    return make


BERT = {**TEXT, "intermediate_size": 59, "max_position_embeddings": 64}
QUERY_KEY = ("attention.self.query", "attention.self.key", "q_proj", "k_proj")


def _detr() -> nn.Module:
    backbone = _config(
        "ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"], num_channels=3
    )
    config = _config(
        "Detr", use_timm_backbone=False, backbone_config=backbone, backbone=None, use_pretrained_backbone=False,
        d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=6, decoder_attention_heads=3,
        encoder_ffn_dim=59, decoder_ffn_dim=53, num_queries=7, num_labels=5, attn_implementation="eager",
    )  # fmt: skip
    return hf.DetrForObjectDetection(config)


def _llava() -> nn.Module:
    text = _config("Llama", **GROUPED)
    vision = _config("CLIPVision", **IMAGE, projection_dim=48)
    config = _config(
        "Llava", text_config=text, vision_config=vision, image_token_index=96, image_token_id=96,
        vision_feature_select_strategy="default", vision_feature_layer=-1, attn_implementation="eager",
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def _clip() -> nn.Module:
    text = {**DECODER, "projection_dim": 48, "pad_token_id": 0, "eos_token_id": 2}
    return hf.CLIPModel(
        _config("CLIP", text_config=text, vision_config=IMAGE, projection_dim=48, attn_implementation="eager")
    )


FAMILIES: dict[str, Family] = {
    "bert": Family("BERT", _of("BertForMaskedLM", **BERT), right_padded, ("mask",), QUERY_KEY),
    "roberta": Family("RoBERTa", _of("RobertaForMaskedLM", **BERT), right_padded, ("mask",), QUERY_KEY),
    "distilbert": Family(
        "DistilBERT",
        _of("DistilBertForMaskedLM", vocab_size=97, dim=48, n_layers=2, n_heads=6, hidden_dim=59, pad_token_id=0),
        right_padded, ("mask",), ("q_lin", "k_lin"),
    ),
    "gpt2": Family(
        "GPT-2", _of("GPT2LMHeadModel", "GPT2", vocab_size=97, n_embd=48, n_layer=2, n_head=6, n_positions=64,
                     bos_token_id=1, eos_token_id=2, pad_token_id=0),
        left_padded, ("mask",), ("c_attn",), True,
    ),
    "opt": Family(
        "OPT", _of("OPTForCausalLM", **{**DECODER, "ffn_dim": 59, "word_embed_proj_dim": 48}),
        left_padded, ("mask",), generates=True,
    ),
    "llama": Family(
        "Llama (grouped heads)", _of("LlamaForCausalLM", **GROUPED), left_padded, ("mask",), generates=True
    ),
    "mistral": Family(
        "Mistral (window)", _of("MistralForCausalLM", **GROUPED, sliding_window=5), left_padded, ("mask", "window"),
        generates=True,
    ),
    "qwen2": Family("Qwen 2", _of("Qwen2ForCausalLM", **GROUPED), left_padded, ("mask",), generates=True),
    "qwen3": Family(
        "Qwen 3", _of("Qwen3ForCausalLM", **GROUPED, head_dim=8), left_padded, ("mask",), ("q_norm", "k_norm"), True
    ),
    "gemma2": Family(
        "Gemma 2 (window, soft-cap)",
        _of("Gemma2ForCausalLM", **GROUPED, head_dim=8, sliding_window=5, attn_logit_softcapping=3.0),
        left_padded, ("mask", "window", "cap"), generates=True,
    ),
    "gemma3": Family(
        "Gemma 3 (window)",
        _of("Gemma3ForCausalLM", "Gemma3Text", **GROUPED, head_dim=8, sliding_window=5,
            layer_types=["sliding_attention", "full_attention"]),
        left_padded, ("mask", "window"), ("q_norm", "k_norm"), True,
    ),
    "gpt_oss": Family(
        "gpt-oss (window, sinks)",
        _of("GptOssForCausalLM", **{**GROUPED, "intermediate_size": 60}, head_dim=8, sliding_window=5,
            num_local_experts=2, num_experts_per_tok=1, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            layer_types=["sliding_attention", "full_attention"]),
        left_padded, ("mask", "window", "sinks"), generates=True,
    ),
    "llama4": Family(
        "Llama 4, text (chunks)",
        _of("Llama4ForCausalLM", "Llama4Text", **GROUPED, head_dim=8, intermediate_size_mlp=59, num_local_experts=2,
            attention_chunk_size=5, use_qk_norm=False, layer_types=["chunked_attention", "full_attention"],
            no_rope_layers=[1, 0]),
        left_padded, ("mask", "chunks"),
    ),
    "deepseek_v3": Family(
        "DeepSeek-V3 (values of another width)",
        _of("DeepseekV3ForCausalLM", **{**DECODER, "num_key_value_heads": 6}, q_lora_rank=13, kv_lora_rank=11,
            qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7, n_routed_experts=4, n_group=2, topk_group=1,
            num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1),
        left_padded, ("mask",), ("q_b_proj",), True,
    ),
    "deepseek_v32": Family(
        "DeepSeek-V3.2 (keys chosen by an indexer)",
        _of("DeepseekV32ForCausalLM", **{**DECODER, "num_key_value_heads": 6}, q_lora_rank=13, kv_lora_rank=11,
            qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7, n_routed_experts=4, n_group=2, topk_group=1,
            num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1, index_topk=5, index_head_dim=8,
            index_n_heads=2),
        left_padded, ("mask", "selection"), ("q_b_proj",), True,
    ),
    "t5": Family(
        "T5 (relative bias, cross-attention)",
        _of("T5ForConditionalGeneration", "T5", vocab_size=97, d_model=48, d_kv=8, d_ff=59, num_layers=2, num_heads=6,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=2),
        pairs, ("mask", "bias", "cross"), ("Attention.q", "Attention.k", "relative_attention_bias"), True,
    ),
    "bart": Family(
        "BART (cross-attention)", _of("BartForConditionalGeneration", "Bart", **PAIR), pairs, ("mask", "cross"),
        generates=True,
    ),
    "marian": Family(
        "Marian (cross-attention)", _of("MarianMTModel", "Marian", **PAIR), pairs, ("mask", "cross"), generates=True
    ),
    "whisper": Family(
        "Whisper",
        _of("WhisperForConditionalGeneration", "Whisper",
            **{**PAIR, "decoder_start_token_id": 1}, num_mel_bins=8, max_source_positions=20, max_target_positions=32,
            suppress_tokens=None, begin_suppress_tokens=None),
        sound, ("mask",),
    ),
    "vit": Family("ViT", _of("ViTForImageClassification", "ViT", **IMAGE), image, ()),
    "dinov2": Family("DINOv2", _of("Dinov2ForImageClassification", "Dinov2", **IMAGE), image, ()),
    "clip": Family("CLIP (text and vision)", _clip, image_and_text, ("mask",)),
    "detr": Family("DETR", _detr, padded_images, ("mask",)),
    "llava": Family("Llava (vision tower and Llama)", _llava, image_in_text, ("mask",)),
}  # fmt: skip


VALUES = ("attention.self.value", "attention.output", "v_lin", "out_lin", "v_proj", "o_proj", "out_proj", "c_proj",
          "kv_b_proj", "Attention.v", "Attention.o", "attention.attention.value")  # fmt: skip


def build(name: str) -> nn.Module:
    """The random model of a family, eager, sharpened, in eval mode."""
    family = FAMILIES[name]
    torch.manual_seed(3)
    return sharpened(family.make(), family.inputs(), family.sharp)


def sharpened(model: nn.Module, inputs: Inputs, sharp: tuple[str, ...]) -> nn.Module:
    """The model with weights that let its attention show: rows look at few keys, and what they see counts."""
    model.eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "relative_attention_bias" in key or key.endswith("sinks"):
                parameter.normal_(0, 2)
            elif any(part in key for part in VALUES) and parameter.dim() > 1:
                parameter.mul_(4)  # so that what attention adds is no smaller than what passes it by
        for _ in range(20):
            if top_weight(model, inputs) > 0.35:
                break
            for key, parameter in model.named_parameters():
                if any(part in key for part in sharp):
                    # The weight of a normalization may be 1 + what is stored.
                    parameter.add_(0.3) if "norm" in key else parameter.mul_(1.3)
    return model


def top_weight(model: nn.Module, inputs: Inputs) -> float:
    """The mean of the largest weight of every row, over the rows that see at least a few keys."""
    with torch.no_grad():
        made = model(**inputs, output_attentions=True)
    tops = [
        weights[:, :, weights.shape[2] // 2 :].amax(-1).flatten()
        for name, weights in flat(made).items()
        if "attentions" in name
    ]
    return float(torch.cat(tops).mean())


def flat(outputs: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every floating-point tensor among a model's outputs, by its place."""
    items = outputs.items() if hasattr(outputs, "items") else enumerate(outputs)
    found: dict[str, Tensor] = {}
    for key, value in items:
        if isinstance(value, Tensor) and value.dtype.is_floating_point:
            found[f"{prefix}{key}"] = value
        elif isinstance(value, tuple | list) or hasattr(value, "items"):
            found.update(flat(value, f"{prefix}{key}."))
    return found


def real(outputs: dict[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """The outputs without the rows of padding, whose content no model promises."""
    kept = {}
    for key, value in outputs.items():
        encoder = "encoder" in key.split(".")[0] or "decoder_input_ids" not in inputs
        mask = inputs.get("attention_mask" if encoder else "decoder_attention_mask")
        is_text = mask is not None and value.dim() >= 3 and value.shape[:2] == mask.shape
        kept[key] = value[mask.bool()] if is_text else value
    return kept
