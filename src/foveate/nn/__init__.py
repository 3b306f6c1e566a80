"""Modules with parameters, built on the functions of `foveate.functional`."""

from foveate.nn.attention import CrossAttention, KeysValues, MultiHeadAttention, SelfAttention
from foveate.nn.position import Learned, Rotary, Sinusoidal
from foveate.nn.pytorch import torch_masks

__all__ = [
    "CrossAttention",
    "KeysValues",
    "Learned",
    "MultiHeadAttention",
    "Rotary",
    "SelfAttention",
    "Sinusoidal",
    "torch_masks",
]
