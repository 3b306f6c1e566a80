"""Linear attention a chunk of steps at a time: matrix products inside, and one state handed from chunk to chunk.

    steps    0 … C−1         C … 2C−1        2C … 3C−1
           ┌─────────┐ S_C  ┌─────────┐ S_2C ┌─────────┐
    S_0 ─→ │ C × C ◣ │ ───→ │ C × C ◣ │ ───→ │ C × C ◣ │ ─→ S_T      out = read(state before) + ◣·written
           └─────────┘      └─────────┘      └─────────┘

With e^(a→b) for the decay from after step a up to and with step b, and ◣ for the part on and below the diagonal:

    u   = β·(v − δ·[k·e^(0→t)·S + ◣′(k·e^(j→t)·kᵀ)·u])    ◣′ without the diagonal: a triangular system if δ = 1
    out = q·e^(0→t)·S + ◣(q·e^(j→t)·kᵀ)·u
    S′  = e^(0→C)·S + (k·e^(t→C))ᵀ·u = M·S + X             the only line that waits for the chunk before

Every exponent is a sum of decays, so it is ≤ 0 and nothing overflows, and no sum is the difference of two others, so
nothing cancels. Decays by channel would need C × C × dim exponents; halving a chunk again and again needs log₂ C × dim
a step instead: from the first half to the second everything goes through the middle.

Memory is O(T·C), forward and backward. Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over
Sequence Length": https://arxiv.org/abs/2406.06484; decays: https://arxiv.org/abs/2312.06635,
https://arxiv.org/abs/2412.06464
"""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.eager import is_known
from foveate.linear.problem import LinearProblem
from foveate.values import static_size

_CHUNKS = 16, 64  # the fewest and the most steps in a chunk, unless there are fewer
_NOTHING = -1000.0  # its exponential is 0 in every dtype, and its sums stay finite


def refuses(problem: LinearProblem) -> list[str]:
    """Nothing: it can compute every problem."""
    return []


