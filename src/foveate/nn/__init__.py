"""Modules with parameters, built on the functions of `foveate.functional`."""

from foveate.nn.additive import AdditiveAttention, LuongAttention
from foveate.nn.attention import CrossAttention, KeysValues, MultiHeadAttention, SelfAttention
from foveate.nn.decoder import AttentiveDecoder, DecoderState
from foveate.nn.delta import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from foveate.nn.glimpse import Glimpses, RecurrentAttentionModel, glimpse
from foveate.nn.linear import LinearAttention, Performer
from foveate.nn.mixing import MixerState, ShortConvolution
from foveate.nn.position import Learned, Rotary, Sinusoidal
from foveate.nn.pytorch import torch_masks
from foveate.nn.retention import GatedLinearAttention, LightningAttention, MultiScaleRetention

__all__ = [
    "AdditiveAttention",
    "AttentiveDecoder",
    "CrossAttention",
    "DecoderState",
    "DeltaNet",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "Glimpses",
    "KeysValues",
    "KimiDeltaAttention",
    "Learned",
    "LightningAttention",
    "LinearAttention",
    "LuongAttention",
    "MixerState",
    "MultiHeadAttention",
    "MultiScaleRetention",
    "Performer",
    "RecurrentAttentionModel",
    "Rotary",
    "SelfAttention",
    "ShortConvolution",
    "Sinusoidal",
    "glimpse",
    "torch_masks",
]
