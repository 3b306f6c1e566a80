"""Write the pages that are made from the code: `python docs/generate.py`.

docs/patterns.md         every pattern of `foveate.see.gallery` with a picture
docs/capabilities.md     what each implementation refuses, asked of the implementations themselves
docs/models.md           models.md.in, with what every Hugging Face model of tests/families.py asked of Foveate
docs/images/patterns/    the pictures
docs/images/tour/        the pictures of the tour

A test makes them anew and compares, so none of them can go stale.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import foveate as fv
from foveate.dispatch import NAMES, choose, implementation
from foveate.problem import problem
from foveate.see.gallery import gallery

HERE = Path(__file__).parent
MADE = "<!-- Made by `python docs/generate.py`: change that file instead. -->\n"

# Expression → meaning, how many pairs n queries and n keys have, paper. The keys are those of the gallery.
ABOUT: dict[str, tuple[str, str, str]] = {
    "causal": (
        "A query sees its own position and every one before: text that is written from left to right.",
        "n²/2",
        "[Vaswani et al. 2017](https://arxiv.org/abs/1706.03762), section 3.2.3",
    ),
    "window(3)": (
        "Its own position and the 2 on each side: `window(w)` reaches w − 1 positions to both sides.",
        "n·(2w − 1)",
        "[Beltagy et al. 2020](https://arxiv.org/abs/2004.05150), section 3.1",
    ),
    "causal & window(4)": (
        "Its own position and the 3 before: 4 keys in all. The sliding window of language models.",
        "n·w",
        "[Jiang et al. 2023](https://arxiv.org/abs/2310.06825), section 2",
    ),
    "window(3, step=2)": (
        "A dilated window: every second position, so that it reaches twice as far for the same cost.",
        "n·(2w − 1)",
        "[Beltagy et al. 2020](https://arxiv.org/abs/2004.05150), section 3.1",
    ),
    "window(left=5, right=1)": (
        "5 positions before and 1 after, beside its own. A side left out has no limit.",
        "n·(l + r + 1)",
        "",
    ),
    "chunks(4)": (
        "Inside its own chunk of 4 positions and nowhere else.",
        "n·c",
        "[Qiu et al. 2019](https://arxiv.org/abs/1911.02972)",
    ),
    "causal & chunks(4)": (
        "The past of its own chunk: the local layers of Llama 4, there with chunks of 8192.",
        "n·c/2",
        "",
    ),
    "neighborhood(2, 4)": (
        "A window in two dimensions: on a picture of 4 columns, read row by row, at most 1 row and 1 column away.",
        "n·(2w − 1)²",
        "[Ramachandran et al. 2019](https://arxiv.org/abs/1906.05909)",
    ),
    "prefix(5)": ("The first 5 keys, for every query.", "n·p", ""),
    "causal | prefix(5)": (
        "A prefix language model: the prompt sees itself in both directions, the rest is causal.",
        "n²/2",
        "[Raffel et al. 2019](https://arxiv.org/abs/1910.10683), section 3.2.1",
    ),
    "documents(ids)": (
        "Several texts packed into one row: a text sees itself and no other.",
        "Σ len²",
        "[Krell et al. 2021](https://arxiv.org/abs/2107.02027)",
    ),
    "causal & documents(ids)": (
        "The same for language models, as long contexts are trained.",
        "Σ len²/2",
        "[Llama 3, 2024](https://arxiv.org/abs/2407.21783), section 3.2",
    ),
    "padding(lengths)": (
        "Keys past the end of a short text are hidden. For padding on the left give a boolean `[batch, keys]`.",
        "n·len",
        "",
    ),
    "global_tokens([0, 8])": (
        "Some positions see everything and are seen by everything: rows and columns.",
        "2·n·g",
        "[Beltagy et al. 2020](https://arxiv.org/abs/2004.05150), section 3.1",
    ),
    "random_blocks(2, 2, seed=1)": (
        "2 random blocks of 2 keys for each block of queries and each head; the seed fixes them on every machine.",
        "n·count·block",
        "[Zaheer et al. 2020](https://arxiv.org/abs/2007.14062)",
    ),
    "blocks(matrix, 4)": (
        "A boolean matrix of blocks, made by you: block-sparse attention.",
        "block² for each True",
        "[Child et al. 2019](https://arxiv.org/abs/1904.10509)",
    ),
    "blockwise(window(2), 4)": (
        "Any pattern over blocks of positions instead of single ones; here the own block of 4 and one on each side.",
        "pairs of blocks × block²",
        "[Zaheer et al. 2020](https://arxiv.org/abs/2007.14062)",
    ),
    "rule(lambda b, h, q, k: (q + k) % 3 == 0)": (
        "Any function of batch, head, query and key positions. Nothing is known about it, so every pair is asked.",
        "what it allows, but n² are asked",
        "[Dong et al. 2024](https://arxiv.org/abs/2412.05496)",
    ),
    "from_mask(mask)": (
        "A boolean tensor that you have; True = may attend. A tensor given as the pattern means the same.",
        "what it allows, but n² are stored",
        "",
    ),
    "causal & selected(indices, block=4)": (
        "The tokens, or here blocks of 4, that a table lists for each query: what selections are made of.",
        "n·k·block",
        "[Yuan et al. 2025](https://arxiv.org/abs/2502.11089)",
    ),
    "longformer(4, [0])": (
        "A window of 4 (2 on each side) and global tokens.",
        "n·(w + 1 + 2g)",
        "[Beltagy et al. 2020](https://arxiv.org/abs/2004.05150)",
    ),
    "bigbird(2, random=1)": (
        "A window of blocks, the first and the last block global, and random blocks.",
        "about n·block·(w + 4 + r)",
        "[Zaheer et al. 2020](https://arxiv.org/abs/2007.14062)",
    ),
    "pooled(4)": (
        "Causality for keys that stand for 4 positions each, here only 4 of them: a key counts once it is past as a whole.",
        "n²/2·stride",
        "[Yuan et al. 2025](https://arxiv.org/abs/2502.11089)",
    ),
    "every(4)": (
        "The last key of every 4, for everyone: places that can sum up what came before them.",
        "n²/s",
        "",
    ),
    "strided(4)": (
        "The last 4 keys, and every fourth before: in two steps everybody reaches everybody. For what repeats, as the "
        "rows of a picture do.",
        "n·(s + n/2s)",
        "[Child et al. 2019](https://arxiv.org/abs/1904.10509), section 4.3",
    ),
    "fixed(4)": (
        "The own block of 4, and the last key of every block before. For text.",
        "n·(s/2 + n/2s)",
        "[Child et al. 2019](https://arxiv.org/abs/1904.10509), section 4.3",
    ),
    "streaming(2, 4)": (
        "The first 2 keys, which act as sinks for weight, and a causal window of 4.",
        "n·(first + w)",
        "[Xiao et al. 2023](https://arxiv.org/abs/2309.17453)",
    ),
    "causal & ~window(3)": (
        "The past without the nearest positions: `~` turns a pattern round.",
        "n²/2",
        "",
    ),
}

PATTERNS = """# Patterns

