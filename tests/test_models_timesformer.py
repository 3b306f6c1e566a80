"""TimeSformer is Hugging Face's, by each of its three kinds of attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from families import sharpened
from parity import Case, _random, check
from torch import Tensor, nn

import foveate as fv
from foveate.models import timesformer

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 59, "image_size": 12,
         "patch_size": 4, "num_channels": 2, "num_frames": 5, "attn_implementation": "eager"}  # fmt: skip
KINDS = ("divided_space_time", "joint_space_time", "space_only")


def made(name: str, **more: object) -> nn.Module:
    model = getattr(hf, name)(hf.TimesformerConfig(**SIZES, **more))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "token" in key or "time_embeddings" in key:  # as they are after some training
                parameter.add_(torch.randn(parameter.shape))
    # Its blocks fold the tokens by the number of frames in its config, the paper's by those of the video.
    model.register_forward_pre_hook(
        lambda model, args, given: setattr(model.config, "num_frames", given["pixel_values"].shape[1]), with_kwargs=True
    )
    model.register_forward_hook(lambda model, args, out: setattr(model.config, "num_frames", 5))
    return model


def video(*shape: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(shape or (2, 5, 2, 12, 12), generator=torch.Generator().manual_seed(5))}


def longer() -> dict[str, Tensor]:
    return video(2, 7, 2, 12, 12)


def shorter() -> dict[str, Tensor]:
    return video(2, 3, 2, 12, 12)


def higher() -> dict[str, Tensor]:
    """Not of the size that the places were learned for."""
    return video(2, 5, 2, 28, 12)


def base(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"last_hidden_state": model(inputs["pixel_values"])}


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": model(inputs["pixel_values"])}


def case(kind: str, inputs: object = video, **more: object) -> Case:
    def make() -> nn.Module:
        return made("TimesformerModel", attention_type=kind, **more)

    return Case(make, inputs, base, {"blocks": "encoder.layer"}, sharp=("qkv",))


def labels(kind: str) -> Case:
    def make() -> nn.Module:
        return made("TimesformerForVideoClassification", attention_type=kind, num_labels=7)

    return Case(make, video, logits, {"body.blocks": "timesformer.encoder.layer"}, sharp=("qkv",))


CASES = {
    **{kind: case(kind) for kind in KINDS},
    **{f"{kind}, more frames": case(kind, longer) for kind in KINDS[:2]},
    **{f"{kind}, larger frames": case(kind, higher) for kind in KINDS},
    "fewer frames": case(KINDS[0], shorter),
    "without biases": case(KINDS[0], qkv_bias=False),
    **{f"{kind}, labels": labels(kind) for kind in KINDS[:2]},
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_hugging_faces(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


def test_attention_along_time_was_far_from_even() -> None:
    """`check` asks this of attention across the frames alone, which is all that Hugging Face returns."""
    torch.manual_seed(3)
    model, found = sharpened(_random(made("TimesformerModel")), video(), ("qkv",)), []
    for layer in model.encoder.layer:
        layer.temporal_attention.attention.attn_drop.register_forward_hook(lambda m, args, out: found.append(args[0]))
    model(**video())
    assert [weights.shape for weights in found] == [(18, 6, 5, 5)] * 2
    assert torch.stack(found).amax(-1).mean() > 0.4


def test_frames_by_themselves_score_their_mean(tmp_path: Path) -> None:
    """Hugging Face gives scores of every frame."""
    theirs = _random(made("TimesformerForVideoClassification", attention_type="space_only", num_labels=7)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fv.from_pretrained(tmp_path / "theirs")
    want = theirs(**video()).logits.view(2, 5, 7).mean(1)
    assert (ours(video()["pixel_values"]) - want).abs().max() < 1e-5 * want.abs().max()
    fv.save_pretrained(ours, tmp_path / "ours")
    back = type(theirs).from_pretrained(tmp_path / "ours")
    assert torch.equal(back(**video()).logits, theirs(**video()).logits)


SMALL = {"image": 12, "patch": 4, "channels": 2, "frames": 5, "dim": 48, "layers": 2, "heads": 6, "hidden": 59}


NOT_THE_CLASS = fv.rule(lambda batch, head, query, key: (key > 0) | (query == 0))


def test_the_past_does_not_see_what_time_hides() -> None:
    """Attention along time narrowed by causal, and across frames to patches: what comes later changes nothing."""
    torch.manual_seed(3)
    model = timesformer.Model(timesformer.Config(**SMALL)).eval()
    for block in model.blocks:
        nn.init.normal_(block.time.after[1].weight)
    pixels = video()["pixel_values"]
    changed = torch.cat([pixels[:, :3], torch.randn(2, 2, 2, 12, 12)], 1)
    for time, same in ((fv.causal, True), (None, False)):
        before, after = (model(x, NOT_THE_CLASS, time=time)[:, 1:].unflatten(1, (9, 5)) for x in (pixels, changed))
        assert torch.equal(before[:, :, :3], after[:, :, :3]) is same


def test_it_begins_as_a_model_of_images() -> None:
    """After the first block, attention along time adds nothing until it has learned to."""
    first, *rest = timesformer.Model(timesformer.Config(**SMALL)).blocks
    assert first.time.after[1].weight.any()
    for block in rest:
        x = torch.randn(3, 5, 48)
        assert torch.equal(block.time(x), x)


def test_it_is_as_large_as_the_paper_says() -> None:
    """121.4 million, table 2, with the labels of Something-Something."""
    with torch.device("meta"):
        model = timesformer.VideoClassifier(timesformer.Config(labels=174))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 121.4


def test_what_does_not_fit_is_said() -> None:
    model = timesformer.Model(timesformer.Config(**SMALL))
    for shape in ((1, 5, 3, 12, 12), (1, 5, 2, 12, 13), (1, 5, 2, 10, 12), (5, 2, 12, 12), (1, 0, 2, 12, 12)):
        wanted = r"wanted \[batch, frames, 2 channels, height, width\], and sides that are multiples of 4"
        with pytest.raises(fv.InvalidInput, match=f"{'×'.join(map(str, shape))}>: {wanted}"):
            model(torch.zeros(shape))
    with pytest.raises(fv.InvalidInput, match="100 pixels do not divide into patches of 16"):
        timesformer.Config(image=100)
    with pytest.raises(fv.InvalidInput, match="unknown attention 'divided_time': did you mean 'divided_space_time'"):
        timesformer.Config(attention="divided_time")
    joint = timesformer.Model(timesformer.Config(**SMALL, attention="joint_space_time"))
    with pytest.raises(fv.InvalidInput, match="time is causal but the model attends by joint_space_time"):
        joint(video()["pixel_values"], time=fv.causal)
