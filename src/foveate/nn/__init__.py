"""Modules with parameters, built on the functions of `foveate.functional`."""

from foveate.nn.additive import AdditiveAttention, LuongAttention
from foveate.nn.decoder import AttentiveDecoder, DecoderState
from foveate.nn.glimpse import Glimpses, RecurrentAttentionModel, glimpse

__all__ = [
    "AdditiveAttention",
    "AttentiveDecoder",
    "DecoderState",
    "Glimpses",
    "LuongAttention",
    "RecurrentAttentionModel",
    "glimpse",
]