A pattern says who may attend to whom. In a picture **rows are queries, columns are keys**, and a dark cell means that
this query may see this key.

Patterns are values. Compose them, draw them, count them:

```python
import foveate as fv

local = fv.causal & (fv.window(3) | fv.prefix(1))
print(local)
print(local.picture(6, 6))
print(f"{local.density(4096, 4096):.2%} of all pairs")
```

```text
causal & (window(3) | prefix(1))
1 . . . . .
1 1 . . . .
1 1 1 . . .
1 1 1 1 . .
1 . 1 1 1 .
1 . . 1 1 1
0.10% of all pairs
```

- `a & b`: both allow it. The intersection only takes away.
- `a | b`: either allows it. The union only adds.
- `~a`: the opposite.

Python reads `&` before `|`, so write the brackets of `causal & (window(3) | prefix(1))`. And write `&`, not `and`:
Python's own `and`, `or`, `not` raise an error that says so.

The pictures below have 16 queries and 16 keys. *Pairs* is how many pairs n queries and n keys have: what the time
follows, since tiles of 128 × 128 pairs in which nothing is visible are skipped. On the command line the same gallery is

```console
$ foveate patterns
```

## The gallery

<!-- gallery -->

## What a pattern can do

| call | answer |
|:--|:--|
| `picture(queries, keys)` | the matrix as text, a row for each query; `plot()` draws it |
| `density(queries, keys)` | the share of pairs that may attend, exactly, at any length |
| `summary(queries, keys)` | which tiles are empty, full or partial; memory follows the tiles that are not empty |
| `dense(queries, keys)` | the boolean matrix itself, `[batch, heads, queries, keys]`, when you ask for it |
| `pattern(batch, head, query, key)` | a pattern is a `mask_mod` of FlexAttention, its queries starting at position 0 |
| `mask_mod(query_start)` | the same with queries that start elsewhere |
| `repr(pattern)` | an expression that you could paste back; tensors are shown as `<int64 2×17>` |

