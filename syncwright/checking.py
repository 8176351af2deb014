"""Is a plan the same training as one device? A few steps of each, compared variable by variable (SEMANTICS 0)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Node

from syncwright.capture.state import Binding
from syncwright.errors import PlanError
from syncwright.plan import Local, Plan
from syncwright.program import Program, Role, Variable
from syncwright.reference import Kept, Values, concatenated, split, values_of
from syncwright.runtime.intercept import FirstStep
from syncwright.runtime.loopback import loopback
from syncwright.runtime.sharding import part_of
from syncwright.verify import draws_random

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
FLOORS = 3.0
Progress = Callable[[str, int], None]
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a variable of the job is from one device: max|a-b| / max|b|.

    whole  from the whole batch at once; None where that is no reference (see `Check.mixing`)
    parts  from the parts one after another
    floor  between these two, both plain PyTorch; None likewise
    limit  what is tolerated: the tolerance of the dtype, or three times the floor
    """

    variable: Variable
    whole: float | None
    parts: float
    floor: float | None
    limit: float

    @property
    def holds(self) -> bool:
        return self.parts <= self.limit and (self.whole is None or self.whole <= self.limit)


@dataclass(frozen=True, slots=True)
class Check:
    """What was found. `mixing`: what joins the examples of a batch, so that only the parts are a reference."""

    plan: Plan
    steps: int
    differences: tuple[Difference, ...]
    mixing: tuple[str, ...]

    @property
    def beyond(self) -> tuple[Difference, ...]:
        return tuple(d for d in self.differences if not d.holds)


def check_plan(
    first: FirstStep,
    program: Program,
    plan: Plan,
    steps: int,
    without: Sequence[str] = (),
    progress: Progress = lambda what, step: None,
) -> Check:
    """Trains `steps` steps on the batch of `first` in three ways, each from the user's values, which are put back.

    In a job of the plan's trainers and servers inside this process, on one device part by part, and on one device
    with the whole batch. `progress(what, step)` is called after each step. Raises `PlanError` for plans that one
    device cannot equal.
    """
    _refuse_independent(program, plan)
    binding = Binding(first.model, first.optimizer, first.state)
    kept, mixing = Kept(binding), mixing_in(first.model, program)

    def run(what: str, steps_of: Iterator[None]) -> Values:
        kept.put_back()
        try:
            for step, _ in enumerate(steps_of, start=1):
                progress(what, step)
            return values_of(binding)
        finally:
            kept.put_back()

    job = run("the plan", _job(first, plan, steps, without))
    parts = run("one device, part by part", split(first, binding, plan, steps))
    whole = run("one device, the whole batch", concatenated(first, steps)) if not mixing else None
    shown = [v for v in binding.variables.values() if v.role in (Role.PARAM, Role.STATE) or v.name in program.writes]
    return Check(plan, steps, tuple(_difference(v, job, parts, whole) for v in shown), mixing)


def mixing_in(model: nn.Module, program: Program) -> tuple[str, ...]:
    """Modules (or operations, where no module does it) whose result on a whole batch is not that on its parts."""
    found = {str(n.target): n for n in program.graph.nodes if draws_random(n) or _normalizes_batch(n)}
    if not found:
        return ()
    modules = [f"{name or 'the model'} ({type(m).__name__})" for name, m in model.named_modules() if _mixes(m)]
    return tuple(modules) or tuple(found)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a-b| / max|b|; 0 where they are equal, infinite where only one of them is a number."""
    if torch.equal(a, b):
        return 0.0
    a, b = a.double(), b.double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    finite = b.isfinite()
    apart, scale = (a - b)[finite].abs().max().item(), b[finite].abs().max().item()
    return apart / scale if scale else math.inf


def _job(first: FirstStep, plan: Plan, steps: int, without: Sequence[str]) -> Iterator[None]:
    job = loopback(
        *(first.step, first.model, first.optimizer),
        plan=plan,
        trainers=plan.trainers,
        servers=plan.servers,
        examples=first.examples,
        without=without,
        state=first.state,
    )
    parts = [part_of(first.batch, plan.trainers, k) for k in range(plan.trainers)]
    for _ in range(steps):
        job.step(parts)  # type: ignore[arg-type]
        yield
    job.sync()


def _difference(variable: Variable, job: Values, parts: Values, whole: Values | None) -> Difference:
    name = variable.name
    tolerance = TOLERANCE.get(variable.dtype, 0.0)
    if whole is None:
        return Difference(variable, None, relative(job[name], parts[name]), None, tolerance)
    floor = relative(parts[name], whole[name])
    limit = max(tolerance, FLOORS * floor)
    return Difference(variable, relative(job[name], whole[name]), relative(job[name], parts[name]), floor, limit)


def _refuse_independent(program: Program, plan: Plan) -> None:
    for sharing in plan.sharings:
        if isinstance(sharing.sync, Local) and sharing.variable in program.writes and plan.trainers > 1:
            raise PlanError(
                f"variable {sharing.variable!r}: found local, expected a sharing that keeps trainers equal: no run on "
                "one device equals trainers that each train a copy of their own. Share it, or verify with one trainer."
            )


def _mixes(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.training or module.running_mean is None
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0


_BATCH_NORMS = frozenset({aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit.no_stats})


def _normalizes_batch(node: Node) -> bool:
    return node.target in _BATCH_NORMS and any(argument is True for argument in node.args)
