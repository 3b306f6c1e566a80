"""A wrong call is refused in one sentence that says what was given and what was wanted, before any work."""

import re

import jaxtyping
import pytest
import torch

import foveate as fv
from foveate import InvalidInput, Unsupported
from foveate.softmax import chunked, flex, reference, sdpa

B, HQ, HK, NQ, NK, D, DV = 2, 6, 3, 5, 7, 11, 13


@pytest.fixture(autouse=True)
def _as_a_user_calls_it(monkeypatch):
    """Without the type checker of the tests, which would be first; and every implementation fails if it is reached."""
    jaxtyping.config.update("jaxtyping_disable", True)
    for module in (reference, chunked, sdpa, flex):
        monkeypatch.setattr(module, "run", lambda *_: pytest.fail("work was done before the input was refused"))
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def q(*shape, **options):
    return torch.zeros(shape or (B, HQ, NQ, D), **options)


def k(*shape, **options):
    return torch.zeros(shape or (B, HK, NK, D), **options)


def v(*shape, **options):
    return torch.zeros(shape or (B, HK, NK, DV), **options)


def refused(function, *arguments, says, kind=InvalidInput, **options):
    """The call raises `kind` with one sentence that mentions every one of these words."""
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 400
    assert not re.search(r"\. [A-Z]", sentence), "more than one sentence"
    for word in says:
        assert word in sentence, f"{word!r} is not in: {sentence}"


def integers(*shape):
    return torch.zeros(shape, dtype=torch.long)


def booleans(*shape):
    return torch.ones(shape, dtype=torch.bool)


