"""The benchmark of selections and additive scores: who takes part, what is checked, what comes out."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import foveate as fv
from foveate import commands
from foveate.bench import alignment, sparse
from foveate.bench.results import read
from foveate.bench.rows import Row


def _row(name: str) -> Row:
    return next(row for row in sparse.table(quick=True) if name in row.name)


def test_rows_have_names_and_claims_of_their_own() -> None:
    for quick in (False, True):
        rows = sparse.table(quick=quick)
        assert len({row.name for row in rows}) == len(rows)
        for row in rows:
            for claim in row.claims:
                assert {claim.contestant, claim.against} <= set(row.contestants), row.name
    wanted = [claim.target for row in sparse.table() for claim in row.claims if claim.target]
    assert wanted == [4, 3, 1, 10]


@pytest.mark.parametrize("name", ["fp32 16 of", "bf16 16 of", "forward + backward", "d=32, forward + backward"])
def test_everyone_computes_the_truth_and_is_timed(name: str) -> None:
    row = _row(name)
    found = sparse.measure_sparse(row, runs=1, seconds=0.001)
    assert set(found.figures) == set(row.contestants)
    for figure in found.figures.values():
        assert figure.middle, figure.refused
    assert found.again is not None
    assert all(claim.worst for claim in found.claims)


def test_the_drawn_tokens_are_distinct_and_of_the_past() -> None:
    row = _row("fp32 16 of")
    assert isinstance(row, sparse.SelectionRow)
    pattern = sparse._tokens(row)
    sizes = pattern.dense(row.queries, row.keys, heads=row.heads).sum(-1)
    wanted = (torch.arange(row.queries) + 1).clamp(max=row.chosen)
    assert torch.equal(sizes, wanted.expand_as(sizes))


def test_a_lost_key_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of a wrong list, a list short of one entry, are not the truth of the right one."""
    right = sparse.attention

    def short(q: Tensor, k: Tensor, v: Tensor, pattern: fv.Pattern, *, backend: str) -> Tensor:
        parts = [part for part in getattr(pattern, "parts", ()) if isinstance(part, sparse.Selected)]
        if parts:
            pattern = fv.causal & fv.selected(parts[0].indices[..., 1:], block=parts[0].block)
        return right(q, k, v, pattern, backend=backend)

    monkeypatch.setattr(sparse, "attention", short)
    found = sparse.measure_sparse(_row("bf16 16 of"), runs=1, seconds=0.001)
    assert found.figures["dense"].middle
    for name in ("blocks", "tokens"):
        assert found.figures[name].wrong
        assert str(found.figures[name].refused).startswith("wrong: out is off by")


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own() -> None:
    row = next(row for row in sparse.table() if "memory" in row.name)
    assert isinstance(row, alignment.AdditiveRow)
    figures = alignment.weigh(row, 1)
    assert all(figure.unit == "MB" and figure.middle for figure in figures.values())
    assert (figures["broadcast"].middle or 0) > 4 * 512 * 512 * 256 / 1e6  # it holds at least the tanh


@pytest.mark.slow
def test_the_command_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / f"found.{kind}" for kind in ("json", "csv", "svg")]
    with pytest.raises(SystemExit) as done:
        commands.app(["bench", "sparse", "--quick", "--runs", "1", *(f"--out={file}" for file in files)])
    assert done.value.code == 0
    assert "selections" in capsys.readouterr().out
    assert [row.section for row in read(files[0]).rows] == [row.section for row in sparse.table()]
    assert all(file.stat().st_size for file in files)
