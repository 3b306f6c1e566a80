"""Modules with parameters, built on the functions of `foveate.functional`."""

from foveate.nn.sparse_selection import Compressor, LightningIndexer, MoBA, NativeSparseAttention

__all__ = ["Compressor", "LightningIndexer", "MoBA", "NativeSparseAttention"]
