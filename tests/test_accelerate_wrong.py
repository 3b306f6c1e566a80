"""What is wrong with a call is PyTorch's to say, under `accelerate()` too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sdpa_calls import SDPA, Call, hidden, qkv
from torch import Tensor

import foveate as fv

pytestmark = pytest.mark.usefixtures("_nothing_stays")


WRONG: dict[str, Callable[[], Call]] = {
    "a mask and causal": lambda: ((*qkv(), hidden(67, 131)), {"is_causal": True}),
    "a mask of integers": lambda: ((*qkv(), torch.ones(67, 131, dtype=torch.int64)), {}),
    "a float64 mask": lambda: ((*qkv(), torch.ones(67, 131, dtype=torch.float64)), {}),
    "a mask that does not fit": lambda: ((*qkv(), hidden(66, 131)), {}),
    "a mask of one dimension": lambda: ((*qkv(), hidden(1, 131)[0]), {}),
    "other dims": lambda: ((qkv()[0][..., :15], *qkv()[1:]), {}),
    "fewer values than keys": lambda: ((*qkv()[:2], qkv()[2][:, :, :130]), {}),
    "more values than keys": lambda: ((*qkv()[:2], qkv(keys=132)[2]), {}),
    "heads that are no multiple": lambda: (qkv(key_heads=4), {"enable_gqa": True}),
    "heads that are not said to be grouped": lambda: (qkv(key_heads=2), {}),
    "other dtypes": lambda: ((qkv()[0].half(), *qkv()[1:]), {}),
    "one dimension": lambda: (tuple(x[0, 0, 0] for x in qkv()), {}),
    "other leading dimensions": lambda: (
        tuple(x.unflatten(0, shape) for x, shape in zip(qkv(batch=6), [(3, 2), (2, 3), (2, 3)], strict=True)),
        {},
    ),
    "five dimensions, and a mask of all batches": lambda: (
        (*(x.unflatten(0, (3, 2)) for x in qkv(batch=6)), hidden(6, 6, 67, 131)),
        {},
    ),
    "other ranks": lambda: ((qkv()[0], qkv()[1][0], qkv()[2][0, 0]), {}),
    "other devices": lambda: ((qkv()[0], *(x.to("meta") for x in qkv()[1:])), {}),
    "dropout below 0": lambda: (qkv(), {"dropout_p": -0.5}),
    "dropout above 1": lambda: (qkv(), {"dropout_p": 1.5}),
    "no tensor": lambda: ((qkv()[0], None, qkv()[2]), {}),  # type: ignore[dict-item]
    "a complex number": lambda: (tuple(x.to(torch.complex64) for x in qkv()), {}),
}


def outcome(arguments: tuple[Tensor, ...], options: dict[str, object]) -> tuple[object, ...]:
    try:
        return (SDPA(*arguments, **options),)  # type: ignore[arg-type]
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.usefixtures("_ours")
def test_a_wrong_call_says_what_pytorch_says(name: str) -> None:
    torch.manual_seed(0)
    before = outcome(*WRONG[name]())
    with fv.accelerate():
        torch.manual_seed(0)
        during = outcome(*WRONG[name]())
    if isinstance(before[0], Tensor):  # PyTorch lets it pass
        assert (
            torch.equal(
                before[0],
                during[0],
            )
            or name == "more values than keys"
        )  # type: ignore[arg-type]
    else:
        assert during == before
