"""The page and the picture: nothing is fetched, nothing in a token is obeyed, and the numbers are the report's."""

from __future__ import annotations

import os
import re
import shutil
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.errors import InvalidInput
from foveate.see.page import render
from foveate.see.plots import picture
from foveate.see.report import Report

SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PATIENCE = 60_000  # milliseconds: a machine that does much else is slow, not wrong
HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<!--",
    "<script>",
    "$script",
    "${data}",
    "&lt;b&gt;",
    "a\u2028b",
    "]]>",
    "\u202eright to left",
    "漢字",
    "'`\\u003c",
]

Open = Callable[..., Any]


def made_up(layers: int, heads: int, length: int, keys: int, tokens: list[str] | None = None, **named: str) -> Report:
    """A report on random weights: a prime for every axis tells them apart."""
    torch.manual_seed(7)
    weights, indices = torch.randn(layers, heads, length, length).mul(2).softmax(-1).topk(keys)
    words = tokens or [f"word{i}" for i in range(length)]
    received = torch.rand(layers, heads, length)
    about = {"text": " ".join(words), "model": "made-up", "note": "A made-up reading.", **named}
    return Report(tokens=words, indices=indices, weights=weights, received=received, **about)


# ---- without a browser -----------------------------------------------------------------------------------------------


def test_page_loads_nothing_and_runs_only_itself() -> None:
    html = render(made_up(2, 3, 7, 5))
    assert set(re.findall(r"https?://[^\s\"'<>]*", html)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"@import|url\(|<(?:iframe|object|embed|img)|\bsrc=", html)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy[1]


def test_page_keeps_hostile_text_inside_its_script() -> None:
    plain, hostile = render(made_up(1, 1, 12, 3)), render(made_up(1, 1, 12, 3, HOSTILE, note="</script>", model="<!--"))
    assert hostile.count("<script") == plain.count("<script")
    assert hostile.count("</script") == plain.count("</script")
    assert hostile.count("<!--") == plain.count("<!--")
    assert "\u2028" not in hostile


@pytest.mark.parametrize("place", [{"layer": 2}, {"head": 3}, {"token": 7}, {"layer": -1}])
def test_page_and_picture_name_a_place_that_is_not_there(place: dict[str, int], tmp_path: Path) -> None:
    report, where = made_up(2, 3, 7, 5), {"layer": 0, "head": 0, "token": 0, **place}
    name, number = next(iter(place.items()))
    with pytest.raises(InvalidInput, match=f"{name} {number} does not exist"):
        render(report, **where)
    with pytest.raises(InvalidInput, match=f"{name} {number} does not exist"):
        picture(report, **where, path=tmp_path / "x.png")


def test_page_refuses_weights_that_are_not_finite() -> None:
    report = made_up(1, 1, 5, 3)
    report.weights[0, 0, 0, 0] = float("nan")
    with pytest.raises(InvalidInput, match="not finite"):
        render(report)


