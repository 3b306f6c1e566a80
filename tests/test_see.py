"""What is shown is what the model computed: reports against Hugging Face's eager weights, on the spot."""

import time
from pathlib import Path

import pytest
import torch
import transformers

import foveate as fv
from foveate.see.report import report
from foveate.see.text import Sentence, bundled_model, see_text

TEXT = "The animal didn't cross the street because it was too tired."


@pytest.fixture(scope="module")
def sentence() -> Sentence:
    return see_text(TEXT)


def _eager(text: str) -> list[torch.Tensor]:
    folder = bundled_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt"), output_attentions=True).attentions


def test_it_looks_at_animal(sentence: Sentence) -> None:
    (row,), (column,) = sentence.places("it"), sentence.places("animal")
    truth = _eager(TEXT)[3][0, 1, row]
    assert truth.argmax() == column
    assert float(truth[column]) == pytest.approx(0.68, abs=0.005)
    assert sentence.report.indices[3, 1, row, 0] == column
    torch.testing.assert_close(sentence.report.weights[3, 1, row, 0], truth[column], atol=1e-5, rtol=0)


def test_every_row_of_every_head_equals_eager(sentence: Sentence) -> None:
    shown = sentence.report
    for layer, truth in enumerate(_eager(TEXT)):
        top = truth[0].topk(shown.weights.shape[-1], -1)
        torch.testing.assert_close(shown.weights[layer], top.values, atol=1e-5, rtol=0)
        torch.testing.assert_close(shown.received[layer], truth[0].mean(1), atol=1e-5, rtol=0)
        torch.testing.assert_close(truth[0].gather(-1, shown.indices[layer]), top.values, atol=1e-5, rtol=0)


def test_what_is_not_shown_is_said() -> None:
    few = see_text(TEXT, k=3).report
    assert few.weights.shape[-1] == 3
    torch.testing.assert_close(few.rest() + few.weights.sum(-1), torch.ones_like(few.rest()))
    assert few.rest().max() > 0.3


def test_a_word_is_found_as_a_whole_word_first(sentence: Sentence) -> None:
    tokens = sentence.report.tokens
    assert [tokens[n] for n in sentence.places("it")] == ["it"]
    assert [tokens[n] for n in sentence.places("didn't")] == ["didn", "'", "t"]
    assert [tokens[n] for n in sentence.places("ANIMAL")] == ["animal"]
    with pytest.raises(fv.InvalidInput, match="'dog' is not in the text"):
        sentence.places("dog")


def test_a_word_of_several_tokens_means_the_same_in_the_terminal_on_the_page_and_in_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from foveate.commands import app

    given = []
    for place in ("foveate.see.page.render", "foveate.see.plots.picture"):
        monkeypatch.setattr(place, lambda report, *, token, path=None, **_: given.append(token) or "")
    outs = [f"--out={tmp_path / name}" for name in ("a.html", "a.png")]
    said = CliRunner().invoke(app, ["see", TEXT, "--from", "didn't", "--layer", "3", "--head", "1", *outs])
    assert "where “didn't”, mean of its 3 tokens, looks" in said.output
    assert given == [[3, 4, 5], [3, 4, 5]]


def test_where_a_word_looks_is_the_mean_of_its_rows(sentence: Sentence) -> None:
    rows = sentence.places("didn't")
    truth = _eager(TEXT)[3][0, 1, rows].mean(0)
    torch.testing.assert_close(sentence.report.looks(3, 1, rows), truth, atol=1e-5, rtol=0)


def test_five_hundred_tokens_in_seconds() -> None:
    start = time.perf_counter()
    shown = see_text("the animal crossed the street again and again " * 62).report
    assert 450 < len(shown.tokens) <= 512
    assert time.perf_counter() - start < 15


def test_a_decoder_folder_is_read_and_sees_no_future(tmp_path: Path) -> None:
    _save_decoder(tmp_path)
    shown = see_text("ab ba ab", str(tmp_path)).report
    rows = torch.arange(len(shown.tokens)).view(1, 1, -1, 1)
    assert (shown.indices <= rows)[shown.weights > 0].all()
    torch.testing.assert_close(shown.rest(), torch.zeros_like(shown.rest()), atol=1e-5, rtol=0)


