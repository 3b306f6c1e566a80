"""What a stranger writes, who knows other libraries: one sentence says what to write here instead."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable

import jaxtyping
import pytest
import torch
from test_bad_input import HK, NK, NQ, B, D, k, q, v
from torch import nn

import foveate as fv
from foveate import words


@pytest.fixture(autouse=True)
def _as_a_user_calls_it():
    """Without the type checker of the tests, which would be first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def said(function: Callable[..., object], /, *arguments: object, **options: object) -> str:
    """The one sentence with which a call is refused; Python's own TypeError is what programs look for, so it is one."""
    with pytest.raises(fv.InvalidInput) as caught:
        function(*arguments, **options)
    assert isinstance(caught.value, TypeError)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 500
    return sentence


ATTENTION = {
    "is_causal": "write pattern=fv.causal, and query_start=0", "causal": "write pattern=fv.causal",
    "attn_mask": "write pattern= for a boolean mask", "mask": "write pattern= for a boolean mask",
    "attention_mask": "pattern=fv.padding(attention_mask)", "key_padding_mask": "pattern=fv.padding(~mask)",
    "attn_bias": "write score=", "enable_gqa": "leave it out: query heads may be any multiple of the key heads",
    "window_size": "pattern=fv.window(w)", "sliding_window": "fv.causal & fv.window(w)",
    "softmax_scale": "write scale=", "alibi_slopes": "score=fv.alibi(slopes)", "softcap": "score=fv.softcap(cap)",
    "s_aux": "score=fv.sinks(logits)", "block_mask": "fv.rule(function)", "score_mod": "fv.relative_bias",
    "cu_seqlens_q": "pattern=fv.documents(cu_seqlens=offsets)", "max_seqlen_k": "leave it out",
    "position_ids": "write query_start=", "cache_seqlens": "pattern=fv.padding(lengths)",
    "query": "write q=", "key": "write k=", "value": "write v=", "scal": "did you mean scale=?",
    "start": "did you mean query_start=?", "telepathy": "it takes q, k, v, pattern, score, scale",
}  # fmt: skip
SOFTMAX = (fv.attention, fv.attention_with_lse, fv.weights, fv.explain)


@pytest.mark.parametrize("word", ATTENTION)
def test_a_keyword_of_others_is_answered_with_ours(word: str) -> None:
    for function in SOFTMAX:
        sentence = said(function, q(), k(), v(), **{word: None})
        assert sentence.startswith(f"{function.__name__} was given {word}=: ")
        assert ATTENTION[word] in sentence


def test_dropout_is_called_dropout_where_there_is_any() -> None:
    assert "dropout_p=: write dropout=" in said(fv.attention, q(), k(), v(), dropout_p=0.1)
    assert "dropout_p=: leave it out" in said(fv.weights, q(), k(), v(), dropout_p=0.1)


def test_every_word_is_answered_at_once_and_a_right_one_is_not_named() -> None:
    sentence = said(fv.attention, q(), k(), v(), attn_mask=None, dropout_p=0.1, is_causal=True, scale=1.0)
    assert all(f"{word}=: " in sentence for word in ("attn_mask", "dropout_p", "is_causal"))
    assert "scale" not in sentence


LINEAR = {
    "is_causal": "write causal=", "mask": "knows no mask but causal= and documents=",
    "attention_mask": "documents=attention_mask - 1", "cu_seqlens": "documents=fv.documents(cu_seqlens=offsets)",
    "g": "write decay=, natural logarithms", "initial_state": "write state=", "output_final_state": "always returned",
    "head_first": "[batch, heads, length, dim]", "normalise": "did you mean normalize=?",
}  # fmt: skip


@pytest.mark.parametrize("word", LINEAR)
def test_linear_attention_answers_in_its_own_words(word: str) -> None:
    x = q(B, HK, NK, D)
    for function in (fv.linear_attention, fv.elu_linear, fv.retention):
        assert LINEAR[word] in said(function, x, x, x, **{word: None})
    assert "write decay=" in said(fv.gated_delta, x, x, x, g=None, beta=None)  # the call of flash-linear-attention


