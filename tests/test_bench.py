"""The benchmark: what it measures is the truth or has no figure, and what it writes can be read again."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import cli
from foveate.bench import contestants, measuring, memory, tables
from foveate.bench import truth as truths
from foveate.bench.preferences import preferences
from foveate.bench.results import Figure, Measured, Results, Verdict, read, to_json
from foveate.bench.rows import Claim, Row
from foveate.errors import Unsupported
from foveate.pattern.catalogue import causal, window

CEILINGS = {"float32": 100.0, "bfloat16": 200.0, "read": 10.0}


def _main(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["foveate", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def _row(name: str) -> Row:
    (row,) = (row for row in tables.softmax(quick=True) if row.name == name)
    return row


def _measure(row: Row) -> Measured:
    return measuring.measure(row, runs=1, ceilings=CEILINGS, seconds=0.001, left_out={"flex": "left out"})


FULL, CAUSAL = "fp32 full N=64 D=64", "fp32 causal N=16 D=64"
TRAINING = "fp32 causal N=64 D=64, forward + backward"
DECODE = "fp32 decode, 64 keys, 32/8 heads D=128"
LOOKED = "fp32 causal N=64 D=64, top 8 and received"
WINDOW = "fp32 causal & window(8) N=256 D=64"


def test_every_row_has_a_name_of_its_own_and_claims_about_who_takes_part() -> None:
    for quick in (False, True):
        rows = tables.softmax(quick=quick)
        assert len({row.name for row in rows}) == len(rows)
        for row in rows:
            assert set(row.contestants) <= {*contestants.OURS, *contestants.PEERS}, row.name
            for claim in row.claims:
                assert claim.contestant in row.contestants, row.name
                assert claim.against in (*row.contestants, "ceiling", "memory"), row.name
                assert (claim.target or claim.aim) is not None, row.name
    assert [row.section for row in tables.softmax(quick=True)] == [row.section for row in tables.softmax()]


def test_an_interruption_keeps_the_rows_that_are_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measure, rows = measuring.measure, iter([True, False])

    def interrupted(row: Row, **options: Any) -> Measured:
        if next(rows):
            return measure(row, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "measure", interrupted)
    path = tmp_path / "some.json"
    code, out, err = _main(
        capsys, monkeypatch, "softmax", "--quick", "--runs", "1", "--only", "causal", "--out", str(path)
    )
    assert code == 0
    assert "interrupted: 1 of " in err
    assert len(read(path).rows) == 1
    assert read(path).rows[0].name in out


@pytest.mark.parametrize("name", [FULL, CAUSAL, TRAINING, DECODE, LOOKED, WINDOW, "fp32 bigbird(8) N=256 D=64"])
def test_every_kind_of_row_gives_figures_or_reasons(name: str) -> None:
    found = _measure(_row(name))
    assert found.again is not None
    assert found.again >= 1
    assert set(found.figures) == set(_row(name).contestants)
    for contestant, figure in found.figures.items():
        assert (figure.middle is None) == (figure.refused is not None), contestant
        assert not figure.wrong, figure.refused
        if figure.middle is not None and contestant != "looked":
            assert figure.gbytes if name == DECODE else figure.gflops
            assert figure.percent
    for claim in found.claims:
        measured = found.figures[claim.contestant].middle is not None
        peer = claim.against == "ceiling" or found.figures[claim.against].middle is not None
        assert (claim.worst is not None) == (measured and peer)


def test_operations_are_those_of_visible_pairs() -> None:
    row = _row(CAUSAL)
    assert row.operations(row.density()) == 4 * 8 * (16 * 17 / 2) * 64
    assert replace(row, work="forward + backward").operations(1.0) == 3.5 * 4 * 8 * 16 * 16 * 64
    assert _row(DECODE).key_value_bytes() == 2 * 8 * 64 * 128 * 4


def test_who_is_wrong_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    right = contestants.attention

    def slightly_off(*call: Tensor, backend: str) -> Tensor:
        out = right(*call)
        return out * 1.00001 if backend == "native" else out

    monkeypatch.setattr(contestants, "attention", slightly_off)
    found = _measure(_row(FULL))
    figure = found.figures["native"]
    assert figure.wrong
    assert figure.middle is None
    assert not figure.runs
    assert figure.refused is not None
    assert figure.refused.startswith("wrong: out is off by")
    assert found.figures["auto"].middle
    claim = found.claims[0]
    assert (claim.worst, claim.met) == (None, False)


def test_a_wrong_gradient_or_a_hidden_nan_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    right = contestants.attention

    def doubled(*call: Tensor, backend: str) -> Tensor:
        out = right(*call)
        return out + (out - out.detach())  # the same numbers, twice the gradient

    monkeypatch.setattr(contestants, "attention", doubled)
    assert str(_measure(_row(TRAINING)).figures["auto"].refused).startswith("wrong: dQ is off by")

    def hole(*call: Tensor, backend: str) -> Tensor:
        out = right(*call)
        out[0, 1, 7, 3] = torch.nan
        return out

    monkeypatch.setattr(contestants, "attention", hole)
    monkeypatch.setattr(truths, "_PAIRS", 2 * 8 * 64)  # only the first and the last row are compared
    assert _measure(_row(FULL)).figures["native"].refused == "wrong: out is not finite"


def test_an_eighth_of_the_keys_lost_is_noticed_in_any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    right = contestants.attention

    def forgetful(q: Tensor, k: Tensor, v: Tensor, *pattern: object, backend: str) -> Tensor:
        most = k.shape[2] * 7 // 8
        return right(q, k[:, :, :most], v[:, :, :most])

    monkeypatch.setattr(contestants, "attention", forgetful)
    for dtype in ("fp32", "bf16"):
        row = _row(f"{dtype} decode, 2048 keys, 32/8 heads D=128")
        long = replace(row, keys=65536, heads=2, key_heads=1, contestants=("native",), claims=())
        assert _measure(long).figures["native"].wrong


@pytest.mark.parametrize("damage", ["indices", "weights", "rest", "received", "lse"])
def test_every_part_of_what_was_looked_at_is_checked(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = contestants.looked

    def damaged(*call: object, k: int) -> object:
        seen = right(*call, k=k)  # type: ignore[arg-type]
        part = getattr(seen, damage)
        return replace(seen, **{damage: part.flip(-1) if damage == "indices" else part + 0.001})

    monkeypatch.setattr(contestants, "looked", damaged)
    assert _measure(_row(LOOKED)).figures["looked"].wrong


def test_some_rows_are_compared_where_all_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truths, "_PAIRS", 8 * 256 * 20)
    row = _row(WINDOW)
    rows = truths.truth(row, *row.inputs()).rows
    assert len(set(rows.tolist())) == 20
    assert {0, 255} <= set(rows.tolist())
    assert _measure(row).figures["native"].middle


def test_what_fails_is_a_reason_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*call: object, **how: object) -> Tensor:
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", breaks)
    found = _measure(_row("fp32 full N=64 D=64, AVX2 build"))
    assert found.figures["sdpa"].refused == "failed: RuntimeError: no luck"
    assert found.claims[0].worst is None


def test_contestants_take_turns_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    turns = {name: (lambda name=name: order.append(name) or ()) for name in "ab"}
    monkeypatch.setattr(measuring, "_TURN", 0.0)
    measuring.medians(turns, 0.0)
    assert order == ["a", "a", "b", "b", *["a", "b"] * 5]  # twice to warm up and to see how long one takes


def verdict(claim: Claim, mine: list[float], peer: list[float], again: float = 1.0) -> Verdict:
    figures = {"native": Figure(runs=mine, middle=mine[0]), "auto": Figure(runs=mine, middle=mine[0])}
    return measuring.verdict(claim, figures | {"sdpa": Figure(runs=peer, middle=peer[0])}, again)


def test_of_all_runs_the_worst_counts() -> None:
    found = verdict(Claim("native", "sdpa", 2.0, aim=2.4), [1.0, 1.0, 1.0], [3.0, 1.9, 2.5])
    assert (found.runs, found.worst, found.met, found.aim_met) == ([3.0, 1.9, 2.5], 1.9, False, False)
    assert verdict(Claim("native", "sdpa", 1.9), [1.0, 1.0], [3.0, 1.9]).met


def test_never_behind_forgives_the_noise_and_no_more() -> None:
    claim = Claim("auto", "sdpa", 1.0, never_behind=True)
    assert not verdict(claim, [1.0], [0.98]).met
    assert verdict(claim, [1.0], [0.98], again=1.03).met
    assert not verdict(claim, [1.0], [0.9], again=2.0).met


def test_memory_is_what_a_call_needs_beside_what_it_returns() -> None:
    long = _row("fp32 causal & window(32) N=4096 D=64, memory of forward")
    assert memory.megabytes(long, "native")[0] < 4  # its output alone is 8.4 MB
    row = replace(long, queries=1024, keys=1024)
    grown, complaint = memory.megabytes(row, "eager")
    assert complaint == ""
    assert 2 * 4e-6 * 8 * 1024**2 < grown < 8 * 4e-6 * 8 * 1024**2  # scores and weights, 33.6 MB each
    with pytest.raises(Unsupported, match="sdpa: has no causal & window"):
        memory.megabytes(row, "sdpa")


def test_the_end_of_a_long_row_is_checked() -> None:
    row = replace(_row("fp32 causal & window(32) N=4096 D=64, memory of forward"), queries=200, keys=200)
    inputs = row.inputs()
    for work in ("forward", "forward + backward"):
        trained = replace(row, work=work)
        with torch.enable_grad():
            found = memory._turn(trained, "eager", *inputs)
        assert memory._complaint(trained, inputs, found) == ""
        for place in range(len(found)):
            broken = [part.detach().clone() for part in found]
            broken[place][0, 3, -5] += 0.01
            assert "is off by" in memory._complaint(trained, inputs, tuple(broken))


def test_json_holds_everything_and_reads_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"found.{suffix}" for suffix in ("json", "csv", "svg")]
    outs = [word for file in files for word in ("--out", str(file))]
    code, out, err = _main(capsys, monkeypatch, "softmax", "--quick", "--json", "--only", "n=64 d=64, AVX2", *outs)
    assert code == 0
    assert "wrote" in err
    tree = json.loads(out)
    assert out == files[0].read_text()
    assert set(tree) == {"schema", "about", "rows"}
    assert set(tree["about"]) == {
        "date", "machine", "kernels", "versions", "threads", "ceilings", "quick", "runs",
    }  # fmt: skip
    assert tree["about"]["machine"]["cpu"]
    assert tree["about"]["ceilings"]["float32"] > 0
    assert len(tree["rows"]) == 2
    for row in tree["rows"]:
        assert set(row["figures"]) == {"avx2", "sdpa"}
        assert len(row["claims"][0]["runs"]) == 3
        assert row["claims"][0]["worst"] == min(row["claims"][0]["runs"])
    results = read(files[0])
    assert to_json(results) == out
    lines = list(csv.DictReader(io.StringIO(files[1].read_text())))
    assert [line["row"] for line in lines] == [row["name"] for row in tree["rows"]]
    assert lines[0]["worst"] == str(tree["rows"][0]["claims"][0]["worst"])
    assert files[2].read_text().startswith("<?xml")


def _stored(folder: Path, ratio: float) -> Path:
    """Results of one row in which native is so many times faster than SDPA."""
    row = replace(_row(CAUSAL), contestants=("native", "sdpa"), claims=(Claim("native", "sdpa", 2.0),))
    figures = {"native": Figure(runs=[1.0], middle=1.0), "sdpa": Figure(runs=[ratio], middle=ratio)}
    found = replace(_measure(row), figures=figures, claims=[measuring.verdict(row.claims[0], figures, 1.0)])
    from foveate.bench.about import about

    path = folder / f"{ratio}.json"
    path.write_text(to_json(Results(about(CEILINGS, quick=True, runs=1), [found])))
    return path


def test_a_comparison_shows_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = _stored(tmp_path, 2.0), _stored(tmp_path, 3.0)
    code, out, _ = _main(capsys, monkeypatch, "show", str(new), "--compare", str(old))
    assert code == 0
    assert "+50%" in out
    assert "1 of 1 targets are met" in out
    assert "before" in out


def test_preferences_are_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (slow,) = preferences(read(_stored(tmp_path, 0.9)))
    assert slow["prefer"] == "sdpa"
    code, out, _ = _main(capsys, monkeypatch, "preferences", str(_stored(tmp_path, 1.5)))
    assert code == 0
    (fast,) = json.loads(out)
    assert fast["kernel"]
    del fast["kernel"]
    assert fast == {
        "work": "forward", "dtype": "float32", "causal": True, "keys": "up to 256", "dim": 64, "prefer": "native",
        "worst": 1.5,
    }  # fmt: skip


def test_a_wrong_result_of_ours_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = contestants.attention
    monkeypatch.setattr(contestants, "attention", lambda *call, backend: right(*call) + 1)
    code, out, err = _main(capsys, monkeypatch, "softmax", "--quick", "--runs", "1", "--only", CAUSAL)
    assert code == 1
    assert "wrong: out is off by" in out
    assert f"foveate: {CAUSAL}: native: wrong" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("softmax", "--only", "nothing of the kind"),
            "no row has 'nothing of the kind' in its name: the sections are",
        ),
        (("softmax", "--out", "found.pdf"), "ends in .pdf: wanted one of .json, .csv, .png, .svg"),
        (("softmax", "--out", "no/such/folder/found.json"), "the folder no/such/folder does not exist"),
        (("softmax", "--compare", "nowhere.json"), "cannot read nowhere.json"),
        (("softmax", "--json", "--compare", "nowhere.json"), "--json prints the results alone"),
        (("show", "nowhere.json"), "cannot read nowhere.json"),
        (("show", "pyproject.toml"), "pyproject.toml is not JSON"),
        (("preferences", "nowhere.json"), "cannot read nowhere.json"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    code, _, err = _main(capsys, monkeypatch, *arguments)
    assert code == 2
    assert words in err
    assert err.startswith("foveate: ")
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "has schema nothing"),
        ('{"schema": 9}', "has schema 9"),
        ('{"schema": 1, "about": {}, "rows": []}', "is damaged ('date')"),
    ],
)
def test_damaged_results_are_one_sentence(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "found.json"
    file.write_text(text)
    code, _, err = _main(capsys, monkeypatch, "show", str(file))
    assert code == 2
    assert words in err


def test_flex_reads_bigbird_from_a_table_of_blocks() -> None:
    row = _row("fp32 bigbird(8) N=256 D=64")
    assert row.pattern is not None
    rule = contestants._block_table(row.pattern, row)
    head, query, key = (torch.arange(n).view(shape) for n, shape in ((8, (-1, 1, 1)), (256, (-1, 1)), (256, (1, -1))))
    assert torch.equal(rule(torch.tensor(0), head, query, key), row.pattern.dense(256, 256, heads=8)[0])


@pytest.mark.slow
def test_the_whole_quick_table_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "found.png"
    code, out, _ = _main(capsys, monkeypatch, "softmax", "--quick", "--runs", "1", "--out", str(picture))
    assert code == 0
    assert "the figures mean nothing" in out
    assert "cost of a pattern" in out
    assert "left out by --quick" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_compiled_flex_is_right() -> None:
    row = replace(_row(WINDOW), contestants=("flex",), claims=(), pattern=causal & window(8))
    found = measuring.measure(row, runs=1, ceilings={}, seconds=0.001)
    assert found.figures["flex"].middle, found.figures["flex"].refused
