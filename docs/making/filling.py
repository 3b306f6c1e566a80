"""A page is a text with places to fill in: `<!-- table -->` in docs/NAME.md.in."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parent.parent
MADE = "<!-- Made by `python docs/generate.py` from {}.in and docs/making: change those instead. -->\n"


def filled(name: str, **parts: str) -> str:
    """The text of docs/`name`.in with every place filled in, under a line that says how it was made."""
    text = (DOCS / f"{name}.in").read_text(encoding="utf-8")
    for place, part in parts.items():
        assert f"<!-- {place} -->" in text, f"{name}.in has no place for {place}"
        text = text.replace(f"<!-- {place} -->", part)
    return MADE.format(Path(name).name) + text
