"""A wrong call of the linear family is refused in one sentence, before any work."""

import jaxtyping
import pytest
import torch
from test_bad_input import booleans, integers, refused

import foveate as fv
from foveate.linear import chunked, recurrence

B, HQ, HK, N, D, DV = 2, 6, 3, 5, 7, 11


@pytest.fixture(autouse=True)
def _as_a_user_calls_it(monkeypatch):
    """Without the type checker of the tests, which would be first; and every implementation fails if it is reached."""
    jaxtyping.config.update("jaxtyping_disable", True)
    for module in (recurrence, chunked):
        monkeypatch.setattr(module, "run", lambda *_: pytest.fail("work was done before the input was refused"))
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def q(*shape, **options):
    return torch.ones(shape or (B, HQ, N, D), **options)


def k(*shape, **options):
    return torch.ones(shape or (B, HK, N, D), **options)


def v(*shape, **options):
    return torch.ones(shape or (B, HK, N, DV), **options)


def state(*shape, z=None, **options):
    return fv.LinearState(torch.zeros(shape or (B, HK, D, DV), **options), z)


TENSORS = {
    "lengths of k and v": ((q(), k(), v(B, HK, N + 1, DV)), ["2×3×5×7", "2×3×6×11", "keys"]),
    "heads that do not divide": ((q(B, 5, N, D), k(), v()), ["2×5×5×7", "multiple"]),
    "more queries than keys": ((q(B, HQ, N + 1, D), k(), v()), ["q has 6", "k has 5", "causal=False", "state="]),
    "integers": ((q().long(), k().long(), v().long()), ["int64", "float32"]),
    "no tensors": ((q(), [1.0], v()), ["list", "tensors"]),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_do_not_fit(what):
    arguments, says = TENSORS[what]
    refused(fv.linear_attention, *arguments, says=says)


OPTIONS = {
    "decay above zero": ({"decay": torch.full((HK,), 0.9)}, ["decay", "0.9", "at most 0", ".log()"]),
    "decay of query heads": ({"decay": -torch.ones(HQ)}, ["decay", "float32 6", "[key heads] = [3]"]),
    "decay with the steps first": (
        {"decay": -torch.ones(B, N, HK)},
        ["2×5×3", "[batch, key heads, steps] = [2, 3, 5]"],
    ),
    "decay of another width": ({"decay": -torch.ones(B, HK, N, DV)}, ["2×3×5×11", "feature dim] = [2, 3, 5, 7]"]),
    "decay of two dimensions": ({"decay": -torch.ones(HK, D)}, ["decay", "3×7", "1 or 3 or 4"]),
    "decay of whole numbers": ({"decay": integers(HK)}, ["decay", "int64", "floating-point"]),
    "decay that is a number": ({"decay": -0.5}, ["decay", "float", "floating-point tensor"]),
    "decay elsewhere": ({"decay": -torch.ones(HK, device="meta")}, ["decay", "meta", "cpu", "move"]),
    "beta by channel": ({"beta": torch.ones(B, HK, N, D)}, ["beta", "2×3×5×7", "1 or 3"]),
    "beta of query heads": ({"beta": torch.ones(B, HQ, N)}, ["beta", "2×6×5", "[2, 3, 5]"]),
    "beta above two": ({"beta": torch.full((B, HK, N), 2.5), "delta_rule": True}, ["beta", "2.5", "0 to 2", "sigmoid"]),
    "beta below zero": ({"beta": torch.full((HK,), -0.1), "delta_rule": True}, ["beta", "-0.1", "0 to 2"]),
    "a feature that is no function": ({"feature": "elu"}, ["feature", "str", "function"]),
    "a feature that drops steps": ({"feature": lambda x: x[:, :, :2]}, ["feature", "2×6×2×7", "last dimension"]),
    "a feature that makes nothing": ({"feature": lambda x: None}, ["feature", "NoneType"]),
    "features of two widths": ({"feature": (torch.relu, fv.taylor)}, ["feature", "2×6×5×7", "2×3×5×57", "one last"]),
    "cosformer too short": ({"feature": fv.cosformer(4)}, ["cosformer(4)", "up to 5", "length"]),
    "favor of another dim": ({"feature": fv.favor(8)}, ["favor", "dim = 8", "2×6×5×7"]),
    "hedgehog of another dim": ({"feature": fv.hedgehog(torch.ones(8, 2))}, ["hedgehog", "8×2", "dim = 7"]),
    "hedgehog of other heads": ({"feature": fv.hedgehog(torch.ones(4, 7, 2))}, ["hedgehog", "4×7×2", "heads = 6"]),
    "scale": ({"scale": "1"}, ["scale", "'1'", "number"]),
    "ids of another length": ({"documents": integers(B, N + 1)}, ["documents", "6 steps", "wanted 5"]),
    "ids of another batch": ({"documents": integers(B + 1, N)}, ["documents", "3 batch rows", "2"]),
    "ids that are floats": ({"documents": torch.zeros(B, N)}, ["ids of documents", "float32"]),
    "ids elsewhere": ({"documents": integers(B, N).to("meta")}, ["documents", "meta", "cpu"]),
    "another pattern": ({"documents": fv.causal}, ["documents is causal", "cu_seqlens"]),
    "no pattern": ({"documents": 3}, ["documents is a int", "cu_seqlens"]),
    "documents for everyone": ({"documents": integers(B, N), "causal": False}, ["documents", "causal=True"]),
    "a bare tensor as state": ({"state": torch.zeros(B, HK, D, DV)}, ["state", "Tensor", "LinearState"]),
    "state of query heads": ({"state": state(B, HQ, D, DV)}, ["state.s", "2×6×7×11", "[2, 3, 7, 11]"]),
    "state turned round": ({"state": state(B, HK, DV, D)}, ["state.s", "2×3×11×7", "[2, 3, 7, 11]"]),
    "state without z": ({"state": state(), "normalize": True}, ["state has no z", "normalize=True"]),
    "state with z": ({"state": state(z=torch.zeros(B, HK, D))}, ["state has a z", "normalize=True"]),
    "z of another shape": (
        {"state": state(z=torch.zeros(B, HK, DV)), "normalize": True},
        ["state.z", "2×3×11", "[2, 3, 7]"],
    ),
    "state elsewhere": ({"state": state(device="meta")}, ["state.s", "meta", "cpu"]),
    "state of booleans": ({"state": fv.LinearState(booleans(B, HK, D, DV), None)}, ["state.s", "bool"]),
    "unknown backend": ({"backend": "chunkd"}, ["unknown backend 'chunkd'", "did you mean 'chunked'", "recurrence"]),
    "a backend of softmax": ({"backend": "sdpa"}, ["unknown backend 'sdpa'", "chunked", "recurrence"]),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options_that_do_not_fit(what):
    options, says = OPTIONS[what]
    refused(fv.linear_attention, q(), k(), v(), says=says, **options)


def test_a_negative_normaliser(monkeypatch):
    monkeypatch.undo()
    for backend in ("chunked", "recurrence"):
        refused(
            fv.linear_attention, q(), -k(), v(), normalize=True, backend=backend,
            says=["a normaliser is -", "never negative", "elu_plus_one"],
        )  # fmt: skip


def test_forms_that_do_not_fit():
    beta = torch.ones(B, HK, N)
    refused(fv.kimi_delta, q(), k(), v(), -beta, beta, says=["kimi_delta", "2×3×5", "4 dimensions"])
    refused(fv.retention, q(), k(), v(), -beta, says=["retention", "2×3×5", "[key heads]"])
    refused(fv.performer, q(), k(), v(), fv.taylor, says=["function", "favor(dim, features)"])


def test_features_that_cannot_be_made():
    refused(fv.favor, 0, says=["favor's dim is 0", "at least 1"])
    refused(fv.favor, 4, 0, says=["favor's features is 0", "at least 1"])
    refused(fv.cosformer, 0, says=["cosformer's length is 0"])
    refused(fv.cosformer, 4, start=-1, says=["cosformer's start is -1"])
    refused(fv.hedgehog, torch.zeros(3), says=["hedgehog's weight", "float32 3"])
