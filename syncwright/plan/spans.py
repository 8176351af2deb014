"""Which plan holds at a step: some variables are all-reduced before trainers train them alone."""

from __future__ import annotations

from dataclasses import replace

from syncwright.plan.plan import Plan, Sharing
from syncwright.plan.sync import AllReduce, LocalSteps


def starts_of(plan: Plan) -> list[int]:
    """The steps from which on another plan holds than before, in order.

    `start` 0 and 100 of two variables -> [100]
    """
    if plan.trainers == 1:
        return []
    found = {s.sync.start for s in plan.sharings if isinstance(s.sync, LocalSteps)}
    return sorted(start for start in found if start > 0)


def plan_at(plan: Plan, step: int) -> Plan:
    """The plan of a step: variables that trainers do not train alone yet are all-reduced, as their `over` says."""
    if not any(step < start for start in starts_of(plan)):
        return plan
    return replace(plan, sharings=tuple(_sharing_at(sharing, step) for sharing in plan.sharings))


def _sharing_at(sharing: Sharing, step: int) -> Sharing:
    match sharing.sync:
        case LocalSteps(start=start, over=AllReduce() as over) if step < start:
            return replace(sharing, sync=over)
        case LocalSteps(start=start) if step < start:
            return Sharing(sharing.variable, AllReduce(), (sum(sharing.sizes),))
    return sharing
