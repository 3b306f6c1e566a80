"""Random calls, everything composed with everything, against float64.

python tests/fuzzing.py 7 8           runs the cases 7 and 8 again, and says what they are
python tests/fuzzing.py --minutes 5   new cases until then, their numbers from the clock
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from budget import Run, cast, complaint
from budget_linear import assert_linear_within_budget
from drawing import LEAVES, Call, Choose, T
from kernels import KERNELS, on
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import foveate as fv
from foveate import Pattern, Score
from foveate.dispatch.choose import implementation
from foveate.integrations import fused
from foveate.linear.choose import linear_implementation
from foveate.linear.problem import LinearProblem, LinearState, linear_problem
from foveate.problem import Problem, Result, problem
from foveate.score import parse as parse_score
from foveate.softmax import flex

LENGTHS = 1, 2, 3, 7, 16, 17, 31, 63, 64, 65, 71, 97, 127, 128, 129, 131, 193
DIMS = 1, 2, 3, 5, 8, 16, 17, 24, 32, 33, 59, 64, 65, 96, 128
DTYPES = torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16
NARROW = torch.bfloat16, torch.float16
Way = Callable[[Run, Problem], Result]


class Draw(Choose):
    """Choices and numbers of one case."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def one_of(self, *options: T) -> T:
        return self.random.choice(options)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def pattern(self, call: Call) -> Pattern | None:
        """A tree of patterns that fit the call."""
        if self.chance(0.15):
            return None
        found = LEAVES[self.one_of(*LEAVES)](self, call, self.generator)
        while self.chance(0.4):
            other = LEAVES[self.one_of(*LEAVES)](self, call, self.generator)
            found = self.one_of(found & other, found | other, ~found, fv.causal & found)
        return found

    def score(self, call: Call) -> Score | None:
        """A sum of some terms; now and then one moves every score far from 0."""
        sizes = call.batch, call.heads, call.queries, call.keys
        far = self.one_of(0.0, 0.0, 0.0, 0.0, -1e4, 3e4)
        terms = [
            fv.alibi(self.normal(call.heads).abs()),
            fv.relative_bias(self.normal(self.one_of(3, 33), call.heads)),
            fv.relative_bias(self.normal(12, call.heads), 17, bidirectional=self.one_of(True, False)),
            fv.bias(self.normal(*(self.one_of(1, size) for size in sizes)) + far),
            fv.softcap(self.one_of(0.9, 7.0)),
            fv.sinks(self.normal(call.heads)),
        ]
        chosen = [term for term in terms if self.chance(0.2)]
        return sum(chosen[1:], chosen[0]) if chosen else None


@dataclass(frozen=True)
class Case:
    """What is run, in words, and the running of it: what is wrong, or nothing."""

    words: str
    complaint: Callable[[], str]


def case(seed: int, *, compiles: bool = False) -> Case:
    """The case of a number; a graph is only made where there is time for it."""
    draw = Draw(seed)
    make = draw.one_of(softmax, softmax, softmax, linear, accelerated)
    return make(draw, compiles) if make is softmax else make(draw)


# How the same call can be made. Each takes what attends and the call.


def eager(attend: Run, call: Problem) -> Result:
    return attend(call)


def again(attend: Run, call: Problem) -> Result:
    """A call like one before it, whose plan is remembered."""
    attend(call)
    return attend(call)


def without_gradients(attend: Run, call: Problem) -> Result:
    with torch.inference_mode():
        return attend(call)


