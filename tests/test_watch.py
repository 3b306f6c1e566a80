"""Whose calls `watch(model)` records: those of the model's own forwards, in every thread, whoever else watches."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
import transformers
from families import build, left_padded, right_padded
from torch import Tensor, nn

import foveate as fv


class Own(nn.Module):
    """A model of one's own that attends; `heads` tells two of them apart."""

    def __init__(self, heads: int = 2, other: nn.Module | None = None) -> None:
        super().__init__()
        self.heads, self.other = heads, other

    def forward(self, x: Tensor) -> Tensor:
        if self.other is not None:
            self.other(x)
        q = x.expand(1, self.heads, -1, -1)
        return fv.attention(q, q, q, fv.causal)


X = torch.randn(1, 1, 5, 8, generator=torch.Generator().manual_seed(0))


def in_a_thread(run: Callable[[], object]) -> None:
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def heads(seen: Any) -> list[int]:
    return [call.q.shape[1] for call in seen.calls]


def test_a_forward_in_another_thread_is_seen() -> None:
    model = Own()
    with fv.watch(model) as seen:
        in_a_thread(lambda: model(X))
    assert len(seen) == 1
    assert seen.weights(0).shape == (1, 2, 5, 5)


def test_a_streamer_is_seen() -> None:
    model: Any = build("llama")
    streamer = transformers.TextIteratorStreamer(None, skip_prompt=True)
    streamer.on_finalized_text = lambda *_, **__: None
    streamer.put = lambda _: None
    streamer.end = lambda: None
    ids = torch.arange(1, 6)[None]
    with fv.watch(model) as seen:
        in_a_thread(lambda: model.generate(ids, max_new_tokens=3, do_sample=False, streamer=streamer))
    assert len(seen) == 3 * model.config.num_hidden_layers


