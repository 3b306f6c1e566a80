"""What compiled code can do wrong with memory: reads and writes outside, odd addresses, leaks, and too much of it."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from budget import Budget
from kernels import DTYPES, KERNELS, derived, normal, on
from torch import Tensor

import foveate as fv
from foveate.errors import InvalidInput
from foveate.problem import problem
from foveate.softmax import native, reference


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(65, 63), (64, 65), (1, 129), (3, 300), (130, 1)])
def test_nothing_is_read_or_written_outside(queries: int, keys: int, dtype: torch.dtype) -> None:
    """q, k, v and the gradient lie inside memory full of NaN: it reaches nothing, and none of it is changed."""
    for kernel in KERNELS:
        held = [torch.full((2, 4, n + 2, 11), torch.nan, dtype=dtype) for n in (queries, keys, keys, queries)]
        inner = [x[:, :, 1:-1, 1:-1].copy_(normal(*x[:, :, 1:-1, 1:-1].shape, seed=n)) for n, x in enumerate(held)]
        *leaves, d_out = inner
        result = on(kernel)(problem(*(x.requires_grad_() for x in (y.detach() for y in leaves)), fv.causal))
        found = [result.out.detach(), *torch.autograd.grad(result.out, _leaves_of(result.out), d_out)]
        assert all(x.isfinite().all() for x in found), kernel
        for x in held:
            assert x.isnan().sum() == x.numel() - x[:, :, 1:-1, 1:-1].numel()


def _leaves_of(out: Tensor) -> list[Tensor]:
    """The tensors that autograd would accumulate into behind this one."""
    assert out.grad_fn is not None
    return [node.variable for node, _ in out.grad_fn.next_functions if node is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_memory_is_written_before_it_is_read(dtype: torch.dtype) -> None:
    """Results come out of memory that was NaN a moment ago, rows without a key too."""
    for queries, keys in ((70, 90), (1, 300), (5, 0)):
        q, k, v = normal(2, 4, queries, 8), normal(2, 2, keys, 8, seed=1), normal(2, 2, keys, 6, seed=2)
        call = problem(q, k, v, fv.causal, query_start=-3, needs_lse=True)
        budget = Budget(call, dtype)
        for kernel in KERNELS:
            for size in (queries * 8, queries * 6, keys * 8, keys * 6, queries):
                poison = [torch.full((8 * size,), torch.nan) for _ in range(20)]
                del poison
            budget.check(on(kernel))
            for found in native.looked(problem(q.to(dtype), k.to(dtype), v.to(dtype), fv.causal), 3, kernel):
                assert not found.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_odd_address_is_copied_or_read(dtype: torch.dtype) -> None:
    """Tensors over bytes that begin anywhere: q, k, v, the gradient, scores, lengths and starts."""

    def odd(x: Tensor) -> Tensor:
        raw = bytearray(1) + bytearray(x.contiguous().view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(raw, dtype=x.dtype, offset=1).view(x.shape)

    q, k, v = (normal(2, 4, n, 8, seed=n, dtype=dtype) for n in (70, 90, 90))
    bias, sinks, lengths, starts = normal(1, 4, 70, 90), normal(4), torch.tensor([90, 7]), torch.tensor([20, 3])
    for kernel in KERNELS:
        found = []
        for change in (odd, lambda x: x):
            leaves = [change(x).requires_grad_() for x in (q, k, v, bias, sinks)]
            call = problem(
                *leaves[:3],
                fv.causal & fv.padding(change(lengths)),
                score=fv.bias(leaves[3]) + fv.sinks(leaves[4]),
                query_start=change(starts),
                needs_lse=True,
            )
            result = on(kernel)(call)
            d_out = change(normal(*result.out.shape, dtype=dtype))
            found.append([result.out, result.lse, *torch.autograd.grad(result.out, leaves, d_out)])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True)), kernel


def test_more_than_two_to_the_31_entries() -> None:
    """Expanded: they need no memory, but every offset is beyond 32 bits' reach."""
    keys = 1 << 14
    base = normal(1, 1, keys, 8)
    k = base.expand(1, 1 << 15, keys, 8)[:, -2:]
    wide = torch.as_strided(normal(1 << 12), (1, 2, 3, 8), (0, 1 << 10, 8, 1))
    assert torch.equal(on()(problem(wide, k, k)).out, on()(problem(wide.clone(), base, base)).out)
    huge = normal(1).expand(1, 1, 1 << 32, 1)  # a length of more than 32 bits, of which a window sees a little
    found = on()(problem(normal(1, 1, 1, 1), huge, huge, fv.causal & fv.window(100)))
    torch.testing.assert_close(found.out.flatten(), normal(1))
    torch.testing.assert_close(found.lse.exp(), 100 * (normal(1) * normal(1)).exp().expand(1, 1, 1))


