"""Modules with parameters, built on the functions of `foveate.functional`."""

from foveate.nn.additive import AdditiveAttention, LuongAttention
from foveate.nn.attention import CrossAttention, KeysValues, MultiHeadAttention, SelfAttention
from foveate.nn.decoder import AttentiveDecoder, DecoderState
from foveate.nn.glimpse import Glimpses, RecurrentAttentionModel, glimpse
from foveate.nn.position import Learned, Rotary, Sinusoidal
from foveate.nn.pytorch import torch_masks

__all__ = [
    "AdditiveAttention",
    "AttentiveDecoder",
    "CrossAttention",
    "DecoderState",
    "Glimpses",
    "KeysValues",
    "Learned",
    "LuongAttention",
    "MultiHeadAttention",
    "RecurrentAttentionModel",
    "Rotary",
    "SelfAttention",
    "Sinusoidal",
    "glimpse",
    "torch_masks",
]