TENSORS = {
    "key lengths": ((q(), k(), v(B, HK, NK + 1, DV)), ["2×3×7×11", "2×3×8×13", "keys"]),
    "key heads": ((q(), k(), v(B, HK + 1, NK, DV)), ["2×3×7×11", "2×4×7×13", "heads"]),
    "heads that do not divide": ((q(B, 5, NQ, D), k(), v()), ["2×5×5×11", "multiple", "key heads"]),
    "fewer query heads than key heads": ((q(B, 1, NQ, D), k(), v()), ["2×1×5×11", "multiple"]),
    "no key heads": ((q(), k(B, 0, NK, D), v(B, 0, NK, DV)), ["2×0×7×11", "multiple"]),
    "batch sizes": ((q(1, HQ, NQ, D), k(), v()), ["1×6×5×11", "2×3×7×11", "batch"]),
    "head sizes": ((q(B, HQ, NQ, D + 1), k(), v()), ["2×6×5×12", "2×3×7×11", "head size"]),
    "mixed dtypes": ((q(), k(dtype=torch.float64), v()), ["float32", "float64", "one dtype"]),
    "mixed devices": ((q(), k(device="meta"), v()), ["cpu", "meta", "one device"]),
    "integer q": ((q().long(), k().long(), v().long()), ["int64", "float32", "bfloat16"]),
    "boolean q": ((q().bool(), k().bool(), v().bool()), ["bool", "float32"]),
    "complex q": ((q().cfloat(), k().cfloat(), v().cfloat()), ["complex64", "float32"]),
    "two-dimensional q": ((q(NQ, D), k(NK, D), v(NK, DV)), ["5×11", "[batch, heads, length, dim]"]),
    "five-dimensional q": ((q(1, B, HQ, NQ, D), k(1, B, HK, NK, D), v(1, B, HK, NK, DV)), ["1×2×6×5×11", "[batch"]),
    "batch on one only": ((q(HQ, NQ, D), k(), v()), ["6×5×11", "2×3×7×11", "[batch"]),
    "v of two dimensions": ((q(HQ, NQ, D), k(HK, NK, D), v(NK, DV)), ["7×13", "[batch"]),
    "no tensors": ((q(), [1.0], v()), ["list", "tensors"]),
    "nothing for v": ((q(HQ, NQ, D), k(HK, NK, D), None), ["NoneType", "tensors"]),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_do_not_fit(what):
    arguments, says = TENSORS[what]
    for function in (fv.attention, fv.attention_with_lse, fv.weights, fv.explain):
        refused(function, *arguments, says=says)


OPTIONS = {
    "dropout of one": ({"dropout": 1.0}, ["dropout is 1.0", "less than 1"]),
    "dropout below zero": ({"dropout": -0.1}, ["dropout is -0.1", "at least 0"]),
    "dropout that is no number": ({"dropout": float("nan")}, ["dropout is nan"]),
    "scale that is no number": ({"scale": float("nan")}, ["scale is nan", "finite number"]),
    "scale without end": ({"scale": -float("inf")}, ["scale is -inf", "finite number"]),
    "scale that is a string": ({"scale": "1"}, ["scale is '1'", "dim^-½"]),
    "scale that is a bool": ({"scale": True}, ["scale is True", "finite number"]),
    "scale that is a tensor": ({"scale": torch.tensor(0.5)}, ["float32 scalar", "multiply q"]),
    "dropout that is a bool": ({"dropout": False}, ["dropout is False", "at least 0"]),
    "dropout that is a tensor": ({"dropout": torch.tensor(0.5)}, ["float32 scalar", ".item()"]),
    "seed that is a bool": ({"dropout": 0.5, "seed": True}, ["seed is True", "64 bits"]),
    "start that is a float of nothing": ({"query_start": 0.0}, ["query_start is 0.0", "int"]),
    "backend that is a list": ({"backend": ["native"]}, ["unknown backend ['native']"]),
    "seed too large": ({"dropout": 0.5, "seed": 2**64}, ["seed", str(2**64)]),
    "unknown backend": ({"backend": "chunkd"}, ["unknown backend 'chunkd'", "did you mean 'chunked'", "reference"]),
    "no backend like it": ({"backend": "xyz"}, ["unknown backend 'xyz'", "sdpa", "flex"]),
    "start of floats": ({"query_start": torch.zeros(B)}, ["query_start", "float32", "integers"]),
    "start of another batch": ({"query_start": integers(B + 1)}, ["query_start", "[2]"]),
    "start with two dimensions": ({"query_start": integers(B, 1)}, ["query_start", "int64 2×1"]),
    "start that is a float": ({"query_start": 1.5}, ["query_start is 1.5", "int"]),
    "start that is a bool": ({"query_start": True}, ["query_start is True", "int"]),
    "start elsewhere": ({"query_start": integers(B).to("meta")}, ["query_start", "meta", "cpu"]),
    "score that is a number": ({"score": 3.0}, ["score", "float", "wanted"]),
    "score of booleans": ({"score": booleans(NQ, NK)}, ["boolean", "from_mask"]),
    "score of integers": ({"score": integers(NQ, NK)}, ["int64", "floating-point"]),
    "bias by batch or head": ({"score": torch.zeros(B, NQ, NK)}, ["2×5×7", "could mean"]),
    "bias of another length": ({"score": torch.zeros(NQ, NK + 1)}, ["5×8", "broadcast", "7"]),
    "bias elsewhere": ({"score": torch.zeros(NQ, NK, device="meta")}, ["meta", "cpu", "move"]),
    "slopes of other heads": ({"score": fv.alibi(torch.zeros(HQ - 1))}, ["alibi", "5", "[6]"]),
    "slopes of another batch": ({"score": fv.alibi(torch.zeros(B + 1, HQ))}, ["alibi", "3×6", "[2, 6]"]),
    "table of other heads": ({"score": fv.relative_bias(torch.zeros(3, HK))}, ["relative_bias", "3×3", "6 heads"]),
    "sinks of other heads": ({"score": fv.sinks(torch.zeros(HK))}, ["sinks", "3", "[6]"]),
}  # fmt: skip


@pytest.mark.parametrize("what", OPTIONS)
def test_options_that_do_not_fit(what):
    options, says = OPTIONS[what]
    refused(fv.attention, q(), k(), v(), says=says, **options)


MASKS = {
    "three dimensions that could be two things": (booleans(B, NQ, NK), ["2×5×7", "could mean", "mask[:, None]"]),
    "heads without a batch": (booleans(HQ, NQ, NK), ["6×5×7", "could mean", "mask[None]"]),
    "keys of another call": (booleans(NQ, NK + 2), ["5×9", "broadcast", "[2, 6, 5, 7]"]),
    "key heads": (booleans(B, HK, NQ, NK), ["2×3×5×7", "broadcast"]),
    "five dimensions": (booleans(1, 1, 1, NQ, NK), ["1×1×1×5×7", "4"]),
    "a float mask": (torch.zeros(NQ, NK), ["float32 5×7", "boolean", "score="]),
    "integers": (integers(NQ, NK), ["int64", "boolean"]),
    "keys by batch": (booleans(B, NK), ["2×7", "broadcast", "padding(mask)"]),
    "a mask of Hugging Face": (integers(B, NK), ["int64 2×7", "fv.padding(mask)", "boolean"]),
    "a string": ("causal", ["str", "pattern", "fv.causal"]),
    "a name that is near": ("sliding_window", ["pattern", "fv.window(w)"]),
    "yes": (True, ["True", "pattern", "fv.causal"]),
    "no": (False, ["False", "None"]),
    "a number": (3, ["int 3", "fv.window(3)"]),
    "a score": (fv.softcap(2.0), ["Score", "score="]),
    "a function": (lambda b, h, i, j: i >= j, ["function", "pattern", "fv.rule"]),
    "the maker": (fv.window, ["function", "pattern", "fv.window(…)"]),
    "a list of numbers": ([[1, 0], [1, 1]], ["int64 2×2", "boolean"]),
}


@pytest.mark.parametrize("what", MASKS)
def test_masks_that_do_not_fit(what):
    mask, says = MASKS[what]
    refused(fv.attention, q(), k(), v(), mask, says=says)


MISFITS = {
    "documents too short": (fv.documents(integers(B, NK - 1)), ["documents(<int64 2×6>)", "6", "7"]),
    "documents of another batch": (fv.documents(integers(B + 1, NK)), ["documents", "3 batch rows", "2"]),
    "query ids of another length": (fv.documents(integers(B, NK), integers(B, NK)), ["7 queries", "5"]),
    "key ids of another length": (fv.documents(integers(B, NQ), integers(B, NQ)), ["5 keys", "7"]),
    "padding of another batch": (fv.padding(integers(B + 1)), ["padding(<int64 3>)", "3", "batch is 2"]),
    "padding of another length": (fv.padding(booleans(B, NK + 1)), ["padding", "8 keys", "7"]),
    "prefix of another batch": (fv.prefix(integers(B + 1)), ["prefix", "3", "batch is 2"]),
    "global tokens too short": (fv.global_tokens(booleans(B, NK - 1)), ["global_tokens", "6", "7"]),
    "blocks too small": (fv.blocks(booleans(2, 2), 3), ["blocks", "too small", "3"]),
    "blocks of other heads": (fv.blocks(booleans(HK, 4, 4), 3), ["blocks", "6 heads"]),
    "offsets past the keys": (fv.documents(cu_seqlens=torch.tensor([0, NK + 1])), ["is 8", "at most the 7", "clamp"]),
    "lengths past the keys": (fv.padding(torch.tensor([NK, NK + 1])), ["a length of 8", "at most the 7", "clamp"]),
    "deep inside": (fv.causal & ~(fv.chunks(2) | fv.documents(integers(B, 1))), ["documents(<int64 2×1>)", "7"]),
    "inside blockwise": (fv.blockwise(fv.documents(integers(B, 2)), 2), ["documents(<int64 2×2>)", "4"]),
    "elsewhere": (fv.padding(integers(B).to("meta")), ["meta", "cpu", "move"]),
    "more than one": (fv.padding(integers(5)) & fv.documents(integers(4, NK)), ["padding", "documents"]),
}


@pytest.mark.parametrize("what", MISFITS)
def test_patterns_whose_tensors_do_not_fit(what):
    pattern, says = MISFITS[what]
    refused(fv.attention, q(), k(), v(), pattern, says=says)


def test_a_mask_of_as_many_texts_as_queries_could_mean_two_things():
    square = q(NQ, HQ, NQ, D), q(NQ, HK, NK, D), q(NQ, HK, NK, DV)
    says = ["5×7", "could mean [queries, keys] or [batch, keys]", "[None]", "[:, None, None]"]
    refused(fv.attention, *square, booleans(NQ, NK), says=[*says, "padding(mask)"])
    refused(fv.attention, *square, score=torch.zeros(NQ, NK), says=says)


def test_positions_past_the_ids_are_refused():
    refused(fv.attention, q(), k(), v(), fv.documents(integers(B, NK)), query_start=3, says=["7", "at least 8"])


INTS = {
    "window": (fv.window, 1), "window left": (lambda n: fv.window(left=n), 0),
    "step": (lambda n: fv.window(2, step=n), 1),
    "pooled": (fv.pooled, 1), "pooled stride": (lambda n: fv.pooled(2, n), 1),
    "chunks": (fv.chunks, 1), "prefix": (fv.prefix, 0), "random_blocks": (fv.random_blocks, 0),
    "random_blocks' block": (lambda n: fv.random_blocks(1, n), 1), "seed": (lambda n: fv.random_blocks(1, 2, n), 0),
    "blocks": (lambda n: fv.blocks(booleans(2, 2), n), 1), "blockwise": (lambda n: fv.blockwise(fv.causal, n), 1),
    "longformer": (fv.longformer, 0), "bigbird": (fv.bigbird, 1),
    "bigbird's window": (lambda n: fv.bigbird(window_blocks=n), 1),
    "streaming": (lambda n: fv.streaming(n, 2), 0), "streaming's window": (lambda n: fv.streaming(2, n), 1),
}  # fmt: skip


@pytest.mark.parametrize("what", INTS)
def test_numbers_that_are_no_sizes(what):
    make, least = INTS[what]
    for wrong in (least - 1, -7, True, 2.0, "3"):
        refused(make, wrong, says=[f"is {wrong!r}", f"at least {least}"])


MAKERS = {
    "float ids": (lambda: fv.documents(torch.zeros(B, NK)), ["float32 2×7", "integers"]),
    "ids of three dimensions": (lambda: fv.documents(integers(1, B, NK)), ["int64 1×2×7", "dimension"]),
    "ids of a list of lists of two lengths": (lambda: fv.documents([[0], [0, 1]]), ["[[0], [0, 1]]", "integers"]),
    "ids of floats": (lambda: fv.documents([0.0, 1.0]), ["float32 2", "integers"]),
    "ids of booleans and numbers": (lambda: fv.documents([True, 1]), ["[True, 1]", "integers"]),
    "ids of tensors": (lambda: fv.documents([torch.tensor(0)]), ["tensor(0)", "integers"]),
    "ids of a word": (lambda: fv.documents("abc"), ["str", "integers", "list"]),
    "offsets that fall": (lambda: fv.documents(cu_seqlens=torch.tensor([0, 5, 3])), ["falls from 5 to 3", "offsets 0"]),
    "lengths for offsets": (lambda: fv.documents(cu_seqlens=torch.tensor([2, 3, 5])), ["starts at 2", "cumsum"]),
    "offsets from below": (lambda: fv.documents(cu_seqlens=[-1, 3]), ["starts at -1", "wanted 0, len₁"]),
    "lengths below zero": (lambda: fv.padding(torch.tensor([3, -1])), ["a length of -1", "at least 0"]),
    "a mask of weights": (lambda: fv.padding(torch.tensor([[1, 2, 0]])), ["int64 1×3", "0 to 2", "lengths"]),
    "a float mask of padding": (lambda: fv.padding(torch.ones(1, 3)), ["float32 1×3", "integers 1 and 0", ".bool()"]),
    "one length": (lambda: fv.padding(3), ["int", "lengths [batch]"]),
    "a mask of integers": (lambda: fv.from_mask(integers(2, 2)), ["int64 2×2", "boolean", ".bool()"]),
    "no ids": (fv.documents, ["nothing", "cu_seqlens="]),
    "ids twice": (lambda: fv.documents(integers(NK), cu_seqlens=integers(3)), ["also", "one of them"]),
    "float offsets": (lambda: fv.documents(cu_seqlens=torch.zeros(3)), ["float32 3", "integers"]),
    "no offsets": (lambda: fv.documents(cu_seqlens=integers(0)), ["empty", "offsets"]),
    "float lengths": (lambda: fv.padding(torch.zeros(B)), ["float32 2", "integers"]),
    "keep without a batch": (lambda: fv.padding(booleans(NK)), ["bool 7", "[batch, keys]"]),
    "float prefix": (lambda: fv.prefix(torch.zeros(B)), ["float32 2", "integers"]),
    "one global token": (lambda: fv.global_tokens(0), ["global_tokens", "0", "wanted"]),
    "float global tokens": (lambda: fv.global_tokens([0.5]), ["[0.5]", "whole numbers"]),
    "global tokens of a mask": (lambda: fv.global_tokens([True, False]), ["True", "whole numbers"]),
    "float tensor of global tokens": (lambda: fv.global_tokens(torch.zeros(3)), ["float32 3", "integers"]),
    "global tokens without a batch": (lambda: fv.global_tokens(booleans(NK)), ["bool 7", "[batch, length]"]),
    "float blocks": (lambda: fv.blocks(torch.zeros(2, 2), 3), ["float32 2×2", "boolean"]),
    "float mask": (lambda: fv.from_mask(torch.zeros(2, 2)), ["float32 2×2", "boolean"]),
    "rule that is none": (lambda: fv.rule(3), ["int", "function"]),
    "rule that gives floats": (lambda: fv.rule(lambda b, h, i, j: i * 0.5).dense(2, 2), ["float32", "boolean"]),
    "no size": (fv.window, ["no size", "window(w)"]),
    "size and side": (lambda: fv.window(3, left=2), ["left", "window(w)"]),
    "pattern and tensor": (lambda: fv.causal & booleans(2, 2), ["causal", "Tensor", "from_mask"]),
    "pattern or number": (lambda: fv.causal | 3, ["causal", "int"]),
    "blockwise of a number": (lambda: fv.blockwise(3, 4), ["int", "pattern"]),
    "cap of zero": (lambda: fv.softcap(0.0), ["0.0", "positive"]),
    "cap below zero": (lambda: fv.softcap(-2), ["-2", "positive"]),
    "two caps": (lambda: fv.softcap(2) + fv.softcap(3), ["softcap(2.0)", "softcap(3.0)", "two soft-caps"]),
    "two sets of sinks": (lambda: fv.sinks(torch.zeros(2)) + fv.sinks(torch.ones(2)), ["two sets of sinks", "one"]),
    "score plus tensor": (lambda: fv.softcap(2) + torch.zeros(2), ["softcap(2.0)", "Tensor", "bias(tensor)"]),
    "integer slopes": (lambda: fv.alibi(integers(HQ)), ["alibi", "int64 6", "floating-point"]),
    "slopes of three dimensions": (lambda: fv.alibi(torch.zeros(1, 1, HQ)), ["alibi", "1×1×6", "dimension"]),
    "even table": (lambda: fv.relative_bias(torch.zeros(4, HQ)), ["4×6", "2m + 1"]),
    "far too near": (lambda: fv.relative_bias(torch.zeros(32, HQ), 8), ["8", "32"]),
    "boolean bias": (lambda: fv.bias(booleans(2, 2)), ["boolean", "pattern"]),
    "sinks of two dimensions": (lambda: fv.sinks(torch.zeros(1, HQ)), ["sinks", "1×6", "dimension"]),
    "nothing to merge": (lambda: fv.merge([]), ["no parts", "at least one"]),
    "parts of two shapes": (
        lambda: fv.merge([(torch.zeros(1, 2, 3, d), torch.zeros(1, 2, 3)) for d in (5, 7)]),
        ["1×2×3×5", "1×2×3×7"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MAKERS)
def test_patterns_and_scores_that_cannot_be_made(what):
    make, says = MAKERS[what]
    refused(make, says=says)


@pytest.mark.parametrize("rows", [[0.5], [True]], ids=str)
def test_rows_that_are_no_numbers(rows):
    refused(fv.weights, q(), k(), v(), rows=rows, says=["rows is", "whole numbers"])


def test_a_named_backend_gives_every_reason():
    arguments = q().double(), k().double(), v().double(), fv.causal & fv.window(2)
    options = {"score": fv.softcap(2.0) + fv.sinks(torch.zeros(HQ).double()), "dropout": 0.5}
    sdpa_says = ["sdpa: ", "random stream", "head size 13", "softcap", "sinks", "causal & window(2)"]
    refused(fv.attention, *arguments, **options, backend="sdpa", says=sdpa_says, kind=Unsupported)
    refused(
        fv.attention, *arguments, **options, backend="flex", says=["flex: ", "float64", "dropout"], kind=Unsupported
    )
    with pytest.raises(Unsupported) as caught:
        fv.attention_with_lse(*arguments, **options, backend="sdpa")
    assert len(caught.value.reasons["sdpa"]) >= 6
    assert isinstance(caught.value, fv.FoveateError)
    assert isinstance(caught.value, NotImplementedError)
    assert issubclass(InvalidInput, ValueError)