@pytest.mark.parametrize("limit", [2**33, 2**61, 2**62, 2**63 - 1, 2**63, 2**70])
def test_a_wide_window_hides_nothing(limit: int) -> None:
    q, k = normal(1, 2, 70, 8), normal(1, 2, 90, 8, seed=1)
    for window in (fv.window(left=limit), fv.window(right=limit), fv.window(left=limit, right=limit)):
        for start in (None, 0, -(2**31), 2**32):
            found, true = (
                on()(problem(q, k, k, pattern & fv.padding(torch.tensor([81])), query_start=start)).out
                for pattern in (window, fv.window(100 + abs(start or 0)))
            )
            assert torch.equal(found, true)


@pytest.mark.parametrize("start", [2**61 + 1, -(2**61) - 1, 2**63, 2**64])
def test_a_position_outside_64_bits_is_refused(start: int) -> None:
    q = normal(1, 2, 5, 8)
    with pytest.raises(InvalidInput, match="wanted a position between"):
        problem(q, q, q, fv.causal, query_start=start)


def test_long_rows_stay_exact() -> None:
    """65,537 keys, forward and backward: a sum rounded once for every key would lose five digits."""
    q, k = normal(1, 1, 20, 16), normal(1, 1, 65_537, 16, seed=1)
    v = normal(1, 1, 65_537, 4, seed=2).abs()
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    true = derived(reference.run(problem(*wide, needs_lse=True)), wide)
    for kernel in KERNELS:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        found = derived(on(kernel)(problem(*leaves, needs_lse=True)), leaves)
        assert ((found[0] - true[0]) / true[0]).abs().max() < 1e-6, kernel
        for mine, exact in zip(found[1:], true[1:], strict=True):
            assert (mine - exact).abs().max() < 4e-6 * exact.abs().max(), kernel


def _soak(turns: int) -> int:
    """Bytes of growth over so many forward and backward calls, after as many warm ones as matter."""
    sizes = [(1, 300), (70, 90), (130, 65), (33, 193)]
    settled = 0
    for turn in range(turns + 200):
        if turn == 200:
            gc.collect()
            settled = resident()
        queries, keys = sizes[turn % len(sizes)]
        leaves = [normal(1, 4, n, 16, seed=1).requires_grad_() for n in (queries, keys, keys)]
        sinks = normal(4).requires_grad_()
        pattern = (fv.causal, fv.window(9, step=2))[turn % 2]
        result = on("", 2)(problem(*leaves, pattern, score=fv.sinks(sinks), dropout=0.1, seed=turn))
        result.out.sum().backward()
        with torch.no_grad():
            native.looked(problem(*leaves, pattern), 3)
    gc.collect()
    return resident() - settled


@linux
def test_memory_does_not_grow() -> None:
    assert _soak(1_000) < 4 << 20


@linux
@pytest.mark.slow
def test_memory_does_not_grow_in_twenty_thousand_calls() -> None:
    assert _soak(20_000) < 4 << 20


SCRIPT = """
import sys, threading, torch
import foveate as fv
from foveate.softmax import native
from foveate.problem import problem, Result
torch.set_num_threads(2)
backward = sys.argv[1] == "backward"
leaves = [torch.randn(1, 8, 32768, 64).requires_grad_(backward) for _ in range(3)]
small = [x[:, :, :2048].detach().requires_grad_(backward) for x in leaves]
def attend(leaves):
    out = native.run(problem(*leaves, fv.causal & fv.window(1024))).out
    return torch.autograd.grad(out, leaves, torch.ones(1).expand_as(out)) if backward else out
attend(small)
def most():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
before = most()
result = attend(leaves)
print(most() - before)
"""


@linux
@pytest.mark.parametrize("what", ["forward", "backward"])
def test_a_long_window_needs_little_beside_its_tensors(what: str) -> None:
    """32,768 tokens: results (backward: out, a copy of its gradient, three gradients), lse, and 64 MB at most."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, what], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    tensor, lse = 8 * 32_768 * 64 * 4, 8 * 32_768 * 4
    results = tensor + lse if what == "forward" else 5 * tensor + 2 * lse
    assert int(done.stdout) <= results + (64 << 20)
