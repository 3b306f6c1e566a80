"""One call of linear attention, checked once: every implementation may trust it.

What is the same for all of them happens here: features are applied, packed documents become steps at which the state is
emptied, and the normaliser z becomes one more column of the state, since it is the state of a value that is always 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.eager import is_known
from foveate.errors import InvalidInput
from foveate.pattern.algebra import Pattern
from foveate.pattern.checks import row_misfit
from foveate.pattern.packing import Documents, PackedDocuments
from foveate.pattern.packing import documents as by_ids
from foveate.positions import Extent
from foveate.problem import accumulator, autocast, check_tensors, without_autocast
from foveate.values import Integers, at_hand, describe, floating, is_listed, scale_of

Feature = Callable[[Tensor], Tensor]


class LinearState(NamedTuple):
    """All that the past leaves behind, in float32 or wider; it does not grow.

    s `[*batch, key heads, feature dim, value dim]` is Σ φ(k)·vᵀ, decayed and corrected; z `[*batch, key heads, feature
    dim]`, the same of values that are 1, is None without `normalize`.
    """

    s: Tensor
    z: Tensor | None


@dataclass(frozen=True, eq=False)
class LinearProblem:
    """q `[B, Hq, Nq, Dk]`, k `[B, Hk, N, Dk]`, v `[B, Hk, N, Dv]` after features; Nq = N if causal.

    decay `[1 or B, 1 or Hk, N, 1 or Dk]`, logarithms ≤ 0, or None for 0; beta `[1 or B, 1 or Hk, N, 1]` or None for 1;
    both float32 or wider. resets `[1 or B, N]` is True at the steps before which the state is emptied, or None. state
    `[B, Hk, Dk, Dv]`, float32 or wider, is what the first step finds.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    resets: Tensor | None
    state: Tensor
    scale: float
    delta_rule: bool
    causal: bool
    normalize: bool
    skipped: Tensor | None
    dtype: torch.dtype

    @property
    def needs_gradient(self) -> bool:
        """Whether autograd will ask for any gradient of this call."""
        tensors = (self.q, self.k, self.v, self.decay, self.beta, self.state)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

    def result(self, out: Tensor, state: Tensor) -> tuple[Tensor, LinearState]:
        """(out in the caller's dtype, the state handed on) from what an implementation computed."""
        s, z = state, None
        if self.normalize:
            out, total = out[..., :-1], out[..., -1:]
            s, z = state[..., :-1], state[..., -1]
            wanted = (
                "wanted a feature map whose products φ(q)·φ(k) are never negative, such as elu_plus_one, "
                "or normalize=False"
            )
            if at_hand(total) and bool((total < 0).any()):
                raise InvalidInput(f"a normaliser is {total.min().item():.3g}: {wanted}")
            if is_far(total):
                torch._assert_async((~(total < 0)).all(), f"a normaliser is negative: {wanted}")
            empty = total == 0
            out = (out / total.masked_fill(empty, 1)).masked_fill(empty, 0)
        if self.skipped is not None and self.causal:
            out = out.masked_fill(self.skipped[:, None, :, None], 0)
        return out.to(self.dtype), LinearState(s, z)


def linear_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    feature: Feature | tuple[Feature, Feature] | None = None,
    normalize: bool = False,
    delta_rule: bool = False,
    causal: bool = True,
    scale: float | None = None,
    documents: Tensor | Pattern | None = None,
    state: LinearState | None = None,
) -> LinearProblem:
    """Check a call with four-dimensional q, k, v and resolve its defaults; raises `InvalidInput` in one sentence."""
    q, k, v = autocast(q, k, v)
    check_tensors(q, k, v)
    dtype, wide = q.dtype, accumulator(q.dtype)
    batch, heads, steps = k.shape[:3]
    if causal and q.shape[2] != steps:
        raise InvalidInput(
            f"q has {q.shape[2]} steps and k has {steps}: causal linear attention reads and writes at every step, "
            "so give as many queries as keys, hand on the past as state=, or say causal=False"
        )
    if scale is None:
        scale = 1.0 if normalize or not q.shape[3] else 1 / math.sqrt(q.shape[3])  # under a normaliser it cancels
    scale = scale_of(scale)
    resets, skipped = _documents(documents, k, causal)
    with without_autocast(q.device):
        if skipped is not None:  # what a skipped position holds never matters, not even to a feature's gradient
            q, k, v = (x.masked_fill(skipped[:, None, :, None], 0) for x in (q, k, v))
        q, k = _featured(q, k, feature, wide)
        if skipped is not None:
            k = k.masked_fill(skipped[:, None, :, None], 0)
        if normalize:
            v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], -1)
        decay = _decay(decay, batch, heads, steps, k, wide)
        beta = _beta(beta, batch, heads, steps, k, wide, delta_rule)
        if skipped is not None and decay is not None:
            decay = decay.masked_fill(skipped[:, None, :, None], 0)
        if skipped is not None and beta is not None:
            beta = beta.masked_fill(skipped[:, None, :, None], 0)
    return LinearProblem(
        q, k, v, decay, beta, resets, _state(state, k, v, normalize, wide), scale,
        delta_rule, causal, normalize, skipped, dtype,
    )  # fmt: skip


