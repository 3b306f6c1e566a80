"""Which implementation runs is the first that can; a named one runs or says everything that is against it."""

import subprocess
import sys
import threading

import pytest
import torch

import foveate as fv
from foveate.dispatch.choose import NAMES, implementation, observe


def _qkv(heads: int = 4, key_heads: int = 2, queries: int = 5, keys: int = 7, dim: int = 8, **more: object) -> list:
    return [torch.randn(2, h, n, dim, **more) for h, n in ((heads, queries), (key_heads, keys), (key_heads, keys))]


def test_every_implementation_has_the_two_functions() -> None:
    for name in NAMES:
        module = implementation(name)
        assert callable(module.refuses)
        assert callable(module.run)


def test_auto_takes_the_fused_kernel_where_it_means_the_same() -> None:
    assert fv.explain(*_qkv()).chosen == "sdpa"
    assert fv.explain(*_qkv(queries=7), fv.causal).chosen == "sdpa"
    assert fv.explain(*_qkv(), fv.causal, query_start=0).chosen == "sdpa"
    assert fv.explain(*_qkv(queries=1), fv.causal).chosen == "sdpa"
    assert fv.explain(*_qkv(), fv.padding(torch.tensor([3, 7]))).chosen == "sdpa"


def test_auto_takes_the_compiled_kernels_where_it_does_not() -> None:
    assert fv.explain(*_qkv(), fv.causal).chosen == "native"
    assert fv.explain(*_qkv(), fv.window(3)).chosen == "native"
    assert fv.explain(*_qkv(), score=fv.sinks(torch.zeros(4)) + fv.softcap(3)).chosen == "native"
    assert fv.explain(*_qkv(), with_lse=True).chosen == "native"
    assert fv.explain(*_qkv(), dropout=0.1).chosen == "native"
    assert fv.explain(*_qkv(requires_grad=True), fv.window(3)).chosen == "native"


def test_auto_goes_chunked_where_nothing_else_can() -> None:
    assert fv.explain(*_qkv(dtype=torch.float64), dropout=0.1).chosen == "chunked"
    assert fv.explain(*_qkv(dtype=torch.float64), fv.window(3)).chosen == "chunked"


def test_without_compiled_kernels_everything_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.softmax import native

    monkeypatch.setattr(native, "_native", None)
    choice = fv.explain(*_qkv(), fv.window(3))
    assert choice.chosen == "chunked"
    assert "compiled kernels are missing" in choice.refusals["native"][0]


def test_auto_never_takes_what_compiles_or_holds_a_matrix_on_a_cpu() -> None:
    for pattern in (None, fv.causal, fv.window(3)):
        choice = fv.explain(*_qkv(), pattern)
        assert choice.chosen not in ("flex", "reference")
        assert "on a CPU it runs only by name" in choice.refusals["flex"][0]
        assert "holds n×n weights" in choice.refusals["reference"][0]


