"""Captured and lowered steps by what they were captured for: shapes of the batch, settings, branches on numbers."""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

import torch
from torch.utils import _pytree as pytree

from syncwright import ops
from syncwright.capture import Captured, capture_step
from syncwright.capture.state import Binding
from syncwright.errors import BatchError, LoweringError
from syncwright.job import Job
from syncwright.lower import communications, lower
from syncwright.passes import COMPILED, PIPELINE
from syncwright.plan import Plan
from syncwright.program import Guard, Program
from syncwright.runtime import inductor
from syncwright.runtime.compiled import CompiledExecutor
from syncwright.runtime.executor import Executor
from syncwright.runtime.structure import difference, skeleton

log = logging.getLogger("syncwright")
CAPACITY = 8
INTERPRETED_FIRST = 3
"""Runs of a further shape before it is compiled."""


Busy = Callable[[str], AbstractContextManager[object]]
"""Tells those who wait for this role what it does while open: capturing, compiling."""

T = TypeVar("T")


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


class Prepared:
    """A step ready to run on batches of one shape. Changes as it is used: executors are made when they are needed.

    pulls  channels that the step pulls before it sends anything, and may ask for ahead
    uses   by phase, how often it pulls each channel, and whether as it is after this step
    """

    def __init__(self, captured: Captured, job: Job, compiled: bool, interpreted: int = 0, busy: Busy = nullcontext):
        self.captured, self.job, self.compiled = captured, job, compiled
        pulls = {
            phase: [(str(n.args[1]), bool(n.args[0])) for n in communications(program) if n.target is ops.pull]
            for phase, program in job.trainer.items()
        }
        self.pulls = tuple(channel for channel, later in pulls["step"] if not later)
        self.uses = {phase: Counter(each) for phase, each in pulls.items()}
        self._phases = {
            "step": Warming(job.trainer["step"], compiled, interpreted, "the step", busy),
            "idle": Warming(job.trainer["idle"], False, 0, "the step", busy),
        }

    def executor(self, phase: str) -> Executor | CompiledExecutor:
        """Runs `job.trainer[phase]`; the step itself compiled, where it is to be."""
        return self._phases[phase].executor()


class Kept(Generic[T]):
    """A bounded cache of what was captured: by what it was captured for, and guards on numbers. Changes with use."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, tuple[Guard, ...]], T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: object, hypers: Mapping[str, float]) -> T | None:
        """What was captured for `key` under numbers that led to the same branches."""
        for known in self._kept:
            if known[0] == key and all(guard.holds(hypers) for guard in known[1]):
                self._kept.move_to_end(known)
                return self._kept[known]
        return None

    def keep(self, key: object, guards: tuple[Guard, ...], made: T) -> None:
        """Keeps `made`; forgets what was used longest ago."""
        self._kept[key, guards] = made
        if len(self._kept) > CAPACITY:
            self._kept.popitem(last=False)


class Programs:
    """Captured steps. Captures on demand. Changes with every new shape."""

    def __init__(
        self,
        step: Callable,
        binding: Binding,
        optimizer: object,
        plan: Callable[[Program], Plan],
        without: Sequence[str] = (),
        compile: bool | str = False,
        busy: Busy = nullcontext,
    ):
        self._step, self._binding, self._optimizer = step, binding, optimizer
        self._served: str | None = None
        self._make_plan, self._without, self._compile, self._busy = plan, without, compile, busy
        self.latest: Prepared | None = None
        self._plan: Plan | None = None
        self._structure: tuple | None = None
        self._kept: Kept[Prepared] = Kept()

    def for_batch(self, batch: tuple) -> Prepared:
        """The step for batches like this one. Raises `BatchError` for another structure, `CaptureError`."""
        self._check_structure(batch)
        key, hypers = (shapes_of(batch), self._binding.settings()), self._binding.hyper_values()
        prepared = self._kept.find(key, hypers)
        if prepared is None:
            prepared = self._prepare(batch)
            self._kept.keep(key, prepared.captured.program.guards, prepared)
        self.latest = prepared
        return prepared

    def compiles(self) -> bool:
        """Whether programs are compiled; decided once."""
        if self._compile == "auto":
            self._compile = inductor.is_available()
            log.info("the step is %s", "compiled" if self._compile else "interpreted: there is no C++ compiler")
        return bool(self._compile)

    def _prepare(self, batch: tuple) -> Prepared:
        began = time.perf_counter()
        with self._busy("capturing the step"):
            captured = capture_step(self._step, self._binding, self._optimizer, batch)
            if self._plan is None:
                self._plan = self._make_plan(captured.program)
            compiled = self.compiles()
            job = lower(captured.program, self._plan, self._without, COMPILED if compiled else PIPELINE)
        self._check_served(job)
        again = "again, for another shape or setting" if len(self._kept) else ""
        seconds = time.perf_counter() - began
        log.info("captured the step %s in %.1f s (%d nodes)", again, seconds, len(captured.program.graph.nodes))
        return Prepared(captured, job, compiled, INTERPRETED_FIRST if len(self._kept) else 0, self._busy)

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


def shapes_of(batch: tuple) -> tuple:
    """What a capture depends on: the shape, dtype and device of tensors, everything else as it is."""
    return tuple(_key(leaf) for leaf in pytree.tree_leaves(batch))


def _key(leaf: object) -> object:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    try:
        hash(leaf)
    except TypeError as error:
        raise BatchError(
            f"the batch holds a {type(leaf).__name__}; expected tensors, numbers and strings, in any tree. "
            "Turn it into a tensor: torch.as_tensor(...)."
        ) from error
    return leaf
