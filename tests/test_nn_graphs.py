"""Blocks as PyTorch transforms them: compiled whole, exported, checkpointed, in autocast."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import foveate as fv

LATER = fv.causal & fv.window(4)


class Body(nn.Module):
    """A causal Transformer of today: rotary, grouped heads, RMSNorm, gates; and one more block of 2017."""

    def __init__(self, old: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        if old:
            block = fv.nn.Block.paper(24, 6, hidden=13, dropout=0.0)
        else:
            attention = fv.nn.SelfAttention(24, 6, key_heads=2, rotary=fv.nn.Rotary(4))
            block = fv.nn.Block(
                fv.nn.PreNorm(attention, nn.RMSNorm(24)), fv.nn.PreNorm(fv.nn.GatedFeedForward(24), nn.RMSNorm(24))
            )
        self.encoder = fv.nn.Encoder([block], nn.LayerNorm(24), relative=fv.nn.RelativeBias(6, 8, 13))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, LATER)  # type: ignore[no-any-return]


class Both(nn.Module):
    """Encoder and decoder, from tokens to scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        core = fv.nn.Transformer.paper(24, 6, 1, 13, dropout=0.0)
        self.model = fv.nn.Seq2Seq(17, 24, transformer=core, dropout=0.0, pad=0)
        self.source = torch.tensor([[3, 5, 2, 0, 0], [8, 1, 4, 6, 9]])

    def forward(self, target: Tensor) -> Tensor:
        return self.model(self.source, target)  # type: ignore[no-any-return]


MODELS = {"today": lambda: Body(False), "2017": lambda: Body(True), "both": Both}


def made(name: str) -> tuple[nn.Module, Tensor]:
    model = MODELS[name]()
    torch.manual_seed(1)
    return model, torch.randint(1, 17, (2, 7)) if name == "both" else torch.randn(2, 7, 24)


@pytest.fixture
def _traced() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)  # the tracer cannot follow the run-time checks of shapes
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def gradients(model: nn.Module, out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.sin().sum(), list(model.parameters()))


SOME = ["today", *(pytest.param(name, marks=pytest.mark.slow) for name in ("2017", "both"))]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.usefixtures("_traced")
def test_compiled_whole_it_is_the_same(name: str) -> None:
    model, x = made(name)
    found, true = torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x)
    torch.testing.assert_close(found, true)
    torch.testing.assert_close(gradients(model, found), gradients(model, true))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.usefixtures("_traced")
def test_exported_it_is_the_same(name: str) -> None:
    model, x = made(name)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model.eval(), (x,), dynamic_shapes=({1: length},))
    longer = torch.cat([x, x[:, :4]], 1)
    torch.testing.assert_close(program.module()(longer), model(longer))


@pytest.mark.parametrize("name", ["today", "2017"])
def test_checkpointed_it_is_the_same(name: str) -> None:
    model, x = made(name)
    block, norm = model.encoder.blocks[0], model.encoder.norm
    kept = norm(checkpoint(block, x, LATER, score=model.encoder.relative(), use_reentrant=False))
    torch.testing.assert_close(kept, model(x), rtol=0, atol=0)
    torch.testing.assert_close(gradients(model, kept), gradients(model, model(x)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own RMSNorm
def test_autocast_is_near(name: str) -> None:
    model, x = made(name)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    gradients(model, found.float())
    torch.testing.assert_close(found.float(), model(x), rtol=0.05, atol=0.05)
