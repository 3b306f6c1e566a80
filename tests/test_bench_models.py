"""`foveate bench models`: every row computes what the others compute, or has no figure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from foveate import cli
from foveate.bench import modelling, models
from foveate.bench.memory import megabytes_of_model
from foveate.bench.modelling import _complaint, measure_model
from foveate.errors import Unsupported

ROWS = {row.name: row for row in models.table(quick=True)}
# What is about memory starts a process for each contestant.
ONE_OF_EACH = [
    pytest.param(row.name, marks=pytest.mark.slow if row.weighs_memory else ())
    for row in {row.work: row for row in ROWS.values()}.values()
]
PACKED = next(row.name for row in ROWS.values() if "packed" in row.contestants)


def test_the_quick_table_is_the_whole_one_made_small() -> None:
    quick, whole = models.table(quick=True), models.table()
    assert [(row.section, row.work, row.claims) for row in quick] == [
        (row.section, row.work, row.claims) for row in whole
    ]
    for rows in (quick, whole):
        assert len({row.name for row in rows}) == len(rows)
        for row in rows:
            assert {claim.contestant for claim in row.claims} <= set(row.contestants)


@pytest.mark.parametrize(("name", "millions"), [("LlamaForCausalLM", 94), ("GPT2LMHeadModel", 25)])
def test_the_models_are_as_large_as_their_names_say(name: str, millions: int) -> None:
    row = next(row for row in models.table() if row.model == name)
    with torch.device("meta"):
        model = modelling._built(row, torch.float32, "sdpa")
    assert round(sum(x.numel() for x in set(model.parameters())) / 1e6) == millions


@pytest.mark.parametrize("name", [*ONE_OF_EACH, PACKED])
def test_every_contestant_of_a_row_is_right(name: str) -> None:
    found = measure_model(ROWS[name], runs=2, seconds=0.001)
    assert {name: figure.refused for name, figure in found.figures.items()} == dict.fromkeys(ROWS[name].contestants)
    named = {name for claim in found.claims for name in (claim.contestant, claim.against)}
    runs = 1 if ROWS[name].weighs_memory else 2
    assert {name: len(figure.runs) for name, figure in found.figures.items()} == {
        name: runs if name in named else 1 for name in found.figures
    }
    assert [len(claim.runs) for claim in found.claims] == [runs] * len(found.claims)
    assert (found.again is None) == ROWS[name].weighs_memory


@pytest.mark.slow
def test_the_weights_of_all_layers_take_more_memory_than_those_of_one() -> None:
    row = ROWS["BERT-base fp32, 128 tokens, memory for one layer's weights"]
    assert megabytes_of_model(row.name, "foveate") < 50  # they are 0.8 MB, of 12 heads
    with pytest.raises(Unsupported, match="nobody: its process failed: "):
        megabytes_of_model(row.name, "nobody")


@pytest.mark.parametrize("bad", ["foveate", "packed", "eager"])
def test_a_wrong_result_has_no_figure(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = modelling._turn

    def damaged(row: models.ModelRow, model: torch.nn.Module, name: str) -> modelling.Turn:
        work = turn(row, model, name)
        return lambda: tuple(x * 1.01 for x in work()) if name == bad else work()

    monkeypatch.setattr(modelling, "_turn", damaged)
    found = measure_model(next(row for row in ROWS.values() if bad in row.contestants), runs=1, seconds=0.001)
    assert "wrong: result 0 is off by" in str(found.figures[bad].refused)
    assert found.figures[bad].wrong == (bad != "eager")
    assert not found.figures["accelerate"].refused


def test_a_nan_is_wrong_and_bfloat16_has_its_own_measure() -> None:
    one, off = torch.ones(3), torch.tensor([1.0, 1.0, 1.02])
    assert not _complaint((one,), (one,), (one,), torch.float32)
    assert _complaint((off,), (one,), (one,), torch.float32)
    assert _complaint((off,), (one,), (one,), torch.bfloat16)
    assert not _complaint((off,), (torch.tensor([1.0, 0.99, 1.0]),), (one,), torch.bfloat16)
    assert _complaint((one * torch.nan,), (one,), (one,), torch.bfloat16)


def test_the_command_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, drawn = tmp_path / "models.json", tmp_path / "models.png"
    outs = ("--out", str(data), "--out", str(drawn))
    arguments = ["bench", "models", "--quick", "--runs", "1", "--only", "vit", *outs]
    monkeypatch.setattr(sys, "argv", ["foveate", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    (row,) = json.loads(data.read_text())["rows"]
    assert list(row["figures"]) == ["own", "foveate", "accelerate", "sdpa", "eager"]
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert "ViT-B/16" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_quick_table_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["foveate", "bench", "models", "--quick", "--runs", "1"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
