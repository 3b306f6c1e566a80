"""How long `accelerate()` holds: blocks in each other, exceptions, `restore()`; and that nothing is left of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sdpa_calls import calls_go_to_us

import foveate as fv

pytestmark = pytest.mark.usefixtures("_nothing_stays")


def test_nested_use_ends_with_the_last() -> None:
    with fv.accelerate() as outer:
        assert calls_go_to_us()
        with fv.accelerate() as inner:
            assert calls_go_to_us()
        assert calls_go_to_us()
        fv.accelerate()
        fv.restore()
        assert calls_go_to_us()
    assert not calls_go_to_us()
    assert outer.report().foveate == {("forward", ""): 4}
    assert inner.report().foveate == {("forward", ""): 1}


def test_the_order_in_which_they_end_does_not_matter() -> None:
    first, second = fv.accelerate(), fv.accelerate()
    with first:
        pass
    assert calls_go_to_us()
    fv.restore()
    assert not calls_go_to_us()
    with pytest.raises(fv.InvalidInput, match="this acceleration has ended: call accelerate\\(\\) again"), second:
        pass


def test_an_exception_inside_puts_everything_back() -> None:
    with pytest.raises(ZeroDivisionError), fv.accelerate():
        raise ZeroDivisionError
    assert not calls_go_to_us()


def test_restore_inside_its_block_is_enough() -> None:
    with fv.accelerate():
        fv.restore()
        assert not calls_go_to_us()
    with pytest.raises(fv.InvalidInput, match="nothing is accelerated"):
        fv.restore()


def test_nothing_is_printed(tmp_path: Path) -> None:
    script = tmp_path / "quiet.py"
    script.write_text(
        "import torch, foveate as fv\n"
        "q = torch.randn(1, 2, 512, 8)\n"
        "for _ in range(2):\n"
        "    with fv.accelerate():\n"
        "        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)\n"
    )
    done = subprocess.run([sys.executable, "-Wd", str(script)], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("", "")