@pytest.mark.parametrize("length", [12, 61])
@pytest.mark.parametrize("token", [3, None])
def test_picture_writes_png_and_svg(length: int, token: int | None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tokens = [*[word for word in HOSTILE if word != "漢字"], "$\\frac{1}$", *(f"word{i}" for i in range(length - 12))]
    report = made_up(2, 3, length, 5, tokens)
    for name in ("a.png", "a.svg"):
        picture(report, layer=1, head=2, token=token, path=tmp_path / name)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert xml.parse(tmp_path / "a.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    with pytest.raises(InvalidInput, match=r"ends in \.png or \.svg"):
        picture(report, layer=1, head=2, token=token, path=tmp_path / "a.gif")


# ---- in Chromium -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        message = "the page is not tested: this needs playwright and Debian's chromium (apt-get install chromium)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=SWITCHES)
        yield running
        running.close()


@pytest.fixture
def page_of(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a report's page from a file; at the end nothing else was asked for, and nothing went wrong."""
    asked: list[str] = []
    wrong: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 900})

    def refuse(dialog: Any) -> None:
        wrong.append(dialog.message)
        dialog.dismiss()

    def open_page(report: Report, **where: int) -> Any:
        path = tmp_path / "page.html"
        path.write_text(render(report, **where), encoding="utf-8")
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", refuse)
        page.goto(path.as_uri())
        page.locator("html[data-ready]").wait_for(timeout=PATIENCE)
        return page

    yield open_page
    context.close()
    assert [url for url in asked if not url.startswith("blob:")] == [(tmp_path / "page.html").as_uri()]
    assert wrong == []


def listed(page: Any) -> list[tuple[int, float]]:
    """The table as people read it: (token, share) of every row."""
    rows = page.locator("#keys tbody tr").evaluate_all(
        "rows => rows.map(row => [row.querySelector('button').dataset.key, row.lastChild.textContent])"
    )
    return [(int(key), float(share.strip("<%")) / 100) for key, share in rows]


def assert_shows(page: Any, report: Report, layer: int, head: int, token: int) -> None:
    page.locator(f'body[data-layer="{layer}"][data-head="{head}"][data-token="{token}"]').wait_for(timeout=PATIENCE)
    table = listed(page)
    assert [key for key, _ in table] == report.indices[layer, head, token].tolist()
    assert [share for _, share in table] == pytest.approx(report.weights[layer, head, token].tolist(), abs=6e-4)
    rest = page.locator("#keys tfoot").text_content()
    assert rest.startswith("not shown: ")
    assert float(rest.split()[-1].strip("<%")) / 100 == pytest.approx(
        float(report.rest()[layer, head, token]), abs=6e-4
    )


def test_page_holds_the_reports_numbers(page_of: Open) -> None:
    report = made_up(2, 3, 7, 5)
    page = page_of(report)
    names = ("index", "weight", "rest", "average")
    index, *inside = (torch.tensor(page.evaluate(f"Array.from({name})")) for name in names)
    assert index.tolist() == report.indices.flatten().tolist()
    for got, wanted in zip(inside, (report.weights, report.rest(), report.received), strict=True):
        flat = wanted.flatten()
        assert ((got - flat).abs() <= 1.01 * flat.sqrt() / 65535 + 1e-7).all()  # half a step of the root, both ways


def test_page_of_many_weights_keeps_a_byte_each_and_claims_no_tenths(
    page_of: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.see.page.EXACT_UP_TO", 0)
    report = made_up(2, 3, 7, 5)
    page = page_of(report, layer=1, head=2, token=4)
    shares = page.locator("#keys tbody td:last-child").all_text_contents()
    assert all(re.fullmatch(r"<1%|\d+%", share) for share in shares)
    assert [share for _, share in listed(page)] == pytest.approx(report.weights[1, 2, 4].tolist(), abs=0.009)
    got = torch.tensor(page.evaluate("Array.from(weight)"))
    assert ((got - report.weights.flatten()).abs() <= 1.01 * got.sqrt() / 255 + 1e-5).all()


def test_page_shows_what_is_picked(page_of: Open) -> None:
    report = made_up(5, 3, 11, 7)
    page = page_of(report, layer=1, head=2, token=4)
    assert_shows(page, report, 1, 2, 4)
    page.locator("#layer").select_option("3")
    assert_shows(page, report, 3, 2, 4)
    page.locator("#head").select_option("0")
    assert_shows(page, report, 3, 0, 4)
    page.locator("#cells button").nth(4 * 3 + 1).click()
    assert_shows(page, report, 4, 1, 4)
    page.locator("#tokens button").nth(9).click()
    assert_shows(page, report, 4, 1, 9)
    page.locator("#tokens button").nth(2).hover()
    assert_shows(page, report, 4, 1, 2)
    page.locator("h1").hover()
    assert_shows(page, report, 4, 1, 9)
    page.keyboard.press("ArrowLeft")
    assert_shows(page, report, 4, 1, 8)
    page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("Shift+ArrowRight")
    assert_shows(page, report, 3, 2, 8)


def test_page_follows_one_key_through_every_head(page_of: Open) -> None:
    report = made_up(2, 3, 11, 7)
    page = page_of(report, token=4)
    key = int(report.indices[0, 0, 4, 3])
    page.locator("#keys tbody button").nth(3).click()
    page.locator(f'body[data-target="{key}"]').wait_for(timeout=PATIENCE)
    for cell in range(6):
        keys, weights = (values[cell // 3, cell % 3, 4].tolist() for values in (report.indices, report.weights))
        said = page.locator("#cells button").nth(cell).get_attribute("aria-label")
        weight = f"{weights[keys.index(key)]:.1%}" if key in keys else "not shown, at most"
        assert said.startswith(f"layer {cell // 3} head {cell % 3}: ")
        assert weight in said


def test_a_word_of_several_tokens_is_their_mean_on_the_page(page_of: Open) -> None:
    """As in the terminal, where `--from` says the same."""
    report, word = made_up(2, 3, 11, 7), [3, 4, 5]
    page = page_of(report, layer=1, head=2, token=word)
    page.locator('body[data-token="11"]').wait_for(timeout=PATIENCE)
    mean = report.looks(1, 2, word)
    table = listed(page)
    assert len(table) == int((mean > 0).sum())
    assert [share for _, share in table] == pytest.approx([float(mean[key]) for key, _ in table], abs=6e-4)
    assert [share for _, share in table] == sorted((share for _, share in table), reverse=True)
    rest = float(page.locator("#keys tfoot").text_content().split()[-1].strip("<%")) / 100
    assert rest == pytest.approx(1 - float(mean.sum()), abs=6e-4)
    assert "mean of its 3 tokens" in page.locator("#claim").text_content()
    assert "“word3 word4 word5” looks at" in page.locator("#keys-title").text_content()
    chosen = page.locator("#tokens .source").evaluate_all("chips => chips.map(chip => Number(chip.dataset.token))")
    assert chosen == word
    target = table[0][0]
    for cell in range(6):
        weight = float(report.looks(cell // 3, cell % 3, word)[target])
        said = page.locator("#cells button").nth(cell).get_attribute("aria-label")
        assert f"{weight:.1%}" in said if weight else "not shown, at most" in said
    page.locator("#received").click()
    page.locator('body[data-received="true"]').wait_for(timeout=PATIENCE)
    total = float(report.received[1, 2, word].sum())
    assert f"receives {'100%' if total > 0.9995 else f'{total:.1%}'}" in page.locator("#claim").text_content()
    page.locator("#from").click()
    page.keyboard.press("ArrowRight")
    assert_shows(page, report, 1, 2, 4)


@pytest.mark.parametrize("length", [12, 61])
def test_a_word_of_several_tokens_is_their_mean_in_the_picture(length: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.text import Text

    report, word = made_up(1, 1, length, 5), [3, 4]
    written: list[str] = []
    keep = Text.set_text

    def heard(self: Text, words: object) -> None:
        written.append(str(words))
        keep(self, words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "set_text", heard)
        picture(report, layer=0, head=0, token=word, path=tmp_path / "word.svg")
    mean = report.looks(0, 0, word)
    assert "What “word3 word4”, mean of its 2 tokens, looks at" in written
    assert f"{float(mean.max()):.1%}" in written
    assert f"{1 - float(mean.sum()):.1%}" in written


def test_page_says_what_each_token_receives_and_that_the_list_is_partial(page_of: Open) -> None:
    report = made_up(2, 3, 11, 2)
    page = page_of(report, layer=1, head=1, token=4)
    page.locator("#received").click()
    page.locator('body[data-received="true"]').wait_for(timeout=PATIENCE)
    assert f"receives {float(report.received[1, 1, 4]):.1%} on average" in page.locator("#claim").text_content()
    assert "Approximate" in page.locator("#keys-note").text_content()
    rows = {row for row in range(11) if 4 in report.indices[1, 1, row].tolist()}
    assert {row for row, _ in listed(page)} == rows


def test_page_shows_hostile_tokens_as_text_and_nothing_else(page_of: Open) -> None:
    bad = '"><img src=x onerror=alert(1)></script><script>alert(2)</script><!--'
    page = page_of(made_up(1, 2, 12, 12, HOSTILE, text=bad, model=bad, note=bad))
    assert page.locator("#tokens button").all_text_contents() == HOSTILE
    assert page.locator("img, iframe, script[src]").count() == 0
    assert page.locator("script").count() == 3
    assert page.locator("#model").text_content() == page.locator("#note").text_content() == bad
    for token in range(len(HOSTILE)):
        page.locator("#tokens button").nth(token).click()


def test_page_saves_what_it_shows(page_of: Open, tmp_path: Path) -> None:
    page = page_of(made_up(1, 2, 12, 5, HOSTILE))
    for kind in ("svg", "png"):
        with page.expect_download() as download:
            page.locator(f"#save-{kind}").click()
        download.value.save_as(tmp_path / f"saved.{kind}")
    words = "".join(xml.parse(tmp_path / "saved.svg").getroot().itertext())
    assert "not shown: " in words
    assert all(token in words for token in HOSTILE)
    assert (tmp_path / "saved.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_page_of_500_tokens_is_small_and_quick(page_of: Open, tmp_path: Path) -> None:
    report, took = made_up(6, 12, 500, 16), []
    while not took or (min(took) >= 5 and len(took) < 3):  # once more where something else was at work
        start = time.perf_counter()
        page = page_of(report, layer=3, head=1, token=77)
        took.append(time.perf_counter() - start)
    assert min(took) < 5
    assert page.locator("*").count() < 3_000  # what a browser has to lay out
    assert (tmp_path / "page.html").stat().st_size < 5_000_000
    assert_shows(page, report, 3, 1, 77)
    page.locator("#by-pattern").click()
    page.locator('#by-pattern[aria-pressed="true"]').wait_for(timeout=PATIENCE)
