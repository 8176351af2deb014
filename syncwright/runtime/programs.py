"""Captured and lowered steps by what they were captured for: shapes of the batch, settings, branches on numbers."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from syncwright.capture import Captured, capture_step
from syncwright.capture.state import Binding
from syncwright.errors import BatchError
from syncwright.job import Job
from syncwright.lower import lower
from syncwright.passes import COMPILED, PIPELINE
from syncwright.plan import Plan
from syncwright.program import Program
from syncwright.runtime import inductor
from syncwright.runtime.compiled import CompiledExecutor
from syncwright.runtime.executor import Executor

log = logging.getLogger("syncwright")
CAPACITY = 8


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A step ready to run on batches of one shape."""

    captured: Captured
    job: Job
    phases: Mapping[str, Executor | CompiledExecutor]


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
    ):
        self._step, self._binding, self._optimizer = step, binding, optimizer
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
        compiled = self._compiles()
        job = lower(captured.program, self._plan, self._without, COMPILED if compiled else PIPELINE)
        again = "again, for another shape or setting" if self._kept else ""
        seconds = time.perf_counter() - began
        log.info("captured the step %s in %.1f s (%d nodes)", again, seconds, len(captured.program.graph.nodes))
        phases: dict[str, Executor | CompiledExecutor] = {name: Executor(p) for name, p in job.trainer.items()}
        if compiled:
            began = time.perf_counter()
            phases["step"] = CompiledExecutor(job.trainer["step"])
            log.info("compiled the step in %.1f s", time.perf_counter() - began)
        return Prepared(captured, job, phases)

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
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf
