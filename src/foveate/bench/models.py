"""The table of whole models, as data: Hugging Face's own attention beside ours.

A row's contestants are one model of random weights several times, with the same weights in the same memory:

- eager, sdpa: as transformers computes it by itself
- foveate: `attn_implementation="foveate"`
- accelerate: "sdpa" under `foveate.accelerate()`
- grown: "foveate" with a `GrowingCache` in place of transformers' DynamicCache
- packed: "foveate" on what is no padding, the texts of a batch end to end in one row (`documents`); laying them out and
  back is part of a turn
- own: the model of `foveate.models` that such a checkpoint opens as
- own packed: the same on what is no padding
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from foveate.bench.rows import Claim

EVERYONE = ("foveate", "accelerate", "sdpa", "eager")
_F32, _BF16 = torch.float32, torch.bfloat16
_SHRINK = 32  # of lengths in the quick table, whose models have one narrow layer


@dataclass(frozen=True)
class ModelRow:
    """A model, what it has to do, and how ours has to stand against another.

    `config` is what its configuration is made of, `turn(model, inputs)` one piece of its work, `sizes` batch, heads,
    key heads, queries, keys and head size.
    """

    section: str
    name: str
    work: str
    model: str
    config: Mapping[str, Any]
    sizes: tuple[int, int, int, int, int, int]
    claims: tuple[Claim, ...]
    dtype: torch.dtype = _F32
    contestants: tuple[str, ...] = EVERYONE
    pattern: str | None = None
    lengths: tuple[float, float] = (0.25, 1.0)  # of padded texts, evenly from the one to the other
    weights_from: tuple[int, ...] = ()

    @property
    def weighs_memory(self) -> bool:
        """Whether it is about the peak memory of one turn, not about time."""
        return self.work == "memory"


def table(*, quick: bool = False) -> list[ModelRow]:
    """Prefill, decoding, windows, encoders, pictures, a training step, and weights that somebody asked for."""
    shrink = _SHRINK if quick else 1
    return [
        *_prefill(shrink), *_decoding(shrink), *_windows(shrink), *_encoders(shrink), *_pictures(shrink),
        *_training(shrink), *_weights(shrink),
    ]  # fmt: skip


def _claims(target: float) -> tuple[Claim, ...]:
    return Claim("foveate", "sdpa", target), Claim("accelerate", "sdpa", 1.0, never_behind=True)


OWN = Claim("own", "sdpa", 0.98)


def _llama(shrink: int) -> dict[str, Any]:
    """94 million parameters."""
    width = 1024 if shrink == 1 else 64
    return {
        "hidden_size": width, "intermediate_size": 2816 if shrink == 1 else 96, "num_attention_heads": 16,
        "num_key_value_heads": 4, "num_hidden_layers": 8 if shrink == 1 else 1, "vocab_size": 4096,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    }  # fmt: skip


def _prefill(shrink: int) -> Iterator[ModelRow]:
    n, config = 4096 // shrink, _llama(shrink)
    for dtype, kind in ((_F32, "fp32"), (_BF16, "bf16")):
        yield ModelRow(
            "prefill", f"Llama shape {kind}, prefill {n}", "prefill", "LlamaForCausalLM", config,
            (1, 16, 4, n, n, config["hidden_size"] // 16), (OWN, *_claims(1.0)), dtype, ("own", *EVERYONE), "causal",
        )  # fmt: skip
        yield ModelRow(
            "prefill", f"Llama shape {kind}, prefill {n}, attention alone", "attention", "LlamaForCausalLM", config,
            (1, 16, 4, n, n, config["hidden_size"] // 16), _claims(1.5), dtype, pattern="causal",
        )  # fmt: skip


def _decoding(shrink: int) -> Iterator[ModelRow]:
    """Some tokens a turn: over 128 of them the cache grows by three percent at most, and the ratio stays.

    "eager" repeats all keys, so the long rows are without it.
    """
    config, tokens = _llama(shrink), 32 if shrink == 1 else 4
    for dtype, kind in ((_F32, "fp32"), (_BF16, "bf16")):
        for length, target in ((4096, 1.2), (16384, 2.0)):
            n = length // shrink
            yield ModelRow(
                "decoding", f"Llama shape {kind}, {tokens} tokens after {n}", "decoding", "LlamaForCausalLM", config,
                (1, 16, 4, tokens, n + tokens, config["hidden_size"] // 16),
                (Claim("grown", "sdpa", target), OWN, *_claims(target)), dtype, pattern="causal",
                contestants=("grown", "own", *(EVERYONE if length <= 4096 else EVERYONE[:-1])),
            )  # fmt: skip


def _windows(shrink: int) -> Iterator[ModelRow]:
    n, width = 8192 // shrink, 512 // shrink
    config = {**_llama(shrink), "sliding_window": width}
    yield ModelRow(
        "windows", f"Mistral shape fp32, window {width}, prefill {n}", "prefill", "MistralForCausalLM", config,
        (1, 16, 4, n, n, config["hidden_size"] // 16), _claims(2.0), contestants=("foveate", "accelerate", "sdpa"),
        pattern=f"causal & window({width})",
    )  # fmt: skip


def _bert(shrink: int, length: int) -> dict[str, Any]:
    small = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 99}
    return {"max_position_embeddings": max(512, length), **({} if shrink == 1 else small)}


def _encoders(shrink: int) -> Iterator[ModelRow]:
    dim = 64 if shrink == 1 else 4
    for batch, length in ((32, 128), (8, 512)):
        n = length // shrink
        yield ModelRow(
            "encoders", f"BERT-base fp32, {batch} × {n}", "forward", "BertModel", _bert(shrink, n),
            (batch, 12, 12, n, n, dim), (OWN, *_claims(0.98)), contestants=("own", *EVERYONE),
        )  # fmt: skip
    for batch, length, target in ((32, 128, 0.98), (4, 512, 1.1)):
        n = length // shrink
        yield ModelRow(
            "encoders", f"BERT-base fp32, {batch} × {n}, lengths of 25 to 100 %", "forward", "BertModel",
            _bert(shrink, n), (batch, 12, 12, n, n, dim), (Claim("packed", "sdpa", target), *_claims(0.98)),
            contestants=("foveate", "packed", *EVERYONE[1:]), pattern="padding",
        )  # fmt: skip
    n = 512 // shrink
    yield ModelRow(
        "encoders", f"BERT-base fp32, 8 × {n}, half of it padding", "forward", "BertModel", _bert(shrink, n),
        (8, 12, 12, n, n, dim), (Claim("own packed", "sdpa", 1.1),), pattern="padding", lengths=(0.25, 0.75),
        contestants=("own packed", "own", "packed", "sdpa"),
    )  # fmt: skip


def _pictures(shrink: int) -> Iterator[ModelRow]:
    side = 224 if shrink == 1 else 32
    config = {"image_size": side}
    if shrink > 1:
        config |= {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1}
    n = (side // 16) ** 2 + 1
    yield ModelRow(
        "pictures", "ViT-B/16 fp32, batch 8", "forward", "ViTModel", config,
        (8, 12, 12, n, n, 64 if shrink == 1 else 4), (OWN, *_claims(0.98)), contestants=("own", *EVERYONE),
    )  # fmt: skip


def _training(shrink: int) -> Iterator[ModelRow]:
    """25 and 124 million parameters, no dropout; AdamW's rate is 0, so that every turn finds the same model."""
    for name, heads, layers, length, words, target in (
        ("GPT of 25M", 8, 6, 1024, 8192, 1.02),
        ("GPT of 25M", 8, 6, 4096, 8192, 1.2),
        ("GPT-2 small", 12, 12, 1024, 50257, None),
    ):
        n, width = length // shrink, 64 * heads if shrink == 1 else 4 * heads
        config = {
            "n_embd": width, "n_layer": layers if shrink == 1 else 1, "n_head": heads,
            "vocab_size": words if shrink == 1 else 99, "n_positions": 4096 if target else 1024, "resid_pdrop": 0.0,
            "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
        }  # fmt: skip
        yield ModelRow(
            "training", f"{name} fp32, a training step at {n}", "training", "GPT2LMHeadModel", config,
            (1, heads, heads, n, n, width // heads), _claims(target) if target else (OWN,),
            contestants=EVERYONE if target else ("own", "foveate", "sdpa"), pattern="causal",
        )  # fmt: skip


def _weights(shrink: int) -> Iterator[ModelRow]:
    """Time, and the memory beside the model: what was returned counts, all layers' weights of "eager" too."""
    n = 4096 // shrink
    for work, kind, target in (
        ("weights", "weights of one layer", 2.0),
        ("memory", "memory for one layer's weights", 4.0),
    ):
        yield ModelRow(
            "weights", f"BERT-base fp32, {n} tokens, {kind}", work, "BertModel", _bert(shrink, n),
            (1, 12, 12, n, n, 64 if shrink == 1 else 4), (Claim("foveate", "eager", target),),
            contestants=("foveate", "eager"), weights_from=(5,) if shrink == 1 else (0,),
        )  # fmt: skip
