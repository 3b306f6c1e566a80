"""Hard attention: what is chosen, what stands in for its gradient, and that REINFORCE's is right in expectation."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from calls import BATCH, GROUP, HEADS, gradients, near, random, random_mask, scores, tensors
from torch import Tensor

import foveate as fv
from foveate import Chosen, InvalidInput
from foveate.mechanisms import hard
from foveate.problem import problem

QUERIES, KEYS = 11, 13
PATTERNS = {"all": None, "causal": fv.causal, "some rows see nothing": fv.from_mask(random_mask(QUERIES, KEYS, 0.1))}
patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
TERMS = {
    "none": None,
    "all but sinks": fv.softcap(2.0) + fv.bias(random(1, HEADS, QUERIES, KEYS)) + fv.alibi(random(HEADS).abs()),
}
terms = pytest.mark.parametrize("score", TERMS.values(), ids=TERMS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ways(*arguments: Tensor, **options: object) -> dict[str, Chosen]:
    return {
        "straight": fv.straight_through(*arguments, temperature=0.7, **options),
        "gumbel": fv.gumbel_attention(*arguments, temperature=0.7, generator=generator(), **options),
        "sampled": fv.sampled_attention(*arguments, generator=generator(), **options),
    }


@patterns
@terms
def test_what_is_said_about_a_choice_is_what_the_weights_say(pattern, score):
    q, k, v = tensors(QUERIES, KEYS)
    weights = fv.weights(q, k, v, pattern, score=score)
    for taken in ways(q, k, v, pattern, score=score).values():
        sees = weights.sum(-1) > 0
        assert torch.equal(taken.choices >= 0, sees)
        picked = weights.gather(-1, taken.choices.clamp(min=0)[..., None]).squeeze(-1)
        assert (picked[sees] > 0).all()
        near(taken.log_prob, torch.where(sees, picked.clamp(min=1e-300).log(), 0))
        near(taken.entropy, torch.special.entr(weights).sum(-1))
        values = v.repeat_interleave(GROUP, 1)
        index = taken.choices.clamp(min=0)[..., None].expand(-1, -1, -1, v.shape[3])
        assert torch.equal(taken.out, values.gather(2, index).where(sees[..., None], 0))


@patterns
@terms
def test_straight_through_is_hardmax_forward_and_softmax_backward(pattern, score):
    leaves = tensors(QUERIES, KEYS, gradients=True)
    taken = fv.straight_through(*leaves, pattern, score=score)
    assert torch.equal(
        taken.out, fv.attention(*leaves, pattern, score=score, normalizer=fv.hardmax, backend="reference")
    )
    soft = fv.attention(*leaves, pattern, score=score, backend="reference")
    chosen = fv.attention(*leaves, pattern, score=score, normalizer=fv.hardmax, backend="reference")
    mine, by_soft, by_choice = (gradients((out,), leaves) for out in (taken.out, soft, chosen))
    for one, true in zip(mine, (*by_soft[:2], by_choice[2]), strict=True):
        near(one, true)


def test_temperature_is_that_of_the_backward_pass_alone():
    leaves = tensors(QUERIES, KEYS, gradients=True)
    warm = fv.straight_through(*leaves, temperature=2.0)
    assert torch.equal(warm.out, fv.straight_through(*leaves).out)
    soft = fv.attention(*leaves, scale=leaves[0].shape[3] ** -0.5 / 2, backend="reference")
    near(gradients((warm.out,), leaves[:1])[0], gradients((soft,), leaves[:1])[0])


def test_gumbel_equals_torch_s_own_given_the_same_noise():
    leaves = tensors(QUERIES, KEYS, gradients=True)
    taken = fv.gumbel_attention(*leaves, temperature=0.7, generator=generator(3))
    seed = hard.seed_of(generator(3))
    noise = hard.gumbel_noise(seed, problem(*leaves).pairs(), torch.float64)
    logits = leaves[0] @ leaves[1].repeat_interleave(GROUP, 1).mT * leaves[0].shape[3] ** -0.5
    soft = ((logits.log_softmax(-1) + noise) / 0.7).softmax(-1)
    one = torch.nn.functional.one_hot(soft.argmax(-1), KEYS) + soft - soft.detach()
    want = one @ leaves[2].repeat_interleave(GROUP, 1)
    near(taken.out, want)
    for mine, true in zip(gradients((taken.out,), leaves), gradients((want,), leaves), strict=True):
        near(mine, true)


@pytest.mark.parametrize("way", ["gumbel", "sampled"])
def test_draws_follow_the_weights(way):
    draws, keys = 20_000, 5
    q = random(1, 1, 1, 3).expand(1, 1, draws, 3)
    k = random(1, 1, keys, 3, seed=4)
    mask = torch.tensor([True, True, False, True, True])
    make = fv.gumbel_attention if way == "gumbel" else fv.sampled_attention
    taken = make(q, k, k, mask.expand(draws, keys), generator=generator(1))
    found = taken.choices.flatten().bincount(minlength=keys) / draws
    true = fv.weights(q, k, k, mask.expand(draws, keys), rows=[0])[0, 0, 0]
    assert found[2] == 0
    # Five standard deviations of a share: a right sampler fails once in a million.
    assert ((found - true).abs() <= 5 * (true * (1 - true) / draws).sqrt()).all()
    again = make(q, k, k, mask.expand(draws, keys), generator=generator(1))
    assert torch.equal(again.choices, taken.choices)
    assert not torch.equal(make(q, k, k, generator=generator(2)).choices, taken.choices)


def reward_of(out: Tensor, target: Tensor) -> Tensor:
    """A reward that is no sum over rows: log p of a target depends on all choices of a batch row together."""
    return -(out.mean((1, 2)) - target).square().sum(-1)


@pytest.mark.parametrize("baseline", [0.0, 3.7])
def test_the_expected_gradient_is_the_exact_one_by_enumeration(baseline):
    batch, heads, queries, keys, dim = 2, 1, 3, 5, 2
    leaves = tuple(
        x.requires_grad_() for x in (random(batch, heads, n, dim, seed=n) for n in (queries, keys, keys + 1))
    )
    q, k, v = leaves[0], leaves[1], leaves[2][:, :, :keys]
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1]]).bool()
    target = random(batch, dim, seed=8)

    weights = fv.attention(
        q, k, torch.eye(keys, dtype=q.dtype).expand(batch, heads, keys, keys), mask, backend="reference"
    )
    exact, surrogate = torch.zeros(()).double(), torch.zeros(()).double()
    for picked in itertools.product(*(row.nonzero().flatten().tolist() for row in mask)):
        choices = torch.tensor(picked).expand(batch, heads, queries)
        chance = weights.gather(-1, choices[..., None]).flatten(1).prod(-1)
        taken = fv.sampled_attention(q, k, v, mask, choices=choices)
        near(taken.log_prob.sum((1, 2)).exp(), chance)
        reward = reward_of(taken.out, target)
        exact = exact + (chance * reward).mean()
        # Each batch row is drawn by itself, so the expectation is taken row by row.
        for b in range(batch):
            mine = Chosen(*(part[b : b + 1] for part in taken))
            surrogate = (
                surrogate + chance[b].detach() * fv.reinforce_loss(reward[b : b + 1], mine, baseline=baseline) / batch
            )
    for mine, true in zip(
        torch.autograd.grad(surrogate, leaves, retain_graph=True), torch.autograd.grad(-exact, leaves), strict=True
    ):
        near(mine, true)


def test_the_average_of_many_draws_goes_to_the_exact_gradient():
    count, keys, dim = 20_000, 4, 2
    leaves = tuple(
        x.requires_grad_()
        for x in (random(1, 1, 1, dim), random(1, 1, keys, dim, seed=2), random(1, 1, keys, dim, seed=3))
    )
    q, k, v = (x.expand(count, -1, -1, -1) for x in leaves)
    target = random(1, dim, seed=8)
    shares = fv.attention(leaves[0], leaves[1], torch.eye(keys, dtype=q.dtype)[None, None], backend="reference")[
        0, 0, 0
    ]
    exact = (shares * reward_of(leaves[2][0, 0][:, None, None], target)).sum()
    true = torch.autograd.grad(-exact, leaves)
    taken = fv.sampled_attention(q, k, v, generator=generator(5))
    reward = reward_of(taken.out, target)
    found = torch.autograd.grad(fv.reinforce_loss(reward, taken, baseline=reward.detach().mean()), leaves)
    for mine, exactly in zip(found, true, strict=True):
        assert (mine - exactly).abs().max() < 5 * 2 / math.sqrt(count)  # the terms are of size 2


def test_a_baseline_that_fits_lowers_the_variance():
    q, k, v = (x.requires_grad_() for x in (random(1, 1, 1, 2), random(1, 1, 4, 2, seed=2), random(1, 1, 4, 2, seed=3)))
    spread = []
    for baseline in (0.0, 10.0):
        found = []
        for seed in range(64):
            taken = fv.sampled_attention(q, k, v, generator=generator(seed))
            loss = fv.reinforce_loss(reward_of(taken.out, random(1, 2)) + 10, taken, baseline=baseline)
            found.append(torch.autograd.grad(loss, q)[0])
        spread.append(torch.stack(found).var(0).sum())
    assert spread[1] < spread[0] / 4


def test_the_terms_of_the_loss():
    q, k, v = tensors(QUERIES, KEYS, gradients=True)
    first, second = (fv.sampled_attention(q, k, v, generator=generator(n)) for n in (1, 2))
    reward = random(BATCH).requires_grad_()
    baseline = random(BATCH, seed=3).requires_grad_()
    loss = fv.reinforce_loss(reward, [first, second], baseline=baseline, weight=0.3, entropy_weight=0.01)
    logs = sum(one.log_prob.sum((1, 2)) for one in (first, second))
    entropy = sum(one.entropy.sum((1, 2)) for one in (first, second))
    near(
        loss, -(reward + 0.3 * (reward - baseline) * logs + 0.01 * entropy).mean() + (reward - baseline).square().mean()
    )
    near(torch.autograd.grad(loss, reward, retain_graph=True)[0], torch.full((BATCH,), -1 / BATCH).double())
    near(torch.autograd.grad(loss, baseline)[0], 2 * (baseline - reward) / BATCH)
    per_row = fv.reinforce_loss(random(BATCH, HEADS, QUERIES), first)
    near(per_row, -(random(BATCH, HEADS, QUERIES) * (1 + first.log_prob)).mean())


def test_a_share_of_the_batch_takes_the_mean():
    leaves = tuple(x.requires_grad_() for x in (random(64, 1, n, 3, seed=n) for n in (2, 5, 5)))
    taken = fv.sampled_attention(*leaves, soft_share=0.5, generator=generator(1))
    soft = (taken.choices == -1).all((1, 2))
    assert 16 < soft.sum() < 48
    assert torch.equal(soft, (taken.choices == -1).any((1, 2)))
    near(taken.out[soft], fv.attention(*leaves)[soft])
    assert (taken.log_prob[soft] == 0).all()
    assert (taken.log_prob[~soft] < 0).all()
    near(fv.sampled_attention(*leaves, soft_share=1.0).out, fv.attention(*leaves))


def test_log_probabilities_and_entropies_have_right_gradients():
    leaves = tensors(3, 5, gradients=True)
    mask = random_mask(3, 5, 0.5)
    choices = fv.sampled_attention(*leaves, mask, generator=generator()).choices

    def call(q, k, v):
        taken = fv.sampled_attention(q, k, v, mask, score=fv.softcap(3.0), choices=choices)
        return taken.out, taken.log_prob, taken.entropy

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("limit", [1, KEYS * HEADS * 2, KEYS * HEADS * QUERIES * BATCH])
def test_the_size_of_a_block_is_no_part_of_the_meaning(monkeypatch, limit):
    leaves = tensors(QUERIES, KEYS, gradients=True)
    options = {"pattern": fv.causal, "score": scores(QUERIES, KEYS)["t5"]}
    whole = ways(*leaves, **options)
    monkeypatch.setattr(hard, "_SCORES", limit)
    for name, taken in ways(*leaves, **options).items():
        assert torch.equal(taken.choices, whole[name].choices)
        for mine, true in zip(taken, whole[name], strict=True):
            near(mine, true)
        outputs = [(one.out, one.log_prob, one.entropy) for one in (taken, whole[name])]
        for mine, true in zip(*(gradients(some, leaves) for some in outputs), strict=True):
            near(mine, true)


def test_without_a_batch_and_without_keys():
    q, k, v = tensors(QUERIES, KEYS)
    for name, taken in ways(q[0], k[0], v[0]).items():
        assert taken.out.shape == (HEADS, QUERIES, v.shape[3]), name
        assert taken.choices.shape == (HEADS, QUERIES)
    for taken in ways(q, k[:, :, :0], v[:, :, :0]).values():
        assert (taken.choices == -1).all()
        assert (taken.out == 0).all()
        assert (taken.log_prob == 0).all()
    for taken in ways(q[:, :, :0], k, v).values():
        assert taken.out.shape == (BATCH, HEADS, 0, v.shape[3])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_hidden_keys_never_matter(bad):
    q, k, v = tensors(QUERIES, KEYS)
    clean = ways(q, k, v, fv.prefix(7))
    k[:, :, 7:], v[:, :, 7:] = bad, bad
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    for name, taken in ways(*leaves, fv.prefix(7)).items():
        for mine, true in zip(taken, clean[name], strict=True):
            near(mine.detach(), true, 8)
        given = gradients((taken.out, taken.log_prob, taken.entropy), leaves)
        assert all(x is None or x.isfinite().all() for x in given)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (fv.straight_through, {"temperature": 0.0}, "the temperature is 0.0: wanted a positive"),
        (fv.straight_through, {"score": fv.sinks(torch.zeros(HEADS))}, "a sink is none: drop the sinks"),
        (fv.sampled_attention, {"soft_share": 1.5}, "soft_share is 1.5: wanted a share from 0 to 1"),
        (fv.sampled_attention, {"choices": torch.zeros(3)}, "choices= is <float32 3>: wanted integers"),
        (fv.sampled_attention, {"choices": torch.full((BATCH, HEADS, QUERIES), KEYS)}, "go from 13 to 13: wanted keys"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(make, options, message):
    with pytest.raises(InvalidInput, match=message):
        make(*tensors(QUERIES, KEYS), **options)


def test_a_reward_of_another_shape():
    taken = fv.sampled_attention(*tensors(QUERIES, KEYS))
    with pytest.raises(InvalidInput, match=r"the reward is <float32 7> and log_prob .*: wanted its first dimensions"):
        fv.reinforce_loss(torch.zeros(7), taken)
    with pytest.raises(InvalidInput, match="the reward is <int64 2>: wanted floats"):
        fv.reinforce_loss(torch.zeros(2).long(), taken)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB there")
def test_memory_is_linear_in_the_length():
    code = """
import resource, torch, foveate as fv
torch.set_num_threads(1)
def peak(n):
    q, k, v = (torch.randn(1, 4, n, 8).requires_grad_() for _ in range(3))
    taken = fv.sampled_attention(q, k, v)
    fv.reinforce_loss(-taken.out.square().mean((1, 2, 3)), taken, entropy_weight=0.01).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
few = peak(1024)
print((peak(4096) - few) / 2**10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, timeout=300)
    assert float(done.stdout) < 128, f"{done.stdout} MiB more; one matrix of scores has 256"
