"""Is a plan the same training as one device? A few steps of each, compared variable by variable (SEMANTICS 0)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from syncwright.capture.own_scale import scaled_by
from syncwright.capture.state import Binding
from syncwright.capture.step import capture_step
from syncwright.errors import PlanError
from syncwright.plan import AllReduce, Plan, shown
from syncwright.program import Program, Role, Variable
from syncwright.reference import Gradients, Kept, Values, concatenated, split, values_of
from syncwright.runtime.intercept import FirstStep
from syncwright.runtime.loopback import loopback
from syncwright.runtime.sharding import leading_size, part_of
from syncwright.typed import tag
from syncwright.verify import draws_random

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
FLOORS = 3.0
SAME_GRADIENT = {torch.float64: 1e-9, torch.float32: 1e-4}
SAME_GRADIENT_ELSE = 5e-2
JOINED = "the loss, or a module before it,"
Progress = Callable[[str, int], None]
T = TypeVar("T")
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
    """What was found.

    mixing     what joins the examples of a batch, so that only the parts are a reference
    weights    with which the parts' gradients add up to that of the whole batch, where the plan has others: its
               `reduce`, or the count of examples, is not the loss's
    together   trainers normalise by all examples (`sync_batch_norm`): in place of the parts, which are another computation,
               stands the whole batch with its examples in reverse
    """

    plan: Plan
    steps: int
    differences: tuple[Difference, ...]
    mixing: tuple[str, ...]
    weights: tuple[float, ...] = ()
    together: bool = False

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
    plan = replace(
        plan, accumulate=1
    )  # the mean over calls with one batch is that of one, but for buffers and random draws
    _refuse_independent(program, plan)
    _refuse_by_id(program)
    first = replace(first, step=scaled_by(first.step, plan.loss_scale))
    binding = Binding(first.model, first.optimizer, first.state)
    if any(variable.of is None for variable in program.of_role(Role.STATE)):
        capture_step(first.step, binding, first.optimizer, first.batch)  # which meets the scalers of the step
    kept, mixing = Kept(binding), mixing_in(first.model, program)
    together = plan.sync_batch_norm and any(map(_normalizes_batch, program.graph.nodes))
    if together and any(map(draws_random, program.graph.nodes)):
        raise PlanError(
            f"sync_batch_norm: found a step that also draws at random ({', '.join(mixing)}), expected one of both: no run on one "
            "device has the trainers' streams and normalises by all examples. Verify without dropout, or without sync_batch_norm."
        )

    def run(what: str, steps_of: Iterator[T]) -> tuple[Values, T]:
        kept.put_back()
        try:
            of_first = next(steps_of)
            progress(what, 1)
            for step, _ in enumerate(steps_of, start=2):
                progress(what, step)
            return values_of(binding), of_first
        finally:
            kept.put_back()

    job, _ = run("the plan", _job(first, plan, steps, without))
    whole, weights = None, ()
    if together:
        turned = replace(first, batch=_in_reverse(first.batch))
        parts, _ = run("one device, the examples in reverse", concatenated(turned, binding, steps))
        whole, _ = run("one device, the whole batch", concatenated(first, binding, steps))
        mixing = ()
    else:
        parts, gradients = run("one device, part by part", split(first, binding, plan, steps))
    if not (mixing or together):
        whole, of_whole = run("one device, the whole batch", concatenated(first, binding, steps))
        mixing, weights = _how_parts_join(gradients, of_whole)
    shown = [v for v in binding.variables.values() if v.role in (Role.PARAM, Role.STATE) or v.name in program.writes]
    reference, trusted = None if mixing else whole, not weights
    differences = tuple(_difference(v, job, parts, reference, trusted) for v in shown)
    return Check(plan, steps, differences, mixing, weights, together)


def _in_reverse(batch: tuple) -> tuple:
    count = leading_size(batch)
    return pytree.tree_map_only(torch.Tensor, lambda t: t.flip(0) if t.dim() and len(t) == count else t, batch)


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


def _how_parts_join(found: Gradients, whole: Values) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """`mixing` and `weights`, from the gradients of the first step.

    Where the parts make up the whole batch they differ by rounding, small beside the largest gradient. Otherwise the
    floor would be large, and excuse everything.
    """
    if not whole:
        return (), ()
    expected = _flat(whole, whole)
    largest = expected.abs().max().item() or 1.0
    dtypes = {gradient.dtype for gradient in whole.values()}
    tolerated = largest * max(SAME_GRADIENT.get(dtype, SAME_GRADIENT_ELSE) for dtype in dtypes)
    if not (_flat(found.reduced, whole) - expected).abs().max() > tolerated:
        return (), ()
    parts = torch.stack([_flat(part, whole) for part in found.parts], dim=1)
    weights = torch.linalg.lstsq(parts, expected[:, None]).solution
    if (parts @ weights - expected[:, None]).abs().max() > tolerated:
        return (JOINED,), ()
    return (), tuple(weights.flatten().tolist())


def _flat(gradients: Values, names: Iterable[str]) -> torch.Tensor:
    return torch.cat([gradients[name].to_dense().double().flatten() for name in names])


def _difference(variable: Variable, job: Values, parts: Values, whole: Values | None, trusted: bool) -> Difference:
    """`trusted`: the floor is rounding."""
    name = variable.name
    tolerance = TOLERANCE.get(variable.dtype, 0.0)
    if whole is None:
        return Difference(variable, None, relative(job[name], parts[name]), None, tolerance)
    floor = relative(parts[name], whole[name])
    limit = max(tolerance, FLOORS * floor) if trusted else tolerance
    return Difference(variable, relative(job[name], whole[name]), relative(job[name], parts[name]), floor, limit)


def _refuse_independent(program: Program, plan: Plan) -> None:
    for sharing in plan.sharings:
        if isinstance(sharing.sync, AllReduce) and sharing.sync.delay:
            raise PlanError(
                f"variable {sharing.variable!r}: found delay: 1, expected gradients that are applied in their own step: one "
                "device applies none later. Verify the plan without delay."
            )
        alone = len(plan.groups.alike(sharing.sync)) > 1
        if alone and sharing.variable in program.writes and plan.trainers > 1:
            found = tag(type(sharing.sync))
            found += f" over: {shown(sharing.sync.over)}" if isinstance(sharing.sync, AllReduce) else ""
            raise PlanError(
                f"variable {sharing.variable!r}: found {found}, expected a sharing that keeps trainers equal: "
                "no run on one device equals trainers that each train a copy of their own. Share it, or verify with one trainer."
            )


def _refuse_by_id(program: Program) -> None:
    for variable in [v for v in program.variables.values() if v.unbounded is not None]:
        raise PlanError(
            f"variable {variable.name!r}: found a table of any ids, expected variables whose rows stand in the same places "
            "everywhere: each keeper gives an id the place that is free. Compare exports by id, or verify with an nn.Embedding "
            "in its place."
        )


def _mixes(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.training or module.running_mean is None
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0


_BATCH_NORMS = frozenset({aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit.no_stats})


def _normalizes_batch(node: Node) -> bool:
    return node.target in _BATCH_NORMS and any(argument is True for argument in node.args)