The first four take `query_start=`, the position of the first query. Left out, the last query stands at the last key:

```python
print(fv.causal.picture(2, 5))
print()
print(fv.causal.picture(2, 5, query_start=0))
```

```text
1 1 1 1 .
1 1 1 1 1

1 . . . .
1 1 . . .
```

A window over 131,072 positions, without a matrix of 131,072² entries:

```python
window = fv.causal & fv.window(256)
print(f"{window.density(131072, 131072):.4f}")
kinds = window.summary(131072, 131072).kinds()
print({name: int((kinds == kind).sum()) for kind, name in enumerate(["empty", "partial", "full"])})
```

```text
0.0020
{'empty': 1045507, 'partial': 2046, 'full': 1023}
```
"""

CAPABILITIES = """# Capabilities

What each implementation can compute. The table is made by asking them: each has a function `refuses(problem)` that
lists every reason for which it will not run a call. A refusal of one feature never costs another one.

✓ means that it runs, – that it refuses; every reason stands below the tables. `auto` is what `backend="auto"` takes.

- **sdpa**: PyTorch's fused kernels behind `scaled_dot_product_attention`.
- **flex**: PyTorch's FlexAttention. On a CPU it compiles C++ when it is first called, so there it runs only by name.
- **chunked**: plain PyTorch, exact, memory linear in the length, on any device.
- **reference**: the definition, with the whole n×n matrix in memory. It runs only by name, and it alone has a second
  derivative.

