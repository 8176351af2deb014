"""Schedulers that servers tick: copies of the user's, one for each channel, so that updates and not trainers are counted."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from syncwright.capture.state import Binding, HyperSlot
from syncwright.errors import PlanError
from syncwright.plan import ParameterServer, Plan


def _updated() -> None:
    """Stands for `optimizer.step`: torch's schedulers warn of a tick before the first update, and ask whether there was one."""


_updated._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


class _Groups:
    """What a scheduler sees of an optimizer. Changes as it is scheduled."""

    step = staticmethod(_updated)
    _opt_called = True

    def __init__(self, groups: Iterable[Mapping[str, Any]]):
        self.param_groups = [
            {"params": [], **{key: copy.deepcopy(value) for key, value in group.items() if key != "params"}}
            for group in groups
        ]


class Ticking:
    """Schedulers with what they set in place of optimizers. Changes with every tick.

    A scheduler's optimizer, which holds the model, is not copied: a stand-in that has nothing but the groups' numbers is.
    """

    def __init__(self, schedulers: list[Any], stand_ins: Mapping[int, _Groups], slots: Mapping[str, HyperSlot]):
        self._schedulers, self._stand_ins, self._slots = schedulers, stand_ins, slots
        self._pushes = 0

    @classmethod
    def of(cls, scheduler: object, binding: Binding) -> Ticking:
        """Of the user's scheduler, or of several, as they are now.

        Raises `PlanError` for what is none, needs a metric to step, or schedules another optimizer.
        """
        schedulers, optimizers = _listed(scheduler), list(binding.optimizers.values())
        for each in schedulers:
            _check(each, optimizers)
        stand_ins = {id(each): _Groups(each.param_groups) for each in optimizers}
        return cls(copy.deepcopy(schedulers, dict(stand_ins)), stand_ins, binding.hypers)

    def copied(self) -> Ticking:
        """Another that ticks by itself."""
        stand_ins = {key: _Groups(each.param_groups) for key, each in self._stand_ins.items()}
        memo = {id(self._stand_ins[key]): each for key, each in stand_ins.items()}
        return Ticking(copy.deepcopy(self._schedulers, memo), stand_ins, self._slots)

    def values(self) -> dict[str, float]:
        """What the schedulers have set, and all other hyper-parameters as they were at the start, by name."""
        return {name: slot.of(self._stand_ins[id(slot.optimizer)].param_groups) for name, slot in self._slots.items()}

    def applied(self, pushes: int, trainers: int) -> None:
        """So many pushes have been applied: one tick for as many as there are trainers."""
        self._pushes += pushes
        while trainers and self._pushes >= trainers:
            self._pushes -= trainers
            for each in self._schedulers:
                each.step()


def check_scheduler(plan: Plan, scheduler: object) -> Plan:
    """The plan. Raises `PlanError` where servers are to tick a scheduler and none was given."""
    ticked = [s.variable for s in plan.sharings if isinstance(s.sync, ParameterServer) and s.sync.ticks]
    if ticked and not _listed(scheduler):
        raise PlanError(
            f"variable {ticked[0]!r}: found clock: global_update and no scheduler; expected the one that the servers tick "
            "themselves. Give it to distribute(..., scheduler=scheduler), or leave `clock` out."
        )
    return plan


def _listed(scheduler: object) -> list[Any]:
    if scheduler is None:
        return []
    return list(scheduler) if isinstance(scheduler, list | tuple) else [scheduler]


def _check(scheduler: Any, optimizers: list) -> None:
    kind = type(scheduler).__name__
    if not callable(getattr(scheduler, "step", None)) or not hasattr(scheduler, "optimizer"):
        raise PlanError(
            f"scheduler: found a {kind}, expected one of torch.optim.lr_scheduler, or several in a list. Correct it."
        )
    needed = [p for p in inspect.signature(scheduler.step).parameters.values() if p.default is p.empty]
    if any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in needed):
        raise PlanError(
            f"scheduler: found a {kind}, whose step() wants {needed[0].name}, which no server has; expected one that counts its "
            "steps. Use another, or clock: trainer_step."
        )
    if not any(scheduler.optimizer is each for each in optimizers):
        raise PlanError(
            f"scheduler: found a {kind} of an optimizer that is not one of those given to distribute; expected one of them. Give "
            "the scheduler of the optimizer that the step uses."
        )