def test_many_threads_lose_no_call() -> None:
    model = Own()
    with fv.watch(model) as seen:
        threads = [threading.Thread(target=lambda: [model(X) for _ in range(20)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(seen) == 160
    assert all(seen.weights(n).shape == (1, 2, 5, 5) for n in range(160))


def test_what_other_models_and_nobody_calls_is_not_recorded() -> None:
    model, other = Own(2), Own(3)
    with fv.watch(model) as seen:
        other(X)
        model(X)
        fv.attention(X, X, X)
        in_a_thread(lambda: other(X))
    assert heads(seen) == [2]


def test_layer_numbers_of_a_hugging_face_model_are_its_own() -> None:
    model, other = build("bert"), build("llama")
    with torch.no_grad(), fv.patch(other), fv.watch(model) as seen:
        other(**left_padded())
        model(**right_padded())
        other(**left_padded())
    assert len(seen) == model.config.num_hidden_layers


def test_a_model_in_the_model_is_its_part() -> None:
    inner = Own(3)
    model = Own(2, inner)
    with fv.watch(model) as whole, fv.watch(inner) as part:
        model(X)
        inner(X)
    assert heads(whole) == [3, 2, 3]
    assert heads(part) == [3, 3]


def test_without_a_model_all_calls_of_this_thread_are_recorded() -> None:
    with fv.watch() as seen:
        Own(2)(X)
        Own(3)(X)
        fv.attention(X, X, X)
        in_a_thread(lambda: Own(5)(X))
    assert heads(seen) == [2, 3, 1]


@pytest.mark.parametrize("name", ["own", "bert"])
@pytest.mark.parametrize("given", [True, False], ids=["model", "no model"])
def test_watches_end_in_any_order(name: str, given: bool) -> None:
    model: Any = Own() if name == "own" else build(name)
    inputs: dict[str, Any] = {"x": X} if name == "own" else right_padded()
    layers = 1 if name == "own" else model.config.num_hidden_layers
    first, second = (fv.watch(model), fv.watch(model if given else None))
    with torch.no_grad():
        one = first.__enter__()
        two = second.__enter__()
        model(**inputs)
        first.__exit__(None, None, None)
        if name == "own" or given:
            model(**inputs)
        second.__exit__(None, None, None)
        model(**inputs)
    assert len(one) == layers
    assert len(two) == layers * (2 if name == "own" or given else 1)
    if name == "bert":
        assert model.config._attn_implementation == "eager"


def test_a_watch_of_a_part_goes_on_when_that_of_the_whole_ends() -> None:
    model: Any = build("llama")
    whole, part = fv.watch(model), fv.watch(model.model)
    whole.__enter__()
    seen = part.__enter__()
    whole.__exit__(None, None, None)
    with torch.no_grad():
        model(**left_padded())
    part.__exit__(None, None, None)
    assert len(seen) == model.config.num_hidden_layers
    assert model.config._attn_implementation == "eager"


def test_an_end_in_another_context_is_an_end() -> None:
    model = Own()
    watch = fv.watch(model)
    nobody = fv.watch()

    async def begin() -> tuple[Any, Any]:
        return watch.__enter__(), nobody.__enter__()

    async def use() -> tuple[Any, Any]:
        both = await asyncio.create_task(begin())
        model(X)
        watch.__exit__(None, None, None)
        nobody.__exit__(None, None, None)
        model(X)
        return both

    seen, _ = asyncio.run(use())
    assert len(seen) == 1


def test_a_thread_in_the_middle_of_a_forward_is_not_heard_any_more() -> None:
    from foveate.dispatch.choose import is_observed

    inside, go, heard = threading.Event(), threading.Event(), []

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            go.wait(10)
            return fv.attention(x, x, x, score=fv.softcap(3.0))  # which is never known already

    model = Slow()

    def run() -> None:
        model(X)
        heard.append(is_observed())

    thread = threading.Thread(target=run)
    with fv.watch(model) as seen:
        thread.start()
        inside.wait(10)
    go.set()
    thread.join()
    assert not len(seen)
    assert heard == [False]


def test_a_forward_that_fails_is_over() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            fv.attention(x, x, x)
            raise KeyError

    model = nn.ModuleList([Failing()])
    with fv.watch(model) as seen:
        with pytest.raises(KeyError):
            model[0](X)
        fv.attention(X, X, X)
    assert len(seen) == 1


def test_nothing_is_left_on_the_model_and_copies_made_meanwhile_are_free() -> None:
    model = Own(2, Own(3))
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with fv.watch(model) as seen:
        written = pickle.dumps(model)
        twin, read = copy.deepcopy(model), pickle.loads(written)
        assert b"foveate" not in written
        twin(X)
        read(X)
    assert not len(seen)
    for network in (model, twin, read):
        network(X)
    assert not len(seen)
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert vars(module).keys() == before[name].keys()


def sentence_transformer() -> nn.Module:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    from foveate.see.text import bundled_model

    return SentenceTransformer(str(bundled_model()), device="cpu")


def test_a_sentence_transformer_is_seen() -> None:
    model: Any = sentence_transformer()
    before = model.encode("the animal crossed the street")
    with fv.watch(model) as seen:
        found = model.encode("the animal crossed the street")
    assert len(seen) == 6
    assert abs(before - found).max() < 1e-5
    assert not any(getattr(part, "_forward_pre_hooks", None) for part in model.modules())


def test_wrappers_are_seen() -> None:
    inner: Any = build("bert")
    wrappers = {
        "DataParallel": nn.DataParallel(inner),
        "one's own": nn.ModuleDict({"bert": inner, "head": nn.Linear(3, 3)}),
    }
    for name, model in wrappers.items():
        with torch.no_grad(), fv.watch(model) as seen:
            inner(**right_padded()) if isinstance(model, nn.ModuleDict) else model(**right_padded())
        assert len(seen) == inner.config.num_hidden_layers, name
        assert inner.config._attn_implementation == "eager"


class Pipeline:
    """What transformers' pipelines are to us: no module, and one in `model`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model


def test_the_model_of_a_pipeline_is_seen() -> None:
    pipeline = Pipeline(build("bert"))
    with torch.no_grad(), fv.watch(pipeline) as seen:
        pipeline.model(**right_padded())
    assert len(seen) == 2


def test_a_pipeline_of_transformers_is_seen() -> None:
    from foveate.see.text import bundled_model

    pipeline: Any = transformers.pipeline("feature-extraction", model=str(bundled_model()))
    with fv.watch(pipeline) as seen:
        pipeline("the animal")
    assert len(seen) == 6


def test_parts_of_a_patched_model_are_seen() -> None:
    model: Any = build("llama")
    with torch.no_grad(), fv.patch(model):
        for part, calls in ((model.model, 2), (model.model.layers[0], 1), (model.model.layers[1].self_attn, 1)):
            with fv.watch(part) as seen:
                model(**left_padded())
            assert len(seen) == calls
        assert model.config._attn_implementation == "foveate"


def test_a_part_of_a_model_loaded_for_foveate_is_seen() -> None:
    model: Any = build("llama")
    fv.register()
    model.set_attn_implementation("foveate")
    with torch.no_grad(), fv.watch(model.model.layers[0]) as seen:
        model(**left_padded())
    assert len(seen) == 1


def test_a_part_of_a_model_that_is_not_on_foveate_is_one_sentence() -> None:
    model: Any = build("llama")
    wanted = r"LlamaDecoderLayer is a part of a model that .* 'eager': .* fv\.patch\(model\)"
    with pytest.raises(fv.InvalidInput, match=wanted), fv.watch(model.model.layers[0]):
        pass


def test_a_model_with_a_part_that_is_patched_is_one_sentence() -> None:
    model: Any = build("llava")
    part = next(each for each in model.modules() if each is not model and type(each).__name__ == "CLIPVisionModel")
    with fv.patch(part):
        for switch in (fv.patch, fv.watch):
            with pytest.raises(fv.InvalidInput, match=r"CLIPVisionModel, .* is patched already: unpatch that first"):
                switch(model).__enter__()
    assert {each.config._attn_implementation for each in model.modules() if hasattr(each, "config")} == {"eager"}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(3, 3), r"Linear has no attention that foveate could see"),
        (nn.DataParallel(nn.Linear(3, 3)), r"DataParallel has no attention that foveate could see"),
        (nn.MultiheadAttention(4, 2), r"MultiheadAttention.*its attention is PyTorch's own: .*from_torch"),
        (nn.Transformer(8, 2, 1, 1, 8, batch_first=True), r"Transformer.*PyTorch's own: .*from_torch"),
        (3, "watch was given a int: wanted a model"),
        (Own, "watch was given a type: wanted a model"),
        ({"model": nn.Linear(3, 3)}, "watch was given a dict: wanted a model"),
        (Pipeline(3), "watch was given a Pipeline: wanted a model"),  # type: ignore[arg-type]
    ],
)
def test_what_has_nothing_to_see_is_one_sentence(model: Any, said: str) -> None:
    with pytest.raises(fv.InvalidInput, match=said), fv.watch(model):
        pass


def test_why_nothing_was_seen_is_told() -> None:
    class Softmax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1)

    model = Softmax()
    with fv.watch(model) as seen:
        fv.attention(X, X, X)
    with pytest.raises(fv.FoveateError, match="nothing was watched: Softmax did not run inside the `with`"):
        seen.weights(0)
    with fv.watch(model) as seen:
        model(X)
    with pytest.raises(fv.FoveateError, match="nothing was watched: Softmax ran, but no attention in it went through"):
        seen.weights(0)


def test_a_part_that_cannot_be_reached_is_named() -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    model = nn.ModuleDict({"image": transformers.ResNetModel(config), "text": build("bert")})
    with pytest.warns(UserWarning, match="watch does not see into ResNetModel: .* has no attention layer") as said:  # noqa: SIM117
        with torch.no_grad(), fv.watch(model) as seen:
            model["text"](**right_padded())
    assert said[0].filename == __file__
    assert len(seen) == 2


def test_unpatched_meanwhile_is_no_error_at_the_end() -> None:
    model = build("bert")
    with fv.watch(model):
        fv.unpatch(model)
    assert model.config._attn_implementation == "eager"


def test_replicas_of_a_model_are_it() -> None:
    """What DataParallel runs on several devices: copies of the module's dictionary."""
    model = Own()
    with fv.watch(model) as seen:
        replica: Any = model._replicate_for_data_parallel()
        in_a_thread(lambda: replica(X))
    assert len(seen) == 1


@pytest.fixture
def _traced() -> Iterator[None]:
    """Without the run-time checks of shapes, which only tests switch on and which break a trace."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


@pytest.mark.usefixtures("_traced")
def test_a_compiled_graph_is_whole_and_not_seen() -> None:
    model = Own()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for given in (model, compiled):
        torch._dynamo.reset()
        with torch.no_grad(), fv.watch(given) as seen:
            compiled(X)
        with pytest.raises(fv.FoveateError, match=r"Own did not run .* only as a compiled graph"):
            seen.weights(0)
        with fv.watch(given) as seen:
            model(X)
        assert len(seen) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_part_that_is_pytorchs_keeps_its_fast_path() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    model = nn.ModuleList([Own(), block]).eval()
    texts = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    with torch.no_grad(), fv.watch(model):
        assert block(texts).is_nested
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in block.modules())


def test_calls_that_were_taken_out_are_gone_and_the_others_stay() -> None:
    model, x = Own(), X.clone()
    with torch.no_grad(), fv.watch(model) as seen:
        model(x)
        del seen.calls[:]
        model(X)
        x.add_(1)
    assert seen.weights(0).shape == (1, 2, 5, 5)
    assert len(copy.deepcopy(seen)) == 1
