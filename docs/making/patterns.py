"""docs/patterns.md: every pattern of `foveate.see.gallery`, with a picture."""

from __future__ import annotations

import html

import foveate as fv
from foveate.see.gallery import gallery
from making.filling import filled
from making.pictures import slug

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
        "Causality for keys that stand for 4 positions each (here 4 keys): a key counts once it is past as a whole.",
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


def patterns() -> str:
    """The page of the gallery."""
    differing = {name for name, _ in gallery()} ^ set(ABOUT)
    if differing:
        raise fv.InvalidInput(
            f"making/patterns.py and the gallery differ in {sorted(differing)}: wanted the same patterns"
        )
    lines = ["| | pattern | pairs | paper |", "|:--|:--|:--|:--|"]
    for name, _ in gallery():
        meaning, pairs, paper = ABOUT[name]
        code = f"<code>{html.escape(name, quote=False).replace('|', '&#124;')}</code>"
        picture = f"![{html.escape(name, quote=False).replace('|', '&#124;')}](images/patterns/{slug(name)}.svg)"
        lines.append(f"| {picture} | {code}<br>{meaning} | {pairs} | {paper} |")
    return filled("patterns.md", gallery="\n".join(lines))
