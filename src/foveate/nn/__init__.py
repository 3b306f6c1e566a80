"""Modules with parameters, built on the functions of `foveate.functional`."""

from typing import TYPE_CHECKING

from foveate.names import explained_names
from foveate.nn.additive import AdditiveAttention, LuongAttention
from foveate.nn.attention import CrossAttention, KeysValues, MultiHeadAttention, SelfAttention
from foveate.nn.axial import AxialRotary, MultimodalRotary
from foveate.nn.bias import ALiBi, RelativeBias
from foveate.nn.bigbird import BigBirdAttention
from foveate.nn.block import (
    Block,
    FeedForward,
    GatedFeedForward,
    PostNorm,
    PreNorm,
)
from foveate.nn.decoder import AttentiveDecoder, DecoderState
from foveate.nn.delta import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from foveate.nn.glimpse import Glimpses, RecurrentAttentionModel, glimpse
from foveate.nn.hashing import ReformerAttention
from foveate.nn.interleaved import ChunkedAttention
from foveate.nn.latent import LatentAttention
from foveate.nn.linear import LinearAttention, Performer
from foveate.nn.longformer import LongformerAttention
from foveate.nn.lowrank import Linformer, Nystrom
from foveate.nn.mixing import MixerState, ShortConvolution
from foveate.nn.position import Learned, Rotary, Sinusoidal
from foveate.nn.pytorch import torch_masks
from foveate.nn.retention import GatedLinearAttention, LightningAttention, MultiScaleRetention
from foveate.nn.seq2seq import Seq2Seq, inverse_sqrt_rate
from foveate.nn.sparse_selection import Compressor, LightningIndexer, MoBA, NativeSparseAttention
from foveate.nn.strided import Fixed, Strided
from foveate.nn.transformer import Decoder, Encoder, Transformer
from foveate.words import explained_class

__all__ = [
    "ALiBi",
    "AdditiveAttention",
    "AttentiveDecoder",
    "AxialRotary",
    "BigBirdAttention",
    "Block",
    "ChunkedAttention",
    "Compressor",
    "CrossAttention",
    "Decoder",
    "DecoderState",
    "DeltaNet",
    "Encoder",
    "FeedForward",
    "Fixed",
    "GatedDeltaNet",
    "GatedFeedForward",
    "GatedLinearAttention",
    "Glimpses",
    "KeysValues",
    "KimiDeltaAttention",
    "LatentAttention",
    "Learned",
    "LightningAttention",
    "LightningIndexer",
    "LinearAttention",
    "Linformer",
    "LongformerAttention",
    "LuongAttention",
    "MixerState",
    "MoBA",
    "MultiHeadAttention",
    "MultiScaleRetention",
    "MultimodalRotary",
    "NativeSparseAttention",
    "Nystrom",
    "Performer",
    "PostNorm",
    "PreNorm",
    "RecurrentAttentionModel",
    "ReformerAttention",
    "RelativeBias",
    "Rotary",
    "SelfAttention",
    "Seq2Seq",
    "ShortConvolution",
    "Sinusoidal",
    "Strided",
    "Transformer",
    "glimpse",
    "inverse_sqrt_rate",
    "torch_masks",
]

for _name in __all__:
    explained_class(globals()[_name])

if not TYPE_CHECKING:
    __getattr__ = explained_names(__name__)
