"""How far a result may be from the truth: the error budget of DESIGN's meanings, in one place.

error ≤ 2 × (error of plain torch in the same dtype) + 2·eps·max(1, |truth|max), gradients 3 ×, against float64.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from foveate.primitives import dropout_mask
from foveate.problem import Problem, Result, accumulator
from foveate.score import Score, parse
from foveate.softmax import reference

Run = Callable[[Problem], Result]
Axes = tuple[int, ...]


def plain_torch(call: Problem, *, held: bool = False) -> Result:
    """What one writes by hand in the dtype of q: the formula, every step rounded to that dtype.

    What makes the weights of a row sum to 1 has no gradient if it is `held`.
    """
    k, v = (x.repeat_interleave(call.group, 1) for x in (call.k, call.v))
    at, hold = call.pairs(), Tensor.detach if held else Tensor.clone
    scores = (call.q @ k.mT) * call.scale
    if call.score is not None:
        scores = call.score.apply(scores, at)
    if call.pattern is not None:
        scores = scores.masked_fill(~call.pattern.visible(at), -torch.inf)
    if call.normalizer is not None:
        return Result(by_sorting(call.normalizer, scores, held=held) @ v, None)
    if call.score is not None and call.score.sinks is not None:
        sinks = call.score.sinks.of(at).to(scores.dtype).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    top = hold(scores.amax(-1, keepdim=True))
    weights = (scores - top.masked_fill(top == -torch.inf, 0)).exp()
    total = hold(weights.sum(-1, keepdim=True))
    lse = torch.where(total == 0, -torch.inf, total.masked_fill(total == 0, 1).log() + top).squeeze(-1)
    weights = (weights / total.masked_fill(total == 0, 1))[..., : k.shape[2]]
    if call.dropout:
        weights = weights * dropout_mask(call.seed, call.dropout, at.batch, at.head, at.query, at.key)
        weights = weights / (1 - call.dropout)
    return Result(weights @ v, lse.to(accumulator(lse.dtype)))


def by_sorting(normalizer: object, scores: Tensor, *, held: bool = False) -> Tensor:
    """The papers' algorithms for a row of scores, −inf = hidden: sort, find how many stay, subtract the threshold."""
    if repr(normalizer) == "sigmoid":
        return 1 / (1 + (-scores).exp())
    alpha = {"sparsemax": 2.0, "entmax(1.5)": 1.5}[repr(normalizer)]
    hold = Tensor.detach if held else Tensor.clone
    x = (alpha - 1) * (scores - hold(scores.amax(-1, keepdim=True)))
    x = x.masked_fill(~x.isfinite(), -torch.inf)
    down = x.sort(-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    filled = down.masked_fill(down == -torch.inf, 0)
    mean = filled.cumsum(-1) / count
    if alpha == 2:  # Martins & Astudillo 2016, algorithm 1
        tau = mean - 1 / count
    else:  # Peters et al. 2019, algorithm 2
        spread = (filled**2).cumsum(-1) - count * mean**2
        inside = (1 - spread) / count
        tau = mean - inside.masked_fill(inside <= 0, 1).sqrt().masked_fill(inside <= 0, 0)
    stays = (tau <= down) & (down > -torch.inf)
    tau = hold(tau.gather(-1, (stays.sum(-1, keepdim=True) - 1).clamp(min=0)))
    hidden = (x <= tau) | (x == -torch.inf)
    return (x - tau).masked_fill(hidden, 0) ** (1 / (alpha - 1))


def cast(call: Problem, dtype: torch.dtype, *, gradients: bool) -> tuple[Problem, list[Tensor]]:
    """The same problem in another dtype, on leaves of its own: q, k, v, then the score's tensors."""
    leaves = [x.detach().to(dtype).requires_grad_(gradients) for x in (call.q, call.k, call.v)]
    score: Score | None = None
    if call.score is not None:
        words, tensors = call.score.spec()
        wide = torch.promote_types(dtype, torch.float32)
        fresh = [x.detach().to(wide).requires_grad_(gradients) for x in tensors]
        score = parse(words, fresh)
        leaves += fresh
    q, k, v = leaves[:3]
    return replace(call, q=q, k=k, v=v, score=score), leaves


def results(
    run: Run, call: Problem, dtype: torch.dtype, *, gradients: bool = True, alike: Axes = ()
) -> list[Tensor | None]:
    """out, lse (if there is one), and the gradients of a fixed random sum of both.

    Along the axes `alike` the gradient of the output is one number with a stride of 0, as that of a sum is.
    """
    call, leaves = cast(call, dtype, gradients=gradients)
    result = run(call)
    found: list[Tensor | None] = [result.out.detach(), None if result.lse is None else result.lse.detach()]
    if gradients:
        # Eighths are exact in every dtype, so all runs differentiate the same function.
        generator = torch.Generator().manual_seed(7)
        shape = result.out.shape
        d_out, d_lse = (
            (torch.randint(-8, 9, size, generator=generator) / 8).to(result.out.device)
            for size in ([1 if axis in alike else size for axis, size in enumerate(shape)], shape[:3])
        )
        outputs, given = [result.out], [d_out.to(result.out.dtype).expand(shape)]
        if call.needs_lse and result.lse is not None and result.lse.requires_grad:
            outputs.append(result.lse)
            given.append(d_lse.to(result.lse.dtype).masked_fill(result.lse.isinf(), 0))
        found += torch.autograd.grad(outputs, leaves, given, allow_unused=True)
    return found


class Budget:
    """What a problem may lose in `dtype`, worked out once for every implementation that is measured by it.

    The largest error of one draw is a noisy measure of what plain torch loses, so where one draw of q, k, v does not
    settle it, it is the largest over eight. Results of a `few` entries, of thousands of calls, need a measure with less
    noise: the largest over more draws, and the rounding, in the dtype of q, of the two numbers of which a gradient is
    the difference, p · dp − p · Σ p · dp. Three times that is allowed.
    """

    def __init__(
        self, call: Problem, dtype: torch.dtype, *, gradients: bool = True, alike: Axes = (), few: bool = False
    ) -> None:
        self.call, _ = cast(call, dtype, gradients=False)  # the truth is about the same rounded inputs
        self.dtype, self.gradients, self.alike = dtype, gradients, alike
        self.few, self.most_draws = few, 64 if few else 8
        self.truth = results(reference.run, self.call, torch.float64, gradients=gradients, alike=alike)
        self.parts = [0.0] * len(self.truth)
        if few and gradients:
            parts = results(functools.partial(plain_torch, held=True), self.call, torch.float64, alike=alike)
            self.parts[2:] = [0.0 if part is None else float(part.abs().max()) for part in parts[2:]]
        self.losses = [0.0] * len(self.truth)
        self.draws = 0

    def check(self, run: Run) -> None:
        """Assert that `run` loses no more than the allowed multiple of what plain torch does."""
        found = results(run, self.call, self.dtype, gradients=self.gradients, alike=self.alike)
        while any(complaints := self._complaints(found)) and self.draws < self.most_draws:
            more = _losses(self.call, self.draws, self.dtype, self.gradients, self.alike)
            self.losses = [max(pair) for pair in zip(self.losses, more, strict=True)]
            self.draws += 1
        if any(complaints):
            raise AssertionError("; ".join(filter(None, complaints)))

    def _complaints(self, found: list[Tensor | None]) -> list[str]:
        named = zip(_names(len(self.truth)), self.truth, found, self.losses, self.parts, strict=True)
        return [_excess(*one, self.dtype if self.few else None) for one in named]


def assert_within_budget(run: Run, call: Problem, dtype: torch.dtype, *, gradients: bool = True) -> None:
    """Compare `run` with the float64 reference, allowing a multiple of what plain torch loses in `dtype`."""
    Budget(call, dtype, gradients=gradients).check(run)


def complaint(run: Run, call: Problem, dtype: torch.dtype, *, gradients: bool = True, alike: Axes = ()) -> str:
    """What exceeds the budget, or nothing; of calls of any size, thousands of them.

    Where a result has a handful of entries, plain torch's largest error says little.
    """
    try:
        Budget(call, dtype, gradients=gradients, alike=alike, few=True).check(run)
    except AssertionError as error:
        return str(error)
    return ""


def _names(count: int) -> list[str]:
    return [*("out", "lse", "dq", "dk", "dv"), *(f"d tensor {n}" for n in range(count))][:count]


def _losses(call: Problem, draw: int, dtype: torch.dtype, gradients: bool, alike: Axes) -> list[float]:
    """What plain torch loses of each result: for q, k, v as they are, then for ones of the same distribution."""
    if draw:
        turns = draw // 8  # few rows make few draws
        call = replace(
            call,
            q=call.q.roll((draw, turns), (2, 3)),
            k=call.k.roll(-draw, 2),
            v=call.v.roll((2 * draw, turns), (2, 3)),
        )
    truth = results(reference.run, call, torch.float64, gradients=gradients, alike=alike)
    plain = results(plain_torch, call, dtype, gradients=gradients, alike=alike)
    return [
        0.0 if true is None or mine is None else _furthest(mine, true) for true, mine in zip(truth, plain, strict=True)
    ]


def _excess(
    name: str, true: Tensor | None, mine: Tensor | None, loss: float, parts: float, of_few: torch.dtype | None
) -> str:
    """What is wrong with one result, or nothing; the dtype of q, if it is one of few entries."""
    if mine is None or true is None:
        return "" if mine is None else f"{name}: there should be none"
    if mine.shape != true.shape:
        return f"{name} has shape {tuple(mine.shape)}, not {tuple(true.shape)}"
    if not torch.equal(true.isinf(), mine.isinf()):
        return f"{name}: other places are infinite"
    eps = max(torch.finfo(of_few if of_few and name.startswith("d") else mine.dtype).eps, 1e-15)
    most = float(true.masked_fill(true.isinf(), 0).abs().max()) if true.numel() else 0.0
    bound = (2 if name in ("out", "lse") else 3) * loss + 2 * eps * max(1.0, most, parts)
    bound *= 3 if of_few else 1
    off = _furthest(mine, true)
    return "" if off <= bound else f"{name} is off by {off:.3g}, allowed {bound:.3g}"


def _furthest(found: Tensor, true: Tensor) -> float:
    """The largest distance of finite entries; NaN where one is NaN alone."""
    difference = (found.double() - true).masked_fill(true.isinf() & found.isinf(), 0)
    return float(difference.abs().max()) if true.numel() else 0.0
