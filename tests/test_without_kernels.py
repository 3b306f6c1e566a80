"""Installed without a compiler, all of Foveate works: slower, and it says so."""

import subprocess
import sys

HIDDEN = "import sys\nsys.modules['foveate._native'] = None\n"  # importing it fails, as where it was not compiled
EXAMPLES = (
    HIDDEN
    + """
import doctest, importlib, torch
torch.set_num_threads(1)
for name in sys.argv[1:]:
    found = doctest.testmod(importlib.import_module(name))
    print(name, found.failed, found.attempted)
"""
)
TRAINS = (
    HIDDEN
    + """
import torch
import foveate as fv
q, k, v = (torch.randn(2, heads, 37, 8).requires_grad_() for heads in (4, 2, 2))
scores = [torch.rand(4).requires_grad_() for _ in range(2)]
score = fv.alibi(scores[0]) + fv.sinks(scores[1]) + fv.softcap(3)
assert "compiled kernels are missing" in fv.explain(q, k, v, fv.causal).refusals["native"][0]
documents = fv.causal & fv.documents(torch.arange(37) // 9)
for pattern in (None, fv.causal, fv.causal & fv.window(5), fv.bigbird(4), documents):
    out, lse = fv.attention_with_lse(q, k, v, pattern, score=score, dropout=0.1, seed=3)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, *scores)))
with torch.no_grad():
    step = fv.attention(q[:, :, -1:], k, v, fv.causal)
    pages = [x.unflatten(2, (1, 37)).transpose(1, 2).flatten(0, 1) for x in (k, v)]
    paged = fv.paged_attention(q[:, :, -1:], *pages, torch.tensor([[0], [1]]), torch.tensor([37, 37]))
    torch.testing.assert_close(paged, step)
for refused in (lambda: fv.attention(q, k, v, backend="native"), fv.accelerate):
    try:
        refused()
    except fv.FoveateError as error:
        print(error)
"""
)


def _said(script: str, *arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_attention_trains_decodes_and_says_what_is_missing() -> None:
    asked, accelerated = _said(TRAINS)
    assert "the compiled kernels are missing: install a C++ compiler and foveate again" in asked
    assert accelerated == "accelerate needs the compiled kernels: install a C++ compiler and foveate again"


def test_doctor_says_that_there_are_none() -> None:
    said = " ".join(
        " ".join(_said(HIDDEN + "from foveate.cli import main\nsys.argv = ['foveate', 'doctor']\nmain()")).split()
    )
    assert "cpu kernels none not compiled: install g++ or" in said
    assert "the compiled kernels are missing" in said.replace("│ ", "")


MODULES = (
    "functional", "generation.cache", "inspection", "linear.forms", "linear.functional", "linear.problem",
    "mechanisms.additive", "mechanisms.hard", "mechanisms.lowrank", "mechanisms.lsh", "mechanisms.merge",
    "mechanisms.paged", "mechanisms.strided", "rotary", "normalizers", "score", "pattern.catalogue", "pattern.algebra",
    "see.watching", "nn.attention", "nn.transformer", "selection",
)  # fmt: skip


def test_every_example_of_a_public_function_runs() -> None:
    found = [line.split() for line in _said(EXAMPLES, *(f"foveate.{name}" for name in MODULES))]
    assert [(name, failed) for name, failed, _ in found if failed != "0"] == []
    assert sum(int(attempted) for _, _, attempted in found) > 100
