"""What stands for a mask in a Hugging Face model is a tensor: for Python, for torch, for copies and for graphs."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils as known

import foveate as fv
from foveate.integrations.transformers import Mask, attention, mask
from foveate.integrations.transformers.standing import Described, standing
from foveate.integrations.transformers.switching import BEFORE

HOW: dict[str, Any] = {
    "q_offset": 2,
    "mask_function": known.sliding_window_causal_mask_function(3),
    "attention_mask": torch.tensor([[True] * 5, [False] + [True] * 4]),
}

BOOLEAN = SimpleNamespace()
BEFORE[id(BOOLEAN)] = "sdpa"


def pair(boolean: bool = False) -> tuple[Tensor, Tensor]:
    """A mask, and the tensor that transformers makes of the same."""
    if boolean:  # for a model that attended by "sdpa" before it was patched
        return mask(2, 3, 5, **HOW, config=BOOLEAN), known.sdpa_mask(2, 3, 5, **HOW)
    return mask(2, 3, 5, **HOW), known.eager_mask(2, 3, 5, **HOW)


def told(act: Callable[[Tensor], Any], given: Tensor) -> tuple[str, Any]:
    """What comes of something that is done to a tensor: a value, or the kind of an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operators that PyTorch lets go of
            return "value", act(given)
    except Exception as error:
        return "error", type(error)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        if not isinstance(other, Tensor) or one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(one.clone().nan_to_num(), other.clone().nan_to_num())
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__next__"):
        return same(list(one), list(other))
    return bool(one == other)


