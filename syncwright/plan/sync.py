"""Sync: the ways in which a variable is shared. To add one, add a dataclass here and a pass for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from syncwright.errors import PlanError
from syncwright.plan.outer import Geo, Mean, Outer
from syncwright.plan.partition import Partition, Whole
from syncwright.plan.placement import Placement, RoundRobin
from syncwright.typed import Amount, Count, Index, check_fields

_WHOLE, _IN_TURN, _MEAN = Whole(), RoundRobin(), Mean()


@dataclass(frozen=True, slots=True)
class Local:
    """Every trainer keeps a copy of its own and updates it with its own gradient."""


@dataclass(frozen=True, slots=True)
class AllReduce:
    """Every trainer keeps a replica; gradients are all-reduced, the update runs on every trainer.

    bucket_mb  megabytes (2**20 bytes) of gradients that one collective joins; 0: one collective per variable
    reduce     "mean": weighted by examples; "sum": for losses that are sums
    """

    bucket_mb: Amount = 25.0
    reduce: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        check_fields(self, PlanError)


@dataclass(frozen=True, slots=True)
class ParameterServer:
    """Servers keep the variable and run its update: trainers push gradients and pull the value.

    mode       "sync": one update per step, when all live trainers have pushed
    partition  how the variable is cut along axis 0
    place      which server keeps each piece
    reduce     "mean": weighted by examples; "sum": for losses that are sums
    """

    mode: Literal["sync"] = "sync"
    partition: Partition = _WHOLE
    place: Placement = _IN_TURN
    reduce: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        check_fields(self, PlanError)


_ALL_REDUCE = AllReduce()


@dataclass(frozen=True, slots=True)
class LocalSteps:
    """Every trainer runs the whole update on its own gradient; every k-th step they exchange what they have come to.

    every  the steps between two exchanges
    outer  what an exchange makes of it: the mean, or the update of an outer optimizer
    start  the first step that a trainer takes alone; until then gradients are all-reduced, as under `over`
    over   how the differences travel. Only all_reduce, so far: every trainer runs the outer update
    """

    every: Count
    outer: Outer = _MEAN
    start: Index = 0
    over: AllReduce | ParameterServer = _ALL_REDUCE

    def __post_init__(self) -> None:
        check_fields(self, PlanError)
        if isinstance(self.outer, Geo):
            raise PlanError(
                "LocalSteps.outer: found geo, expected mean or an optimizer: a server would have to add each trainer's "
                "difference as it comes, and servers wait for all trainers so far. Write one of these."
            )
        if isinstance(self.over, ParameterServer):
            raise PlanError(
                "LocalSteps.over: found parameter_server, expected all_reduce: servers count one update for each step so "
                "far, and not one for each exchange. Write all_reduce, or leave `over` out."
            )


Sync = Local | AllReduce | ParameterServer | LocalSteps
