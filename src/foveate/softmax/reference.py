"""The definition of softmax attention. Everything else is compared with this file.

    scores  = scale · q·kᵀ → soft-cap → + biases → hidden keys are −inf
    weights = exp(scores − lse),  lse = log(Σ exp(scores) + exp(sink))    (or those of another normalizer)
    out     = dropout(weights) · v

It holds the whole matrix, differentiates twice, and takes any float dtype (sums in float32 or wider).
Vaswani et al. 2017, "Attention Is All You Need", equation 1: https://arxiv.org/abs/1706.03762
"""

from foveate.primitives import dropout_mask, group, laid_out_as, normalized, raw_scores, ungroup, weigh
from foveate.problem import Problem, Result, accumulator


def refuses(problem: Problem) -> list[str]:
    """Nothing: it can compute every problem, at n×n memory."""
    return []


def run(problem: Problem) -> Result:
    """Compute it as it is written."""
    q, k, v = problem.q, problem.k, problem.v
    wide = accumulator(q.dtype)
    at = problem.pairs()
    scores = raw_scores(q.to(wide), k.to(wide)) * problem.scale
    weights, _, lse = normalized(problem, scores, at)
    if problem.dropout:
        assert problem.seed is not None
        kept = dropout_mask(problem.seed, problem.dropout, at.batch, at.head, at.query, at.key)
        weights = weights * kept / (1 - problem.dropout)
    out = ungroup(weigh(group(weights, k), v.to(wide)), q)
    return Result(laid_out_as(q, out.to(q.dtype)), lse)
