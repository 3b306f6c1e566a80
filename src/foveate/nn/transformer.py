"""The Transformer: an encoder reads the source, a decoder writes the target, each step from what it wrote before.

    source ─ Encoder ───────────────────────┐ context
                                            ▼
    target ─ Decoder: attention to itself ─ attention to the context ─ feed-forward ─ … ─ next tokens

`Transformer` maps vectors to vectors, as `torch.nn.Transformer`; `Seq2Seq` is the whole model of the paper around it,
from tokens to scores of the next token.

Vaswani et al. 2017, "Attention is all you need": https://arxiv.org/abs/1706.03762
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Self

from jaxtyping import Float
from torch import Tensor, nn

from foveate.errors import InvalidInput
from foveate.nn.attention import KeysValues, LayerCache
from foveate.nn.block import Block
from foveate.nn.pytorch import rename_layers
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import causal
from foveate.rotary import Angles
from foveate.score import Score
