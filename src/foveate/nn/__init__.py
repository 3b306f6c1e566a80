"""Modules with parameters, built on the functions of `foveate.functional`."""

from foveate.nn.attention import CrossAttention, KeysValues, MultiHeadAttention, SelfAttention
from foveate.nn.bigbird import BigBirdAttention
from foveate.nn.hashing import ReformerAttention
from foveate.nn.interleaved import ChunkedAttention
from foveate.nn.latent import LatentAttention
from foveate.nn.longformer import LongformerAttention
from foveate.nn.lowrank import Linformer, Nystrom
from foveate.nn.position import Learned, Rotary, Sinusoidal
from foveate.nn.pytorch import torch_masks
from foveate.nn.strided import Fixed, Strided

__all__ = [
    "BigBirdAttention",
    "ChunkedAttention",
    "CrossAttention",
    "Fixed",
    "KeysValues",
    "LatentAttention",
    "Learned",
    "Linformer",
    "LongformerAttention",
    "MultiHeadAttention",
    "Nystrom",
    "ReformerAttention",
    "Rotary",
    "SelfAttention",
    "Sinusoidal",
    "Strided",
    "torch_masks",
]
