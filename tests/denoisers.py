"""Small models of diffusers of random weights, a family each: how it attends, and where its text stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

TEXT = 5
SIDE = 4
IMAGE = SIDE * SIDE


@dataclass(frozen=True)
class Denoiser:
    """A model, what it is called with, and the layers (by parts of their names) that attend among their own tokens."""

    model: Any
    inputs: dict[str, Any]
    own: tuple[str, ...]

    def out(self) -> Tensor:
        with torch.no_grad():
            torch.manual_seed(0)
            found = self.model(**self.inputs, return_dict=False)
        return found[0] if isinstance(found, tuple) else found

    def layers(self, *parts: str) -> list[str]:
        """All names of layers with processors that have one of these parts; without parts, those in `own`."""
        names = [name for name, layer in self.model.named_modules() if hasattr(layer, "set_processor")]
        return [name for name in names if any(f".{part}." in f".{name}." for part in parts or self.own)]

    def masked(self, mask: Callable[[int, int], Tensor | None], layers: list[str]) -> Tensor:
        """The output with PyTorch's own attention under a mask in these layers: (queries, keys) → True = may attend."""
        with masked(self.model, mask, layers):
            return self.out()


@contextmanager
def masked(model: Any, mask: Callable[[int, int], Tensor | None], layers: list[str]) -> Iterator[None]:
    plain = torch.nn.functional.scaled_dot_product_attention
    inside: list[str] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        seen = mask(query.shape[-2], key.shape[-2]) if inside else None
        if seen is None:
            return plain(query, key, value, attn_mask, **more)
        if attn_mask is not None:
            seen = seen & attn_mask if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~seen, -torch.inf)
        return plain(query, key, value, seen, **more)

    hooks = []
    for name in layers:
        layer = model.get_submodule(name)
        hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        hooks.append(layer.register_forward_hook(lambda *_: [inside.pop()][:0] or None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        yield
    for hook in hooks:
        hook.remove()


def sharpened(model: Any) -> Any:
    """Far from uniform weights, or a fault would not be seen; and nothing that begins as zeros."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in (".to_q.", ".to_k.", ".to_qkv.")):
                weight *= 4
            elif not weight.any():
                weight.normal_(0, 0.1)
    return model.eval()


def _made(kind: str, settings: dict[str, Any], inputs: dict[str, Any], *own: str) -> Denoiser:
    import diffusers

    torch.manual_seed(0)
    return Denoiser(sharpened(getattr(diffusers, kind)(**settings)), inputs, own)


def _of(**values: Any) -> dict[str, Any]:
    return values


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


STEP = torch.tensor([7.0, 3.0])


def ltx(text: int = TEXT) -> Denoiser:
    settings = _of(
        in_channels=3, out_channels=3, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=11,
    )  # fmt: skip
    inputs = _of(
        hidden_states=_random(2, IMAGE, 3), encoder_hidden_states=_random(2, text, 11), timestep=STEP,
        encoder_attention_mask=torch.ones(2, text), num_frames=1, height=SIDE, width=SIDE,
    )  # fmt: skip
    return _made("LTXVideoTransformer3DModel", settings, inputs, "attn1")


def wan(text: int = TEXT) -> Denoiser:
    settings = _of(
        patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=11,
        freq_dim=16, ffn_dim=13, num_layers=2,
    )  # fmt: skip
    inputs = _of(hidden_states=_random(2, 3, 1, SIDE, SIDE), encoder_hidden_states=_random(2, text, 11), timestep=STEP)
    return _made("WanTransformer3DModel", settings, inputs, "attn1")


def any_flow(text: int = TEXT) -> Denoiser:
    settings = _of(
        patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=11,
        freq_dim=16, ffn_dim=13, num_layers=2,
    )  # fmt: skip
    inputs = _of(
        hidden_states=_random(2, 1, 3, SIDE, SIDE), encoder_hidden_states=_random(2, text, 11),
        timestep=STEP[:, None], r_timestep=STEP[:, None] / 2,
    )  # fmt: skip
    return _made("AnyFlowTransformer3DModel", settings, inputs, "attn1")


def pixart(text: int = TEXT) -> Denoiser:
    settings = _of(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=2, sample_size=SIDE,
        patch_size=1, cross_attention_dim=16, caption_channels=11, norm_num_groups=1, use_additional_conditions=False,
    )  # fmt: skip
    inputs = _of(
        hidden_states=_random(2, 3, SIDE, SIDE), encoder_hidden_states=_random(2, text, 11), timestep=STEP,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )  # fmt: skip
    return _made("PixArtTransformer2DModel", settings, inputs, "attn1")


def sd3(text: int = TEXT, dual: tuple[int, ...] = ()) -> Denoiser:
    settings = _of(
        sample_size=SIDE, patch_size=1, in_channels=3, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=11, pooled_projection_dim=13, out_channels=3,
        pos_embed_max_size=8, dual_attention_layers=dual,
    )  # fmt: skip
    inputs = _of(
        hidden_states=_random(2, 3, SIDE, SIDE), encoder_hidden_states=_random(2, text, 11),
        pooled_projections=_random(2, 13), timestep=STEP,
    )  # fmt: skip
    return _made("SD3Transformer2DModel", settings, inputs, "attn")


def flux(text: int = TEXT) -> Denoiser:
    settings = _of(
        patch_size=1, in_channels=3, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=11, pooled_projection_dim=13, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    inputs = _of(
        hidden_states=_random(2, IMAGE, 3), encoder_hidden_states=_random(2, text, 11),
        pooled_projections=_random(2, 13), timestep=STEP, img_ids=_random(IMAGE, 3), txt_ids=_random(text, 3),
    )  # fmt: skip
    return _made("FluxTransformer2DModel", settings, inputs, "attn")


def qwen_image(text: int = TEXT) -> Denoiser:
    settings = _of(
        patch_size=1, in_channels=3, out_channels=3, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=11, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    inputs = _of(
        hidden_states=_random(2, IMAGE, 3), encoder_hidden_states=_random(2, text, 11),
        encoder_hidden_states_mask=torch.ones(2, text, dtype=torch.long), timestep=STEP,
        img_shapes=[(1, SIDE, SIDE)] * 2,
    )  # fmt: skip
    return _made("QwenImageTransformer2DModel", settings, inputs, "attn")


def cogvideox(text: int = TEXT) -> Denoiser:
    settings = _of(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, time_embed_dim=2, text_embed_dim=11,
        num_layers=2, sample_width=SIDE, sample_height=SIDE, sample_frames=1, patch_size=1, max_text_seq_length=text,
    )  # fmt: skip
    inputs = _of(hidden_states=_random(2, 1, 3, SIDE, SIDE), encoder_hidden_states=_random(2, text, 11), timestep=STEP)
    return _made("CogVideoXTransformer3DModel", settings, inputs, "attn1")


def hunyuan_video(text: int = TEXT) -> Denoiser:
    settings = _of(
        in_channels=3, out_channels=3, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=False, text_embed_dim=11,
        pooled_projection_dim=13, rope_axes_dim=(2, 4, 4), image_condition_type=None,
    )  # fmt: skip
    inputs = _of(
        hidden_states=_random(2, 3, 1, SIDE, SIDE), encoder_hidden_states=_random(2, text, 11), timestep=STEP,
        encoder_attention_mask=torch.ones(2, text), pooled_projections=_random(2, 13),
    )  # fmt: skip
    return _made("HunyuanVideoTransformer3DModel", settings, inputs, "attn")


def lumina2(text: int = TEXT) -> Denoiser:
    settings = _of(
        sample_size=SIDE, patch_size=1, in_channels=3, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64),
        cap_feat_dim=11,
    )  # fmt: skip
    inputs = _of(
        hidden_states=_random(2, 3, SIDE, SIDE), encoder_hidden_states=_random(2, text, 11), timestep=STEP / 9,
        encoder_attention_mask=torch.ones(2, text, dtype=torch.bool),
    )  # fmt: skip
    return _made("Lumina2Transformer2DModel", settings, inputs, "attn")


def prx(text: int = TEXT) -> Denoiser:
    """Its queries are the picture's alone, its keys the text's and the picture's."""
    settings = _of(
        in_channels=3, patch_size=1, context_in_dim=11, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[4, 4],
    )  # fmt: skip
    inputs = _of(hidden_states=_random(2, 3, SIDE, SIDE), encoder_hidden_states=_random(2, text, 11), timestep=STEP)
    return _made("PRXTransformer2DModel", settings, inputs, "attention")


def added_keys(text: int = TEXT) -> Denoiser:
    """A UNet whose layers lay the text's keys before the picture's."""
    settings = _of(
        sample_size=SIDE, in_channels=3, out_channels=3, block_out_channels=(16, 32), norm_num_groups=8,
        layers_per_block=1, cross_attention_dim=11, attention_head_dim=8, encoder_hid_dim=None,
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )  # fmt: skip
    inputs = _of(sample=_random(2, 3, SIDE, SIDE), encoder_hidden_states=_random(2, text, 11), timestep=3)
    return _made("UNet2DConditionModel", settings, inputs, "attentions")


@cache
def made(name: str) -> Denoiser:
    return {each.__name__: each for each in ALL}[name]()


ALL = (
    ltx, wan, any_flow, pixart, sd3, flux, qwen_image, cogvideox, hunyuan_video, lumina2, prx, added_keys
)  # fmt: skip