FUNCTIONS = {
    "paged": (lambda **w: fv.paged_attention(q(), k(), v(), None, None, **w), "block_table", "write table="),
    "pages": (lambda **w: fv.paged_attention(q(), k(), v(), None, None, **w), "seq_lens", "write lengths="),
    "window": (fv.window, "window_size", "fv.window(left=l, right=r)"),
    "padding": (fv.padding, "attention_mask", "fv.padding(attention_mask)"),
    "documents": (fv.documents, "document_ids", "write ids="),
    "alibi": (fv.alibi, "num_heads", "fv.alibi_slopes(heads)"),
    "chunks": (fv.chunks, "chunk_size", "did you mean size=?"),
    "rule": (fv.rule, "mask_mod", "fv.rule(mask_mod)"),
    "rope": (lambda **w: fv.rope(q(), None, **w), "position_ids", "write positions="),
    "top-k": (lambda **w: fv.selection.topk(q(), k(), **w), "mask", "write pattern="),
    "entmax": (fv.entmax, "dim", "it takes alpha"),
    "favor": (fv.favor, "d_model", "write dim="),
    "YaRN": (fv.rotary.YaRN, "scale_factor", "did you mean factor=?"),
    "accelerate": (fv.accelerate, "causal", "it takes nothing"),
    "patch": (lambda **w: fv.patch(nn.Identity(), **w), "is_causal", "write pattern=fv.causal"),
    "register": (fv.register, "name", "it takes nothing"),
    "watch": (fv.watch, "output_attentions", "fv.weights"),
    "load": (lambda **w: fv.from_pretrained("x", **w), "torch_dtype", "write dtype="),
    "layer": (lambda **w: fv.nn.MultiHeadAttention(12, 3, **w), "is_causal", "the call of the layer, write pattern="),
    "sizes": (fv.nn.MultiHeadAttention, "embed_dim", "write dim="),
    "layout": (lambda **w: fv.nn.SelfAttention(12, 3, **w), "batch_first", "tensors are [batch, length, dim]"),
    "call": (lambda **w: SELF(X, **w), "attn_mask", "fv.nn.torch_masks(attn_mask)"),
    "causal call": (lambda **w: SELF(X, **w), "is_causal", "call of SelfAttention was given is_causal=: write"),
    "weights": (lambda **w: SELF(X, **w), "need_weights", "fv.weights"),
    "encoder": (lambda **w: fv.nn.Encoder([])(X, **w), "src_key_padding_mask", "fv.padding(~mask)"),
    "transformer": (lambda **w: fv.nn.Transformer(None, None)(X, X, **w), "tgt_mask", "target_pattern="),
    "linear layer": (lambda **w: fv.nn.LinearAttention(12, 3, **w), "is_causal", "write causal="),
}  # fmt: skip
SELF, X = fv.nn.SelfAttention(12, 3), torch.zeros(1, 5, 12)


@pytest.mark.parametrize("what", FUNCTIONS)
def test_every_public_function_and_layer_answers(what: str) -> None:
    function, word, answer = FUNCTIONS[what]
    assert answer in said(function, **{word: 1})


def test_no_layer_and_no_function_answers_as_python_does() -> None:
    """All of them: an unknown word is refused by us, with what there is instead."""
    layers = [getattr(fv.nn, name) for name in fv.nn.__all__]
    layers = [layer for layer in layers if isinstance(layer, type) and issubclass(layer, nn.Module)]
    assert len(layers) > 30
    functions = [getattr(fv, name) for name in fv.__all__ if inspect.isfunction(getattr(fv, name))]
    functions += [getattr(fv.selection, name) for name in fv.selection.__all__]
    assert len(functions) > 60
    plain = {"elu_plus_one", "taylor"}  # features, which are called with one tensor by the call that they are given to
    for made in [*layers, *(one for one in functions if one.__name__ not in plain)]:
        takes = inspect.signature(made).parameters.values()
        if any(one.kind is one.VAR_KEYWORD for one in takes):
            continue  # handed on to linear_attention
        needed = {one.name: q() for one in takes if one.default is one.empty}
        assert "telepathy=: it takes" in said(made, **needed, telepathy=1), made


def test_more_by_position_than_there_are_is_answered_too() -> None:
    assert "it takes nothing" in said(fv.accelerate, nn.Identity())
    assert "it takes size, left, right, step" in said(fv.window, 3, 4)


