"""PyTorch's fused kernels, where they mean the same.

`torch.nn.functional.scaled_dot_product_attention` is fast but differs from our meanings: it aligns a causal mask
top-left, reads past k when v is longer (both checked before), and takes its n×n fallback in silence when no fused
kernel fits. So this file corrects what it can and refuses the rest, with the reason. On CUDA PyTorch itself is asked
which of its kernels take a call on this card, and runs with those alone.

Keys hidden from one row but visible to another do matter here if they hold NaN or inf: the kernels compute 0 · NaN.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveate.locks import Lock
from foveate.pattern.custom import FromMask
from foveate.pattern.packing import PaddingKeep, PaddingLengths
from foveate.pattern.positional import Causal
from foveate.primitives import group, laid_out_as, ungroup, without_unseen
from foveate.problem import Problem, Result
from foveate.score import Bias
from foveate.values import describe

_FEW_KEYS = 16
# The context that bars a kernel is of the whole process: two of ours at once would restore each other's.
_ALONE = Lock()


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
    if q.device.type == "cuda" and not reasons:
        reasons += _unfused(problem)
    return reasons


def _unfused(problem: Problem) -> list[str]:
    call = _call(problem, only_asked=True)
    if _allowed(call, problem.needs_gradient):
        return []
    if call.mask is not None and "cudnn" in _kernels(call, problem.needs_gradient):
        return ["of its kernels only cuDNN's takes this, and with a mask that one's gradients may be NaN"]
    return [
        "none of its kernels takes this on this card, and the n×n matrix would be computed: "
        "torch.backends.cuda.can_use_efficient_attention(params, debug=True) says why"
    ]


def direct(problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """What `run` comes to for q, k, v like these, where it is one call of the fused kernel as they are."""
    if problem.q.device.type == "cuda":
        return None  # it asks each time
    queries, keys, pattern = problem.q.shape[2], problem.k.shape[2], problem.pattern
    causal = isinstance(pattern, Causal) and not _sees_all(problem)
    if problem.score is not None or problem.group > 1 or not (pattern is None or isinstance(pattern, Causal)):
        return None
    if keys < _FEW_KEYS or (causal and keys > queries):
        return None
    return partial(torch.nn.functional.scaled_dot_product_attention, is_causal=causal, scale=problem.scale)


def run(problem: Problem) -> Result:
    """One call of the fused kernel, on the keys that some row may see."""
    call = _call(problem)
    q, k, v, mask, causal, seen = call
    if seen is not None:
        kept = seen()
        k, v = (without_unseen(x, kept) for x in (k, v))
    on_cpu = k.device.type == "cpu"
    if on_cpu and not causal and (mask is None or mask.shape[1:3] == (1, 1)):
        q = group(q, k)  # the kernel for CPUs reads the keys for every head
    if mask is None and on_cpu and k.shape[2] < _FEW_KEYS:
        # Without a mask the kernel loses a NaN of the query among so few keys.
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=k.device)
        mask, causal = mask.tril() if causal else mask, False
    attend, grouped = torch.nn.functional.scaled_dot_product_attention, bool(q.shape[1] != k.shape[1])
    if k.device.type != "cuda":
        out = attend(q, k, v, mask, is_causal=causal, scale=problem.scale, enable_gqa=grouped)
        return Result(laid_out_as(problem.q, ungroup(out, problem.q)), None)
    allowed = _allowed(call._replace(k=k, v=v), problem.needs_gradient)
    with nullcontext() if torch.compiler.is_compiling() else _ALONE, sdpa_kernel(allowed):
        out = attend(q, k, v, mask, is_causal=causal, scale=problem.scale, enable_gqa=grouped)
    return Result(laid_out_as(problem.q, out), None)


class _Call(NamedTuple):
    """What PyTorch is given, and which keys a mask leaves to some row: those of k and v that are read."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    seen: Callable[[], Tensor] | None