def _save_decoder(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"ab": 0, "ba": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
        vocab_size=3, max_position_embeddings=8,
    )  # fmt: skip
    transformers.LlamaModel(config).save_pretrained(folder)


def test_bad_models_and_texts_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(fv.InvalidInput, match="does not exist"):
        see_text(TEXT, str(tmp_path / "nowhere"))
    with pytest.raises(fv.InvalidInput, match=r"has no config\.json"):
        see_text(TEXT, str(tmp_path))
    _save_decoder(tmp_path)
    with pytest.raises(fv.InvalidInput, match="has 9 tokens but the model takes 8"):
        see_text("ab " * 9, str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(fv.InvalidInput, match="has no weights"):
        see_text(TEXT, str(tmp_path))
    with pytest.raises(fv.InvalidInput, match="the text is empty"):
        see_text("  ")


def test_a_byte_level_token_is_shown_as_its_text() -> None:
    from foveate.see.text import _readable

    tokens, text = ["<s>", "caf", "Ã", "©", "Ġis", "</s>"], "café is"
    spans = [[0, 0], [0, 3], [3, 4], [3, 4], [4, 7], [0, 0]]
    assert _readable(tokens, spans, text) == ["<s>", "caf", "é", "·", " is", "</s>"]


def test_a_word_without_a_token_of_its_own_is_one_sentence(sentence: Sentence) -> None:
    with pytest.raises(fv.InvalidInput, match="no token stands for ' ' alone"):
        sentence.places(" ")


def test_text_that_is_no_utf8_is_one_sentence() -> None:
    with pytest.raises(fv.InvalidInput, match="not valid UTF-8"):
        see_text("caf\udce9")


def test_watching_leaves_the_model_as_it_was() -> None:
    model = transformers.BertModel(transformers.BertConfig(hidden_size=12, num_attention_heads=2, intermediate_size=8))
    model.set_attn_implementation("sdpa")
    ids = torch.arange(5)[None]
    truth = model.eval()(ids).last_hidden_state

    def watch_and_fail() -> None:
        with fv.watch(model) as seen:
            torch.testing.assert_close(model(ids).last_hidden_state, truth)
        assert len(seen) == 12
        with fv.watch(model):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        watch_and_fail()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).last_hidden_state, truth)


def test_nothing_watched_is_a_clear_error() -> None:
    with fv.watch() as seen:
        pass
    with pytest.raises(fv.FoveateError, match="nothing was watched"):
        seen.looked(0)


def test_an_overwritten_cache_is_noticed() -> None:
    q, cache = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4)
    with fv.watch() as seen:
        fv.attention(q, cache, cache)
    seen.weights(0)
    cache[0, 0, 0] = 7
    with pytest.raises(fv.FoveateError, match="overwritten after it ran"):
        seen.weights(0)


def test_a_report_wants_one_self_attention_a_layer() -> None:
    q = torch.randn(1, 2, 3, 4)
    with fv.watch() as seen:
        fv.attention(q, q, q)
        fv.attention(q[:, :, :1], q, q)
    with pytest.raises(fv.FoveateError, match="wanted one self-attention a layer over the 3 tokens"):
        report(seen, ["a", "b", "c"])


def test_long_inputs_are_summarised_in_little_memory() -> None:
    q = torch.randn(1, 1, 4099, 8)
    with fv.watch() as seen:
        fv.attention(q, q, q, fv.causal & fv.window(64))
    looked = seen.looked(0, k=8)
    assert looked.indices.shape == (1, 1, 4099, 8)
    total = looked.weights.sum(-1) + looked.rest
    torch.testing.assert_close(total, torch.ones_like(total))
    assert looked.watchers[0, 0, 0] == 64
    torch.testing.assert_close(looked.received.sum(), torch.tensor(4099.0), rtol=1e-4, atol=0)
