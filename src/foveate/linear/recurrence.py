"""The definition of linear attention: one step after the other. Everything else is compared with this file.

    S_t = (I − δ·β_t·k_t·k_tᵀ)·A_t·S_{t−1} + β_t·k_t·v_tᵀ        A_t = diag(exp(decay_t)), δ = 1 for the delta rule
    o_t = scale · S_tᵀ·q_t

It keeps one state, differentiates twice, and takes any float dtype (sums in float32 or wider). One step is decoding.
Katharopoulos et al. 2020, "Transformers are RNNs": https://arxiv.org/abs/2006.16236; the delta rule is that of Yang et
al. 2024, https://arxiv.org/abs/2406.06484, with decays as in https://arxiv.org/abs/2412.06464.
"""

import torch
from torch import Tensor

from foveate.linear.problem import LinearProblem


def refuses(problem: LinearProblem) -> list[str]:
    """Nothing: it can compute every problem, step by step."""
    return []


def run(problem: LinearProblem) -> tuple[Tensor, Tensor]:
    """(out `[B, Hq, Nq, Dv]`, the last state `[B, Hk, Dk, Dv]`), both float32 or wider."""
    state = problem.state
    wide = state.dtype
    batch, heads, steps, dim = problem.k.shape
    group = problem.q.shape[1] // max(heads, 1)
    k, v = problem.k.to(wide), problem.v.to(wide)
    # The query heads of one key head are rows that read the same state.
    q = (problem.q.to(wide) * problem.scale).reshape(batch, heads, group, problem.q.shape[2], dim)
    rows = []
    for t in range(steps):
        if problem.resets is not None:
            state = state.masked_fill(problem.resets[:, t, None, None, None], 0)
        if problem.decay is not None:
            state = state * problem.decay[:, :, t, :, None].exp()
        value = v[:, :, t, None]
        if problem.delta_rule:
            value = value - k[:, :, t, None] @ state
        if problem.beta is not None:
            value = value * problem.beta[:, :, t, :, None]
        state = state + k[:, :, t, :, None] * value
        if problem.causal:
            rows.append(q[:, :, :, t] @ state)
    if not problem.causal:
        out = q.flatten(2, 3) @ state
    elif rows:
        out = torch.stack(rows, 3)
    else:
        out = q.new_zeros(*q.shape[:4], v.shape[3])
    return out.reshape(*problem.q.shape[:3], v.shape[3]), state
