"""PyTorch's fused kernels, where they mean the same.

`torch.nn.functional.scaled_dot_product_attention` is fast but differs from our meanings: it aligns a causal mask
top-left, reads past k when v is longer (both checked before), and takes its n×n fallback in silence when no fused
kernel fits. So this file corrects what it can and refuses the rest, with the reason.

Keys hidden from one row but visible to another do matter here if they hold NaN or inf: the kernels compute 0 · NaN.
"""

import torch
from torch import Tensor

from foveate.pattern.algebra import Pattern
from foveate.pattern.given import FromMask
from foveate.pattern.packing import PaddingKeep, PaddingLengths
from foveate.pattern.positional import Causal
from foveate.problem import Problem, Result
from foveate.score import Bias


def refuses(problem: Problem) -> list[str]:
    """Every reason for which a fused kernel would compute something else, or an n×n fallback would run."""
    q, v = problem.q, problem.v
    _, _, queries, keys = problem.shape
    reasons = []
    if problem.needs_lse:
        reasons.append("returns no log-sum-exp")
    if problem.dropout:
        reasons.append("draws its dropout from another random stream")
    if q.shape[3] != v.shape[3]:
        reasons.append(f"v has head size {v.shape[3]} but q has {q.shape[3]}")
    if q.device.type not in ("cpu", "cuda", "meta"):
        reasons.append(f"no fused kernel is known on {q.device.type}")
    if q.device.type == "cuda":
        if q.dtype == torch.float64:
            reasons.append("float64 has no fused kernel on cuda")
        if q.shape[3] > 256 or q.shape[3] % 8:
            reasons.append(f"head size {q.shape[3]} has no fused kernel on cuda (multiples of 8 up to 256 have)")
        if problem.group > 1 and (problem.pattern or problem.score or q.dtype == torch.float32):
            reasons.append("grouped heads with a mask or in float32 have no fused kernel on cuda")
    if any(x.numel() and x.stride(3) != 1 for x in (q, problem.k, v)):
        reasons.append("the last stride of q, k or v is not 1")
    reasons += _score_reasons(problem)
    pattern = problem.pattern
    if isinstance(pattern, Causal):
        if not isinstance(problem.query_start, int | torch.SymInt):
            reasons.append("query_start differs in the batch")
        elif not _sees_all(problem) and problem.query_start != 0:
            reasons.append(f"its causal mask is top-left, but the first query stands at {problem.query_start}")
        if problem.score and not _sees_all(problem):
            reasons.append("takes causal or a bias, not both")
    elif pattern is not None:
        if not isinstance(pattern, PaddingLengths | PaddingKeep | FromMask):
            reasons.append(f"the pattern {pattern!r} would need a mask of {queries} × {keys}")
        elif problem.score:
            reasons.append("takes a mask or a bias, not both")
    return reasons


def run(problem: Problem) -> Result:
    """One call of the fused kernel, on the keys that some row may see."""
    k, v, mask, causal = problem.k, problem.v, None, False
    pattern = problem.pattern
    if isinstance(pattern, Causal) and not _sees_all(problem):
        causal = True
        k, v = k[:, :, : problem.q.shape[2]], v[:, :, : problem.q.shape[2]]  # no row sees what comes after
    elif pattern is not None and not isinstance(pattern, Causal):
        mask, seen = _mask(pattern, problem)
        k, v = (x.masked_fill(~seen, 0) for x in (k, v))  # what nobody sees never matters, NaN or not
    if problem.score is not None:
        (term,) = problem.score.biases
        assert isinstance(term, Bias)
        mask = term.full().to(problem.q.dtype)
        hidden = (mask == float("-inf")).all(2, keepdim=True)
        if hidden.shape[1] > 1:
            hidden = hidden.all(1, keepdim=True)
        k, v = (x.masked_fill(hidden.mT, 0) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        problem.q, k, v, mask, is_causal=causal, scale=problem.scale, enable_gqa=problem.group > 1
    )
    return Result(out, None)


def _sees_all(problem: Problem) -> bool:
    """Whether the first query already stands at or behind the last key, so that causal hides nothing."""
    start = problem.query_start
    return isinstance(start, int | torch.SymInt) and bool(start >= problem.k.shape[2] - 1)


def _score_reasons(problem: Problem) -> list[str]:
    score = problem.score
    if score is None:
        return []
    reasons = [f"takes no {type(term).__name__.lower()}" for term in score.terms if not isinstance(term, Bias)]
    biases = [term for term in score.biases if isinstance(term, Bias)]
    if len(biases) > 1:
        reasons.append("takes one bias")
    if torch.is_grad_enabled() and any(term.tensor.requires_grad for term in biases):
        reasons.append("the bias needs a gradient")
    return reasons


def _mask(pattern: Pattern, problem: Problem) -> tuple[Tensor, Tensor]:
    """The boolean mask as the kernel takes it, and which keys any row may see, `[batch, 1 or key heads, keys, 1]`."""
    if isinstance(pattern, FromMask):
        mask = pattern.full()
        seen = mask.any(2, keepdim=True)
        if seen.shape[1] > 1:
            seen = seen.unflatten(1, (-1, problem.group)).any(2)
        if seen.shape[3] == 1:
            seen = seen.expand(-1, -1, -1, problem.k.shape[2])
        return mask, seen.mT
    keep = pattern.visible(problem.pairs())
    return keep, keep.mT
