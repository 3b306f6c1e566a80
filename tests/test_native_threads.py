"""The compiled kernels give the same bits on any number of threads, from any thread, and in any process."""

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernels import DTYPES, KERNELS, derived, normal, on, same_bits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import foveate as fv
from foveate import values
from foveate.pattern import block_mask_cache
from foveate.problem import Problem, problem
from foveate.softmax import native

forking = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
COUNTS = (1, 2, 3, 8, 2, 1)


def _leaves(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (2, 6, queries, 24), (2, 3, keys, 24), (2, 3, keys, 17), (1, 6, 1, keys), (6,), (9, 6)
    made = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    return [x.to(dtype if seed < 3 else torch.float32).requires_grad_() for seed, x in enumerate(made)]


def _call(leaves: list[Tensor], pattern: fv.Pattern | None, **more: object) -> Problem:
    q, k, v, bias, sinks, table = leaves
    score = fv.bias(bias) + fv.sinks(sinks) + fv.relative_bias(table)
    return problem(q, k, v, pattern, score=score, needs_lse=True, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", [None, fv.causal & fv.window(70), fv.bigbird(13, random=2)], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype, pattern: fv.Pattern | None) -> None:
    """Results and every gradient, in whatever order the tiles are done."""
    for kernel in KERNELS:
        first: list[Tensor] | None = None
        for threads in COUNTS:
            leaves = _leaves(331, 349, dtype)
            found = derived(on(kernel, threads)(_call(leaves, pattern, dropout=0.1, seed=3)), leaves)
            first = first or found
            assert same_bits(found, first), f"{kernel} on {threads}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_queries_give_the_same_bits(dtype: torch.dtype) -> None:
    for kernel in KERNELS:
        first: list[Tensor] | None = None
        for threads in COUNTS:
            leaves = _leaves(2, 5003, dtype)
            found = derived(on(kernel, threads)(_call(leaves, fv.causal)), leaves)
            first = first or found
            assert same_bits(found, first), f"{kernel} on {threads}"


def test_what_was_looked_at_has_the_same_bits() -> None:
    for kernel in KERNELS:
        with torch.no_grad():
            call = _call(_leaves(331, 349), fv.causal)
            first = native.looked(call, 7, kernel, 1)
            for threads in COUNTS:
                assert same_bits(list(native.looked(call, 7, kernel, threads)), list(first)), f"{kernel} on {threads}"


SHORT = """
import os, torch
import foveate as fv
torch.set_num_threads(2)
def threads():
    return len(os.listdir("/proc/self/task"))
def train(length):
    q, k, v = (torch.empty(1, 2, length, 16).fill_(0.1 * n).requires_grad_() for n in range(3))
    bias = torch.zeros(1, 2, 1, length).requires_grad_()
    for queries in (length, 1):
        out = fv.attention(q[:, :, :queries], k, v, fv.causal, score=fv.bias(bias), backend="native")
        torch.autograd.grad(out, (q, k, v, bias), torch.ones(1).expand_as(out))
alone = threads()
train(48)
few = threads()
train(700)
print(few - alone, threads() > few)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_short_call_wakes_no_thread_and_a_long_one_does() -> None:
    done = subprocess.run([sys.executable, "-c", SHORT], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "True"], done.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [65, 84, 97, 127])
def test_what_ran_before_changes_no_bit(keys: int, dtype: torch.dtype) -> None:
    """Scratch memory is kept from call to call, and here is full of NaN."""
    q, k, v = (normal(1, 2, n, 48, seed=n, dtype=dtype) for n in (100, keys, keys))
    spoiler = problem(*(torch.full((1, 2, 193, 48), torch.nan, dtype=dtype) for _ in range(3)))
    for kernel in KERNELS:
        found = []
        for clean in (True, False):
            on(kernel)(problem(torch.zeros_like(spoiler.q), *[torch.zeros_like(spoiler.k)] * 2) if clean else spoiler)
            result = on(kernel)(problem(q, k, v, needs_lse=True))
            found.append([result.out, result.lse])
        assert same_bits(*found), kernel


def _work(threads: int) -> list[Tensor]:
    leaves = _leaves(331, 349)
    return derived(on("", threads)(_call(leaves, fv.causal)), leaves)


def test_eight_threads_at_once() -> None:
    truth, wrong = _work(2), []

    def work(number: int) -> None:
        if not all(same_bits(_work(2 + number % 2), truth) for _ in range(5)):
            wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def _child(truth: list[Tensor]) -> None:
    raise SystemExit(0 if same_bits(_work(4), truth) else 1)


@forking
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_computes_too(method: str) -> None:
    truth = _work(4)  # the threads are running when the child is made
    child = multiprocessing.get_context(method).Process(target=_child, args=(truth,))
    child.start()
    child.join(120)
    assert child.exitcode == 0


class _Attended(Dataset[Tensor]):
    """Attention is part of how an example is made."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        q = normal(1, 4, 300, 16, seed=index)
        return fv.attention(q, q, q, fv.causal, backend="native")


@forking
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_loader_compute_too(method: str) -> None:
    data = _Attended()
    truth = [data[n] for n in range(6)]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=120)
    assert all(torch.equal(*pair) for pair in zip(loader, truth, strict=True))


@forking
def test_a_fork_while_another_thread_computes() -> None:
    """The child has neither the other thread nor the pool, and computes all the same."""
    stop = threading.Event()
    truth = _work(2)

    def busy() -> None:
        while not stop.is_set():
            _work(2)

    other = threading.Thread(target=busy)
    other.start()
    try:
        for _ in range(8):
            assert _forked(lambda: same_bits(_work(2), truth))
    finally:
        stop.set()
        other.join()


@forking
def test_a_fork_while_another_thread_holds_every_lock() -> None:
    """A pattern is read from text, summarized and remembered in the child, as if nothing had been held."""
    held, done = threading.Event(), threading.Event()
    locks = [values._PARSER, block_mask_cache._REMEMBERED.lock]

    def hold() -> None:
        with locks[0], locks[1]:
            held.set()
            done.wait(120)

    def attends() -> bool:
        q = normal(1, 1, 300, 16, seed=0)
        documents = fv.documents(torch.arange(300) // 70)  # not summarized before
        return bool(fv.attention(q, q, q, fv.causal & documents, backend="native").isfinite().all())

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(120)
    try:
        assert _forked(attends)
    finally:
        done.set()
        holder.join()


def _forked(holds: Callable[[], bool]) -> bool:
    """Whether it holds in a forked child, within a minute."""
    child = os.fork()
    if child == 0:
        os._exit(0 if holds() else 1)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        threading.Event().wait(0.1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False
