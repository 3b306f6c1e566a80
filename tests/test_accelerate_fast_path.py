"""The fast path of nn.MultiheadAttention and nn.TransformerEncoderLayer on our kernels, not off."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sdpa_calls import biased, hidden, made, only_hides, padded
from torch import Tensor, nn

import foveate as fv

pytestmark = [
    pytest.mark.usefixtures("_nothing_stays", "_ours"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]
WIDTH, HEADS, LENGTH = 24, 4, 67
FUTURE = nn.Transformer.generate_square_subsequent_mask(LENGTH)


def attention(dtype: torch.dtype = torch.float32) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval().to(dtype)


def layer(dtype: torch.dtype = torch.float32, **options: object) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True, **options).eval().to(dtype)  # type: ignore[arg-type]


def texts(*lengths: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.nested.nested_tensor([made(n, WIDTH, seed=n, dtype=dtype) for n in lengths])


def flat(found: object) -> Tensor:
    out = found[0] if isinstance(found, tuple) else found
    assert isinstance(out, Tensor)
    return out.values() if out.is_nested else out


def slow(run: Callable[[], object]) -> Tensor:
    """Without the fast path, as masks are documented."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return flat(run())
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def close(found: Tensor, truth: Tensor, budget: float = 1e-5) -> bool:
    return found.shape == truth.shape and bool((found - truth).abs().max() <= budget * truth.abs().max())


@pytest.mark.parametrize("lengths", [(41, 67), (7, 0, 53), (150, 131), (128, 128)], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nested_tensors_are_what_they_were(lengths: tuple[int, ...], mode: Callable[[], torch.no_grad]) -> None:
    x, mha, block = texts(*lengths), attention(), layer(norm_first=True)
    with mode():
        runs = (lambda: mha(x, x, x, need_weights=False), lambda: block(x), lambda: nn.Sequential(block, layer())(x))
        for run in runs:
            before = run()
            with fv.accelerate() as acceleration:
                during = run()
            kinds = [y[0] if isinstance(y, tuple) else y for y in (before, during)]
            assert all(y.is_nested for y in kinds)
            assert [y.shape for y in kinds[0].unbind()] == [y.shape for y in kinds[1].unbind()]
            assert close(flat(during), flat(before))
            assert acceleration.report().foveate
            assert not acceleration.report().pytorch


def test_a_nested_tensor_that_gives_weights_is_left_to_pytorch_and_told() -> None:
    x, mha = texts(41, 67), attention()
    with torch.no_grad():
        out, weights = mha(x, x, x)
        with fv.accelerate() as acceleration:
            found, given = mha(x, x, x)
    assert torch.equal(found.values(), out.values())
    assert torch.equal(given, weights)
    assert acceleration.report().pytorch == {("forward", "the weights are asked for"): 1}
    assert not acceleration.report().foveate


def test_few_short_texts_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x, mha = texts(4, 7), attention()
    with torch.no_grad(), fv.accelerate() as acceleration:
        mha(x, x, x, need_weights=False)
    assert list(acceleration.report().pytorch) == [("forward", "PyTorch's kernel is as fast or faster")]


def test_an_encoder_that_makes_nested_tensors_of_padding_writes_the_same_zeros() -> None:
    pad = ~padded(2, LENGTH)[:, 0, 0]
    pad[1] = False  # the longest text gives the length
    encoder = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=True).eval()
    x = made(2, LENGTH, WIDTH, seed=1)
    with torch.no_grad():
        before = encoder(x, src_key_padding_mask=pad)
        with fv.accelerate() as acceleration:
            during = encoder(x, src_key_padding_mask=pad)
    assert not before[pad].any()
    assert not during[pad].any()
    assert close(during, before)
    assert acceleration.report().foveate == {("forward", ""): 2}


MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "causal": {"src_mask": FUTURE},
    "bool, causal": {"src_mask": FUTURE != 0},
    "bool, of pairs": {"src_mask": ~hidden(LENGTH, LENGTH)},
    "bool, hides the corner": {"src_mask": ~hidden(LENGTH, LENGTH).index_fill(1, torch.tensor([LENGTH - 1]), False)},
    "bool, of pairs in heads": {"src_mask": ~hidden(2 * HEADS, LENGTH, LENGTH)},
    "bool, padding": {"src_key_padding_mask": ~padded(2, LENGTH)[:, 0, 0]},
    "bool, all padding": {"src_key_padding_mask": torch.tensor([[False], [True]]).expand(2, LENGTH)},
    "bool, both": {"src_mask": FUTURE != 0, "src_key_padding_mask": ~padded(2, LENGTH)[:, 0, 0]},
    "float, of pairs": {"src_mask": biased(hidden(LENGTH, LENGTH))},
    "float, causal but one": {"src_mask": FUTURE.index_put((torch.tensor(5), torch.tensor(3)), torch.tensor(0.5))},
    "float, of pairs in heads": {"src_mask": biased(hidden(2 * HEADS, LENGTH, LENGTH))},
    "float, padding": {"src_key_padding_mask": only_hides(padded(2, LENGTH)[:, 0, 0])},
    "float, added to keys": {"src_key_padding_mask": made(2, LENGTH, seed=8)},
    "float, both": {"src_mask": FUTURE, "src_key_padding_mask": made(2, LENGTH, seed=8)},
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_mean_what_they_are_documented_to_mean(name: str) -> None:
    """PyTorch's fast path hides all that a float mask does not leave at 0, and its rows that see nothing are NaN."""
    block, x, masks = layer(), made(2, LENGTH, WIDTH, seed=1), MASKS[name]
    with torch.no_grad():
        truth, theirs = slow(lambda: block(x, **masks)), block(x, **masks)
        with fv.accelerate() as acceleration:
            found = block(x, **masks)
    assert close(found, truth)
    assert acceleration.report().foveate == {("forward", ""): 1}
    assert not acceleration.report().pytorch
    if name.startswith(("none", "causal", "bool, causal", "bool, both", "bool, padding")):
        assert close(found, theirs)


