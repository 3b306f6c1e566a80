"""Everything composed with everything: the same cases every time, and where there is time new ones."""

import time

import jaxtyping
import pytest
import torch
from fuzzing import check

FIRST, EACH = 0, 25


@pytest.mark.filterwarnings("ignore")  # PyTorch's tracer and batching warn of what is compared here
@pytest.mark.parametrize("part", range(4))
def test_the_cases_of_every_day(part: int) -> None:
    for seed in range(FIRST + part * EACH, FIRST + (part + 1) * EACH):
        check(seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(2))
def test_new_cases(part: int) -> None:
    """Two minutes each; what fails names its number, and `make fuzz SEED=…` runs it again."""
    jaxtyping.config.update("jaxtyping_disable", True)  # the tracer cannot follow these checks
    try:
        first = time.time_ns() // 1000 * 2 + part
        end, seed = time.monotonic() + 120, first
        while time.monotonic() < end:
            check(seed, compiles=True)
            seed += 2
        assert seed > first
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
        torch._dynamo.reset()