def is_far(tensor: Tensor) -> bool:
    """Whether its numbers are on CUDA: the host does not wait for them, and the device is told to stop instead."""
    return tensor.is_cuda and is_known(tensor)


def _featured(
    q: Tensor, k: Tensor, feature: Feature | tuple[Feature, Feature] | None, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    if feature is None:
        return q, k
    of_q, of_k = feature if isinstance(feature, tuple) and len(feature) == 2 else (feature, feature)
    if not (callable(of_q) and callable(of_k)):
        raise InvalidInput(
            f"feature is a {type(feature).__name__}: wanted a function of a tensor, or a pair, (of q, of k)"
        )
    found = of_q(q.to(wide)), of_k(k.to(wide))
    for name, before, after in zip("qk", (q, k), found, strict=True):
        if not isinstance(after, Tensor) or after.shape[:3] != before.shape[:3] or after.dim() != 4:
            raise InvalidInput(
                f"feature made {describe(after)} of {name} {describe(before)}: wanted another last dimension alone"
            )
    if found[0].shape[3] != found[1].shape[3]:
        raise InvalidInput(
            f"feature made {describe(found[0])} of q and {describe(found[1])} of k: wanted one last dimension"
        )
    return found[0].to(wide), found[1].to(wide)


def _per_step(tensor: Tensor, what: str, want: list[int], k: Tensor, wide: torch.dtype) -> Tensor:
    """`[heads]` or what broadcasts to `want[:tensor.dim()]`, as `[1 or B, 1 or H, N, 1 or D]`."""
    tensor = floating(tensor, what, [1, *range(3, len(want) + 1)])
    if tensor.device != k.device:
        raise InvalidInput(f"{what} is on {tensor.device} but k is on {k.device}: move it")
    given = tensor
    if tensor.dim() == 1:
        tensor = tensor[None, :, None]
    if any(have != size and have != 1 for have, size in zip(tensor.shape, want, strict=False)):
        words = ["batch", "key heads", "steps", "feature dim"]
        shapes = " or ".join(f"[{', '.join(words[:n])}] = {want[:n]}" for n in range(3, len(want) + 1))
        raise InvalidInput(
            f"{what} is {describe(given)}: wanted [key heads] = [{want[1]}], or what broadcasts to {shapes}"
        )
    tensor = (tensor if tensor.dim() == 4 else tensor[..., None]).to(wide)
    return tensor.expand(-1, -1, want[2], -1)


def _decay(decay: Tensor | None, batch: int, heads: int, steps: int, k: Tensor, wide: torch.dtype) -> Tensor | None:
    if decay is None:
        return None
    decay = _per_step(decay, "decay", [batch, heads, steps, k.shape[3]], k, wide)
    wanted = "wanted natural logarithms, which are at most 0; take .log() of a factor between 0 and 1"
    if at_hand(decay) and (top := _extremes(decay)[1]) > 0:
        raise InvalidInput(f"decay goes up to {top:.3g}: {wanted}")
    if is_far(decay):
        torch._assert_async((~(decay > 0)).all(), f"a decay is above 0: {wanted}")
    return decay


def _beta(
    beta: Tensor | None, batch: int, heads: int, steps: int, k: Tensor, wide: torch.dtype, delta_rule: bool
) -> Tensor | None:
    if beta is None:
        return None
    beta = _per_step(beta, "beta", [batch, heads, steps], k, wide)
    wanted = "wanted 0 to 2 (mostly 0 to 1) for the delta rule, which forgets with I − β·k·kᵀ; take a sigmoid"
    if delta_rule and at_hand(beta):
        low, top = _extremes(beta)
        if low < 0 or top > 2:
            raise InvalidInput(f"beta goes from {low:.3g} to {top:.3g}: {wanted}")
    if delta_rule and is_far(beta):
        torch._assert_async((~((beta < 0) | (beta > 2))).all(), f"a beta is below 0 or above 2: {wanted}")
    return beta


def _extremes(x: Tensor) -> tuple[float, float]:
    """The least and the largest number, NaN aside."""
    low, top = (float(end) for end in torch.aminmax(x.detach()))
    if math.isnan(top):
        numbers = x.detach()[~x.detach().isnan()]
        return _extremes(numbers) if numbers.numel() else (low, top)
    return low, top


def step_ids(documents: Pattern | Integers, batch: int, steps: int, device: torch.device) -> Tensor:
    """The document of every step, `[1 or batch, steps]`, negative for none; raises `InvalidInput`."""
    if not isinstance(documents, Pattern) and (isinstance(documents, Tensor) or is_listed(documents)):
        documents = by_ids(documents)
    match documents:
        case Documents(ids=ids):
            ids = ids if ids.dim() == 2 else ids[None]
            reasons = row_misfit(
                documents, ids, Extent(batch, None, steps, steps, None, device), steps, "steps", exact=True
            )
        case PackedDocuments():
            ids, reasons = documents.cu_seqlens, documents.misfits(Extent(batch, None, steps, steps, None, device))
        case _:
            raise InvalidInput(
                f"documents is {documents!r}: wanted ids [batch, steps], documents(ids) or documents(cu_seqlens=)"
                if isinstance(documents, Pattern)
                else f"documents is a {type(documents).__name__}: wanted ids [batch, steps], or documents(cu_seqlens=)"
            )
    if ids.device != device:
        reasons.append(f"{documents!r} has a tensor on {ids.device} but k is on {device}: move it")
    if reasons:
        raise InvalidInput("; ".join(reasons))
    if isinstance(documents, PackedDocuments):
        ids = documents.number(torch.arange(steps, device=device))[None]
    return ids


def _documents(documents: Tensor | Pattern | None, k: Tensor, causal: bool) -> tuple[Tensor | None, Tensor | None]:
    """(where the state is emptied, which positions are passed over), `[1 or B, N]` each."""
    if documents is None:
        return None, None
    steps = k.shape[2]
    ids = step_ids(documents, k.shape[0], steps, k.device)
    if not causal:
        raise InvalidInput("documents need causal=True: without it every query reads the one state after the last step")
    # The last step before each that belongs to a document; the given state belongs to the first one.
    place = torch.arange(steps, device=k.device).expand_as(ids)
    last = torch.where(ids >= 0, place, -1).cummax(1).values
    before = torch.nn.functional.pad(last, (1, 0), value=-1)[:, :steps]
    old = ids.gather(1, before.clamp(min=0))
    return (ids >= 0) & (before >= 0) & (ids != old), ids < 0


def _state(state: LinearState | None, k: Tensor, v: Tensor, normalize: bool, wide: torch.dtype) -> Tensor:
    """`[B, H, Dk, Dv]`, the normaliser's as its last column; empty where none was given."""
    batch, heads, _, dim = k.shape
    width = v.shape[3]
    if state is None:
        return torch.zeros(batch, heads, dim, width, dtype=wide, device=k.device)
    if not isinstance(state, LinearState):
        raise InvalidInput(f"state is a {type(state).__name__}: wanted the LinearState that an earlier call returned")
    s, z = state
    if normalize != (z is not None):
        have, want = ("no z", "normalize=True keeps one") if normalize else ("a z", "only normalize=True keeps one")
        raise InvalidInput(f"state has {have}: {want}, so hand on the state of a call of the same kind")
    shapes = {"state.s": (s, (batch, heads, dim, width - int(normalize))), "state.z": (z, (batch, heads, dim))}
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or not tensor.dtype.is_floating_point:
            raise InvalidInput(f"{name} is {describe(tensor)}: wanted a floating-point tensor of shape {list(shape)}")
        if tensor.device != k.device:
            raise InvalidInput(f"{name} is on {tensor.device} but k is on {k.device}: move it")
    return s.to(wide) if z is None else torch.cat([s.to(wide), z.to(wide)[..., None]], -1)
