"""Sync: the ways in which a variable is shared. To add one, add a dataclass here and a pass for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from syncwright.errors import PlanError
from syncwright.plan.partition import Partition, Whole
from syncwright.plan.placement import Placement, RoundRobin
from syncwright.typed import Amount, check_fields

_WHOLE, _IN_TURN = Whole(), RoundRobin()


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


Sync = Local | AllReduce | ParameterServer
