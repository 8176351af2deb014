"""Captured and lowered steps by what they were captured for: shapes of the batch, settings, branches on numbers."""

from __future__ import annotations

import logging
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence

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
from syncwright.program import Program
from syncwright.runtime import inductor
from syncwright.runtime.compiled import CompiledExecutor
from syncwright.runtime.executor import Executor

log = logging.getLogger("syncwright")
CAPACITY = 8
INTERPRETED_FIRST = 3
"""Runs of a further shape before it is compiled."""


class Prepared:
    """A step ready to run on batches of one shape. Changes as it is used: executors are made when they are needed.

    interpreted  how many runs are interpreted before the step is compiled: a last, ragged batch is not worth it
    """

    def __init__(self, captured: Captured, job: Job, compiled: bool, interpreted: int = 0):
        self.captured, self.job, self.compiled = captured, job, compiled
        self.pulls = tuple(
            str(n.args[1]) for n in communications(job.trainer["step"]) if n.target is ops.pull and not n.args[0]
        )
        self._interpreted = interpreted
        self._executors: dict[str, Executor | CompiledExecutor] = {}

    def executor(self, phase: str) -> Executor | CompiledExecutor:
        """Runs `job.trainer[phase]`; the step itself compiled, where it is to be."""
        compile = self.compiled and phase == "step" and self._interpreted == 0
        kind = CompiledExecutor if compile else Executor
        if not isinstance(self._executors.get(phase), kind):
            self._executors[phase] = self._make(phase, compile)
        if phase == "step" and self._interpreted:
            self._interpreted -= 1
        return self._executors[phase]

    def _make(self, phase: str, compile: bool) -> Executor | CompiledExecutor:
        program = self.job.trainer[phase]
        if not compile:
            return Executor(program)
        began = time.perf_counter()
        executor = CompiledExecutor(program)
        log.info("compiled the step in %.1f s", time.perf_counter() - began)
        return executor


class Programs:
    """A bounded cache. Captures on demand; forgets what was used longest ago. Changes with every new shape.

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
        counted: bool = True,
    ):
        self._step, self._binding, self._optimizer = step, binding, optimizer
        self._served: str | None = None
        self._counted = counted
        self._make_plan, self._without, self._compile = plan, without, compile
        self.latest: Prepared | None = None
        self._plan: Plan | None = None
        self._structure: pytree.TreeSpec | None = None
        self._kept: OrderedDict[object, Prepared] = OrderedDict()

    def for_batch(self, batch: tuple) -> Prepared:
        """The step for batches like this one. Raises `BatchError` for another structure, `CaptureError`."""
        self._check_structure(batch)
        shapes = tuple(_key(leaf) for leaf in pytree.tree_leaves(batch))
        hypers = self._binding.hyper_values()
        settings = self._binding.settings()
        for key in list(self._kept):
            if key[:2] == (shapes, settings) and all(g.holds(hypers) for g in key[2]):  # type: ignore[index]
                self._kept.move_to_end(key)
                self.latest = self._kept[key]
                return self.latest
        prepared = self.latest = self._prepare(batch)
        self._kept[shapes, settings, prepared.captured.program.guards] = prepared
        if len(self._kept) > CAPACITY:
            self._kept.popitem(last=False)
        return prepared

    def _prepare(self, batch: tuple) -> Prepared:
        began = time.perf_counter()
        captured = capture_step(self._step, self._binding, self._optimizer, batch)
        if self._plan is None:
            self._plan = self._make_plan(captured.program)
            self._warn(captured, self._plan)
        compiled = self._compiles()
        job = lower(captured.program, self._plan, self._without, COMPILED if compiled else PIPELINE)
        self._check_served(job)
        again = "again, for another shape or setting" if self._kept else ""
        seconds = time.perf_counter() - began
        log.info("captured the step %s in %.1f s (%d nodes)", again, seconds, len(captured.program.graph.nodes))
        return Prepared(captured, job, compiled, INTERPRETED_FIRST if self._kept else 0)

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

    def _compiles(self) -> bool:
        if self._compile == "auto":
            self._compile = inductor.is_available()
            log.info("the step is %s", "compiled" if self._compile else "interpreted: there is no C++ compiler")
        return bool(self._compile)

    def _check_structure(self, batch: tuple) -> None:
        structure = pytree.tree_structure(batch)
        if self._structure is None:
            self._structure = structure
        elif structure != self._structure:
            raise BatchError(
                f"the batch has another structure than the first one: found {structure}, expected {self._structure}. "
                "Give every step the same arguments; only sizes may differ."
            )


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
