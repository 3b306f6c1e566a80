"""Modules with parameters, built on the functions of `foveate.functional`."""

from foveate.nn.additive import AdditiveAttention, LuongAttention
from foveate.nn.decoder import AttentiveDecoder, DecoderState
from foveate.nn.delta import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from foveate.nn.glimpse import Glimpses, RecurrentAttentionModel, glimpse
from foveate.nn.linear import LinearAttention, Performer
from foveate.nn.mixing import MixerState, ShortConvolution
from foveate.nn.retention import GatedLinearAttention, LightningAttention, MultiScaleRetention

__all__ = [
    "AdditiveAttention",
    "AttentiveDecoder",
    "DecoderState",
    "DeltaNet",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "Glimpses",
    "KimiDeltaAttention",
    "LightningAttention",
    "LinearAttention",
    "LuongAttention",
    "MixerState",
    "MultiScaleRetention",
    "Performer",
    "RecurrentAttentionModel",
    "ShortConvolution",
    "glimpse",
]