@pytest.mark.parametrize("name", [name for name in MASKS if name.startswith(("none", "bool"))])
@pytest.mark.parametrize("needs", [True, False], ids=["weights", "no weights"])
def test_attention_with_masks_and_weights(name: str, needs: bool) -> None:
    mha, x = attention(), made(2, LENGTH, WIDTH, seed=1)
    masks = {key.replace("src_mask", "attn_mask").replace("src_", ""): mask for key, mask in MASKS[name].items()}

    def run() -> tuple[Tensor, Tensor | None]:
        out: tuple[Tensor, Tensor | None] = mha(x, x, x, need_weights=needs, **masks)
        return out

    with torch.no_grad():
        truth, theirs = slow(run), run()
        with fv.accelerate() as acceleration:
            found = run()
    if needs:
        assert torch.equal(found[0].nan_to_num(7), theirs[0].nan_to_num(7))
        assert found[1] is not None
        assert theirs[1] is not None
        assert torch.equal(found[1].nan_to_num(7), theirs[1].nan_to_num(7))
        assert acceleration.report().pytorch == {("forward", "the weights are asked for"): 1}
    else:
        assert found[1] is None
        assert close(found[0], truth)
        assert acceleration.report().foveate == {("forward", ""): 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """No further from float64 than PyTorch's, and what our kernels do not take goes to PyTorch's attention."""
    x, nested = made(2, LENGTH, WIDTH, seed=1, dtype=dtype), texts(150, 131, dtype=dtype)
    block, pad = layer(dtype), MASKS["bool, padding"]
    exact, runs = layer(dtype).double(), ((x, pad), (x, {}), (nested, {}))

    def wide(x: Tensor) -> Tensor:
        return torch.nested.nested_tensor([y.double() for y in x.unbind()]) if x.is_nested else x.double()

    with torch.no_grad():
        for given, masks in runs:
            truth, before = flat(exact(wide(given), **masks)), flat(block(given, **masks))
            with fv.accelerate() as acceleration:
                during = flat(block(given, **masks))
            assert (during - truth).abs().max() <= 1.5 * (before - truth).abs().max() + 1e-12
            assert bool(acceleration.report().foveate) == (dtype != torch.float64)


def test_autocast_makes_three_of_one() -> None:
    """On a CPU autocast leaves the fast path on, and casts query, key and value each."""
    block, mha, x, nested = layer(), attention(), made(2, LENGTH, WIDTH, seed=1), texts(41, 67)
    runs = (
        lambda: block(x),
        lambda: mha(x, x, x, need_weights=False),
        lambda: mha(nested, nested, nested, need_weights=False),
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for run in runs:
            before = flat(run())
            with fv.accelerate() as acceleration:
                during = flat(run())
            assert during.dtype == before.dtype == torch.bfloat16
            assert close(during, before, 2**-6)
            assert list(acceleration.report().foveate) == [("forward", "")]
            assert not acceleration.report().pytorch


def test_a_switch_that_the_program_makes_meanwhile_stays() -> None:
    mha, block, x = torch.backends.mha, layer(), made(2, LENGTH, WIDTH, seed=1)
    with torch.no_grad():
        for was in (False, True):
            mha.set_fastpath_enabled(was)
            with fv.accelerate() as outer:
                assert mha.get_fastpath_enabled() == was
                with fv.accelerate():
                    mha.set_fastpath_enabled(not was)
                    block(x)
                assert mha.get_fastpath_enabled() != was
                block(x)
            assert mha.get_fastpath_enabled() != was
            assert outer.report().foveate == {("forward", ""): 2}
            mha.set_fastpath_enabled(True)


def test_wrong_calls_raise_what_they_raised() -> None:
    block, mha = layer(), attention()
    x, short = made(2, LENGTH, WIDTH, seed=1), torch.zeros(3, 3, dtype=torch.bool)
    wrong: dict[str, Callable[[], object]] = {
        "width": lambda: block(made(2, LENGTH, WIDTH - 1, seed=1)),
        "pairs": lambda: block(x, src_mask=short),
        "padding": lambda: block(x, src_key_padding_mask=short),
        "dtype": lambda: mha(x.double(), x.double(), x.double(), need_weights=False),
        "nested, masked": lambda: block(texts(3, 3), src_mask=short),
    }
    with torch.no_grad():
        for name, run in wrong.items():
            with pytest.raises((RuntimeError, AssertionError)) as before:
                run()
            with fv.accelerate(), pytest.raises((RuntimeError, AssertionError)) as during:
                run()
            assert str(during.value) == str(before.value), name


def test_nothing_at_all_is_nothing() -> None:
    block, mha, none = layer(), attention(), made(2, 0, WIDTH, seed=1)
    with torch.no_grad(), fv.accelerate():
        assert mha(none, none, none, need_weights=False)[0].shape == none.shape
        assert not block(none).numel()


def test_graphs_of_the_fast_path_run_on_our_kernels() -> None:
    block, x = layer(), made(2, LENGTH, WIDTH, seed=1)
    compiled = torch.compile(block, backend="aot_eager")
    with torch.no_grad():
        truth = block(x)
        with fv.accelerate() as acceleration:
            assert close(compiled(x), truth)
        assert acceleration.report().foveate == {("forward", ""): 1}
        assert close(compiled(x), truth)


@pytest.mark.parametrize("kind", ["none", "pairs", "causal", "padding", "both"])
@pytest.mark.parametrize("same", [True, False], ids=["self", "cross"])
def test_the_operator_itself_takes_boolean_masks_and_other_keys(kind: str, same: bool) -> None:
    mha, (q, k, v) = attention(), (made(2, LENGTH, WIDTH, seed=n) for n in (1, 2, 3))
    pairs, pad = ~hidden(LENGTH, LENGTH).index_fill(1, torch.tensor([0]), True), ~padded(2, LENGTH)[:, 0, 0]
    mask, mask_type = {
        "none": (None, None),
        "pairs": (pairs, 0),
        "causal": (FUTURE != 0, 0),
        "padding": (pad, 1),
        "both": ((pairs | pad[:, None, None]).expand(2, HEADS, -1, -1), 2),
    }[kind]
    weights = mha.in_proj_weight, mha.in_proj_bias, mha.out_proj.weight, mha.out_proj.bias
    given = (q, q, q) if same else (q, k, v)
    with torch.no_grad():
        run = lambda: torch._native_multi_head_attention(*given, WIDTH, HEADS, *weights, mask, False, True, mask_type)  # noqa: E731
        truth = run()[0]
        with fv.accelerate() as acceleration:
            found = run()[0]
    seen = ~truth.isnan()  # a row that sees nothing
    assert close(found[seen], truth[seen])
    assert acceleration.report().foveate == {("forward", ""): 1}
