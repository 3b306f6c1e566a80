"""For the API page: a `>>>` example in a docstring is code, wherever it stands, and a paper's number is a link."""

from __future__ import annotations

import re
from typing import Any

import griffe

# From a line that begins with >>> to the next empty line.
EXAMPLE = re.compile(r"^>>> .*?(?=^\s*$|\Z)", re.MULTILINE | re.DOTALL)
PAPER = re.compile(r"(?:https://arxiv\.org/abs/)?\b(\d{4}\.\d{5})\b")


class Doctests(griffe.Extension):
    """Puts a fence around every example and a link behind every arXiv number."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        text = obj.docstring.value if obj.docstring else ""
        if obj.docstring and "```" not in text and "[arXiv:" not in text:  # an object may be visited twice
            text = PAPER.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)
