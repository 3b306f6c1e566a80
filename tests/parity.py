"""One law for every model of our own: a Hugging Face model on disk, loaded here, is the same function, and goes back.

A `Case` says how to make a small random model of Hugging Face and how ours is called; `check` does the rest: outputs
and every layer's hidden states to 1e-5 of the largest value, gradients to 1e-4, with padding and without, with
attention far from uniform; then written by `save_pretrained` and opened by Hugging Face, equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import Inputs, flat, sharpened, top_weight
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

import foveate as fv
from foveate import pretrained
from foveate.checkpoint import format
from foveate.models import formats


@dataclass(frozen=True)
class Case:
    """A small model.

    `call` calls our model with Hugging Face's inputs and gives outputs by Hugging Face's names. `layers` are the lists
    of blocks, ours → theirs, whose outputs are compared one by one. `mask` names the input that says which tokens are
    real, and without which the model is compared once more. `rows` says, for an output, which rows count.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    call: Callable[[nn.Module, Inputs], Mapping[str, Tensor]]
    layers: Mapping[str, str]
    sharp: tuple[str, ...] = ("q_proj", "k_proj")
    mask: tuple[str, ...] = ("attention_mask",)
    dull: tuple[str, ...] = field(default=())  # their names of parameters whose gradient is nothing but rounding
    absent: frozenset[str] = frozenset()  # their names of what is worked out, and which ours are written without


def check(case: Case, folder: Path) -> None:
    """Assert all of it for one model."""
    torch.manual_seed(3)
    theirs = sharpened(_random(case.make()), case.inputs(), case.sharp)
    assert top_weight(theirs, case.inputs()) > 0.3
    theirs.save_pretrained(folder / "theirs")
    ours = fv.from_pretrained(folder / "theirs")
    assert not ours.training
    bare = {key: value for key, value in case.inputs().items() if key not in case.mask}
    for inputs in (case.inputs(), bare) if len(bare) < len(case.inputs()) else (bare,):
        _same(case, ours, theirs, inputs)
    fv.save_pretrained(ours, folder / "ours")
    back, news = type(theirs).from_pretrained(folder / "ours", output_loading_info=True)
    assert set(news.pop("missing_keys")) == case.absent
    assert not any(news.values()), news
    want, found = theirs.state_dict(), back.state_dict()
    assert want.keys() == found.keys()
    assert [key for key in want if not torch.equal(want[key], found[key])] == []
    assert _lasting(theirs.config.to_dict()) == _lasting(back.config.to_dict())


def _random(model: nn.Module) -> nn.Module:
    """Weights of which each counts: biases are not 0, scales not 1, and what a nonlinearity is given is not small."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue  # worked out, not learned
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif parameter.dim() > 1:
                rows, columns = parameter.shape[0], parameter[0].numel()
                parameter.normal_(0, (2 / (rows + columns)) ** 0.5)
    return model


def _lasting(said: dict[str, Any]) -> dict[str, Any]:
    """What a config says of the model, in its parts too, and not of the moment."""
    kept = {key: value for key, value in said.items() if key not in PASSING}
    return {key: _lasting(value) if isinstance(value, dict) else value for key, value in kept.items()}


PASSING = ("_name_or_path", "transformers_version", "_attn_implementation_autoset", "dtype", "architectures")


def check_generation(case: Case, folder: Path, new: int, **more: Any) -> None:
    """Assert that a decoder continues texts with Hugging Face's tokens: padded, not padded, and where one text ends."""
    torch.manual_seed(3)
    theirs = sharpened(_random(case.make()), case.inputs(), case.sharp)
    ids, mask = case.inputs()["input_ids"], case.inputs()["attention_mask"]
    free = theirs.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, **more)
    made = free[:, ids.shape[1] :]
    assert all(len(set(row.tolist())) > 4 for row in made), "the texts are too dull to tell anything"
    end = next(token for token in made[0, 1:].tolist() if token not in made[1])  # the padded text goes on to its end
    theirs.config.eos_token_id = theirs.generation_config.eos_token_id = end
    theirs.save_pretrained(folder)
    ours = fv.from_pretrained(folder)
    for keep in (mask, torch.ones_like(mask)):
        want = theirs.generate(ids, attention_mask=keep, max_new_tokens=new, do_sample=False, **more)
        found = ours.generate(ids, new=new, keep=keep.bool() if keep is mask else None)
        assert torch.equal(found, want)
    assert (want[0] == theirs.config.pad_token_id).any(), "no text ended before another"


def _same(case: Case, ours: nn.Module, theirs: nn.Module, inputs: Inputs) -> None:
    """Equal outputs, hidden states and gradients."""
    with _recorded(theirs, case.layers.values()) as their_layers, _recorded(ours, case.layers) as our_layers:
        truth = flat(theirs(**inputs))
        found = dict(case.call(ours, inputs))
    assert found, "call gives no outputs"
    for (name, value), true in zip(our_layers, (value for _, value in their_layers), strict=True):
        _close(name, value, true, inputs)
    for key, value in found.items():
        _close(key, value, truth[key], inputs)
    mine, wanted = (_total({key: outputs[key] for key in found}, inputs) for outputs in (found, truth))
    wanted.backward()
    mine.backward()
    true_gradients = _written(theirs)
    largest = max(float(gradient.abs().max()) for gradient in true_gradients.values())
    seen = set()
    for name, (gradient, aliases) in _gradients(ours).items():
        key = next((key for key in (name, *aliases) if key in true_gradients), name)
        true_gradient = true_gradients.get(key)
        seen |= {name, *aliases}
        assert (gradient is None) == (true_gradient is None), name
        if gradient is not None and true_gradient is not None and not any(part in name for part in case.dull):
            off = float((gradient - true_gradient).abs().max())
            assert off <= 1e-4 * max(float(true_gradient.abs().max()), 1e-2 * largest), (name, off)
    assert true_gradients.keys() <= seen
    theirs.zero_grad(set_to_none=True)
    ours.zero_grad(set_to_none=True)


