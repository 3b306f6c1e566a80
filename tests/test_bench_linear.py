"""`foveate bench linear`: every row computes what the others compute, or has no figure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from foveate import cli
from foveate.bench import linear, linear_measuring
from foveate.bench.linear_measuring import inputs, measure_linear, prepare

ROWS = {row.name: row for row in linear.table(quick=True)}
ONE_OF_EACH = list({(row.form, row.work, row.dtype, row.sweep): row.name for row in ROWS.values()}.values())


def test_the_quick_table_is_the_whole_one_made_small() -> None:
    quick, whole = linear.table(quick=True), linear.table()
    assert [(row.section, row.work, row.claims) for row in quick] == [
        (row.section, row.work, row.claims) for row in whole
    ]
    for rows in (quick, whole):
        assert len({row.name for row in rows}) == len(rows)
        for row in rows:
            assert {name for claim in row.claims for name in (claim.contestant, claim.against)} <= set(row.contestants)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_contestant_of_a_row_is_right(name: str) -> None:
    row = ROWS[name]
    found = measure_linear(row, runs=2, seconds=0.001)
    assert {name: figure.refused for name, figure in found.figures.items()} == dict.fromkeys(row.contestants)
    assert all(len(figure.runs) == 2 for figure in found.figures.values())
    assert [len(claim.runs) for claim in found.claims] == [2] * len(row.claims)
    assert found.again is not None


@pytest.mark.parametrize(("bad", "factor"), [("native", 1.00001), ("plain", 1.001)])
def test_a_wrong_result_has_no_figure(bad: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = linear_measuring._attend

    def damaged(name: str, row: linear.LinearRow) -> linear_measuring._Attend:
        attend = right(name, row)
        return lambda given: (attend(given)[0] * (factor if name == bad else 1), attend(given)[1])

    monkeypatch.setattr(linear_measuring, "_attend", damaged)
    row = next(row for row in ROWS.values() if row.work == "decode" and "plain" in row.contestants)
    found = measure_linear(row, runs=1, seconds=0.001)
    assert str(found.figures[bad].refused).startswith("wrong: out is off by")
    assert found.figures[bad].wrong == (bad == "native")
    assert found.figures["recurrence"].middle


def test_operations_are_those_of_the_recurrence() -> None:
    row = next(row for row in linear.table() if row.form == "gated delta" and row.work == "forward")
    assert row.operations == 6 * 64 * 64 * 8 * 4096


def test_the_plain_form_takes_any_length() -> None:
    row = ROWS["fp32 linear, 32 steps"]
    given = {name: x[:, :, :23] for name, x in inputs(row).items()}
    found, true = (prepare(name, row, given)() for name in ("plain", "recurrence"))
    for mine, theirs in zip(found, true, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_command_writes_every_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def once(row: linear.LinearRow, *, runs: int, seconds: float) -> object:
        return measure_linear(row, runs=1, seconds=0.0)

    monkeypatch.setattr(linear_measuring, "measure_linear", once)
    outputs = [f"--out={tmp_path / name}" for name in ("a.json", "a.csv", "a.svg")]
    monkeypatch.setattr(sys, "argv", ["foveate", "bench", "linear", "--quick", "--only", "linear", *outputs])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "targets are met" in capsys.readouterr().out
    names = [row["name"] for row in json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["rows"]]
    assert names == [row.name for row in ROWS.values() if "linear" in f"{row.section}: {row.name}"]
    assert (tmp_path / "a.svg").stat().st_size > 10_000
    assert (tmp_path / "a.csv").read_text(encoding="utf-8").count("\n") > 2


def test_transformers_missing_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.qwen3_next", None)
    row = next(row for row in ROWS.values() if row.form == "gated delta" and row.work == "decode")
    found = measure_linear(row, runs=1, seconds=0.0)
    assert "not installed" in str(found.figures["transformers"].refused)
    assert found.figures["native"].middle
