"""check: is a plan, perhaps read from a file, the plan of this program and these machines?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from syncwright.cluster import Cluster
from syncwright.errors import ClusterError, PlanError
from syncwright.plan.partition import Hashed, Whole, length
from syncwright.plan.plan import Plan
from syncwright.plan.sync import served_by
from syncwright.program import Role, Variable

_ANEW = "Make the plan anew from its rules."


def check(plan: Plan, variables: Sequence[Variable], digest: str, cluster: Cluster | None = None) -> None:
    """Raise unless `plan` fits the program with these variables and this digest, and the cluster if given.

    Raises PlanError: variables missing, unknown or of another length; a plan for another program.
    Raises ClusterError: another number of trainers, or fewer servers than the plan names (more is fine).
    """
    differences = _differences(plan, variables)
    if differences:
        raise PlanError(
            f"plan: found a plan for another program, expected one for digest {digest}. It differs in: "
            f"{_listed(differences)}. {_ANEW}"
        )
    if plan.digest != digest:
        raise PlanError(
            f"plan: found the digest {plan.digest}, expected {digest}. The variables are the same; the step, "
            f"the optimizer or a setting of it changed. {_ANEW}"
        )
    if cluster is not None:
        _check_cluster(plan, cluster)


def _differences(plan: Plan, variables: Sequence[Variable]) -> list[str]:
    parameters = {variable.name: variable for variable in variables if variable.role is Role.PARAM}
    planned = {sharing.variable: sum(sharing.sizes) for sharing in plan.sharings}
    partitions = {s.variable: by.partition for s in plan.sharings if (by := served_by(s.sync)) is not None}
    found = _names_apart("variable", planned, parameters)
    for name, total in planned.items():
        if name not in parameters:
            continue
        expected = length(partitions.get(name, Whole()), parameters[name].shape)
        if total != expected:
            has = "it has" if isinstance(partitions.get(name), Hashed) else "its axis 0 has"
            found.append(f"variable {name!r} (the plan's sizes add up to {total}, {has} {expected})")
        if parameters[name].unbounded is not None and not isinstance(partitions.get(name), Hashed):
            found.append(f"variable {name!r} (a table of any ids, which the plan does not keep by virtual shards)")
    written = [variable.name for variable in variables if variable.role is Role.BUFFER]
    return found + _names_apart("buffer", dict(plan.buffers), dict.fromkeys(written))


def _names_apart(what: str, planned: dict[str, int] | dict[str, str], there: dict) -> list[str]:
    missing = [f"{what} {name!r} (not in the plan)" for name in there if name not in planned]
    unknown = [f"{what} {name!r} (not in the program)" for name in planned if name not in there]
    return missing + unknown


def _listed(differences: list[str], most: int = 5) -> str:
    more = len(differences) - most
    return ", ".join(differences[:most]) + (f" and {more} more" if more > 0 else "")


def _check_cluster(plan: Plan, cluster: Cluster) -> None:
    if cluster.trainers != plan.trainers:
        raise ClusterError(
            f"trainers: found {cluster.trainers}, expected {plan.trainers} as the plan says. Start as many, "
            f"or make the plan anew for {cluster.trainers}."
        )
    if cluster.servers < plan.servers:
        raise ClusterError(
            f"servers: found {cluster.servers}, fewer servers than the plan names: expected at least "
            f"{plan.servers}. Start as many, or make the plan anew for {cluster.servers}."
        )
    found = [host.trainers for host in cluster.hosts if host.trainers]
    ends = accumulate(plan.hosts, initial=0)
    if plan.hosts and found != [tuple(range(*pair)) for pair in pairwise(ends)]:
        raise ClusterError(
            f"hosts: found the trainers {', '.join(map(str, map(list, found)))} on them, expected hosts of "
            f"{', '.join(map(str, plan.hosts))} trainers, in the order of their numbers, as the plan "
            "shares by hosts. Start them so, or make the plan anew."
        )
