"""PyTorch's fused kernels, where they mean the same.

`torch.nn.functional.scaled_dot_product_attention` is fast but differs from our meanings: it aligns a causal mask
top-left, reads past k when v is longer (both checked before), and takes its n×n fallback in silence when no fused
kernel fits. So this file corrects what it can and refuses the rest, with the reason.

Keys hidden from one row but visible to another do matter here if they hold NaN or inf: the kernels compute 0 · NaN.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from foveate.pattern.given import FromMask
from foveate.pattern.packing import PaddingKeep, PaddingLengths
from foveate.pattern.positional import Causal
from foveate.primitives import group, laid_out_as, ungroup, without_unseen
from foveate.problem import Problem, Result
from foveate.score import Bias
from foveate.values import describe

_FEW_KEYS = 16


def refuses(problem: Problem) -> list[str]:
    """Every reason for which a fused kernel would compute something else, or an n×n fallback would run."""
    q, v = problem.q, problem.v
    reasons = []
    if torch.autograd.forward_ad._current_level >= 0:
        reasons.append('has no forward derivative: backend="reference" has')
    if problem.needs_lse:
        reasons.append("returns no log-sum-exp")
    if problem.normalizer is not None:
        reasons.append(f"computes softmax, not {problem.normalizer}")
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
        if problem.group > 1 and (problem.pattern is not None or problem.score is not None or q.dtype == torch.float32):
            reasons.append("grouped heads with a mask or in float32 have no fused kernel on cuda")
    if q.stride(3) != 1 or problem.k.stride(3) != 1 or v.stride(3) != 1:
        reasons.append("the last stride of q, k or v is not 1")
    reasons += _score_reasons(problem)
    pattern = problem.pattern
    if isinstance(pattern, Causal):
        if not isinstance(problem.query_start, int | torch.SymInt):
            reasons.append("query_start differs in the batch")
        elif not _sees_all(problem) and problem.query_start != 0:
            reasons.append("its causal mask is top-left, and the first query does not stand at the first key")
        if problem.score and not _sees_all(problem):
            reasons.append("takes causal or a bias, not both")
    elif pattern is not None:
        if not isinstance(pattern, PaddingLengths | PaddingKeep | FromMask):
            reasons.append(f"the pattern {pattern!r} would need a mask as large as the weights")
        elif problem.score:
            reasons.append("takes a mask or a bias, not both")
    return reasons


def direct(problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """What `run` comes to for q, k, v like these, where it is one call of the fused kernel as they are."""
    queries, keys, pattern = problem.q.shape[2], problem.k.shape[2], problem.pattern
    causal = isinstance(pattern, Causal) and not _sees_all(problem)
    if problem.score is not None or problem.group > 1 or not (pattern is None or isinstance(pattern, Causal)):
        return None
    if keys < _FEW_KEYS or (causal and keys > queries):
        return None
    return partial(torch.nn.functional.scaled_dot_product_attention, is_causal=causal, scale=problem.scale)


def run(problem: Problem) -> Result:
    """One call of the fused kernel, on the keys that some row may see."""
    k, v, mask, causal = problem.k, problem.v, None, False
    pattern = problem.pattern
    if isinstance(pattern, Causal) and not _sees_all(problem):
        causal, queries = True, problem.q.shape[2]
        if k.shape[2] > queries:
            k, v = k[:, :, :queries], v[:, :, :queries]  # no row sees what comes after
    elif isinstance(pattern, FromMask):
        mask, seen = pattern.full(), pattern.full().any(2)
        k, v = without_unseen(k, seen), without_unseen(v, seen)
    elif pattern is not None and not isinstance(pattern, Causal):
        mask = pattern.visible(problem.pairs())
        k, v = without_unseen(k, mask[:, :, 0]), without_unseen(v, mask[:, :, 0])
    if problem.score is not None:
        (term,) = problem.score.biases
        assert isinstance(term, Bias)
        # A float32 bias stays float32 beside a narrower q: the kernel adds it to scores that are float32.
        mask, seen = term.full().to(torch.promote_types(term.tensor.dtype, problem.q.dtype)), term.seen()
        k, v = without_unseen(k, seen), without_unseen(v, seen)
    q = problem.q
    if k.device.type == "cpu" and not causal and (mask is None or mask.shape[1:3] == (1, 1)):
        q = group(q, k)  # the kernel for CPUs reads the keys for every head
    if mask is None and k.device.type == "cpu" and k.shape[2] < _FEW_KEYS:
        # Without a mask the kernel loses a NaN of the query among so few keys.
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=k.device)
        mask, causal = mask.tril() if causal else mask, False
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=problem.scale, enable_gqa=bool(q.shape[1] != k.shape[1])
    )
    return Result(laid_out_as(problem.q, ungroup(out, problem.q)), None)


def _sees_all(problem: Problem) -> bool:
    """Whether the first query already stands at or behind the last key, so that causal hides nothing."""
    start = problem.query_start
    return isinstance(start, int | torch.SymInt) and bool(start >= problem.k.shape[2] - 1)


def _score_reasons(problem: Problem) -> list[str]:
    score, q = problem.score, problem.q
    if score is None:
        return []
    reasons = [
        f"takes no {term.write(describe).partition('(')[0]}" for term in score.terms if not isinstance(term, Bias)
    ]
    biases = [term for term in score.biases if isinstance(term, Bias)]
    if len(biases) > 1:
        reasons.append("takes one bias")
    taken = (q.dtype,) if q.device.type == "cuda" else (q.dtype, torch.float32)
    if any(torch.promote_types(term.tensor.dtype, q.dtype) not in taken for term in biases):
        reasons.append(f"the bias is {biases[0].tensor.dtype} but q is {q.dtype}: it would be rounded")
    if torch.is_grad_enabled() and any(term.tensor.requires_grad for term in biases):
        reasons.append("the bias needs a gradient")
    return reasons
