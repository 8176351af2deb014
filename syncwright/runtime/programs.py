"""Captured and lowered steps by what they were captured for: shapes of the batch, settings, branches on numbers.

An interpreted step takes any size along a dynamic axis; a compiled one is made for each shape, from the one capture.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from torch.fx import Node

from syncwright import ops
from syncwright.capture import Captured, capture_step
from syncwright.capture.axes import Axes, dynamic_axes, joined
from syncwright.capture.sizes import with_sizes
from syncwright.capture.state import Binding
from syncwright.cut.of_trainer import has_keepers, of_trainer
from syncwright.errors import BatchError, CaptureError, LoweringError
from syncwright.job import BETWEEN, IDLE_BETWEEN, STEP, Job
from syncwright.job import COMPILED as OFTEN
from syncwright.lower import communications, lower
from syncwright.passes import COMPILED, PIPELINE
from syncwright.plan import Plan
from syncwright.program import Program, Role
from syncwright.runtime import inductor
from syncwright.runtime.compiled import CompiledExecutor
from syncwright.runtime.executor import Executor, pulled_when
from syncwright.runtime.kept import Given, Kept
from syncwright.runtime.lookahead import IndexProgram
from syncwright.runtime.records import check_made
from syncwright.runtime.structure import difference
from syncwright.tree import skeleton

log = logging.getLogger("syncwright")
INTERPRETED_FIRST = 3
"""Runs of a further shape before it is compiled."""


Busy = Callable[[str], AbstractContextManager[object]]
"""Tells those who wait for this role what it does while open: capturing, compiling."""


class Warming:
    """A program that is interpreted for some runs before it is compiled, if it is. Changes with every run.

    interpreted  how many: a last, ragged batch is not worth compiling for
    name         what it is called in messages
    """

    def __init__(self, program: Program, compiled: bool, interpreted: int, name: str, busy: Busy):
        self.program = program
        self._compiled, self._left, self._name, self._busy = compiled, interpreted, name, busy
        self._executor: Executor | CompiledExecutor | None = None

    def executor(self) -> Executor | CompiledExecutor:
        """What runs it this time."""
        compile = self._compiled and self._left == 0
        if not isinstance(self._executor, CompiledExecutor if compile else Executor):
            self._executor = self._compile() if compile else Executor(self.program)
        self._left = max(0, self._left - 1)
        assert self._executor is not None, "made above"
        return self._executor

    def _compile(self) -> CompiledExecutor:
        began = time.perf_counter()
        with self._busy(f"compiling {self._name}"):
            executor = CompiledExecutor(self.program)
        log.info("compiled %s in %.1f s", self._name, time.perf_counter() - began)
        return executor


class Warmings:
    """A program of trainers, as each of them runs it (see `Warming`). Changes with every run."""

    def __init__(self, program: Program, compiled: bool, interpreted: int, name: str, busy: Busy):
        self.program, self._settings = program, (compiled, interpreted, name, busy)
        self._differ = has_keepers(program.variables.values())
        self._made: dict[int, Warming] = {}

    def executor(self, trainer: int) -> Executor | CompiledExecutor:
        """What runs it this time on a trainer."""
        which = trainer if self._differ else 0
        if which not in self._made:
            self._made[which] = Warming(of_trainer(self.program, which), *self._settings)
        return self._made[which].executor()


class Prepared:
    """A step ready to run on batches of one shape. Changes as it is used: executors are made when they are needed.

    pulls  channels that the step pulls before it sends anything, and may ask for ahead; as of how many steps later
    after  by channel, what it is about and the next step pulls: it may be asked for as soon as that is pushed
    index  what leads from a batch to ids of rows
    uses   by phase, how often it pulls each channel as of how many steps later: 1 after this step, -1 before it. In a call
           that only accumulates, without what stays until the next call
    spans  what runs in the first steps instead, with the step that is the first of others
    """

    def __init__(self, captured: Captured, job: Job, compiled: bool, interpreted: int = 0, busy: Busy = nullcontext):
        self.captured, self.job, self.compiled = captured, job, compiled
        pulls = {phase: [_pull(node) for node in _pulls(program)] for phase, program in job.trainer.items()}
        self.pulls = tuple((channel, at) for channel, at in pulls[STEP] if at < 1)
        self.after = _pulled_after(job, self.pulls)
        self.index = IndexProgram(job.trainer[STEP])
        made = job.pushed_between
        self.uses = {
            phase: Counter(pull for pull in each if phase not in (BETWEEN, IDLE_BETWEEN) or pull[0] in made)
            for phase, each in pulls.items()
        }
        self._phases = {
            phase: Warmings(program, compiled and phase in OFTEN, interpreted, "the step", busy)
            for phase, program in job.trainer.items()
        }
        self.spans = [(span.until, Prepared(captured, span.job, compiled, interpreted, busy)) for span in job.spans]

    def at(self, step: int) -> Prepared:
        """What runs at step `step`, counted from 0."""
        return next((prepared for until, prepared in self.spans if step < until), self)

    def executor(self, phase: str, trainer: int) -> Executor | CompiledExecutor:
        """Runs `job.trainer[phase]` on a trainer; the step itself compiled, where it is to be."""
        return self._phases[phase].executor(trainer)


class Programs:
    """Captured steps. Captures on demand. Changes with every new shape.

    counted  whether the user says how many examples a batch counts as
    """

    def __init__(
        self,
        step: Callable,
        binding: Binding,
        optimizer: object,
        plan: Callable[[Program], Plan],
        without: Sequence[str] = (),
        compile: bool | str = False,
        busy: Busy = nullcontext,
        dynamic_shapes: object = None,
        counted: bool = True,
    ):
        self._dynamic_shapes, self._counted = dynamic_shapes, counted
        self._axes: Axes = {}
        self._dynamic: Kept[Captured] = Kept()
        self._step, self._binding, self._optimizer = step, binding, optimizer
        self._served: str | None = None
        self._scalers = 0
        self._make_plan, self._without, self._compile, self._busy = plan, without, compile, busy
        self.latest: Prepared | None = None
        self._plan: Plan | None = None
        self._structure: tuple | None = None
        self._kept: Kept[Prepared] = Kept()

    def for_batch(self, batch: tuple) -> Prepared:
        """The step for batches like this one. Raises `BatchError` for another structure, `CaptureError`."""
        self._check_structure(batch)
        given = Given.of(batch, self._binding)
        prepared = self._kept.find(given)
        if prepared is None:
            prepared = self._prepare(given)
            given = Given.of(batch, self._binding)  # of which the step has shown a scaler, maybe
            self._kept.keep(given.key(prepared.captured.program), prepared)
        self.latest = prepared
        return prepared

    def compiles(self) -> bool:
        """Whether programs are compiled; decided once. Raises `LoweringError` where they are to be and cannot."""
        why = inductor.obstacle() if self._compile else None
        if self._compile == "auto":
            self._compile = why is None
            log.info("the step is %s", "compiled" if why is None else f"interpreted: {why}")
        elif why is not None:
            raise LoweringError(
                f"compile=True, but {why}. Expected what compiling needs. Provide it, or leave compile='auto'."
            )
        return bool(self._compile)

    def _prepare(self, given: Given) -> Prepared:
        began = time.perf_counter()
        if self.compiles():
            inductor.probe()
        with self._busy("capturing the step"):
            captured = self._captured(given)
            if self._plan is None:
                plan = self._make_plan(captured.program)
                check_made(self._binding, plan)
                self._warn(captured, plan)
                self._plan = plan
            compiled = self.compiles()
            if compiled and _is_dynamic(captured):
                captured = replace(captured, program=with_sizes(captured.program, given.sizes))
            known = None if self.latest is None else self.latest.job.exchanges
            passes = COMPILED if compiled else PIPELINE
            job = lower(captured.program, self._plan, self._without, passes, known)
        self._check_served(job)
        again = "again, for another shape or setting" if len(self._kept) else ""
        seconds = time.perf_counter() - began
        log.info("captured the step %s in %.1f s (%d nodes)", again, seconds, len(captured.program.graph.nodes))
        return Prepared(captured, job, compiled, INTERPRETED_FIRST if len(self._kept) else 0, self._busy)

    def _captured(self, given: Given) -> Captured:
        """An earlier capture of any size, or a new one."""
        if (known := self._dynamic.find(given)) is not None:
            return known
        self._axes = joined(self._axes, dynamic_axes(given.batch, self._dynamic_shapes))
        captured = capture_step(self._step, self._binding, self._optimizer, given.batch, self._axes)
        given = Given.of(given.batch, self._binding)
        self._check_scalers()
        if _is_dynamic(captured):
            self._dynamic.keep(given.key(captured.program), captured)
        return captured

    def _check_scalers(self) -> None:
        """All trainers begin with all variables."""
        if self._plan is None:
            self._scalers = len(self._binding.scalers)
        elif len(self._binding.scalers) > self._scalers:
            raise CaptureError(
                f"the step scales its loss by {len(self._binding.scalers)} GradScalers, the first one by {self._scalers}. "
                "Expected every step to use the same ones. Decide before the first step, and not by the batch, whether to scale."
            )

    def _warn(self, captured: Captured, plan: Plan) -> None:
        """Of means that the number of a trainer's examples is no weight for."""
        if self._counted or plan.trainers == 1:
            return
        for mean in captured.means:
            warnings.warn(
                f"{mean}, but trainers are weighted by their numbers of examples, so the result is not that of one device. "
                "Give distribute(..., examples=) a function of the batch that counts what the mean is over.",
                stacklevel=2,
            )

    def _check_served(self, job: Job) -> None:
        """Servers go on with the updates that they were started with: a step with others is refused."""
        if not job.servers:
            return
        self._served = self._served or job.digest
        if job.digest != self._served:
            raise LoweringError(
                "a setting of the step changed (a flag of the optimizer, a frozen layer, a number such as weight_decay that "
                "became or ceased to be zero), and with it an update that servers run. Expected servers' updates to stay as "
                "they were at the first step. Set it before the first step, or share these variables by all_reduce."
            )

    def _check_structure(self, batch: tuple) -> None:
        found = skeleton(batch)
        if self._structure is None:
            self._structure = found
        elif (said := difference(found, self._structure)) is not None:
            raise BatchError(
                f"the batch is built in another way than the first one: {said}. Give every step the same arguments, in "
                "the same tuples, lists and dicts; only sizes may differ."
            )


def _pulls(program: Program) -> list[Node]:
    """Pulls of a value as of a step; what is "latest" is asked for by itself."""
    found = [node for node in communications(program) if node.target is ops.pull]
    return [node for node in found if pulled_when(node) != "latest"]


def _pull(node: Node) -> tuple[str, int]:
    """The channel, and as of how many steps later."""
    return str(node.args[1]), int(bool(node.args[0])) - int(pulled_when(node) == "before")


def _pulled_after(job: Job, pulls: Sequence[tuple[str, int]]) -> dict[str, str]:
    kept = {job.casts[name][0] if name in job.casts else name: name for name, at in pulls if at == 0}
    return {name: kept[str(c.variable.of)] for name, c in job.channels.items() if c.variable.of in kept}


def _is_dynamic(captured: Captured) -> bool:
    return any(variable.dynamic for variable in captured.program.of_role(Role.INPUT))
