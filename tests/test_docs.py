"""The documentation is run: every snippet, every picture of a pattern, every table that is made from the code."""

from __future__ import annotations

import contextlib
import doctest
import functools
import importlib.util
import io
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

import foveate as fv
from foveate.see.gallery import gallery

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"(<!-- not run[^\n]*-->\n)?^( *)```(\w*)[^\n]*\n(.*?)^\2```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, what is in it, and the block of text that follows as what it prints."""

    language: str
    body: str
    line: int
    skipped: bool
    printed: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    made = []
    for n, at in enumerate(found):
        after = found[n + 1] if n + 1 < len(found) else None
        follows = after is not None and after[3] == "text" and not text[at.end() : after.start()].strip()
        printed = after[4] if follows and after is not None else None
        made.append(Block(at[3], at[4], text.count("\n", 0, at.start(4)), at[1] is not None, printed))
    return made


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, no colours, a C++ compiler to speak of, and nothing that a page sets stays set."""
    found = shutil.which
    monkeypatch.setattr("shutil.which", lambda name, *more, **rest: found(name, *more, **rest) or name == "g++")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    options = {name: getattr(torch._tensor_str.PRINT_OPTS, name) for name in ("precision", "sci_mode")}
    torch.manual_seed(0)
    yield
    torch.set_printoptions(**options)


@pytest.mark.parametrize("page", PAGES, ids=named)
@pytest.mark.usefixtures("_offline")
@pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile:UserWarning"
)  # a page does, and says so
def test_every_python_block_runs_and_prints_what_the_page_says(page: Path) -> None:
    space: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page):
        if block.language != "python" or block.skipped:
            continue
        if ">>>" in block.body:
            case = doctest.DocTestParser().get_doctest(block.body, space, page.name, str(page), block.line)
            said = io.StringIO()
            doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(case, out=said.write, clear_globs=False)
            assert not said.getvalue(), said.getvalue()
            space.update(case.globs)
            continue
        printed = io.StringIO()
        code = compile("\n" * block.line + block.body, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, space)
        if block.printed is not None or printed.getvalue():
            assert printed.getvalue() == block.printed, f"{named(page)}, line {block.line}"


TAUGHT = [page for page in PAGES if page.parent.name in ("mechanisms", "transformer") and page.stem != "index"]


@pytest.mark.parametrize("page", TAUGHT, ids=named)
def test_a_mechanism_has_a_page_of_one_screen(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n") <= 62
    assert re.search(r"^> ", text, re.MULTILINE), "no equation"
    assert re.search(r"\bcosts?\b", text, re.IGNORECASE), "no cost"
    assert "](https://" in text, "no paper"
    languages = [block.language for block in blocks(page)]
    assert "text" in languages, "no picture"
    assert "python" in languages, "no code"


@pytest.mark.parametrize("library", ["PyTorch", "Hugging Face transformers", "timm", "diffusers"])
def test_each_library_has_a_section_to_copy(library: str, tmp_path: Path) -> None:
    """A block of Python each, which the test of all pages runs; timm's is run where timm is, by its own tests."""
    page = (DOCS / "use-it.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {library}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section is not None
    (tmp_path / "section.md").write_text(section[1], encoding="utf-8")
    found = [block for block in blocks(tmp_path / "section.md") if block.language == "python"]
    assert {block.skipped for block in found} == {library == "timm"}
    assert "test_what_the_page_shows_runs" in (ROOT / "tests" / "test_timm.py").read_text(encoding="utf-8")


def commands() -> list[tuple[str, str]]:
    """Every command line that a page shows, with the page that shows it first."""
    found: dict[str, str] = {}
    for page in PAGES:
        for block in blocks(page):
            if block.language == "console":
                for line in block.body.splitlines():
                    found.setdefault(line.removeprefix("$ "), named(page))
    return list(found.items())


@pytest.mark.parametrize(("command", "page"), commands())
@pytest.mark.usefixtures("_offline")
def test_every_command_of_ours_runs(command: str, page: str) -> None:
    from typer.testing import CliRunner

    from foveate.commands import app

    program, *arguments = shlex.split(command)
    assert program == "foveate", page
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    if "see" in arguments:
        assert "animal 0.68" in result.output


def test_every_make_target_and_extra_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for page in PAGES:
        for block in blocks(page):
            if block.language == "sh":
                assert set(re.findall(r"^make ([a-z-]+)", block.body, re.MULTILINE)) <= targets, named(page)
                assert set(re.findall(r"\.\[(\w+)\]", block.body)) <= extras, named(page)


@functools.cache
def generator() -> ModuleType:
    sys.path.insert(0, str(DOCS))  # as for a script that is run
    found = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_generated_pages_and_pictures_are_those_that_are_committed() -> None:
    for name, text in generator().pages().items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, f"docs/{name} is stale: python docs/generate.py"


def test_no_picture_is_left_over() -> None:
    made = set(generator().pages())
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.svg")}
    assert there <= made


def test_every_public_pattern_is_in_the_gallery() -> None:
    expressions = " ".join(name for name, _ in gallery())
    page = (DOCS / "patterns.md").read_text(encoding="utf-8")
    patterns = [name for name in fv.__all__ if name in _names_of("foveate.pattern.catalogue")]
    assert "bigbird" in patterns
    for name in patterns:
        assert re.search(rf"\b{name}\b", expressions), f"{name} is not in see/gallery.py"
        assert re.search(rf"<code>[^<]*\b{name}\b", page), f"{name} has no picture in docs/patterns.md"


def _names_of(module: str) -> tuple[str, ...]:
    return tuple(fv._HOME[module])


def test_the_api_page_has_every_public_name() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert [name for name in fv.__all__ if not re.search(rf"[. ]{name}$", page, re.MULTILINE)] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_to_a_page_a_heading_or_an_image_arrives(page: Path) -> None:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"(?:\]\(|\bsrc=\")([^)\"\s]+)[)\"]", prose):
        if link.startswith("https://"):
            continue
        assert "://" not in link, f"{link} is not https"
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{named(page)} points to {link}"
        if anchor and target.suffix == ".md" and target.name != "api.md":  # the API's headings are made from the code
            assert anchor in _anchors(target), f"{named(page)} points to {link}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in plain}


def test_images_are_small() -> None:
    for image in [*DOCS.rglob("*.png"), *DOCS.rglob("*.svg")]:
        assert image.stat().st_size < 200_000, named(image)


def _listed(heading: str) -> str:
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {heading}\n.*?```text\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_the_design_lists_the_files_that_stand_and_none_that_does_not() -> None:
    source = ROOT / "src" / "foveate"
    there = sorted(path.name for path in source.rglob("*.py") if not path.name.startswith("__"))
    listed = re.findall(r"^ +(\w+\.py)\b", _listed("What stands"), re.MULTILINE)
    assert sorted(name for name in listed if name != "__init__.py") == there
    planned = re.findall(r"^  (\w\S*(?:\.py|/))", _listed("What is planned"), re.MULTILINE)
    assert planned
    assert [name for name in planned if (source / name).exists()] == []


def test_the_design_has_the_layers_that_are_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    checked = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert _listed("Who may import whom").split("\n")[:-1] == [layer for layer in checked if layer != "(__main__)"]