def test_signatures_stay_true_and_nothing_is_wrapped_around_a_call() -> None:
    """In a process of its own, where the tests' type checker wraps nothing either."""
    script = """
import inspect, foveate as fv
for name in ("attention", "linear_attention", "paged_attention", "weights"):
    function = getattr(fv, name)
    assert not hasattr(function, "__wrapped__"), name
    assert function.__code__.co_filename.endswith(f"{function.__module__.rpartition('.')[2]}.py"), name
    shown = inspect.signature(function)
    assert "others" not in shown.parameters
    assert all(one.default is one.empty for one in list(shown.parameters.values())[:3]), shown
print(list(inspect.signature(fv.attention).parameters))
print(list(inspect.signature(fv.nn.SelfAttention(12, 3).forward).parameters))
print(inspect.signature(fv.causal))
try:
    fv.attention(query=1, key=2, value=3)
except fv.InvalidInput as error:
    print(error)
try:
    fv.attention(fv, fv)
except fv.InvalidInput as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.splitlines() == [
        "['q', 'k', 'v', 'pattern', 'score', 'scale', 'query_start', 'normalizer', 'dropout', 'seed', 'backend']",
        "['x', 'pattern', 'score', 'positions', 'cache']",
        "(batch: 'Tensor', head: 'Tensor', query: 'Tensor', key: 'Tensor') -> 'Tensor'",
        "attention was given query=: write q=; key=: write k=; value=: write v=",
        "q, k, v are module, module, nothing: wanted three tensors",
    ]


def test_the_table_names_parameters_that_exist() -> None:
    """A row that no function could give would be a mistake in the table."""
    known: set[str] = set()
    for room in (fv, fv.nn, fv.selection):
        for name in room.__all__:
            for made in (getattr(room, name), getattr(getattr(room, name), "forward", None)):
                if inspect.isfunction(made) or isinstance(made, type):
                    known |= set(_parameters(made))
    for word, answers in words.FOREIGN.items():
        assert all(set(needed.split()) <= known for needed in answers), word


def _parameters(made: Callable[..., object]) -> list[str]:
    try:
        return list(inspect.signature(made).parameters)
    except ValueError:  # the exceptions
        return []


def test_a_value_is_not_called_as_if_it_made_one() -> None:
    for value in (fv.causal, fv.window(3), fv.sparsemax, fv.softmax_plus_one, fv.hardmax, fv.sigmoid):
        with pytest.raises(fv.InvalidInput, match=r"was called as if it made one: write it without"):
            value()  # type: ignore[call-arg]
    rows = torch.arange(NQ)
    assert fv.causal(rows, rows, rows, rows).all()  # as FlexAttention calls it


def test_operators_answer_from_either_side() -> None:
    mask = torch.ones(NQ, NK, dtype=torch.bool)
    others = {"causal": "fv.causal", True: "fv.causal", mask: "from_mask", 3: "fv.window(3)", None: "NoneType"}
    for other, answer in [*others.items(), (mask.numpy(), "from_mask")]:
        for combine in (lambda a, b: a & b, lambda a, b: b & a, lambda a, b: a | b, lambda a, b: b | a):
            with pytest.raises(fv.InvalidInput, match="was combined with") as caught:
                combine(fv.causal, other)
            assert answer in str(caught.value)


NAMES = {
    "atention": "fv.attention", "MultiHeadAttention": "fv.nn.MultiHeadAttention", "Causal": "fv.causal",
    "MultiheadAttention": "fv.nn.MultiHeadAttention", "linear_atention": "fv.linear_attention",
    "scaled_dot_product_attention": "fv.attention", "flash_attn_varlen_func": "fv.documents(cu_seqlens=offsets)",
    "sliding_window": "fv.causal & fv.window(w)", "create_block_mask": "fv.causal & fv.window(128)",
    "top_k": "fv.selection.topk", "YaRN": "fv.rotary.YaRN", "GPT2": "fv.models.gpt2", "moba": "fv.selection.moba",
    "DynamicCache": "fv.KeyValueCache", "TransformerEncoderLayer": "fv.nn.Block",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_does_not_exist_is_answered_with_one_that_does(name: str) -> None:
    with pytest.raises(AttributeError, match="did you mean") as caught:
        getattr(fv, name)
    assert NAMES[name] in str(caught.value)


@pytest.mark.parametrize(
    ("room", "name", "meant"),
    [("nn", "MultiheadAttention", "fv.nn.MultiHeadAttention"), ("nn", "causal", "fv.causal"),
     ("nn", "TransformerEncoder", "fv.nn.Encoder"), ("selection", "top_k", "fv.selection.topk"),
     ("rotary", "Yarn", "fv.rotary.YaRN"), ("models", "LLaMA", "fv.models.llama")],
)  # fmt: skip
def test_the_rooms_answer_too(room: str, name: str, meant: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'foveate.{room}' has no attribute {name!r}") as caught:
        getattr(getattr(fv, room), name)
    assert f"did you mean {meant}?" in str(caught.value)


def test_a_name_like_no_other_is_only_missing() -> None:
    for room in (fv, fv.nn, fv.selection, fv.rotary, fv.models):
        with pytest.raises(AttributeError) as caught:
            room.quux  # noqa: B018
        assert str(caught.value).endswith("has no attribute 'quux'")
    assert not hasattr(fv, "__wrapped__")


def test_python_adds_no_second_likeness_and_asking_loads_nothing() -> None:
    look = "import sys, foveate\nassert not hasattr(foveate, 'atention')\nassert 'torch' not in sys.modules\n"
    ran = subprocess.run(
        [sys.executable, "-c", f"{look}foveate.atention"], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.stderr.splitlines()[-1].endswith("has no attribute 'atention': did you mean fv.attention?")
