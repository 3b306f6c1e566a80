"""The examples run, with a tiny setting, and say the same for the same seed; docs/examples.md says what they learn."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
ENDING = b"IEND\xaeB\x60\x82"


@pytest.fixture
def _afterwards() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def main_of(name: str) -> Callable[[list[str]], Any]:
    found: Callable[[list[str]], Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("_afterwards")
@pytest.mark.parametrize(
    ("name", "tiny"),
    [("reverse_and_sort", ["--steps", "2", "--fresh", "20"]), ("digits", ["--epochs", "1"])],
    ids=["reverse", "digits"],
)
def test_an_example_runs(name: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "digits":
        pytest.importorskip("sklearn")
    main = main_of(name)
    said = []
    for out in (["--out", str(tmp_path / "picture.png")], ["--out"]):
        main([*tiny, *out])
        said.append([line for line in capsys.readouterr().out.splitlines() if not line.endswith(" s")])
    assert said[0] == said[1]
    assert len(said[0]) > 2
    assert (tmp_path / "picture.png").read_bytes().endswith(ENDING)
    assert main([*tiny, "--out", "--seed", "1"]) is not None


def test_what_is_learned_is_what_is_meant() -> None:
    names = runpy.run_path(str(EXAMPLES / "reverse_and_sort.py"))
    zero, tasks = names["ZERO"], names["TASKS"]
    sources, targets = names["draw"](200, torch.Generator().manual_seed(0))
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        digits = [token for token in source[1:] if token >= zero]
        assert source[1 + len(digits) :] == [names["PAD"]] * (12 - len(digits))
        wanted = digits[::-1] if source[0] == tasks["reverse"] else sorted(digits)
        assert target == [names["BEGIN"], *wanted, names["END"], *[names["PAD"]] * (12 - len(digits))]
    assert {source[0] for source in sources.tolist()} == set(tasks.values())