# What names an object and not its entries; a hash is that of the object, a repr says what the object is.
OF_OBJECTS = {name for name in dir(object) if name not in {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}}
OF_OBJECTS |= {"__torch_function__", "__torch_dispatch__", "__deepcopy__", "__dlpack__", "__setstate__"}
SPECIAL = sorted(
    name for name in dir(Tensor) if name.startswith("__") and callable(getattr(Tensor, name)) and name not in OF_OBJECTS
)
OTHERS = {
    "nothing": (),
    "number": (2,),
    "zero": (0,),
    "tensor": (torch.arange(5.0) - 2,),
    "whole numbers": (torch.arange(5) + 1,),
    "booleans": (torch.arange(5) > 2,),
    "place": ((0, 0, slice(1, None)),),
    "places": (torch.tensor([1, 0]),),
    "write": ((Ellipsis, 0), 1),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_every_special_method_is_that_of_the_tensor(name: str) -> None:
    for boolean, mode, others in itertools.product([False, True], [torch.enable_grad, torch.inference_mode], OTHERS):
        with mode():
            ours, theirs = pair(boolean)
            found, wanted = (told(lambda x: getattr(x, name)(*OTHERS[others]), x) for x in (ours, theirs))  # noqa: B023
            assert found[0] == wanted[0], (others, found, wanted)
            assert same(found[1], wanted[1]), (others, found, wanted)
            assert same(ours, theirs), f"what {name} wrote"


READ: dict[str, Callable[[Tensor], Any]] = {
    "==": lambda m: m == 0,
    "<": lambda m: m < 0,
    "1 -": lambda m: 1.0 - m,
    "~": lambda m: ~(m == 0.0),
    "-": lambda m: -m,
    "&": lambda m: (m < 0) & (m == m),
    "all of the rows": lambda m: torch.all(~(m == 0.0), dim=2),
    "len": len,
    "iteration": lambda m: [torch.equal(part, m[n]) for n, part in enumerate(m)],
    "in": lambda m: 0.0 in m,
    "bool of one": lambda m: bool(m[0, 0, 0, 0]),
    "if": lambda m: bool(m),
    "float": lambda m: float(m[0, 0, 0, 0]),
    "numpy": lambda m: m.numpy(),
    "asarray": np.asarray,
    "list": lambda m: m.tolist(),
    "item": lambda m: m[1, 0, 0, 0].item(),
    "where": lambda m: torch.where(m == 0, 1.0, m),
    "cat": lambda m: torch.cat([m, m.new_ones(2, 1, 3, 1)], -1),
    "stack": lambda m: torch.stack([m, m]),
    "expand": lambda m: m.expand(-1, 7, -1, -1),
    "softmax": lambda m: m.softmax(-1),
    "out=": lambda m: torch.add(m, 1, out=torch.empty(2, 1, 3, 5)),
    "half": lambda m: m.half(),
    "bool": lambda m: m.bool(),
    "to a dtype": lambda m: m.to(torch.float64),
    "to a device": lambda m: m.to("cpu", copy=True),
    "to another": lambda m: m.to(torch.ones(1, dtype=torch.bfloat16)),
    "type": lambda m: m.type_as(torch.ones(1, dtype=torch.float64)),
    "shape": lambda m: (m.shape, m.size(), m.size(-1), m.dim(), m.ndim, m.numel(), m.stride(), m.is_contiguous()),
    "facts": lambda m: (m.dtype, m.device, m.layout, m.requires_grad, m.is_leaf, m.grad, m.nbytes, m.element_size()),
    "is a tensor": lambda m: (isinstance(m, Tensor), torch.is_tensor(m), torch.is_floating_point(m)),
    "sdpa": lambda m: torch.nn.functional.scaled_dot_product_attention(*[torch.ones(2, 2, 3, 4)] * 1,
                                                                       *[torch.ones(2, 2, 5, 4)] * 2, attn_mask=m),
    "a script": lambda m: torch.relu_(m.clone()),
    "vmap": lambda m: torch.vmap(lambda row: row * 2)(m),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "detached": lambda m: m.detach() + m.data,
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_whatever_is_asked_of_it_is_asked_of_the_tensor(name: str) -> None:
    ours, theirs = (told(READ[name], x) for x in pair())
    assert same(ours, theirs), (ours, theirs)


def test_it_is_hashed_as_an_object_and_found_again() -> None:
    ours, _ = pair()
    assert {ours: 1}[ours] == 1
    assert hash(ours) == hash(ours)
    assert repr(ours) == "<Mask causal & window(3) & padding(<bool 2×5>): 2×1×3×5>"


def test_a_file_of_it_holds_a_plain_tensor() -> None:
    ours, theirs = pair()
    file = io.BytesIO()
    torch.save({"mask": ours}, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)["mask"]
    assert type(found) is Tensor
    assert torch.equal(found, theirs)


def seen_by_a_layer(given: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 2, 3, 4, generator=generator), torch.randn(2, 2, 5, 4, generator=generator)
    return attention(torch.nn.Module(), q, k, k, given)[0]


WRITES: dict[str, Callable[[Tensor], object]] = {
    "entry": lambda m: m.__setitem__((..., 0), 0.0),
    "+=": lambda m: m.__iadd__(torch.arange(5.0)),
    "view": lambda m: m[:, :, :, 2:].fill_(-1.0),
    "view of a view": lambda m: m.squeeze(1)[0].t().mul_(0),
    "masked_fill_": lambda m: m.masked_fill_(torch.arange(5) == 4, 0.0),
    "out=": lambda m: torch.add(torch.ones(2, 1, 3, 5), 1, out=m),
    "detached": lambda m: m.detach().add_(torch.arange(5.0)),
    "data": lambda m: m.data.add_(torch.arange(5.0)),
    "numpy": lambda m: m.numpy().__setitem__((..., 0), 0.0),
    "shared copy": lambda m: copy.copy(m).mul_(0),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", WRITES)
def test_what_is_written_to_it_counts_in_attention(way: str, mode: Any) -> None:
    with mode():
        ours, theirs = pair()
        before = seen_by_a_layer(ours)
        WRITES[way](ours)
        WRITES[way](theirs)
        found, truth = seen_by_a_layer(ours), seen_by_a_layer(theirs)
        torch.testing.assert_close(found, truth)
        assert (truth - before).abs().max() > 1e-3
        torch.testing.assert_close(seen_by_a_layer(copy.deepcopy(ours)), truth)


def test_reading_it_leaves_it_a_pattern() -> None:
    ours, _ = pair()
    q = torch.ones(2, 2, 3, 5)
    assert ((q + ours) * ours)[0].isfinite().any()
    assert isinstance(standing(ours), Described)
    assert isinstance(standing(copy.deepcopy(ours)), Described)
    assert isinstance(standing(ours.detach()), Described)


def test_its_gradient_is_that_of_a_tensor() -> None:
    ours, theirs = (x.requires_grad_() for x in pair())
    for x in (ours, theirs):
        seen_by_a_layer(x).pow(2).sum().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad)


class Kept(torch.autograd.Function):
    """Saves what it was given, which only a tensor may be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: Tensor) -> Tensor:
        ctx.save_for_backward(given)
        return x * given

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (given,) = ctx.saved_tensors
        assert isinstance(given, Mask)
        return gradient * given, None


@pytest.mark.parametrize("reentrant", [False, True])
def test_autograd_keeps_it_and_a_checkpoint_hands_it_on_as_a_pattern(reentrant: bool) -> None:
    ours, theirs = pair()
    x = torch.randn(2, 4, 3, 5, requires_grad=True)
    kinds = []

    def layer(x: Tensor, given: Tensor) -> Tensor:
        kinds.append(isinstance(given, Mask) and isinstance(standing(given), Described))
        return Kept.apply(x, given)  # type: ignore[no-any-return, no-untyped-call]

    checkpoint(layer, x, ours, use_reentrant=reentrant).sum().backward()  # type: ignore[no-untyped-call]
    assert kinds == [True, True]
    assert torch.equal(x.grad, theirs.expand_as(x))  # type: ignore[arg-type]


GRAPHS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "+": lambda x, m: x + m,
    "reflected": lambda x, m: (1.0 - m) + (2 * m) + x,
    "==": lambda x, m: x.masked_fill(m == 0, 7.0),
    "<": lambda x, m: torch.where(m < 0, x, 0.0),
    "~": lambda x, m: x + torch.all(~(m == 0.0), dim=2)[:, :, None],
    "part": lambda x, m: x[..., :3] + m[:, :, :, :3],
    "method": lambda x, m: x + m.bool().logical_not(),
    "in place": lambda x, m: x + m.clone().mul_(2),
    "shape": lambda x, m: x * m.shape[-1] + len(m) + m.dim(),
}


@pytest.mark.parametrize("made", ["in the graph", "before it"])
def test_a_graph_computes_with_it_as_with_a_tensor(made: str) -> None:
    x, kept = torch.randn(2, 1, 3, 5), HOW["attention_mask"]
    before = mask(2, 3, 5, q_offset=2, attention_mask=kept)
    truth = known.eager_mask(2, 3, 5, q_offset=2, attention_mask=kept)

    def inside(x: Tensor, given: Any) -> list[Tensor]:
        one = mask(2, 3, 5, q_offset=2, attention_mask=kept) if given is None else given
        return [graph(x, one) for graph in GRAPHS.values()]

    torch._dynamo.reset()
    found = torch.compile(inside, backend="eager", fullgraph=True)(x, None if made == "in the graph" else before)
    for name, mine in zip(GRAPHS, found, strict=True):
        assert same(mine, GRAPHS[name](x, truth)), name


def test_what_a_graph_writes_to_it_counts_in_attention() -> None:
    def layer(q: Tensor) -> Tensor:
        made = mask(2, 3, 5, q_offset=2)
        made[..., 0] = -1.0
        made += torch.arange(5.0)
        k = q.new_ones(2, 2, 5, 4).cumsum(2)
        return attention(torch.nn.Module(), q, k, k, made, output_attentions=True)[0]

    q = torch.randn(2, 2, 3, 4)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(q), layer(q))


def lasr() -> Any:
    encoder = transformers.LasrEncoderConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=29, num_mel_bins=16,
        subsampling_conv_channels=8, conv_kernel_size=5, layerdrop=0.0,
    )  # fmt: skip
    return transformers.LasrForCTC(transformers.LasrCTCConfig(vocab_size=31, encoder_config=encoder))


def nemotron() -> Any:
    config = transformers.NemotronAsrStreamingEncoderConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=29, num_mel_bins=16,
        subsampling_conv_channels=8, conv_kernel_size=5, layerdrop=0.0, sliding_window=5,
        default_num_lookahead_tokens=2,
    )  # fmt: skip
    return transformers.AutoModel.from_config(config)


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [lasr, nemotron])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch, compiling its own vmap
def test_a_layer_that_computes_with_its_mask_finds_the_kind_that_it_had(make: Any, before: str, compiled: bool) -> None:
    """NemotronAsrStreaming computes another thing from a mask that is added than from a boolean one."""
    torch.manual_seed(3)
    network = make().eval()
    network.set_attn_implementation(before)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    kept = torch.ones(2, 96, dtype=torch.int64)
    kept[1, 60:] = 0
    inputs = {"input_features": torch.randn(2, 96, 16), "attention_mask": kept}
    if make is nemotron:
        inputs["num_lookahead_tokens"] = 2

    def output() -> Tensor:
        with torch.no_grad():
            out = network(**inputs)
        found: Tensor = out.logits if make is lasr else out.last_hidden_state
        return found[0]

    truth = output()
    with fv.patch(network):
        found = output()
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
    if compiled:
        torch._dynamo.reset()
        with fv.patch(network), torch.no_grad():
            out = torch.compile(network, backend="eager")(**inputs)
        found = (out.logits if make is lasr else out.last_hidden_state)[0]
        assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
    if before == "sdpa":  # which these models attend by where nobody asks for another
        fv.register()
        network.set_attn_implementation("foveate")
        found = output()
        assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
