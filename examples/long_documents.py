"""Which modules of Python read alike, by a ModernBERT of random weights: a script for Hugging Face alone.

    bytes of a source file ─ layers that look 64 bytes to each side, every third at all ─ mean ─ who is nearest

Warner et al. 2024: https://arxiv.org/abs/2412.13663. Long texts of different lengths, padded to the longest of a batch.
What it says goes to standard output, how long it took to standard error.

    python examples/long_documents.py                     # needs pip install transformers
    python -m foveate run examples/long_documents.py      # the same script on our kernels
    python examples/long_documents.py --length 256        # a taste
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import ModernBertConfig, ModernBertModel

MODULES = (
    *("json.scanner", "bisect", "json.tool", "email.base64mime"),
    *("colorsys", "asyncio.timeouts", "linecache", "sched"),
)
PAD, BEGIN, END, FIRST = range(4)  # the tokens before those of the 256 bytes
BATCH = 4


def read(module: str, length: int) -> Tensor:
    """The first bytes of a module's source as tokens, between a begin and an end."""
    found = find_spec(module)
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).read_bytes()[: length - 2]
    return torch.tensor([BEGIN, *(FIRST + byte for byte in source), END])


def reader(layers: int) -> ModernBertModel:
    """A model of ModernBERT's form, half as wide as its smallest."""
    config = ModernBertConfig(
        vocab_size=FIRST + 256, hidden_size=384, intermediate_size=576, num_hidden_layers=layers, num_attention_heads=6,
        pad_token_id=PAD, bos_token_id=BEGIN, cls_token_id=BEGIN, eos_token_id=END, sep_token_id=END,
        initializer_range=0.1,  # with the usual 0.02 what its layers see would hardly count
    )  # fmt: skip
    return ModernBertModel(config).eval()


@torch.inference_mode()
def embed(model: ModernBertModel, texts: Sequence[Tensor]) -> Tensor:
    """The mean of what the model makes of each text `[texts, width]`, a batch at a time, in order of length."""
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    found = torch.empty(len(texts), model.config.hidden_size)
    for at in range(0, len(order), BATCH):
        some = order[at : at + BATCH]
        ids = pad_sequence([texts[n] for n in some], batch_first=True, padding_value=PAD)
        kept = ids != PAD
        states = model(input_ids=ids, attention_mask=kept.long()).last_hidden_state
        found[some] = (states * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192, help="bytes of each text that are read")
    parser.add_argument("--layers", type=int, default=6)
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = reader(chosen.layers)
    texts = [read(module, chosen.length) for module in MODULES]
    start = time.perf_counter()
    states = embed(model, texts)
    seconds = time.perf_counter() - start
    states = normalize(states - states.mean(0), dim=-1)  # what all have in common tells none apart
    alike = states @ states.mT - 2 * torch.eye(len(texts))
    for module, text, row in zip(MODULES, texts, alike, strict=True):
        print(f"{module:18}{len(text):6} tokens   most like {MODULES[int(row.argmax())]:18}{row.max():7.3f}")
    print(f"{sum(map(len, texts)):,} tokens in {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
