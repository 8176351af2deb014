"""Which plan holds at a step: some variables are all-reduced, as they are, before trainers train them alone or compress them,
or compressed less at first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from syncwright.plan.compression import PowerSGD, TopK, gathered_as
from syncwright.plan.plan import Plan, Sharing
from syncwright.plan.sync import AllReduce, LocalSteps, Sync


def starts_of(plan: Plan) -> list[int]:
    """The steps from which on another plan holds than before, in order.

    `start` 0 and 100 of two variables -> [100]
    """
    if plan.trainers == 1:
        return []
    found = {start for sharing in plan.sharings for start in _starts(sharing.sync)}
    return sorted(start for start in found if start > 0)


def plan_at(plan: Plan, step: int) -> Plan:
    """The plan of a step: variables that trainers do not train alone yet are all-reduced, as their `over` says; those of which
    factors do not travel yet, whole; of those of which the largest elements do, as many as do at that step."""
    if not any(step < start for start in starts_of(plan)):
        return plan
    return replace(plan, sharings=tuple(_sharing_at(sharing, step) for sharing in plan.sharings))


def _starts(sync: Sync) -> Iterable[int]:
    """The steps from which on a variable is shared in another way; at the last of them, as its plan says."""
    match sync:
        case LocalSteps(start=start) | AllReduce(compress=PowerSGD(start_step=start)):
            return [start]
        case AllReduce(compress=by) if isinstance(top := gathered_as(by), TopK):
            return top.stretches
    return []


def _sharing_at(sharing: Sharing, step: int) -> Sharing:
    match sharing.sync:
        case AllReduce(compress=PowerSGD(start_step=start)) as sync if step < start:
            return replace(sharing, sync=replace(sync, compress=None))
        case AllReduce(compress=by) as sync if isinstance(top := gathered_as(by), TopK):
            ratio = next(ratio for start, ratio in reversed(top.stretches.items()) if start <= step)
            return replace(sharing, sync=replace(sync, compress=replace(top, ratio=ratio, warmup_steps=0)))
        case LocalSteps(start=start, over=AllReduce() as over) if step < start:
            return replace(sharing, sync=over)
        case LocalSteps(start=start) if step < start:
            return Sharing(sharing.variable, AllReduce(), (sum(sharing.sizes),))
    return sharing
