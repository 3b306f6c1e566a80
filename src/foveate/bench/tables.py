"""The tables, as data: which shapes are measured, against whom, and what has to come out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch

from foveate.bench.linear import LinearRow
from foveate.bench.models import ModelRow
from foveate.bench.rows import Claim, Row, Work
from foveate.errors import InvalidInput
from foveate.pattern.algebra import Pattern
from foveate.pattern.catalogue import bigbird, causal, chunks, longformer, window

_Row = TypeVar("_Row", Row, ModelRow, LinearRow)
_F32, _BF16 = torch.float32, torch.bfloat16
_SHRINK = 32  # how much shorter everything is in the quick table, which tests the benchmark and nothing else
_NEVER_BEHIND = Claim("auto", "sdpa", 1.0, never_behind=True)


def softmax(*, quick: bool = False) -> list[Row]:
    """Softmax attention: dense, causal, short, windowed, sparse, decoding, training, what was looked at, memory."""
    shrink = _SHRINK if quick else 1
    return [
        *_dense(shrink), *_short(shrink), *_windows(shrink), *_sparse(shrink), *_decode(shrink),
        *_training(shrink), *_older_machines(shrink), *_looked(shrink), *_memory(shrink), *_sweeps(shrink),
    ]  # fmt: skip


def chosen(rows: list[_Row], only: str | None) -> list[_Row]:
    """The rows of a table whose section or name holds a text; raises `InvalidInput` where none does."""
    if only is None:
        return rows
    found = [row for row in rows if only.lower() in f"{row.section}: {row.name}".lower()]
    if not found:
        sections = ", ".join(dict.fromkeys(row.section for row in rows))
        raise InvalidInput(f"no row has {only!r} in its name: the sections are {sections}")
    return found


def _dense(shrink: int) -> Iterator[Row]:
    """Everyone to everyone, and to everyone before; dtype, causal, length, head size, target, percent of the peak."""
    wanted: list[tuple[torch.dtype, bool, int, int, float, float | None]] = [
        (_F32, False, 2048, 64, 1.3, 78),
        (_F32, False, 2048, 128, 1.2, None),
        (_F32, False, 8192, 64, 1.3, None),
        (_F32, False, 8192, 128, 1.2, None),
        (_F32, True, 512, 64, 2.3, None),
        (_F32, True, 2048, 64, 1.6, None),
        (_F32, True, 2048, 128, 1.5, None),
        (_F32, True, 8192, 64, 1.35, None),
        (_BF16, False, 2048, 64, 2.3, 70),
        (_BF16, True, 2048, 64, 2.7, None),
    ]
    for dtype, is_causal, length, dim, target, percent in wanted:
        n = length // shrink
        pattern, kind = (causal, "causal") if is_causal else (None, "full")
        claims = [Claim("native", "sdpa", target), _NEVER_BEHIND]
        if percent:
            claims.append(Claim("native", "ceiling", percent))
        yield Row(
            "dense and causal", f"{_short_name(dtype)} {kind} N={n} D={dim}", dtype, n, n, dim,
            ("native", "auto", "sdpa", "eager"), tuple(claims), pattern=pattern,
        )  # fmt: skip


def _short(shrink: int) -> Iterator[Row]:
    """Short rows and many heads, as in encoders."""
    batch, heads = (32, 12) if shrink == 1 else (2, 2)
    for dtype in (_F32, _BF16):
        for n in (16, 32, 64, 128, 256):
            yield Row(
                "short rows", f"{_short_name(dtype)} full N={n} D=64 B={batch} H={heads}", dtype, n, n, 64,
                ("native", "auto", "sdpa", "eager"), (Claim("native", "sdpa", 1.0, aim=1.2), _NEVER_BEHIND),
                batch=batch, heads=heads, key_heads=heads,
            )  # fmt: skip


def _windows(shrink: int) -> Iterator[Row]:
    width = 256 // shrink
    for length in (8192, 16384):
        n = length // shrink
        yield Row(
            "windows", f"fp32 causal & window({width}) N={n} D=64", _F32, n, n, 64,
            ("native", "auto", "sdpa mask", "flex"),
            (Claim("native", "sdpa mask", 40), Claim("native", "flex", 2.3)), pattern=causal & window(width),
        )  # fmt: skip


def _sparse(shrink: int) -> Iterator[Row]:
    n = 8192 // shrink
    block, reach = max(8, 64 // shrink), 512 // shrink
    patterns: list[tuple[str, Pattern, int]] = [
        (f"bigbird({block})", bigbird(block), block),
        (f"longformer({reach})", longformer(reach), 0),
    ]
    for name, pattern, size in patterns:
        yield Row(
            "sparse patterns", f"fp32 {name} N={n} D=64", _F32, n, n, 64,
            ("native", "auto", "sdpa mask", "flex"), (Claim("native", "flex", aim=2.0),), pattern=pattern, block=size,
        )  # fmt: skip


def _decode(shrink: int) -> Iterator[Row]:
    """One query, 32 query heads on 8 key heads."""
    for dtype, grouped, folded in ((_F32, 3.0, 1.5), (_BF16, 15.0, 2.0)):
        for length in (2048, 4096, 16384, 65536):
            n = length // shrink
            yield Row(
                "decode", f"{_short_name(dtype)} decode, {n} keys, 32/8 heads D=128", dtype, 1, n, 128,
                ("native", "auto", "sdpa", "folded"),
                (Claim("native", "sdpa", grouped), Claim("native", "folded", folded), _NEVER_BEHIND),
                heads=32, key_heads=8, work="decode",
            )  # fmt: skip


def _training(shrink: int) -> Iterator[Row]:
    n = 2048 // shrink
    wanted: list[tuple[torch.dtype, Pattern | None, str, float | None, float | None]] = [
        (_F32, causal, "causal", 1.75, None),
        (_F32, None, "full", 1.4, None),
        (_BF16, causal, "causal", None, 2.0),
    ]
    for dtype, pattern, kind, target, aim in wanted:
        yield Row(
            "forward + backward", f"{_short_name(dtype)} {kind} N={n} D=64, forward + backward", dtype, n, n, 64,
            ("native", "auto", "sdpa", "eager"), (Claim("native", "sdpa", target, aim), _NEVER_BEHIND),
            pattern=pattern, work="forward + backward",
        )  # fmt: skip


def _older_machines(shrink: int) -> Iterator[Row]:
    """The build for machines without AVX-512, against whatever PyTorch takes here."""
    n = 2048 // shrink
    for pattern, kind, target in ((None, "full", 1.1), (causal, "causal", 1.2)):
        yield Row(
            "AVX2 build", f"fp32 {kind} N={n} D=64, AVX2 build", _F32, n, n, 64,
            ("avx2", "sdpa"), (Claim("avx2", "sdpa", target),), pattern=pattern,
        )  # fmt: skip


def _looked(shrink: int) -> Iterator[Row]:
    """The eight largest weights of each row and what each key received, in at most 1.8 × the time of forward alone."""
    n = 2048 // shrink
    yield Row(
        "what was looked at", f"fp32 causal N={n} D=64, top 8 and received", _F32, n, n, 64,
        ("looked", "native", "sdpa"), (Claim("looked", "native", 1 / 1.8),), pattern=causal, work="looked",
    )  # fmt: skip


def _memory(shrink: int) -> Iterator[Row]:
    n, width = 131072 // shrink, 1024 // shrink
    works: tuple[Work, ...] = ("forward", "forward + backward")
    for work in works:
        yield Row(
            "memory", f"fp32 causal & window({width}) N={n} D=64, memory of {work}", _F32, n, n, 64,
            ("native",), (Claim("native", "memory", 64),), pattern=causal & window(width), work=work, reach=width,
        )  # fmt: skip


def _sweeps(shrink: int) -> Iterator[Row]:
    """What a window costs as the length grows, and what a pattern costs as it gets denser."""
    width = 256 // shrink
    for length in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        n = length // shrink
        peers = ("native", "sdpa mask") if length <= 8192 else ("native",)  # a mask of n×n bytes
        yield Row(
            "cost of a window", f"fp32 causal & window({width}) N={n}", _F32, n, n, 64, peers,
            pattern=causal & window(width), sweep="length",
        )  # fmt: skip
    n = 8192 // shrink
    block = max(8, 64 // shrink)
    patterns: list[tuple[str, Pattern]] = [
        *((f"causal & window({w // shrink})", causal & window(w // shrink)) for w in (128, 256, 512, 1024, 2048, 4096)),
        *((f"chunks({size // shrink})", chunks(size // shrink)) for size in (768, 1536, 3072)),
        (f"bigbird({block})", bigbird(block)),
        (f"longformer({384 // shrink})", longformer(384 // shrink)),
        ("causal", causal),
    ]
    for name, pattern in patterns:
        yield Row(
            "cost of a pattern", f"fp32 {name} N={n}, by density", _F32, n, n, 64, ("native",),
            pattern=pattern, sweep="density",
        )  # fmt: skip


def _short_name(dtype: torch.dtype) -> str:
    return {_F32: "fp32", _BF16: "bf16"}[dtype]
