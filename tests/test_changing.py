"""What changes between two calls is noticed: nothing remembered is ever stale."""

import gc

import numpy as np
import pytest
import torch

import foveate as fv
from foveate.pattern.block_mask_cache import _REMEMBERED

Q = torch.randn(2, 4, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _same(pattern: fv.Pattern) -> bool:
    found = fv.attention(Q, Q, Q, pattern, backend="chunked")
    return torch.allclose(found, fv.attention(Q, Q, Q, pattern, backend="reference"))


def test_what_a_rule_closes_over_may_change() -> None:
    reach = {"keys": 2}
    pattern = fv.rule(lambda batch, head, query, key: key < reach["keys"])
    assert _same(pattern)
    reach["keys"] = 5
    assert _same(pattern)


def test_a_table_may_change_through_numpy() -> None:
    buffer = np.zeros((2, 8), dtype=np.int64)
    pattern = fv.documents(torch.from_numpy(buffer))
    assert _same(pattern)
    buffer[:, 4:] = 1
    assert _same(pattern)


def test_a_tables_data_may_be_replaced() -> None:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    pattern = fv.documents(ids)
    assert _same(pattern)
    ids.data = torch.arange(16).view(2, 8) // 3
    assert _same(pattern)
    ids.data[:, 4:] = 9
    assert _same(pattern)


def test_inference_tensors_may_change() -> None:
    with torch.inference_mode():
        ids = torch.zeros(2, 8, dtype=torch.int64)
        pattern = fv.documents(ids)
        assert _same(pattern)
        ids[:, 4:] = 1
        assert _same(pattern)


def test_equal_tables_share_a_summary_and_memory_is_bounded() -> None:
    first = fv.documents(torch.arange(64) // 7).summary(64, 64)
    assert fv.documents(torch.arange(64) // 7).summary(64, 64) is first
    for shift in range(80):
        fv.documents((torch.arange(2048) + shift) % 3).summary(2048, 2048)
    gc.collect()
    assert len(_REMEMBERED.entries) <= 32
    assert sum(entry.nbytes for entry in _REMEMBERED.entries) <= _REMEMBERED.nbytes


def test_a_watched_pattern_that_changed_is_noticed() -> None:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    bias = torch.randn(8, 8, requires_grad=True)
    with fv.watch() as seen:
        fv.attention(Q.float(), Q.float(), Q.float(), fv.documents(ids), score=bias)
    assert not seen.weights(0).requires_grad
    ids[:, 4:] = 1
    with pytest.raises(fv.FoveateError, match="overwritten after it ran"):
        seen.weights(0)


def test_explaining_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    fv.explain(Q, Q, Q, dropout=0.1)
    with pytest.raises(fv.Unsupported):
        fv.attention(Q, Q, Q, dropout=0.1, backend="sdpa")
    assert torch.equal(torch.get_rng_state(), before)


def test_forward_derivatives_and_vmap_are_right_or_a_clear_error() -> None:
    window = fv.causal & fv.window(3)

    def call(q: torch.Tensor, backend: str) -> torch.Tensor:
        return fv.attention(q, Q, Q, window, backend=backend)

    _, tangent = torch.func.jvp(lambda q: call(q, "reference"), (Q,), (torch.ones_like(Q),))
    step = 1e-6
    difference = (call(Q + step, "reference") - call(Q - step, "reference")) / (2 * step)
    torch.testing.assert_close(tangent, difference, atol=1e-6, rtol=1e-6)
    for backend in ("auto", "chunked"):
        with pytest.raises(fv.Unsupported, match="no vmap and no forward derivative"):
            torch.func.jvp(lambda q, name=backend: call(q, name), (Q,), (torch.ones_like(Q),))
        with pytest.raises(fv.Unsupported, match="no vmap and no forward derivative"):
            torch.func.grad(lambda q, name=backend: call(q, name).sum())(Q)


@pytest.mark.parametrize("keys", [1, 2, 7, 8, 15, 16, 17, 40])
@pytest.mark.parametrize("pattern", [None, fv.causal], ids=repr)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "native", "chunked", "reference"])
def test_a_nan_query_is_seen_in_its_row_among_any_number_of_keys(
    backend: str, pattern: fv.Pattern | None, keys: int
) -> None:
    q, k = torch.randn(1, 2, keys, 8), torch.randn(1, 2, keys, 8)
    truth = fv.attention(q, k, k, pattern, backend="reference")
    row = keys // 2
    q[:, :, row] = torch.nan
    found = fv.attention(q, k, k, pattern, backend=backend)
    assert found[:, :, row].isnan().all()
    others = torch.arange(keys) != row
    torch.testing.assert_close(found[:, :, others], truth[:, :, others], atol=1e-5, rtol=1e-5)