def test_the_fused_kernel_is_really_fused() -> None:
    """SDPA would take its n×n math fallback in silence; every problem that sdpa accepts must avoid it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cases = [
        (_qkv(), {}),
        (_qkv(queries=7), {"pattern": fv.causal}),
        (_qkv(), {"pattern": fv.padding(torch.tensor([3, 7]))}),
        (_qkv(), {"pattern": torch.rand(2, 1, 5, 7) > 0.5}),
        (_qkv(), {"score": torch.randn(2, 4, 5, 7)}),
        (_qkv(dtype=torch.float16), {}),
        (_qkv(dtype=torch.bfloat16), {"pattern": torch.rand(2, 4, 5, 7) > 0.5}),
        (_qkv(dtype=torch.float64), {}),
    ]
    for (q, k, v), more in cases:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):  # raises if none of them fits
            fv.attention(q, k, v, backend="sdpa", **more)


def test_a_named_backend_says_every_reason() -> None:
    q, k, v = _qkv()
    with pytest.raises(fv.Unsupported) as caught:
        fv.attention(q, k, v[..., :5], fv.window(3), score=fv.softcap(2), dropout=0.1, backend="sdpa")
    (reasons,) = caught.value.reasons.values()
    assert len(reasons) == 4
    for words in ("dropout", "head size 5", "softcap", "mask as large as"):
        assert any(words in reason for reason in reasons), words
    assert str(caught.value).startswith("sdpa: ")


def test_explain_prints_one_row_an_implementation() -> None:
    text = str(fv.explain(*_qkv(), fv.window(3)))
    assert [line.split()[0].strip("→") or line.split()[1] for line in text.splitlines()] == list(NAMES)
    assert "→ native" in text


def test_observers_are_told_in_their_own_context_alone() -> None:
    seen: list[object] = []
    end = observe(seen.append)
    fv.attention(*_qkv())
    other = threading.Thread(target=lambda: fv.attention(*_qkv()))
    other.start()
    other.join()
    end()
    fv.attention(*_qkv())
    assert len(seen) == 1


def test_a_public_name_is_never_a_submodules_name() -> None:
    import pkgutil

    modules = {module.name for module in pkgutil.iter_modules(fv.__path__)}
    assert not modules & set(fv.__all__)


def test_all_is_sorted_and_every_name_resolves() -> None:
    assert fv.__all__ == sorted(fv.__all__)
    for name in fv.__all__:
        assert getattr(fv, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'attend'"):
        _ = fv.attend


def test_import_alone_is_light() -> None:
    code = "import foveate, sys; print([m for m in ('torch', 'transformers', 'typer', 'rich') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_computing_loads_nothing_optional() -> None:
    code = (
        "import foveate as fv, torch, sys; q = torch.randn(1, 1, 3, 4);"
        "fv.attention(q, q, q, fv.causal & fv.window(2));"
        "heavy = ('transformers', 'triton', 'typer', 'rich', 'matplotlib');"
        "print([m for m in heavy if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_autocast_computes_in_its_dtype() -> None:
    q, k, v = _qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fv.attention(q, k, v, fv.window(3))
        assert out.dtype == torch.bfloat16
        _, lse = fv.attention_with_lse(q, k, v, score=torch.randn(5, 7))
        assert lse.dtype == torch.float32


@pytest.mark.parametrize("pattern", [None, fv.causal, fv.causal & fv.window(3), fv.bigbird(2)], ids=repr)
def test_meta_tensors_get_shapes(pattern: fv.Pattern | None) -> None:
    q, k, v = (x.to("meta").requires_grad_() for x in _qkv())
    out, lse = fv.attention_with_lse(q, k, v[..., :3], pattern)
    assert out.shape == (2, 4, 5, 3)
    assert lse.shape == (2, 4, 5)
    assert out.is_meta
    out.sum().backward()
    assert q.grad is not None


def test_the_batch_dimension_is_optional() -> None:
    q, k, v = (x[0] for x in _qkv())
    out, lse = fv.attention_with_lse(q, k, v, fv.causal)
    whole, whole_lse = fv.attention_with_lse(q[None], k[None], v[None], fv.causal)
    assert torch.equal(out, whole[0])
    assert torch.equal(lse, whole_lse[0])
    assert fv.weights(q, k, v, rows=[0]).shape == (4, 1, 7)


def test_decoding_in_float64_is_a_call_like_any_other() -> None:
    q, k = torch.randn(1, 4, 1, 512, dtype=torch.float64), torch.randn(1, 1, 4096, 512, dtype=torch.float64)
    assert fv.explain(q, k, k).chosen == "sdpa"


def test_autocast_leaves_float64_as_pytorch_does() -> None:
    q, k, v = _qkv(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fv.attention(q, k, v), fv.weights(q, k, v), fv.linear_attention(q, k, v, causal=False)[0]
    true = fv.attention(q, k, v), fv.weights(q, k, v), fv.linear_attention(q, k, v, causal=False)[0]
    for mine, theirs in zip(found, true, strict=True):
        assert torch.equal(mine, theirs)
