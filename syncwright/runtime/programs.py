"""Captured and lowered steps by what they were captured for: shapes of the batch, settings, branches on numbers.

An interpreted step takes any size along a dynamic axis; a compiled one is made for each shape, from the one capture.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils import _pytree as pytree

from syncwright import ops
from syncwright.capture import Captured, capture_step
from syncwright.capture.axes import Axes, dynamic_axes, joined, name_of
from syncwright.capture.sizes import with_sizes
from syncwright.capture.state import Binding
from syncwright.errors import BatchError, LoweringError
from syncwright.job import Job
from syncwright.lower import communications, lower
from syncwright.passes import COMPILED, PIPELINE
from syncwright.plan import Plan
from syncwright.program import Guard, Program, Role
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
    """A bounded cache. Captures on demand; forgets what was used longest ago. Changes with every new shape."""

    def __init__(
        self,
        step: Callable,
        binding: Binding,
        optimizer: object,
        plan: Callable[[Program], Plan],
        without: Sequence[str] = (),
        compile: bool | str = False,
        dynamic_shapes: object = None,
    ):
        self._dynamic_shapes = dynamic_shapes
        self._axes: Axes = {}
        self._dynamic: OrderedDict[_Key, Captured] = OrderedDict()
        self._step, self._binding, self._optimizer = step, binding, optimizer
        self._served: str | None = None
        self._make_plan, self._without, self._compile = plan, without, compile
        self.latest: Prepared | None = None
        self._plan: Plan | None = None
        self._structure: pytree.TreeSpec | None = None
        self._kept: OrderedDict[_Key, Prepared] = OrderedDict()

    def for_batch(self, batch: tuple) -> Prepared:
        """The step for batches like this one. Raises `BatchError` for another structure, `CaptureError`."""
        self._check_structure(batch)
        given = _Given.of(batch, self._binding)
        for key in list(self._kept):
            if key.stands_for(given):
                self._kept.move_to_end(key)
                self.latest = self._kept[key]
                return self.latest
        prepared = self.latest = self._prepare(batch)
        self._kept[given.key(prepared.captured.program)] = prepared
        if len(self._kept) > CAPACITY:
            self._kept.popitem(last=False)
        return prepared

    def _prepare(self, batch: tuple) -> Prepared:
        began = time.perf_counter()
        captured = self._captured(batch)
        if self._plan is None:
            self._plan = self._make_plan(captured.program)
        compiled = self._compiles()
        if compiled and _is_dynamic(captured):
            captured = replace(captured, program=with_sizes(captured.program, _Given.of(batch, self._binding).sizes))
        job = lower(captured.program, self._plan, self._without, COMPILED if compiled else PIPELINE)
        self._check_served(job)
        again = "again, for another shape or setting" if self._kept else ""
        seconds = time.perf_counter() - began
        log.info("captured the step %s in %.1f s (%d nodes)", again, seconds, len(captured.program.graph.nodes))
        return Prepared(captured, job, compiled, INTERPRETED_FIRST if self._kept else 0)

    def _captured(self, batch: tuple) -> Captured:
        """An earlier capture of any size, or a new one."""
        given = _Given.of(batch, self._binding)
        for key, captured in self._dynamic.items():
            if key.stands_for(given):
                return captured
        self._axes = joined(self._axes, dynamic_axes(batch, self._dynamic_shapes))
        captured = capture_step(self._step, self._binding, self._optimizer, batch, self._axes)
        if _is_dynamic(captured):
            self._dynamic[given.key(captured.program)] = captured
            if len(self._dynamic) > CAPACITY:
                self._dynamic.popitem(last=False)
        return captured

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


@dataclass(frozen=True, slots=True)
class _Key:
    """What a captured step stands for.

    leaves    of the batch: of tensors shape (None along a dynamic axis), dtype and device; others as they are
    axes      of each leaf, the dynamic ones
    settings  flags that the trace has frozen
    """

    leaves: tuple[object, ...]
    axes: tuple[tuple[int, ...], ...]
    settings: tuple
    guards: tuple[Guard, ...]

    def stands_for(self, given: _Given) -> bool:
        alike = self.settings == given.settings and self.leaves == given.leaves(self.axes)
        return alike and all(guard.holds(given.numbers) for guard in self.guards)


@dataclass(frozen=True, slots=True)
class _Given:
    """A batch, and what else a capture depends on.

    sizes    of the tensors, by variable
    numbers  what guards read: hyper-parameters, and sizes
    """

    batch: tuple
    settings: tuple
    sizes: Mapping[str, tuple[int, ...]]
    numbers: Mapping[str, object]

    @classmethod
    def of(cls, batch: tuple, binding: Binding) -> _Given:
        paths, _ = pytree.tree_flatten_with_path(batch)
        sizes = {name_of(path): tuple(leaf.shape) for path, leaf in paths if isinstance(leaf, torch.Tensor)}
        return cls(batch, binding.settings(), sizes, {**binding.hyper_values(), **sizes})

    def key(self, program: Program) -> _Key:
        paths, _ = pytree.tree_flatten_with_path(self.batch)
        known = [program.variables.get(name_of(path)) for path, _ in paths]
        axes = tuple(() if variable is None else variable.dynamic for variable in known)
        return _Key(self.leaves(axes), axes, self.settings, program.guards)

    def leaves(self, axes: tuple[tuple[int, ...], ...]) -> tuple[object, ...]:
        return tuple(_leaf(leaf, each) for leaf, each in zip(pytree.tree_leaves(self.batch), axes, strict=True))


def _is_dynamic(captured: Captured) -> bool:
    return any(variable.dynamic for variable in captured.program.of_role(Role.INPUT))


def _leaf(leaf: object, axes: tuple[int, ...]) -> object:
    if isinstance(leaf, torch.Tensor):
        return tuple(None if i in axes else size for i, size in enumerate(leaf.shape)), leaf.dtype, leaf.device
    try:
        hash(leaf)
    except TypeError as error:
        raise BatchError(
            f"the batch holds a {type(leaf).__name__}; expected tensors, numbers and strings, in any tree. "
            "Turn it into a tensor: torch.as_tensor(...)."
        ) from error
    return leaf