def _close(name: str, value: Tensor, true: Tensor, inputs: Inputs) -> None:
    assert value.shape == true.shape, name
    value, true = _real(value, inputs).detach(), _real(true, inputs).detach()
    off = float((value - true).abs().max())
    assert off <= 1e-5 * float(true.abs().max()), f"{name} is off by {off:.2g}, the largest is {true.abs().max():.2g}"


def _real(value: Tensor, inputs: Inputs) -> Tensor:
    """The rows that stand for tokens, where a mask of that shape says which."""
    for key, mask in inputs.items():
        if key.endswith("mask") and value.dim() >= 2 and value.shape[:2] == mask.shape:
            return value[mask.bool()]
    return value


def _total(outputs: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """A fixed random sum: not a norm, whose gradient after a normalization would be nothing but noise."""
    generator = torch.Generator().manual_seed(7)
    parts = [_real(value, inputs) for _, value in sorted(outputs.items())]
    return torch.stack([(part * torch.randn(part.shape, generator=generator)).sum() for part in parts]).sum()


@contextmanager
def _recorded(model: nn.Module, lists: Any) -> Iterator[list[tuple[str, Tensor]]]:
    """What the blocks of these lists give, in order."""
    found: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: found.append((name, output if isinstance(output, Tensor) else output[0]))

    hooks = [
        block.register_forward_hook(keep(f"{path}.{n}"))
        for path in lists
        for n, block in enumerate(model.get_submodule(path))  # type: ignore[arg-type]
    ]
    yield found
    for hook in hooks:
        hook.remove()


def _written(theirs: nn.Module) -> dict[str, Tensor]:
    """Their gradients by the names, and in the shapes, in which Hugging Face writes the parameters."""
    found = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    return dict(revert_weight_conversion(theirs, found)) if isinstance(theirs, PreTrainedModel) else found


def _gradients(model: nn.Module) -> dict[str, tuple[Tensor | None, list[str]]]:
    """Our gradients by their names, each with the other names that a tied one goes by."""
    kind = model.config.kind
    table = format.plan(model, formats(kind)[kind])
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, tuple[Tensor | None, list[str]]] = {}
    for theirs, entry in table.entries.items():
        if not all(part in parameters for part in entry.parts):
            continue  # a buffer
        parts = {part: parameters[part].grad for part in entry.parts}
        made = None if any(x is None for x in parts.values()) else pretrained._made(entry, parts).make()
        found[theirs] = made, [alias for alias, main in table.aliases.items() if main == theirs]
    return found


def check_translation(
    case: Case, folder: Path, new: int, settings: Callable[[int], Mapping[str, Any]] = lambda token: {}
) -> None:
    """Assert that an encoder and decoder write Hugging Face's tokens: padded sources and not, and where a text ends.

    `settings` are more of generation_config.json, given a token that is written without them; Hugging Face writes the
    same from the folder that we write.
    """
    ids, mask = case.inputs()["input_ids"], case.inputs()["attention_mask"]
    plain = {"max_new_tokens": new, "do_sample": False, "num_beams": 1}
    for seed in range(10):  # some random models say one word for ever
        torch.manual_seed(seed)
        theirs = _random(case.make()).eval()
        with torch.no_grad():
            for key, parameter in theirs.named_parameters():
                if any(part in key for part in case.sharp) and parameter.dim() > 1:
                    parameter.mul_(3)
                elif key.endswith("norm.weight"):
                    parameter.normal_()  # else a word that is tied says itself again
        free = theirs.generate(ids, attention_mask=mask, eos_token_id=None, **plain)
        theirs.generation_config.update(**settings(int(free[0, 2])))
        made = theirs.generate(ids, attention_mask=mask, eos_token_id=None, **plain)[:, 1:]
        ends = [token for token in made[0, 2:-1].tolist() if token not in made[1]]
        if ends and all(len(set(row.tolist())) > 4 for row in made):
            break
    else:
        raise AssertionError("the texts are too dull to tell anything")
    end = ends[0]
    theirs.config.eos_token_id = theirs.generation_config.eos_token_id = end
    theirs.save_pretrained(folder / "theirs")
    ours = fv.from_pretrained(folder / "theirs")
    fv.save_pretrained(ours, folder / "ours")
    back = type(theirs).from_pretrained(folder / "ours")
    for keep in (mask, torch.ones_like(mask)):
        want = theirs.generate(ids, attention_mask=keep, **plain)
        assert torch.equal(ours.generate(ids, new=new, keep=keep.bool() if keep is mask else None), want)
        assert torch.equal(back.generate(ids, attention_mask=keep, **plain), want)
    assert (want[0, -1] == theirs.config.pad_token_id).any(), "no text ended before another"
