"""Which plan holds at a step: some variables are all-reduced, as they are, before trainers train them alone or compress them."""

from __future__ import annotations

from dataclasses import replace

from syncwright.plan.compression import PowerSGD
from syncwright.plan.plan import Plan, Sharing
from syncwright.plan.sync import AllReduce, LocalSteps, Sync


def starts_of(plan: Plan) -> list[int]:
    """The steps from which on another plan holds than before, in order.

    `start` 0 and 100 of two variables -> [100]
    """
    if plan.trainers == 1:
        return []
    found = {_start_of(sharing.sync) for sharing in plan.sharings}
    return sorted(start for start in found if start > 0)


def plan_at(plan: Plan, step: int) -> Plan:
    """The plan of a step: variables that trainers do not train alone yet are all-reduced, as their `over` says; those of which
    factors do not travel yet, whole."""
    if not any(step < start for start in starts_of(plan)):
        return plan
    return replace(plan, sharings=tuple(_sharing_at(sharing, step) for sharing in plan.sharings))


def _start_of(sync: Sync) -> int:
    """The first step at which a variable is shared as its plan says."""
    match sync:
        case LocalSteps(start=start) | AllReduce(compress=PowerSGD(start_step=start)):
            return start
    return 0


def _sharing_at(sharing: Sharing, step: int) -> Sharing:
    match sharing.sync:
        case AllReduce(compress=PowerSGD(start_step=start)) as sync if step < start:
            return replace(sharing, sync=replace(sync, compress=None))
        case LocalSteps(start=start, over=AllReduce() as over) if step < start:
            return replace(sharing, sync=over)
        case LocalSteps(start=start) if step < start:
            return Sharing(sharing.variable, AllReduce(), (sum(sharing.sizes),))
    return sharing