def recorded(attend: Run, call: Problem, record: Callable[..., Callable[..., tuple[Tensor, ...]]]) -> Result:
    def whole(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        result = attend(replace(call, q=q, k=k, v=v))
        return (result.out,) if result.lse is None else (result.out, result.lse)

    out, *lse = record(whole)(call.q, call.k, call.v)
    return Result(out, lse[0] if lse else None)


def checkpointed(attend: Run, call: Problem) -> Result:
    return recorded(attend, call, lambda whole: lambda *x: checkpoint(whole, *x, use_reentrant=False))


def traced(attend: Run, call: Problem) -> Result:
    return recorded(attend, call, lambda whole: torch.jit.trace(whole, (call.q, call.k, call.v), check_trace=False))


def compiled(attend: Run, call: Problem) -> Result:
    torch._dynamo.reset()
    return recorded(attend, call, lambda whole: torch.compile(whole, fullgraph=True, backend="aot_eager"))


def beside_subclasses(attend: Run, call: Problem) -> Result:
    """Every tensor of the score is a subclass beside plain q, k and v."""
    words, tensors = call.score.spec() if call.score is not None else ("", [])
    score = parse_score(words, [TwoTensor(x, x) for x in tensors]) if tensors else call.score
    result = attend(replace(call, score=score))
    out, lse = (x.a if isinstance(x, TwoTensor) else x for x in (result.out, result.lse))
    return Result(out, lse)


def with_lazy_signs(attend: Run, call: Problem) -> Result:
    q, k, v = (torch.complex(torch.zeros_like(x), -x).conj().imag for x in (call.q, call.k, call.v))
    return attend(replace(call, q=q, k=k, v=v))


def among_nan(attend: Run, call: Problem) -> Result:
    """Keys that no row may see hold NaN."""
    if call.pattern is None:
        return attend(call)
    batch, heads, queries, keys = call.shape
    dense = call.pattern.dense(queries, keys, query_start=call.query_start, batch=batch, heads=heads)
    unseen = ~dense.any(2).unflatten(1, (-1, call.group)).any(2)[..., None]
    return attend(replace(call, k=call.k.masked_fill(unseen, torch.nan), v=call.v.masked_fill(unseen, torch.nan)))


def under_autocast(attend: Run, call: Problem) -> Result:
    q, k, v = (x.float() for x in (call.q, call.k, call.v))
    with torch.autocast("cpu", call.q.dtype):
        return attend(replace(call, q=q, k=k, v=v))


def laid(kind: str, x: Tensor) -> Tensor:
    """The same numbers in another layout, with NaN in what lies between them."""
    match kind:
        case "heads inside":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "inside":
            return F.pad(x, (1, 2, 1, 1), value=torch.nan)[:, :, 1:-1, 1:-2]
        case "apart":
            return torch.stack([x, torch.full_like(x, torch.nan)], 3)[:, :, :, 0]
        case "dim first":
            return x.mT.contiguous().mT
        case _:
            return x


LAYOUTS = "plain", "plain", "heads inside", "inside", "apart", "dim first"


def public(backend: str) -> Run:
    """The public functions on a backend."""

    def run(call: Problem) -> Result:
        options = {
            "score": call.score, "scale": call.scale, "query_start": call.query_start, "normalizer": call.normalizer,
            "dropout": call.dropout, "seed": call.seed, "backend": backend,
        }  # fmt: skip
        if call.needs_lse:
            return Result(*fv.attention_with_lse(call.q, call.k, call.v, call.pattern, **options))
        return Result(fv.attention(call.q, call.k, call.v, call.pattern, **options), None)

    return run


def softmax(draw: Draw, compiles: bool) -> Case:
    """A call of `attention` or `attention_with_lse`."""
    batch, key_heads, group = draw.one_of(1, 1, 2, 3), draw.one_of(1, 2), draw.one_of(1, 1, 2, 5)
    sizes = Call(
        batch, key_heads * group, draw.one_of(*LENGTHS), draw.one_of(*LENGTHS),
        draw.one_of(None, None, None, draw.integer(-3, 150), torch.randint(0, 99, (batch,), generator=draw.generator)),
    )  # fmt: skip
    dim, value_dim = draw.one_of(*DIMS), draw.one_of(*DIMS)
    normalizer = draw.one_of(*[None] * 9, fv.softmax_plus_one, fv.sigmoid, fv.sparsemax, fv.entmax(1.5))
    score, dtype = draw.score(sizes), draw.one_of(*DTYPES)
    if normalizer is not None and score is not None:
        score = replace(score, sinks=None) if len(score.terms) > bool(score.sinks) else None
    whole = problem(
        draw.normal(batch, sizes.heads, sizes.queries, dim) * draw.one_of(0.1, 1, 1, 4),
        draw.normal(batch, key_heads, sizes.keys, dim),
        draw.normal(batch, key_heads, sizes.keys, draw.one_of(dim, value_dim)),
        draw.pattern(sizes), score=score, scale=draw.one_of(None, None, 0.2, -0.2), query_start=sizes.start,
        normalizer=normalizer, dropout=draw.one_of(0.0, 0.0, 0.0, 0.4), seed=draw.integer(-(2**63), 2**63 - 1),
        needs_lse=draw.chance(0.5) and normalizer in (None, fv.softmax_plus_one),
    )  # fmt: skip
    call, _ = cast(whole, dtype, gradients=False)
    kind = [draw.one_of(*LAYOUTS) for _ in range(3)]
    call = replace(call, **{name: laid(how, getattr(call, name)) for name, how in zip("qkv", kind, strict=True)})
    named = [name for name in ("sdpa", "native", "chunked", "reference") if not implementation(name).refuses(call)]
    backend = draw.one_of("auto", *named, *(["kernel"] * 2 if "native" in named else []))
    gradients = draw.chance(0.6)
    if backend == "kernel":
        kernel, threads = draw.one_of(*KERNELS), draw.integer(1, 2)
        name, attend = f"native on {kernel}, {threads} threads", on(kernel, threads)
    elif not flex.refuses(call, compiled=False) and draw.chance(0.1):
        name, attend, gradients = "flex", lambda call: flex.run(call, compiled=False), False
    else:
        name, attend = backend, public(backend)
    ways: list[Way] = [eager, eager, again, checkpointed, among_nan]
    if dtype not in NARROW and name != "sdpa":  # such tensors are every second number: PyTorch's kernels take none
        ways.append(with_lazy_signs)
    if name == backend:
        ways += [without_gradients, beside_subclasses]
        ways += [traced] if "rule" not in repr(call.pattern) else []
        ways += [under_autocast] if dtype in NARROW else []
        ways += [compiled] * 4 if compiles and "rule" not in repr(call.pattern) else []
    way = draw.one_of(*ways)
    if way in (without_gradients, beside_subclasses, traced) or (name == "auto" and way is checkpointed):
        gradients = False
    if name == "sdpa" and implementation(name).refuses(cast(call, dtype, gradients=True)[0]):
        gradients = False
    if name == "reference" and way is compiled:  # Inductor adds up a gradient's thousands of terms one after the other
        gradients = False

    def run(call: Problem) -> Result:
        q, k, v = (laid(how, x) for how, x in zip(kind, (call.q, call.k, call.v), strict=True))
        return way(attend, replace(call, q=q, k=k, v=v))

    words = (
        f"{way.__name__}, {name}, {dtype}, gradients={gradients}, layouts {kind}, q {tuple(call.q.shape)}, "
        f"v {tuple(call.v.shape)}, {call.pattern!r}, score {call.score!r}, {call.normalizer!r}, scale {call.scale}, "
        f"start {call.query_start}, dropout {call.dropout} of {call.seed}, lse {call.needs_lse}"
    )
    return Case(words, lambda: complaint(run, call, dtype, gradients=gradients))


def linear(draw: Draw) -> Case:
    """A call of `linear_attention`; its gates as every form has them."""
    batch, heads, group, steps = draw.one_of(1, 2), draw.one_of(1, 2), draw.one_of(1, 1, 3), draw.one_of(*LENGTHS[:-4])
    # A key of one dimension and length 1 is ±1: the delta rule then forgets exactly all, and gradients are exactly 0.
    dim, width, delta = draw.one_of(*DIMS[1:-2]), draw.one_of(*DIMS[:-2]), draw.chance(0.5)
    shapes = {
        "none": None, "by head": (heads,), "by step": (batch, heads, steps), "by channel": (batch, heads, steps, dim),
    }  # fmt: skip
    gate = draw.one_of(*shapes)
    options: dict[str, object] = {"delta_rule": delta, "causal": delta or draw.chance(0.8)}
    if shapes[gate] is not None:
        options["decay"] = -draw.normal(*shapes[gate]).exp() / draw.one_of(4, 400)
    if draw.chance(0.6):
        options["beta"] = draw.normal(batch, heads, steps).sigmoid()
    if options["causal"] and draw.chance(0.3):
        options["documents"] = (torch.rand(batch, steps, generator=draw.generator) < 0.1).long().cumsum(1)
    if draw.chance(0.5):
        options["state"] = LinearState(draw.normal(batch, heads, dim, width), None)
    keys, kind = F.normalize(draw.normal(batch, heads, steps, dim), dim=-1), [draw.one_of(*LAYOUTS) for _ in range(3)]
    whole = linear_problem(
        draw.normal(batch, heads * group, steps, dim), keys, draw.normal(batch, heads, steps, width), **options
    )
    dtype, backend = draw.one_of(torch.float32, *NARROW), draw.one_of("native", "native", "chunked", "recurrence")
    lazy, tells = draw.chance(0.2), draw.chance(0.2)

    def run(given: LinearProblem) -> tuple[Tensor, Tensor]:
        q, k, v = (laid(how, x) for how, x in zip(kind, (given.q, given.k, given.v), strict=True))
        if lazy and given.decay is not None:
            given = replace(given, decay=torch.complex(torch.zeros_like(given.decay), -given.decay).conj().imag)
        given = replace(given, q=q, k=k, v=v)
        attend = linear_implementation(backend).run
        return checkpoint(attend, given, use_reentrant=False) if tells else attend(given)

    def wrong() -> str:
        try:
            assert_linear_within_budget(run, whole, dtype, few=True)
        except AssertionError as error:
            return str(error)
        return ""

    words = (
        f"linear, {backend}, {dtype}, q {tuple(whole.q.shape)}, v {tuple(whole.v.shape)}, decay {gate}, layouts {kind}"
    )
    return Case(f"{words}, {sorted(options)}, delta {delta}, lazy signs {lazy}, checkpoint {tells}", wrong)


def accelerated(draw: Draw) -> Case:
    """A call of PyTorch's attention under `accelerate`, whose meaning is PyTorch's."""
    batch, key_heads, group = draw.one_of(1, 2, 3), draw.one_of(1, 2), draw.one_of(1, 1, 2, 5)
    queries, keys, dim = draw.one_of(*LENGTHS), draw.one_of(*LENGTHS), draw.one_of(*DIMS)
    heads, dtype = key_heads * group, draw.one_of(torch.float32, *NARROW)
    shape = [draw.one_of(1, size) for size in (batch, heads, queries)] + [keys]
    kind, layouts = draw.one_of("none", "causal", "mask", "bias"), [draw.one_of(*LAYOUTS) for _ in range(3)]
    mask = torch.rand(shape, generator=draw.generator) < draw.one_of(0.1, 0.5, 0.95)
    bias = (draw.normal(*shape) + draw.one_of(0.0, 0.0, 1e4)).masked_fill(mask, -torch.inf).to(dtype)
    whole = problem(
        *(draw.normal(batch, h, n, dim) for h, n in ((heads, queries), (key_heads, keys), (key_heads, keys))),
        {"causal": fv.causal, "mask": mask}.get(kind), score=bias.float() if kind == "bias" else None,
        scale=draw.one_of(None, 0.2, -0.2), query_start=0,
    )  # fmt: skip
    call, _ = cast(whole, dtype, gradients=False)
    given = {"mask": mask, "bias": bias}.get(kind)
    # Of a row with one key the gradient is 0, and PyTorch's own kernel misses it by as much: no budget says so.
    seen = torch.ones(queries, keys, dtype=torch.bool) if given is None else mask if kind == "mask" else ~mask
    seen = seen.tril() if kind == "causal" else seen
    gradients = not bool((seen.sum(-1) == 1).any())

    def run(call: Problem) -> Result:
        q, k, v = (laid(how, x) for how, x in zip(layouts, (call.q, call.k, call.v), strict=True))
        leads = fused.leads_forward, fused.leads_backward
        fused.leads_forward = fused.leads_backward = lambda *_: True  # type: ignore[assignment]
        try:
            with fv.accelerate():
                out = F.scaled_dot_product_attention(
                    q, k, v, given, is_causal=kind == "causal", scale=call.scale, enable_gqa=group > 1
                )
                return Result(Held.apply(out), None)
        finally:
            fused.leads_forward, fused.leads_backward = leads

    words = f"accelerated, {dtype}, q {tuple(call.q.shape)}, k {tuple(call.k.shape)}, {kind} {shape}, layouts {layouts}"
    return Case(f"{words}, scale {call.scale}", lambda: complaint(run, call, dtype, gradients=gradients))


class Held(torch.autograd.Function):
    """The same; its gradient is asked for after the block, as a user's is."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def check(seed: int, *, compiles: bool = False) -> None:
    """Raise `AssertionError` that names the case, what is wrong, and how to run it again."""
    torch.manual_seed(seed)
    one = case(seed, compiles=compiles)
    try:
        found = one.complaint()
    except Exception as error:
        raise AssertionError(f"case {seed}: {one.words}: run again by `make fuzz SEED={seed}`") from error
    assert not found, f"case {seed}: {one.words}: {found}; run again by `make fuzz SEED={seed}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, help="the cases to run")
    parser.add_argument("--minutes", type=float, default=0, help="run new cases for so long")
    parser.add_argument("--first", type=int, help="the number of the first new case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        print(case(seed, compiles=True).words)
        check(seed, compiles=True)
    end, seed, wrong = time.monotonic() + 60 * arguments.minutes, arguments.first or time.time_ns() // 1000, 0
    first = seed
    while time.monotonic() < end:
        try:
            check(seed, compiles=True)
        except AssertionError as error:
            wrong += 1
            print(error, repr(error.__cause__)[:300] if error.__cause__ else "", file=sys.stderr, flush=True)
        seed += 1
    if arguments.minutes:
        print(f"{seed - first} cases from {first} on, {wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
