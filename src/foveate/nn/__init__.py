"""Modules with parameters, built on the functions of `foveate.functional`."""

from foveate.nn.additive import AdditiveAttention, LuongAttention
from foveate.nn.attention import CrossAttention, KeysValues, MultiHeadAttention, SelfAttention
from foveate.nn.axial import AxialRotary, MultimodalRotary
from foveate.nn.bias import ALiBi, RelativeBias
from foveate.nn.block import Block, FeedForward, GatedFeedForward, PostNorm, PreNorm
from foveate.nn.decoder import AttentiveDecoder, DecoderState
from foveate.nn.delta import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from foveate.nn.glimpse import Glimpses, RecurrentAttentionModel, glimpse
from foveate.nn.linear import LinearAttention, Performer
from foveate.nn.mixing import MixerState, ShortConvolution
from foveate.nn.position import Learned, Rotary, Sinusoidal
from foveate.nn.pytorch import torch_masks
from foveate.nn.retention import GatedLinearAttention, LightningAttention, MultiScaleRetention
from foveate.nn.seq2seq import Seq2Seq, inverse_sqrt_rate
from foveate.nn.transformer import Decoder, Encoder, Transformer

__all__ = [
    "ALiBi",
    "AdditiveAttention",
    "AttentiveDecoder",
    "AxialRotary",
    "Block",
    "CrossAttention",
    "Decoder",
    "DecoderState",
    "DeltaNet",
    "Encoder",
    "FeedForward",
    "GatedDeltaNet",
    "GatedFeedForward",
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
    "MultimodalRotary",
    "Performer",
    "PostNorm",
    "PreNorm",
    "RecurrentAttentionModel",
    "RelativeBias",
    "Rotary",
    "SelfAttention",
    "Seq2Seq",
    "ShortConvolution",
    "Sinusoidal",
    "Transformer",
    "glimpse",
    "inverse_sqrt_rate",
    "torch_masks",
]