For a call of your own ask [`fv.explain`](api.md#foveate.functional.explain); it takes what `fv.attention` takes.

```python
import torch
import foveate as fv

q = k = v = torch.zeros(1, 8, 64, 32)
print(fv.explain(q, k, v, fv.causal & fv.window(16), score=fv.softcap(50.0)))
```

```text
  sdpa       takes no softcap; the pattern causal & window(16) would need a mask as large as the weights
→ native     runs
  flex       compiles at run time, so on a CPU it runs only by name
  chunked    could run
  reference  holds n×n weights, so it runs only by name
```

One thing is not in the table. If a key is hidden from one row but visible to another and holds NaN or infinity, it
reaches the row that should not see it in sdpa and in flex, and it does not in chunked and in reference; see
[Meanings](meanings.md#hidden-keys).

## On a CPU

<!-- cpu -->

## On a CUDA GPU

The same question, with tensors that claim to be on a GPU (triton installed).

<!-- cuda -->

## Every reason

<!-- reasons -->
"""

Call = Callable[[Callable[..., Tensor]], dict[str, Any]]

# Every feature as the arguments of a call; `x` makes a tensor of a shape. 2 batch rows, 4 heads, 64 positions, dim 16.
FEATURES: dict[str, Call] = {
    "everyone to everyone": lambda x: {},
    "`causal`, as many queries as keys": lambda x: {"pattern": fv.causal},
    "`causal`, one query and a cache": lambda x: {"q": x(2, 4, 1, 16), "pattern": fv.causal},
    "`causal`, several queries and a cache": lambda x: {"q": x(2, 4, 5, 16), "pattern": fv.causal},
    "`query_start` that differs in the batch": lambda x: {
        "pattern": fv.causal,
        "query_start": x(2, dtype=torch.int64),
    },
    "`causal & window`": lambda x: {"pattern": fv.causal & fv.window(16)},
    "`documents`": lambda x: {"pattern": fv.documents(x(2, 64, dtype=torch.int64))},
    "`padding`": lambda x: {"pattern": fv.padding(x(2, dtype=torch.int64))},
    "`causal & padding`": lambda x: {"pattern": fv.causal & fv.padding(x(2, dtype=torch.int64))},
    "any other named pattern": lambda x: {"pattern": fv.bigbird(16)},
    "`rule(fn)`": lambda x: {"pattern": fv.rule(lambda b, h, q, k: q >= k)},
    "a boolean mask": lambda x: {"pattern": x(64, 64, dtype=torch.bool)},
    "`bias`, or a float mask": lambda x: {"score": fv.bias(x(64, 64))},
    "`bias` with a gradient": lambda x: {"score": fv.bias(x(64, 64, requires_grad=True))},
    "`causal` with `bias`": lambda x: {"pattern": fv.causal, "score": fv.bias(x(64, 64))},
    "`alibi`": lambda x: {"score": fv.alibi(x(4))},
    "`relative_bias`": lambda x: {"score": fv.relative_bias(x(9, 4))},
    "`softcap`": lambda x: {"score": fv.softcap(50.0)},
    "`sinks`": lambda x: {"score": fv.sinks(x(4))},
    "`normalizer=softmax_plus_one`": lambda x: {"normalizer": fv.softmax_plus_one},
    "any other `normalizer`": lambda x: {"normalizer": fv.sparsemax},
    "`dropout`": lambda x: {"dropout": 0.1, "seed": 1},
    "log-sum-exp (`attention_with_lse`)": lambda x: {"needs_lse": True},
    "grouped heads": lambda x: {"k": x(2, 2, 64, 16), "v": x(2, 2, 64, 16)},
    "grouped heads with a boolean mask": lambda x: {
        "k": x(2, 2, 64, 16),
        "v": x(2, 2, 64, 16),
        "pattern": x(64, 64, dtype=torch.bool),
    },
    "v of another width than q and k": lambda x: {"v": x(2, 4, 64, 24)},
    "any strides": lambda x: {"q": x(2, 4, 16, 64).mT},
    "no keys at all": lambda x: {"k": x(2, 4, 0, 16), "v": x(2, 4, 0, 16)},
    "gradients": lambda x: {"q": x(2, 4, 64, 16, requires_grad=True)},
    "float64": lambda x: {name: x(2, 4, 64, 16, dtype=torch.float64) for name in "qkv"},
    "bfloat16": lambda x: {name: x(2, 4, 64, 16, dtype=torch.bfloat16) for name in "qkv"},
    "float16": lambda x: {name: x(2, 4, 64, 16, dtype=torch.float16) for name in "qkv"},
    "inside `torch.compile`": lambda x: {"pattern": fv.causal},
    "`rule(fn)` inside `torch.compile`": lambda x: {"pattern": fv.rule(lambda b, h, q, k: q >= k)},
}

Refusals = dict[str, list[str]]


def capabilities() -> str:
    """The page of what each implementation refuses."""
    with mock.patch("shutil.which", return_value="g++"):  # the page is about a machine with a compiler
        cpu = {name: _refusals(name, torch.zeros) for name in FEATURES}
    with FakeTensorMode(), mock.patch("importlib.util.find_spec", return_value=object()):

        def fake(*shape: int, **more: Any) -> Tensor:
            return torch.empty(*shape, device="cuda", **more)

        # A rule cannot be asked of tensors without data: what it needs of a GPU is what any other pattern needs.
        cuda = {name: _refusals(name, fake) for name in FEATURES if not name.startswith("`rule")}
    page = CAPABILITIES.replace("<!-- cpu -->", _table(cpu)).replace("<!-- cuda -->", _table(cuda))
    return MADE + page.replace("<!-- reasons -->", "\n".join(_reasons({"a CPU": cpu, "CUDA": cuda})))


def _refusals(name: str, make: Callable[..., Tensor]) -> Refusals:
    """The reasons of every implementation, and under "auto" what it takes."""
    plain: dict[str, Any] = {each: make(2, 4, 64, 16) for each in "qkv"}
    call = problem(**(plain | FEATURES[name](make)))
    with mock.patch("torch.compiler.is_compiling", return_value="torch.compile" in name):
        found = {each: implementation(each).refuses(call) for each in NAMES}
        try:
            return {**found, "auto": [choose(call).chosen]}
        except fv.Unsupported:
            return {**found, "auto": ["none"]}


def _table(found: dict[str, Refusals]) -> str:
    lines = ["| | " + " | ".join(NAMES) + " | auto |", "|:--|" + ":-:|" * len(NAMES) + ":--|"]
    for feature, refusals in found.items():
        cells = ["–" if refusals[name] else "✓" for name in NAMES]
        lines.append(f"| {feature} | {' | '.join(cells)} | {refusals['auto'][0]} |")
    return "\n".join(lines)


def _reasons(found: dict[str, dict[str, Refusals]]) -> Iterator[str]:
    """For each implementation its refusals: the feature, and the reason as it is given."""
    for name in NAMES:
        listed: dict[str, list[str]] = {}
        for where, features in found.items():
            for feature, refusals in features.items():
                if refusals[name]:
                    reason = "; ".join(refusals[name])
                    listed.setdefault(f"{feature}: {html.escape(reason, quote=False)}", []).append(where)
        if not listed:
            yield f"**{name}** refuses nothing.\n"
            continue
        yield f"**{name}** refuses\n"
        for line, places in listed.items():
            yield f"- {line}" + ("" if len(places) == len(found) else f" (on {places[0]})")
        yield ""


def patterns() -> str:
    """The page of the gallery."""
    lines = ["| | pattern | pairs | paper |", "|:--|:--|:--|:--|"]
    for name, _ in gallery():
        meaning, pairs, paper = ABOUT[name]
        code = f"<code>{html.escape(name, quote=False).replace('|', '&#124;')}</code>"
        picture = f"![{html.escape(name, quote=False).replace('|', '&#124;')}](images/patterns/{slug(name)}.svg)"
        lines.append(f"| {picture} | {code}<br>{meaning} | {pairs} | {paper} |")
    return MADE + PATTERNS.replace("<!-- gallery -->", "\n".join(lines))


@cache
def models() -> str:
    """The page of Hugging Face models: each of them is run, and what its layers asked for is written down."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from families import FAMILIES, build

    def code(value: object) -> str:
        return f"`{re.sub('<[^>]*>', '…', str(value))}`"  # without the sizes of its tensors

    lines = ["| model | class | layers reached | who may attend to whom | scores |", "|:--|:--|--:|:--|:--|"]
    for name, family in FAMILIES.items():
        model = build(name)
        with torch.no_grad(), fv.patch(model) as patched, fv.watch(model) as seen:
            model(**family.inputs())
        asked = dict.fromkeys("all" if call.pattern is None else code(call.pattern) for call in seen.calls)
        scores = dict.fromkeys(code(call.score) for call in seen.calls if call.score is not None)
        lines.append(
            f"| {family.label} | `{type(model).__name__}` | {len(patched.layers)} | {'<br>'.join(asked)} "
            f"| {'<br>'.join(scores)} |"
        )
    page = (HERE / "models.md.in").read_text(encoding="utf-8").replace("<!-- table -->", "\n".join(lines))
    for package in ("transformers", "torch"):
        page = page.replace(f"<!-- {package} -->", version(package).partition("+")[0])
    return MADE + page


def slug(name: str) -> str:
    """The name of a pattern's picture."""
    words = name.replace("|", " or ").replace("&", " and ").replace("~", " not ").replace("lambda", " ")
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


BLUE, LIGHT, FRAME = (15, 108, 141), (238, 240, 241), "#9aa5ab"


def heat(rows: list[list[float]], cell: int = 7) -> str:
    """A matrix of numbers from 0 to 1 as a small SVG: the larger, the darker."""
    height, width = len(rows) * cell, len(rows[0]) * cell
    shapes = []
    for y, row in enumerate(rows):
        x = 0
        while x < len(row):
            end = x + 1
            while end < len(row) and row[end] == row[x]:
                end += 1
            color = "#" + "".join(f"{round(lo + (hi - lo) * row[x]):02x}" for lo, hi in zip(LIGHT, BLUE, strict=True))
            if row[x] > 0:
                shapes.append(
                    f'<path fill="{color}" d="M{x * cell} {y * cell}h{(end - x) * cell}v{cell}h-{(end - x) * cell}z"/>'
                )
            x = end
    grid = [f"M0 {n * cell}h{width}" for n in range(1, len(rows))] + [
        f"M{n * cell} 0v{height}" for n in range(1, len(rows[0]))
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 2}" height="{height + 2}" '
        f'viewBox="-1 -1 {width + 2} {height + 2}" shape-rendering="crispEdges">'
        f'<path fill="#{"".join(f"{c:02x}" for c in LIGHT)}" d="M0 0h{width}v{height}h-{width}z"/>'
        f"{''.join(shapes)}"
        f'<path fill="none" stroke="#fff" stroke-width="1" d="{"".join(grid)}"/>'
        f'<path fill="none" stroke="{FRAME}" d="M0 0h{width}v{height}h-{width}z"/></svg>\n'
    )


def pictures() -> dict[str, str]:
    """Every SVG by its path below docs/."""
    made = {
        f"images/patterns/{slug(name)}.svg": heat(pattern.dense(16, 16)[0, 0].double().tolist())
        for name, pattern in gallery()
    }
    place = torch.arange(16, dtype=torch.float64)
    distance = (place[:, None] - place).abs()
    seen = (fv.causal & fv.window(9)).dense(16, 16)[0, 0]
    # Smooth made-up scores, so that the pictures show what a term does and not noise.
    scores = 2 * torch.cos(distance * 1.3) + torch.cos(place * 0.9)
    softmax = scores.softmax(-1)
    causal = scores.masked_fill(~fv.causal.dense(16, 16)[0, 0], -torch.inf).softmax(-1)
    windowed = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    tour = {
        "weights": softmax / softmax.max(),
        "weights-causal": causal / causal.max(),
        "weights-window": windowed / windowed.max(),
        "alibi": (1 - distance / 16).masked_fill(~fv.causal.dense(16, 16)[0, 0], 0),
    }
    for name, matrix in tour.items():
        made[f"images/tour/{name}.svg"] = heat((matrix * 1000).round().div(1000).tolist(), 10)
    return made


def pages() -> dict[str, str]:
    """Everything that this script writes, by its path below docs/."""
    differing = {name for name, _ in gallery()} ^ set(ABOUT)
    if differing:
        raise fv.InvalidInput(
            f"docs/generate.py and the gallery differ in {sorted(differing)}: wanted the same patterns"
        )
    return {"patterns.md": patterns(), "capabilities.md": capabilities(), "models.md": models(), **pictures()}


def main() -> None:
    """Write what differs and say so."""
    for name, text in pages().items():
        path = HERE / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
