"""What torch does with modules it does with ours: compile, export, checkpoint, autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jaxtyping
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import foveate as fv
from foveate.models import bert, gpt2, vit

KEEP = torch.ones(2, 17, dtype=torch.bool)
KEEP[1, 11:] = False


class Padded(nn.Module):
    """A model of texts, called with tensors alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        return self.model(tokens, fv.padding(keep))


@dataclass(frozen=True)
class Used:
    """A model whose `blocks` may be checkpointed, inputs, and for export: which axes may change, and other inputs."""

    make: Callable[[], nn.Module]
    blocks: str
    inputs: Callable[[int], tuple[Tensor, ...]]
    axes: dict[str, dict[int, object]]


def texts(length: int) -> tuple[Tensor, ...]:
    tokens = torch.randint(3, 97, (2, 17), generator=torch.Generator().manual_seed(5))
    return tokens[:, :length].contiguous(), KEEP[:, :length].contiguous()


def images(count: int) -> tuple[Tensor, ...]:
    return (torch.randn(17, 3, 16, 16, generator=torch.Generator().manual_seed(5))[:count],)


LENGTH, COUNT = torch.export.Dim("length", min=2, max=64), torch.export.Dim("count", min=2, max=64)
TEXT = {"tokens": {1: LENGTH}, "keep": {1: LENGTH}}
SIZES = {"dim": 48, "layers": 1, "heads": 6, "hidden": 59}
MODELS = {
    "bert": Used(
        lambda: Padded(bert.MaskedWords(bert.Config(97, 64, **SIZES))), "model.body.blocks", texts, TEXT
    ),
    "gpt2": Used(
        lambda: Padded(gpt2.LanguageModel(gpt2.Config(97, 64, **SIZES))), "model.body.blocks", texts, TEXT
    ),
    "vit": Used(
        lambda: vit.ImageClassifier(vit.Config(16, 4, **SIZES, labels=5)), "body.blocks", images, {"pixels": {0: COUNT}}
    ),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def used(request: pytest.FixtureRequest) -> Used:
    torch.manual_seed(3)
    return MODELS[request.param]


@pytest.fixture
def _traced() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)  # the tracer cannot follow the run-time checks of shapes
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def gradients(model: nn.Module, out: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(out.sin().sum(), list(model.parameters()), allow_unused=True))


@pytest.mark.usefixtures("_traced")
def test_compiled_in_one_graph_it_is_the_same(used: Used) -> None:
    model = used.make().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, true = compiled(*used.inputs(13)), model(*used.inputs(13))
    torch.testing.assert_close(found, true)
    torch.testing.assert_close(gradients(model, found), gradients(model, true), atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("_traced")
def test_exported_it_is_the_same_at_another_size(used: Used) -> None:
    model = used.make().eval()
    program = torch.export.export(model, used.inputs(13), dynamic_shapes=used.axes).module()
    for size in (13, 17):
        torch.testing.assert_close(program(*used.inputs(size)), model(*used.inputs(size)))


def test_checkpointed_it_has_the_same_gradients(used: Used) -> None:
    model = used.make().train()
    torch.manual_seed(7)  # of the dropout
    want = gradients(model, model(*used.inputs(13)))
    for block in model.get_submodule(used.blocks):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    torch.manual_seed(7)
    torch.testing.assert_close(gradients(model, model(*used.inputs(13))), want)


def test_under_autocast_it_attends_in_bfloat16_and_is_near(used: Used) -> None:
    model = used.make().eval()
    with torch.autocast("cpu", torch.bfloat16), fv.watch(model) as seen:
        found = model(*used.inputs(13))
    assert [call.q.dtype for call in seen.calls] == [torch.bfloat16]
    true = model(*used.inputs(13)).detach()
    torch.testing.assert_close(found.float(), true, atol=0.03 * float(true.abs().max()), rtol=0)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients(model, found))
