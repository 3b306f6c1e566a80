"""The error budget of `budget.py` for linear attention."""

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from foveate.linear import chunked, native, recurrence
from foveate.linear.problem import LinearProblem

Run = Callable[[LinearProblem], tuple[Tensor, Tensor]]


def plain_torch(problem: LinearProblem) -> tuple[Tensor, Tensor]:
    """What one writes by hand in the dtype of q: the recurrence, every step rounded to that dtype."""
    group = problem.q.shape[1] // problem.k.shape[1]
    k, v, state = (x.repeat_interleave(group, 1) for x in (problem.k, problem.v, problem.state.to(problem.q.dtype)))
    decay, beta = (
        None if x is None else x.to(problem.q.dtype).expand(-1, problem.k.shape[1], -1, -1).repeat_interleave(group, 1)
        for x in (problem.decay, problem.beta)
    )
    rows = []
    for t in range(k.shape[2]):
        if decay is not None:
            state = decay[:, :, t, :, None].exp() * state
        value = v[:, :, t]
        if problem.delta_rule:
            value = value - (state.mT @ k[:, :, t, :, None])[..., 0]
        if beta is not None:
            value = value * beta[:, :, t]
        state = state + k[:, :, t, :, None] * value[:, :, None]
        rows.append((state.mT @ problem.q[:, :, t, :, None])[..., 0] * problem.scale)
    return torch.stack(rows, 2), state[:, ::group]


def assert_linear_within_budget(
    backend: str | Run, problem: LinearProblem, dtype: torch.dtype, *, few: bool = False
) -> None:
    """error ≤ 2 × (error of plain torch in `dtype`) + 2·eps·max(1, |truth|max), gradients 3 ×, against float64.

    Three times that for results of a `few` entries, of thousands of calls.
    """
    tensors = {field.name: getattr(problem, field.name) for field in fields(problem)}
    names = [name for name, x in tensors.items() if isinstance(x, Tensor) and x.is_floating_point()]
    wide = torch.promote_types(dtype, torch.float32)

    def results(run: Run, to: torch.dtype, draw: int = 0) -> list[Tensor]:
        cast = {}
        for name in names:
            narrow = name in "qkv"
            rounded = getattr(problem, name).detach().to(dtype if narrow else wide)
            if draw and name != "state":
                rounded = rounded.roll(draw * (-1 if name == "k" else 1), 2)
                rounded = rounded.roll(draw // 8, 3) if name == "q" else rounded  # a few steps make few draws
            cast[name] = rounded.to(to if narrow else torch.promote_types(to, torch.float32)).requires_grad_()
        out, state = run(replace(problem, **cast, dtype=to))
        out = out.to(to)
        eighths = torch.Generator().manual_seed(7)
        total = sum(
            (x * (torch.randint(-8, 9, x.shape, generator=eighths) / 8).to(x.dtype)).sum() for x in (out, state)
        )
        return [out.detach(), state.detach(), *torch.autograd.grad(total, list(cast.values()))]

    named: dict[str, Run] = {"recurrence": recurrence.run, "chunked": chunked.run, "native": native.run}
    run = named[backend] if isinstance(backend, str) else backend
    truth, found = results(recurrence.run, torch.float64), results(run, dtype)
    losses = [0.0] * len(truth)
    for draw in range(32):  # one draw is a noisy measure of what plain torch loses
        true, plain = results(recurrence.run, torch.float64, draw), results(plain_torch, dtype, draw)
        losses = [max(most, furthest(x, y)) for most, x, y in zip(losses, plain, true, strict=True)]
        complaints = []
        for n, name in enumerate(("out", "state", *(f"d {name}" for name in names))):
            eps = torch.finfo(found[n].dtype).eps
            allowed = (2 if n < 2 else 3) * losses[n] + 2 * eps * max(1.0, float(truth[n].abs().max()))
            allowed *= 3 if few else 1
            if not furthest(found[n], truth[n]) <= allowed:
                complaints.append(f"{name} is off by {furthest(found[n], truth[n]):.3g}, allowed {allowed:.3g}")
        if not complaints:
            return
    raise AssertionError("; ".join(complaints))


def furthest(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).abs().max())