def run(problem: LinearProblem, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """(out `[B, Hq, Nq, Dv]`, the last state `[B, Hk, Dk, Dv]`), both float32 or wider."""
    if chunk is None:
        least, most = _CHUNKS
        dim = static_size(problem.k.shape[3])
        # The delta rule solves a system of the keys of a chunk; more keys than dimensions make it lose digits.
        chunk = min(most, max(least, 1 << (dim - 1).bit_length())) if problem.delta_rule else most
    return _finite(problem, chunk) if _is_finite(problem) else _with_broken(problem, chunk)


def _is_finite(problem: LinearProblem) -> bool:
    """Whether it is known that all is finite: on a CPU a look at the extremes is cheap, elsewhere it would wait."""
    looked = [x for x in (problem.k, problem.v, problem.state, problem.beta, problem.decay) if x is not None]
    if any(x.device.type != "cpu" or (x.numel() and not is_known(x)) for x in looked):
        return False
    for x in looked:
        low, high = (float(end.detach()) for end in x.aminmax()) if x.numel() else (0.0, 0.0)
        if math.isnan(high) or (x is not problem.decay and not (math.isfinite(low) and math.isfinite(high))):
            return False  # a decay may be −∞
    return True


def _with_broken(problem: LinearProblem, chunk: int) -> tuple[Tensor, Tensor]:
    """A step that holds NaN or infinity breaks the later rows of its document, and inside a product it would break all.

    So it is left out of the products, and the rows that come after it are NaN.
    """
    bad = _broken(problem)
    k, v, state = (x.masked_fill(~x.isfinite(), 0) for x in (problem.k, problem.v, problem.state))
    decay, beta = problem.decay, problem.beta
    if decay is not None:
        decay = decay.masked_fill(decay.isnan(), 0)
    if beta is not None:
        beta = beta.masked_fill(~beta.isfinite(), 0)
    out, last = _finite(replace(problem, k=k, v=v, decay=decay, beta=beta, state=state), chunk)
    place = torch.arange(bad.shape[-1], device=bad.device)
    first = place.new_zeros(1, bad.shape[-1])  # where the document of each place begins; place 0 is the given state
    if problem.resets is not None:
        first = torch.where(pad(problem.resets, (1, 0)), place, 0).cummax(-1).values
    broken = torch.where(bad, place, -1).cummax(-1).values >= first[:, None]  # [B, Hk, 1 + N]
    last = last.masked_fill(broken[:, :, -1, None, None], math.nan)
    rows = broken[:, :, 1:] if problem.causal else broken[:, :, -1:]
    rows = rows.repeat_interleave(out.shape[1] // max(rows.shape[1], 1), 1)
    return out.masked_fill(rows[..., None], math.nan), last


def _broken(problem: LinearProblem) -> Tensor:
    """Which of (the given state, step 0, step 1 …) hold NaN or infinity, `[B, Hk, 1 + N]`; a decay may be −∞."""
    bad = ~(problem.k.isfinite().all(-1) & problem.v.isfinite().all(-1))
    if problem.decay is not None:
        bad = bad | problem.decay.isnan().any(-1)
    if problem.beta is not None:
        bad = bad | ~problem.beta.isfinite().all(-1)
    return torch.cat([~problem.state.isfinite().all(-1).all(-1, keepdim=True), bad], -1)


def _finite(problem: LinearProblem, chunk: int) -> tuple[Tensor, Tensor]:
    state = problem.state
    wide = state.dtype
    batch, heads, steps, dim = problem.k.shape
    group, width = problem.q.shape[1] // max(heads, 1), problem.v.shape[3]
    chunk = max(1, min(chunk, steps))

    def cut(x: Tensor) -> Tensor:
        """`[…, N, D]` → `[…, chunks, C, D]`; steps added at the end neither write nor decay."""
        chunks: Tensor = pad(x.to(wide), (0, 0, 0, -x.shape[-2] % chunk)).unflatten(-2, (-1, chunk))
        return chunks

    k, u, decays = cut(problem.k), cut(problem.v), _decays(problem)
    decay = None if decays is None else cut(decays)
    beta = None if problem.beta is None else cut(problem.beta)
    if beta is not None:
        u = u * beta
    # From the state before the chunk to a step, and from a step to the state after the chunk.
    to_step = None if decay is None else decay.cumsum(-2).exp()
    leaving = k if decay is None else k * _after(decay).exp()
    carry = None if to_step is None else to_step[..., -1, :, None]  # [1 or B, 1 or H, chunks, 1 or Dk, 1]
    reading = None
    if problem.delta_rule:
        reading = _times(k, to_step)
        inside = _pairs(k[:, :, :, None], k, decay)[:, :, :, 0].tril(-1)
        if beta is not None:
            reading, inside = reading * beta, inside * beta
        solved = torch.linalg.solve_triangular(inside, torch.cat([u, reading], -1), upper=False, unitriangular=True)
        u, reading = solved.split([width, dim], -1)
        # M: what decays, less what the chunk's keys overwrite.
        identity = torch.eye(dim, dtype=wide, device=k.device)
        carry = _times(identity, carry) - leaving.mT @ reading
    written = leaving.mT @ u
    states = []
    for n in range(k.shape[2]):
        states.append(state)
        if reading is not None and carry is not None:
            state = carry[:, :, n] @ state + written[:, :, n]
        else:
            state = _times(state, None if carry is None else carry[:, :, n]) + written[:, :, n]
    if not problem.causal:
        q = problem.q.to(wide).reshape(batch, heads, group * problem.q.shape[2], dim) * problem.scale
        return (q @ state).reshape(*problem.q.shape[:3], width), state
    before = torch.stack(states, 2) if states else written
    if reading is not None:
        u = u - reading @ before
    # The query heads of one key head are rows beside each other: [B, H, chunks, group, C, D].
    q = cut(problem.q.reshape(batch, heads, group, steps, dim)).transpose(2, 3) * problem.scale
    inner = _pairs(q, k, decay).flatten(3, 4) @ u
    outer = _times(q, None if to_step is None else to_step[:, :, :, None]).flatten(3, 4) @ before
    out = (inner + outer).unflatten(3, (group, chunk)).transpose(2, 3).flatten(3, 4)[:, :, :, :steps]
    return out.reshape(*problem.q.shape[:3], width), state


def _decays(problem: LinearProblem) -> Tensor | None:
    """The decays with resets among them, finite: what is emptied has decayed to nothing."""
    decay = problem.decay
    if decay is not None:
        decay = decay.clamp(min=_NOTHING)
    if problem.resets is None:
        return decay
    resets = problem.resets[:, None, :, None]
    if decay is None:
        return resets * torch.full((), _NOTHING, dtype=problem.state.dtype, device=resets.device)
    return decay.masked_fill(resets, _NOTHING)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _after(decay: Tensor) -> Tensor:
    """Σ of the decays of the later steps, `[…, C, D]`: to the end of the chunk, without the step's own."""
    later: Tensor = pad(decay[..., 1:, :], (0, 0, 0, 1))
    return later.flip(-2).cumsum(-2).flip(-2)


def _pairs(a: Tensor, b: Tensor, decay: Tensor | None) -> Tensor:
    """Σ_d a_id·b_jd·exp(Σ decay_md over j < m ≤ i) for j ≤ i, and 0 elsewhere.

    a `[B, H, chunks, group, C, D]`, b `[B, H, chunks, C, D]`, decay `[1 or B, 1 or H, chunks, C, 1 or D]` →
    `[B, H, chunks, group, C, C]`.
    """
    size = b.shape[-2]
    if decay is None:
        return _products(a, b).tril()
    if decay.shape[-1] == 1:
        # Summed by a product with ones: row i, column j holds the decays of j < m ≤ i.
        ones = torch.ones(size, size, dtype=decay.dtype, device=decay.device)
        between = ones.tril() @ (decay * ones.tril(-1))
        return _products(a, b) * between.exp().tril()[:, :, :, None]
    levels = (static_size(size) - 1).bit_length()
    a, b, decay = (pad(x, (0, 0, 0, (1 << levels) - size)) for x in (a, b, decay))
    blocks = (a * b[:, :, :, None]).sum(-1)[..., None, None]  # 1 × 1 on the diagonal: no decay from a step to itself
    for level in range(levels):
        halves = (-1, 2, 1 << level)
        (early, _), (before, behind) = (x.unflatten(-2, halves).unbind(-3) for x in (b, decay))
        late = a.unflatten(-2, halves)[..., 1, :, :] * behind.cumsum(-2).exp()[:, :, :, None]
        below = _products(late.transpose(3, 4), early * _after(before).exp()).transpose(3, 4)
        left, right = blocks.unflatten(-3, (-1, 2)).unbind(-3)
        blocks = torch.cat([pad(left, (0, 1 << level)), torch.cat([below, right], -1)], -2)
    return blocks[..., 0, :size, :size]


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a `[…, group, C, D]` with b `[…, C, D]`: `[…, group, C, C]`, without repeating b."""
    products: Tensor = (a.flatten(-3, -2) @ b.mT).unflatten(-2, a.shape[-3:-1])
    return products
