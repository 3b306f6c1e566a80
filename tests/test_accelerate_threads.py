"""`accelerate()` is one switch for all threads of a process, and for the children that it forks."""

from __future__ import annotations

import multiprocessing
import sys
import threading

import pytest
import torch
from sdpa_calls import SDPA, calls_go_to_us, made, prefer, qkv
from torch import Tensor

import foveate as fv
from foveate.integrations.torch import _STATE

pytestmark = pytest.mark.usefixtures("_nothing_stays")


def test_threads_share_it_and_their_calls_are_counted() -> None:
    q = made(1, 2, 512, 8, seed=1)
    want = SDPA(q, q, q, is_causal=True)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            with fv.accelerate():
                found = SDPA(q, q, q, is_causal=True)
            if not torch.allclose(found, want, atol=1e-5):
                wrong.append(number)

    with fv.accelerate() as acceleration:
        workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert wrong == []
    assert acceleration.report().foveate == {("forward", ""): 400}


def test_threads_that_begin_and_end_it_all_the_time() -> None:
    """Dispatch does not wait for a thread that is on its way into a kernel: with others alive, none is taken out."""
    q, leaf = made(1, 2, 512, 8, seed=1), made(1, 2, 16, 8, seed=2).requires_grad_()
    want = SDPA(q, q, q, is_causal=True)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            with fv.accelerate():
                found = SDPA(q, q, q, is_causal=True)
            again = SDPA(q, q, q, is_causal=True)
            SDPA(leaf, leaf, leaf).sum().backward()
            if not torch.allclose(found, want, atol=1e-5) or not torch.allclose(again, want, atol=1e-5):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_the_kernels_are_taken_out_by_the_last_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def entered() -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key("aten::scaled_dot_product_attention", "AutogradCPU")

    for count in (2, 1):
        monkeypatch.setattr(threading, "active_count", lambda count=count: count)
        with fv.accelerate() as acceleration:
            assert entered()
        assert entered() == (count > 1)
        assert not calls_go_to_us()
        assert not acceleration.report().foveate
    assert not entered()


@pytest.mark.usefixtures("_ours")
def test_kernels_that_had_to_stay_pass_every_call_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 2)

    def everything() -> list[Tensor]:
        q, k, v = (x.requires_grad_() for x in qkv())
        quick = SDPA(*(x.detach() for x in (q, k, v)), is_causal=True)
        return [quick, *torch.autograd.grad(SDPA(q, k, v, is_causal=True).square().sum(), (q, k, v))]

    before = everything()
    with fv.accelerate():
        during = everything()
    assert not any(map(torch.equal, before, during))  # other roundings tell whose they are
    assert all(map(torch.equal, before, everything()))


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "theirs"])
def test_other_threads_run_meanwhile(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels give the interpreter free, and so does what is handed on to PyTorch, as its own call does."""
    prefer(monkeypatch, ours=ours)
    big = made(1, 8, 1024, 64, seed=1).bfloat16()
    for leaf in (big, big.clone().requires_grad_()):
        turns, stop = 0, threading.Event()

        def work(leaf: Tensor = leaf, stop: threading.Event = stop) -> None:
            for _ in range(5):
                SDPA(leaf, big, big)
            stop.set()

        with fv.accelerate():
            worker = threading.Thread(target=work)
            worker.start()
            while not stop.wait(0.0005):
                turns += 1
            worker.join()
        assert turns > 5


def _child() -> None:
    raise SystemExit(0 if calls_go_to_us() else 1)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_is_accelerated_too() -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with _STATE.lock:
            held.set()
            done.wait(120)

    with fv.accelerate():
        holder = threading.Thread(target=hold)  # the lock is another thread's while the child is made
        holder.start()
        held.wait(120)
        child = multiprocessing.get_context("fork").Process(target=_child)
        child.start()
        child.join(60)
        child.kill()
        done.set()
        holder.join()
    assert child.exitcode == 0