def _call(problem: Problem, *, only_asked: bool = False) -> _Call:
    """What PyTorch is given; for a question alone a mask need not say anything."""
    q, k, v, pattern = problem.q, problem.k, problem.v, problem.pattern
    if problem.score is not None:
        (term,) = problem.score.biases
        assert isinstance(term, Bias)
        # A float32 bias stays float32 beside a narrower q: the kernel adds it to scores that are float32.
        full = term.full()
        return _Call(q, k, v, full.to(torch.promote_types(full.dtype, q.dtype)), False, term.seen)
    if isinstance(pattern, Causal):
        causal, queries = not _sees_all(problem), q.shape[2]
        if causal and k.shape[2] > queries:
            k, v = k[:, :, :queries], v[:, :, :queries]  # no row sees what comes after
        return _Call(q, k, v, None, causal, None)
    if isinstance(pattern, FromMask):
        full = pattern.full()
        return _Call(q, k, v, full, False, partial(full.any, 2))
    if pattern is not None:
        if only_asked:
            return _Call(q, k, v, q.new_empty(q.shape[0], 1, 1, k.shape[2], dtype=torch.bool), False, None)
        mask = pattern.visible(problem.pairs())
        return _Call(q, k, v, mask, False, partial(mask.select, 2, 0))
    return _Call(q, k, v, None, False, None)


def _allowed(call: _Call, trains: bool) -> list[SDPBackend]:
    """The kernels that may run a call on CUDA.

    Not cuDNN's beside a mask: where keys mod 128 is 64 and a row's log-sum-exp is below −88.7, its gradients were NaN
    (pytorch/pytorch#196678), and no version is known to be good yet.
    """
    members = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    found = _kernels(call, trains)
    return [members[name] for name in members if name in found and (name != "cudnn" or call.mask is None)]


def _kernels(call: _Call, trains: bool) -> Sequence[str]:
    q, k, v, mask, causal, _ = call
    if not torch.compiler.is_compiling():
        return asked(q, k, v, mask, causal)
    # A graph has no tensors to ask with: others like them are.
    return _asked_for_graph(
        q.device, q.dtype, None if mask is None else mask.dtype, _number(q.shape[1]), _number(k.shape[1]),
        _number(q.shape[3]), _number(v.shape[3]), causal, not causal or bool(q.shape[2] == k.shape[2]), trains,
    )  # fmt: skip


def asked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[str, ...]:
    """Which of its fused kernels PyTorch would run this call with, here and now: by version, card and switches."""
    from torch.backends import cuda

    params = cuda.SDPAParams(q, k, v, mask, 0.0, causal, q.shape[1] != k.shape[1])
    questions = {
        "flash": cuda.can_use_flash_attention,
        "efficient": cuda.can_use_efficient_attention,
        "cudnn": cuda.can_use_cudnn_attention,
    }
    return tuple(name for name, can in questions.items() if can(params))


_LENGTH = 128


def _asked_for_graph(
    device: torch.device, dtype: torch.dtype, mask: torch.dtype | None, heads: int, key_heads: int, dim: int,
    value_dim: int, causal: bool, square: bool, trains: bool,
) -> tuple[str, ...]:  # fmt: skip
    if not torch.cuda.is_available():
        return ()  # nothing is known of the card that the graph is for
    keys = _LENGTH if square else _LENGTH // 2
    q, k, v = (
        torch.empty(1, h, n, d, dtype=dtype, device=device, requires_grad=trains)
        for h, n, d in ((heads, _LENGTH, dim), (key_heads, keys, dim), (key_heads, keys, value_dim))
    )
    hidden = None if mask is None else torch.empty(1, 1, 1, keys, dtype=mask, device=device)
    return asked(q, k, v, hidden, causal)


# What torch.compiler.assume_constant_result says, without loading the compiler: it is called as the graph is made.
_asked_for_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _number(size: int) -> int:
    """A size as a number: in a graph it may be a symbol, and a loop over it makes it none."""
    return len([None for _ in range(size)])


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
