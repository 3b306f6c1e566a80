"""Write the pages and pictures that are made from the code: `python docs/generate.py`.

docs/making/ has a file for each, docs/*.md.in the text around the tables. A test makes them anew and compares, so none
of them can go stale.
"""

from __future__ import annotations

from pathlib import Path

from making.benchmarks import benchmarks
from making.capabilities import capabilities
from making.mechanisms import mechanisms
from making.models import models
from making.own_models import own_models
from making.patterns import patterns
from making.pictures import pictures
from making.speed import speed

HERE = Path(__file__).parent


def pages() -> dict[str, str]:
    """Everything that this script writes, by its path below docs/."""
    return {
        "patterns.md": patterns(),
        "mechanisms/index.md": mechanisms(),
        "benchmarks.md": benchmarks(),
        "capabilities.md": capabilities(),
        "models.md": models(),
        "models-of-our-own.md": own_models(),
        "images/speed.svg": speed(),
        **pictures(),
    }


def main() -> None:
    """Write what differs and say so."""
    for name, text in pages().items():
        path = HERE / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
