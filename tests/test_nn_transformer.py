"""Blocks, encoders, decoders and the Transformer: they equal PyTorch's with the same weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from calls import near, random
from torch import Tensor, nn

import foveate as fv
from foveate import InvalidInput

BATCH, HEADS, DIM, HIDDEN, LENGTH, KEYS = 2, 3, 15, 11, 5, 7
VARIANTS = {
    "post": {},
    "pre": {"norm_first": True},
    "pre, gelu, no bias": {"norm_first": True, "activation": "gelu", "bias": False},
}


def theirs(kind: str, dropout: float = 0.0, **options: object) -> nn.Module:
    """PyTorch's module in float64, its weights scaled up until masks matter, its biases and norms not as they begin."""
    torch.manual_seed(3)
    options = {"dropout": dropout, "dim_feedforward": HIDDEN, "batch_first": True, "dtype": torch.float64, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nested tensors will not be used
        match kind:
            case "encoder layer":
                made: nn.Module = nn.TransformerEncoderLayer(DIM, HEADS, **options)  # type: ignore[arg-type]
            case "decoder layer":
                made = nn.TransformerDecoderLayer(DIM, HEADS, **options)  # type: ignore[arg-type]
            case "encoder":
                made = nn.TransformerEncoder(theirs("encoder layer", **options), 2)  # type: ignore[arg-type]
            case "decoder":
                norm = nn.LayerNorm(DIM, dtype=torch.float64)
                made = nn.TransformerDecoder(theirs("decoder layer", **options), 2, norm)  # type: ignore[arg-type]
            case _:
                made = nn.Transformer(DIM, HEADS, 2, 3, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.5).add_(torch.randn_like(parameter) / 8)
    return made


def hides(queries: int, keys: int, seed: int) -> Tensor:
    mask = torch.rand(queries, keys, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[:, 0] = False
    return mask


PAD = torch.tensor([[False] * KEYS, [False] * 4 + [True] * (KEYS - 4)])
TARGET_PAD = torch.tensor([[False] * 3 + [True] * (LENGTH - 3), [False] * LENGTH])
LATER = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def masks(kind: str) -> dict[str, dict[str, Tensor]]:
    """Masks as the forward of PyTorch's module takes them."""
    source = {"padding": {"src_key_padding_mask": PAD}, "boolean": {"src_mask": hides(KEYS, KEYS, 1)},
              "float": {"src_mask": random(KEYS, KEYS)}}  # fmt: skip
    target = {
        "causal": {"tgt_mask": LATER},
        "causal, padding": {"tgt_mask": LATER, "tgt_key_padding_mask": TARGET_PAD, "memory_key_padding_mask": PAD},
        "float": {"tgt_mask": random(LENGTH, LENGTH), "memory_mask": random(LENGTH, KEYS, seed=8)},
        "boolean": {"tgt_mask": hides(LENGTH, LENGTH, 2), "memory_mask": hides(LENGTH, KEYS, 3)},
    }
    if kind.startswith("encoder"):
        return {"none": {}, **source}
    if kind.startswith("decoder"):
        return {"none": {}, **target}
    return {"none": {}, "causal, padding": source["padding"] | target["causal, padding"],
            "float": source["float"] | target["float"]}  # fmt: skip


def ours(kind: str, given: dict[str, Tensor]) -> dict[str, object]:
    """The same masks as our module takes them."""
    read = {
        side: fv.nn.torch_masks(given.get(f"{side}_mask"), given.get(f"{side}_key_padding_mask"))
        for side in ("src", "tgt", "memory")
    }
    first = {"encoder": "src", "decoder": "tgt"}.get(kind.split()[0])
    names = {first: "", "memory": "context_"} if first else {"src": "source_", "tgt": "target_", "memory": "context_"}
    found = {
        f"{name}{what}": read[side][n] for side, name in names.items() for n, what in enumerate(("pattern", "score"))
    }
    if kind.startswith("encoder"):
        del found["context_pattern"], found["context_score"]
    return found


def made_from(true: nn.Module) -> nn.Module:
    match true:
        case nn.TransformerEncoderLayer() | nn.TransformerDecoderLayer():
            return fv.nn.Block.from_torch(true)
        case nn.TransformerEncoder():
            return fv.nn.Encoder.from_torch(true)
        case nn.TransformerDecoder():
            return fv.nn.Decoder.from_torch(true)
        case nn.Transformer():
            return fv.nn.Transformer.from_torch(true)
    raise AssertionError(true)


def inputs(kind: str) -> list[Tensor]:
    """What the module of PyTorch and ours are called with: (source,), (target, context) or (source, target)."""
    source, target = random(BATCH, KEYS, DIM), random(BATCH, LENGTH, DIM, seed=4)
    return {"encoder": [source], "decoder": [target, source]}.get(kind.split()[0], [source, target])


def told(true: nn.Module, given: Sequence[Tensor], options: dict[str, Tensor]) -> Tensor:
    if isinstance(true, nn.TransformerEncoder):  # it alone calls the mask of its source `mask`
        options = {name.replace("src_mask", "mask"): mask for name, mask in options.items()}
    return true(*given, **options)  # type: ignore[no-any-return]


def call(mine: nn.Module, kind: str, given: Sequence[Tensor], options: dict[str, object]) -> Tensor:
    if kind == "decoder layer":  # a block takes the pattern before the context
        return mine(given[0], context=given[1], **options)  # type: ignore[no-any-return]
    return mine(*given, **options)  # type: ignore[no-any-return]


KINDS = ("encoder layer", "decoder layer", "encoder", "decoder", "transformer")
CASES = [(kind, mask, name) for kind in KINDS for mask in masks(kind) for name in VARIANTS]


@pytest.mark.parametrize(("kind", "mask", "variant"), CASES)
def test_it_equals_torch_with_its_weights(kind: str, mask: str, variant: str) -> None:
    true = theirs(kind, **VARIANTS[variant])
    mine = made_from(true)
    mine.load_state_dict(copy.deepcopy(true.state_dict()))  # a state dict of PyTorch's loads, too
    given = [x.requires_grad_() for x in inputs(kind)]
    options = masks(kind)[mask]
    wanted = told(true, given, options)
    found = call(mine, kind, given, ours(kind, options))
    near(found, wanted, 512)
    way = random(*wanted.shape, seed=6)
    parameters = dict(true.named_parameters())
    theirs_ = torch.autograd.grad((wanted * way).sum(), [*given, *parameters.values()])
    # PyTorch's gradients by our names: a module of ours reads them as if they were weights.
    named = copy.deepcopy(mine)
    named.load_state_dict(dict(zip(parameters, theirs_[len(given) :], strict=True)))
    mine_ = torch.autograd.grad((found * way).sum(), [*given, *mine.parameters()])
    for got, want in zip(mine_, (*theirs_[: len(given)], *named.parameters()), strict=True):
        near(got, want.detach(), 4096)


@pytest.mark.parametrize("kind", KINDS)
def test_in_eval_mode_it_equals_torch(kind: str) -> None:
    true = theirs(kind, dropout=0.3).eval()
    mine = made_from(true)
    assert not any(part.training for part in mine.modules())
    options = masks(kind)[list(masks(kind))[1]]
    with torch.no_grad():
        wanted = told(true, inputs(kind), options)
        found = call(mine, kind, inputs(kind), ours(kind, options))
    if "src_key_padding_mask" in options and kind != "transformer":  # PyTorch's fast path writes 0 where x is padding
        real = ~PAD[..., None]
        wanted, found = wanted * real, found * real
    near(found, wanted, 512)


class Dropped(nn.Module):
    """Dropout by place, where torch's own goes by memory, in which PyTorch's module and ours hold x differently."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape) >= self.p) / (1 - self.p)


@pytest.mark.parametrize("variant", ["post", "pre"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_training_the_same_entries_are_dropped(kind: str, variant: str) -> None:
    true = theirs(kind, dropout=0.4, **VARIANTS[variant])
    mine = made_from(true)
    assert all(part.training for part in mine.modules())
    for part in [*true.modules(), *mine.modules()]:
        if isinstance(part, nn.MultiheadAttention | fv.nn.MultiHeadAttention):
            assert part.dropout == 0.4
            part.dropout = 0.0  # which weights are dropped differs
        for name, child in part.named_children():
            if isinstance(child, nn.Dropout):
                setattr(part, name, Dropped(child.p))
    outs = []
    for run in (lambda: true(*inputs(kind)), lambda: call(mine, kind, inputs(kind), ours(kind, {}))):
        torch.manual_seed(7)
        outs.append(run())
    near(outs[1], outs[0], 512)
    assert not torch.equal(outs[0], true(*inputs(kind)))


def test_gated_feed_forward_is_its_formula() -> None:
    part = fv.nn.GatedFeedForward(DIM, HIDDEN, activation=nn.GELU(), bias=True).double()
    x = random(BATCH, LENGTH, DIM)
    gate, up = x @ part.gate.weight.T + part.gate.bias, x @ part.up.weight.T + part.up.bias
    near(part(x), gate * (1 + torch.erf(gate / 2**0.5)) / 2 * up @ part.down.weight.T + part.down.bias)
    assert not any(name.endswith("bias") for name, _ in fv.nn.GatedFeedForward(12).named_parameters())
    plain, gated = (
        sum(p.numel() for p in f(24, bias=False).parameters()) for f in (fv.nn.FeedForward, fv.nn.GatedFeedForward)
    )
    assert plain == gated


def test_what_stands_behind_a_part() -> None:
    scale = nn.Linear(DIM, DIM).double()
    part, norm = fv.nn.FeedForward(DIM).double(), nn.RMSNorm(DIM).double()
    x = random(BATCH, LENGTH, DIM)
    near(fv.nn.PreNorm(part, norm, after=scale)(x), x + scale(part(norm(x))), 1)


def test_a_block_takes_any_mixing_of_positions() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor, pattern: object) -> Tensor:
            return x.mean(1, keepdim=True).expand_as(x)

    block = fv.nn.Block(fv.nn.PreNorm(Mean(), nn.Identity()), fv.nn.PreNorm(nn.Tanh(), nn.Identity())).double()
    x = random(BATCH, LENGTH, DIM)
    mixed = x + x.mean(1, keepdim=True)
    near(block(x), mixed + mixed.tanh())


def test_a_decoder_with_a_cache_is_the_whole() -> None:
    blocks = [fv.nn.Block.paper(12, 3, reads_context=True, pre_norm=True) for _ in range(2)]
    decoder = fv.nn.Decoder(blocks, nn.LayerNorm(12)).double().eval()
    x, context, seen = random(BATCH, 7, 12), random(BATCH, 5, 12, seed=2), fv.padding(torch.tensor([5, 2]))
    whole = decoder(x, context, context_pattern=seen)
    cache = fv.KeyValueCache(2)
    projected = []
    blocks[0].cross.part.key.register_forward_hook(lambda *_: projected.append(1))  # type: ignore[union-attr]
    with torch.no_grad():
        parts = [decoder(x[:, a:b], context, context_pattern=seen, cache=cache) for a, b in ((0, 3), (3, 4), (4, 7))]
    near(torch.cat(parts, 1), whole, 256)
    assert projected == [1]


def test_a_decoder_sees_what_came_before_unless_told_otherwise() -> None:
    decoder = fv.nn.Decoder([fv.nn.Block.paper(12, 3, pre_norm=True)]).double().eval()
    x = random(BATCH, 7, 12)
    other = torch.cat([x[:, :4], random(BATCH, 3, 12, seed=5)], 1)
    near(decoder(x)[:, :4], decoder(other)[:, :4], 1)
    assert not torch.allclose(decoder(x, pattern=None)[:, :4], decoder(other, pattern=None)[:, :4])


def tiny(**options: object) -> fv.nn.Seq2Seq:
    torch.manual_seed(0)
    transformer = fv.nn.Transformer.paper(12, heads=3, layers=2, hidden=13)
    return fv.nn.Seq2Seq(17, 12, transformer=transformer, **options).double().eval()  # type: ignore[arg-type]


def test_seq2seq_is_its_parts() -> None:
    model = tiny()
    source, target = torch.randint(17, (2, 7)), torch.randint(17, (2, 5))
    table, sines = model.word.weight, fv.nn.Sinusoidal(12)
    x, y = (sines.table(torch.arange(n)).double() + table[tokens] * 12**0.5 for n, tokens in ((7, source), (5, target)))
    near(model(source, target), model.transformer(x, y) @ table.T)
    assert [name for name, _ in model.named_parameters() if "word" in name] == ["word.weight"]
    two = fv.nn.Seq2Seq((19, 17), 12, transformer=model.transformer).double()
    assert two.source_word.weight.shape == (19, 12)
    assert two(source + 2, target).shape == (2, 5, 17)


def test_the_paper_s_model_has_its_size() -> None:
    with torch.device("meta"):
        model = fv.nn.Seq2Seq(37000)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 63  # table 3 says 65 of all the variants


def test_padding_changes_nothing() -> None:
    model = tiny(pad=0)
    source, target = torch.tensor([[5, 7, 2], [3, 1, 4]]), torch.tensor([[1, 9, 6], [1, 8, 2]])
    padded = torch.cat([source, torch.zeros(2, 2, dtype=torch.int64)], 1)
    near(model(padded, target), model(source, target))
    longer = torch.cat([target, torch.zeros(2, 1, dtype=torch.int64)], 1)
    near(model.loss(padded, longer), model.loss(source, target))


def test_smoothed_labels() -> None:
    model = tiny(pad=0)
    source, target = torch.tensor([[5, 7, 2], [3, 1, 4]]), torch.tensor([[1, 9, 6, 3], [1, 8, 2, 0]])
    shares = model(source, target)[:, :-1].log_softmax(-1).detach()
    total, count = 0.0, 0
    for n in range(2):
        for m in range(3):
            if target[n, m + 1]:
                wanted = torch.full((17,), 0.2 / 17, dtype=torch.float64)
                wanted[target[n, m + 1]] += 0.8
                total, count = total - float((wanted * shares[n, m]).sum()), count + 1
    assert count == 5
    torch.testing.assert_close(model.loss(source, target, smoothing=0.2).item(), total / 5)


def test_generating_is_the_likeliest_of_the_whole() -> None:
    torch.manual_seed(0)
    transformer = fv.nn.Transformer.paper(12, heads=3, layers=2, hidden=13, pre_norm=True)
    model = fv.nn.Seq2Seq(17, 12, transformer=transformer, position=fv.nn.Learned(16, 12), pad=0).double().eval()
    model.position.weight.data.copy_(random(16, 12) * 4)  # so that it says more than one thing
    source = torch.tensor([[5, 7, 2, 0], [3, 1, 4, 1]])
    wanted = torch.full((2, 1), 16)
    with torch.no_grad():
        for _ in range(9):
            wanted = torch.cat([wanted, model(source, wanted)[:, -1:].argmax(-1)], 1)
    assert len(wanted.unique()) > 3
    assert torch.equal(model.generate(source, new=9, begin=16), wanted)
    end = int(wanted[0, 3])
    first = int((wanted[0, 1:] == end).nonzero()[0]) + 1
    cut = model.generate(source, new=9, begin=16, end=end)
    assert torch.equal(cut[0, : first + 1], wanted[0, : first + 1])
    assert not cut[0, first + 1 :].any()


def test_the_learning_rate_of_the_paper() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, fv.nn.inverse_sqrt_rate(64, warmup=5))
    for step in range(1, 12):
        wanted = 64**-0.5 * min(step**-0.5, step * 5**-1.5)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted)
        optimizer.step()
        schedule.step()


def test_bad_input() -> None:
    x, plain = torch.randn(2, 5, 12), fv.nn.Block.paper(12, 3)
    cases: dict[str, Callable[[], object]] = {
        r"a context was given to a block without cross-attention": lambda: plain(x, context=x),
        r"no context was given to a block with": lambda: fv.nn.Block.paper(12, 3, reads_context=True)(x),
        r"dim 12 does not divide into 5 heads": lambda: fv.nn.Block.paper(12, 5),
        r"the hidden size is 0": lambda: fv.nn.FeedForward(12, 0),
        r"the nn.Transformer has a Identity: wanted a TransformerEncoder": lambda: fv.nn.Transformer.from_torch(
            nn.Transformer(12, 3, custom_encoder=nn.Identity(), batch_first=True)
        ),
        r"the source is <float32 2×3>: wanted integers": lambda: tiny()(torch.ones(2, 3), torch.ones(2, 3).long()),
        r"the target is <int64 2×1>: wanted at least a beginning": lambda: tiny().loss(
            torch.ones(2, 3).long(), torch.ones(2, 1).long()
        ),
        r"warmup is 0": lambda: fv.nn.inverse_sqrt_rate(64, 0),
    }
    for match, wrong in cases.items():
        with pytest.raises(InvalidInput, match=match):
            wrong()


@pytest.mark.parametrize(
    ("made", "true"),
    [
        (fv.nn.MultiHeadAttention, lambda: nn.MultiheadAttention(12, 4)),
        (fv.nn.MultiHeadAttention, lambda: nn.MultiheadAttention(12, 4, kdim=7, vdim=5)),
        (fv.nn.Block, lambda: nn.TransformerEncoderLayer(12, 4, 20)),
        (
            fv.nn.Encoder,
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 4, 20, batch_first=True), 2, nn.LayerNorm(12)),
        ),
        (fv.nn.Transformer, lambda: nn.Transformer(12, 4, 1, 1, 20, batch_first=True)),
    ],
)
def test_what_is_frozen_in_pytorchs_module_is_frozen_here(made, true):
    module = true()
    first, *others = module.parameters()
    assert all(weight.requires_grad for weight in made.from_torch(module).parameters())
    for weight in (first, *others):
        weight.requires_grad_(False)
    assert not any(weight.requires_grad for weight in made.from_torch(module).parameters())
    first.requires_grad_(True)
    trained = [name for name, weight in made.from_torch(module).named_parameters() if weight.requires_grad]
    assert trained[0].endswith("query.weight")
    assert all(name.endswith(("query.weight", "key.weight", "value.weight")) for name in trained)
