"""One example of every pattern by name: what `foveate patterns` and the docs draw."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from foveate.errors import InvalidInput, unknown_name
from foveate.installing import how_to_install
from foveate.pattern import catalogue as fv
from foveate.pattern.algebra import Pattern

Example = tuple[str, Pattern]


def gallery() -> list[Example]:
    """(the expression as one would type it, the pattern), for 16 queries and 16 keys."""
    ids = torch.tensor([0] * 5 + [1] * 4 + [2] * 7)
    matrix = torch.eye(4, dtype=torch.bool) | torch.eye(4, dtype=torch.bool).roll(2, 1)
    chosen = torch.tensor([(row % 3, row // 4) for row in range(16)]).view(1, 1, 16, 2)
    return [
        ("causal", fv.causal),
        ("window(3)", fv.window(3)),
        ("causal & window(4)", fv.causal & fv.window(4)),
        ("window(3, step=2)", fv.window(3, step=2)),
        ("window(left=5, right=1)", fv.window(left=5, right=1)),
        ("chunks(4)", fv.chunks(4)),
        ("causal & chunks(4)", fv.causal & fv.chunks(4)),
        ("neighborhood(2, 4)", fv.neighborhood(2, 4)),
        ("prefix(5)", fv.prefix(5)),
        ("causal | prefix(5)", fv.causal | fv.prefix(5)),
        ("documents(ids)", fv.documents(ids)),
        ("causal & documents(ids)", fv.causal & fv.documents(ids)),
        ("padding(lengths)", fv.padding(torch.tensor([11]))),
        ("global_tokens([0, 8])", fv.global_tokens([0, 8])),
        ("random_blocks(2, 2, seed=1)", fv.random_blocks(2, 2, seed=1)),
        ("blocks(matrix, 4)", fv.blocks(matrix, 4)),
        ("blockwise(window(2), 4)", fv.blockwise(fv.window(2), 4)),
        ("rule(lambda b, h, q, k: (q + k) % 3 == 0)", fv.rule(_every_third())),
        ("from_mask(mask)", fv.from_mask(torch.arange(256).view(16, 16) % 7 < 3)),
        ("causal & selected(indices, block=4)", fv.causal & fv.selected(chosen, block=4)),
        ("longformer(4, [0])", fv.longformer(4, [0])),
        ("bigbird(2, random=1)", fv.bigbird(2, random=1)),
        ("every(4)", fv.every(4)),
        ("pooled(4)", fv.pooled(4)),
        ("strided(4)", fv.strided(4)),
        ("fixed(4)", fv.fixed(4)),
        ("streaming(2, 4)", fv.streaming(2, 4)),
        ("causal & ~window(3)", fv.causal & ~fv.window(3)),
    ]


def examples_of(name: str | None) -> list[Example]:
    """The examples of one pattern: it alone, or else those in which it takes part; all of them for None.

    Raises:
        InvalidInput: there is no such pattern.
    """
    examples = gallery()
    if name is None:
        return examples
    asked = name.strip().removeprefix("fv.")
    written = asked.partition("(")[0].lower().replace("-", "_")
    same = [one for one in examples if one[0] in (asked, written)]
    alone = [one for one in examples if re.fullmatch(rf"{re.escape(written)}\([^&|]*\)", one[0])]
    known = sorted({word for each, _ in examples for word in re.findall(r"[a-z_]+", each) if word in vars(fv)})
    if not same and written not in known:
        raise unknown_name("pattern", name, known)
    return same or alone or [one for one in examples if re.search(rf"\b{written}\b", one[0])]


def draw(path: Path, name: str | None = None) -> None:
    """The gallery, or one pattern of it, as one picture, PNG or SVG by the suffix."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidInput(f"the picture needs matplotlib: {how_to_install('see')}") from error
    examples = examples_of(name)
    columns = min(6, len(examples))
    rows = -(-len(examples) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.35 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, pattern) in zip(grid.flat, examples, strict=False):
        pattern.plot(16, 16, ax=axes)
        axes.set_title(name.replace("rule(lambda b, h, q, k: ", "rule(… "), fontsize=7.5, family="monospace")
        axes.set(xlabel="", ylabel="")
    for axes in grid.flat[len(examples) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=140)


def _every_third() -> Callable[..., torch.Tensor]:
    return lambda batch, head, query, key: (query + key) % 3 == 0
