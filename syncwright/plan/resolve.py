"""resolve: rules and the variables of one program to a complete plan.

default: all_reduce                          embed.weight  parameter_server  sizes [50, 50]  owners [0, 1]
variables:                                   head.weight   all_reduce        sizes [10]
  - "embed.*":                        ->     head.bias     all_reduce        sizes [10]
      {parameter_server:
        {partition: {even: 2}}}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

from syncwright.errors import PlanError
from syncwright.near import did_you_mean
from syncwright.plan.by_id import check_shards, on_servers
from syncwright.plan.groups import Groups
from syncwright.plan.partition import Hashed, Whole, axis_length, cut
from syncwright.plan.placement import in_order, least_loaded, place
from syncwright.plan.plan import Plan, Sharing, Travelling
from syncwright.plan.rules import BufferPolicy, Rules
from syncwright.plan.sync import (
    AllGather,
    AllReduce,
    Collective,
    Local,
    LocalSteps,
    ParameterServer,
    Shard,
    Sync,
    asks_for_hosts,
    served_by,
)
from syncwright.program import Role, Variable

T = TypeVar("T")
Update = Literal["elementwise", "row-wise", "whole"]


def resolve(
    rules: Rules,
    variables: Sequence[Variable],
    updates: Mapping[str, Update | None],
    trainers: int,
    servers: int,
    digest: str,
    still: Collection[str] = (),
    hosts: Sequence[int] | None = None,
    order: Sequence[str] = (),
) -> Plan:
    """The complete plan that `rules` mean for a program.

    variables  the parameters in registration order and the buffers that the step writes; others are ignored
    updates    how each parameter's update may be split; None: it is never updated, so it is simply replicated
    still      tables whose update leaves rows alone that no lookup touches
    hosts      how many trainers each host has, in the order of their numbers; None: all are on one, () where nobody knows
    order      parameters in the order in which the step first uses them; others come behind, as they are registered

    Raises PlanError: a pattern that matches nothing, servers that are needed and do not exist, a partition of
    a variable whose update needs the whole tensor, a mean of a buffer that is not floating, hosts that are needed and unknown.
    """
    parameters = [variable for variable in variables if variable.role is Role.PARAM]
    written = [variable for variable in variables if variable.role is Role.BUFFER]
    _refuse_idle_patterns(rules, parameters, written)
    groups = Groups(trainers, (trainers,) if hosts is None else tuple(hosts))
    notes: list[str] = []
    chosen: list[tuple[Variable, Sync, tuple[int, ...]]] = []
    for variable in parameters:
        assert variable.name in updates, f"no update kind for {variable.name!r}; say None where it is never updated"
        update = updates[variable.name]
        sync = _last_match(rules.patterns, variable, rules.default) if update is not None else Local()
        if variable.unbounded is not None:
            sync = on_servers(rules.source, variable, sync, update, variable.name in still, notes)
        if isinstance(sync, Shard):
            sync = _sharded(variable, sync, groups, notes)
        sync, sizes = _cut(rules, variable, sync, update, servers, notes)
        chosen.append((variable, sync, sizes))
    rows: dict[str, Travelling] = {
        v.name: _rows(rules, v, sync, updates[v.name], v.name in still, notes) for v, sync, _ in chosen
    }
    sharings = _placed(chosen, rows, servers, _keepers(chosen, updates, groups, order, notes))
    used = [owner for sharing in sharings for owner in sharing.owners]
    return Plan(
        digest=digest,
        trainers=trainers,
        servers=servers,
        reducer=min(used, default=None),
        sharings=sharings,
        buffers=_buffers(rules, written, [sync for _, sync, _ in chosen], notes),
        notes=tuple(notes),
        clip=rules.clip,
        sync_batch_norm=_normalized_together(rules, chosen),
        memory_gb=rules.memory_gb,
        accumulate=rules.accumulate,
        loss_scale=rules.loss_scale,
        hosts=_hosts(rules, sharings, groups.hosts),
    )


def _normalized_together(rules: Rules, chosen: Sequence[tuple[Variable, Sync, tuple[int, ...]]]) -> bool:
    """Whether trainers normalise together, which takes a step in common and one weight for each trainer's examples."""
    if not rules.sync_batch_norm:
        return False
    for variable, sync, _ in chosen:
        if isinstance(sync, LocalSteps) or (isinstance(sync, ParameterServer) and not sync.in_step):
            raise PlanError(
                f"{rules.source}: found sync_batch_norm: true with {variable.name!r}, which has no step in common. Expected "
                "trainers that take every step together. Share it in step, or take sync_batch_norm out."
            )
    if {"mean", "sum"} <= {
        sync.reduce for _, sync, _ in chosen if isinstance(sync, AllReduce | Shard | ParameterServer)
    }:
        raise PlanError(
            f"{rules.source}: found sync_batch_norm: true with gradients averaged and others added up. Expected "
            "one of both, as what is normalised has one gradient. Give all variables the same `reduce`."
        )
    return True


def _hosts(rules: Rules, sharings: Sequence[Sharing], hosts: tuple[int, ...]) -> tuple[int, ...]:
    """The trainers of each host, where it matters."""
    joined = next((s for s in sharings if asks_for_hosts(s.sync)), None)
    if joined is None:
        return ()
    if not hosts:
        raise PlanError(
            f"{rules.source}: variable {joined.variable!r}: found {asks_for_hosts(joined.sync)}, but nothing says which trainers "
            "share a host, expected to know it before the job is made. Start trainers with torchrun, as many on each host, or "
            "set SYNCWRIGHT_HOSTS for all roles to the trainers of each host, such as 2,2."
        )
    return hosts


def _buffers(
    rules: Rules, written: Sequence[Variable], syncs: Sequence[Sync], notes: list[str]
) -> tuple[tuple[str, BufferPolicy], ...]:
    """The policy of each buffer that the step writes: only trainers that keep step have something to average."""
    served = [sync for sync in syncs if isinstance(sync, ParameterServer)]
    arriving = [*(s for s in served if not s.in_step), *(s for s in syncs if isinstance(s, LocalSteps) and s.is_geo)]
    if not arriving or any(isinstance(sync, Collective) for sync in syncs) or any(sync.in_step for sync in served):
        return tuple((buffer.name, _buffer_policy(rules, buffer)) for buffer in written)
    for buffer in written:
        policy = _last_match(rules.buffers, buffer, "local")
        if policy != "local":
            raise PlanError(
                f"{rules.source}: buffer {buffer.name!r}: found {policy}, expected local: all updates are asynchronous, so "
                "there is no step at which trainers could exchange it. Take the line out, or share a variable in step."
            )
        notes.append(f"{buffer.name} stays local: all updates are asynchronous, so trainers have no step in common")
    return tuple((buffer.name, "local") for buffer in written)


def _cut(
    rules: Rules, variable: Variable, sync: Sync, update: Update | None, servers: int, notes: list[str]
) -> tuple[Sync, tuple[int, ...]]:
    """The sharing that is carried out, and the sizes of its pieces; what was changed is added to `notes`."""
    served = served_by(sync)
    if served is None:
        return sync, (axis_length(variable.shape),)
    if servers == 0:
        raise PlanError(
            f"{rules.source}: variable {variable.name!r}: found parameter_server and no servers, expected at "
            f"least one server. Start servers, or share it another way, such as all_reduce."
        )
    sizes = cut(served.partition, variable.shape, servers)
    by_id = isinstance(served.partition, Hashed)
    if isinstance(sync, LocalSteps):
        if by_id:
            raise PlanError(
                f"{rules.source}: variable {variable.name!r}: found virtual shards for a variable that trainers train alone, "
                "expected rows in order: exchanges keep them so. Give `over` another partition, or none."
            )
        return sync, sizes  # it is the outer update that servers run
    if isinstance(served.partition, Hashed) and variable.sparse:
        check_shards(rules.source, variable, served.partition, servers)
    elif by_id and rules.uncuttable == "refuse":
        raise PlanError(
            f"{rules.source}: variable {variable.name!r}: found virtual shards for a variable that lookups are not all that "
            "reads, expected them for tables of which rows travel. Give it another partition, or none."
        )
    whole = by_id and not variable.sparse
    if not whole and (len(sizes) == 1 or update == "elementwise" or (update == "row-wise" and variable.sparse)):
        return sync, sizes
    if rules.uncuttable == "refuse":
        raise PlanError(
            f"{rules.source}: variable {variable.name!r}: found a partition into {len(sizes)} pieces, "
            f"expected none: its update is {update}, only an elementwise update can be cut. Add a line for "
            f"{variable.name!r} without a partition, or say `uncuttable: keep_whole`."
        )
    why = "its update needs the whole tensor" if update == "whole" else f"its update is {update}, not elementwise"
    notes.append(f"{variable.name} is kept whole: {'rows of it do not travel' if whole else why}")
    return replace(served, partition=Whole()), (axis_length(variable.shape),)


def _sharded(variable: Variable, sync: Shard, groups: Groups, notes: list[str]) -> Sync:
    """Of what has a shape trainers keep even parts, or one keeps all of it."""
    alone = groups.trainers > 1 and groups.is_even and groups.cut_among(sync) == 1
    if not variable.shape or alone:
        why = "hosts have one trainer each" if alone else "one number cannot be cut"
        notes.append(f"{variable.name} is all-reduced: {why}")
        return AllReduce(sync.bucket_mb, sync.reduce, sync.compress)
    return sync


def _keepers(
    chosen: Sequence[tuple[Variable, Sync, tuple[int, ...]]],
    updates: Mapping[str, Update | None],
    groups: Groups,
    order: Sequence[str],
    notes: list[str],
) -> dict[str, int]:
    """The trainer that keeps each variable that would be cut and cannot be."""
    whole = [(v, sync) for v, sync, _ in chosen if isinstance(sync, Shard) and updates[v.name] != "elementwise"]
    first = {name: place for place, name in enumerate(order)}
    used = sorted((v for v, sync in whole if sync.owner == "use_order"), key=lambda v: first.get(v.name, len(first)))
    rest = [v for v, sync in whole if sync.owner == "least_loaded"]
    among = min((groups.cut_among(sync) for _, sync in whole), default=groups.trainers)
    found = {v.name: k for v, k in zip(used, in_order([v.numel for v in used], among), strict=True)}
    found |= {v.name: k for v, k in zip(rest, least_loaded([v.numel for v in rest], among), strict=True)}
    for variable, sync in whole if groups.trainers > 1 else ():
        update = updates[variable.name]
        why = "its update needs the whole tensor" if update == "whole" else f"its update is {update}, not elementwise"
        where = " of each host" if groups.cut_among(sync) < groups.trainers else ""
        notes.append(f"{variable.name} is kept whole by trainer {found[variable.name]}{where}: {why}")
    return found


_NOT_OF_ROWS = {
    "compensate": "servers do not keep the rows that each trainer has pulled",
    "merge": "the rows of two batches are others",
    "staged": "servers keep one version of a table",
    "replicated": "trainers keep no copy of it",
    "device": "rows are looked up in host memory",
    "merge_on_host": "the trainers of a host look up other rows",
    "copy_on_host": "the trainers of a host look up other rows",
}
"""Settings that tables do not have whose rows travel, and why."""


def _rows(
    rules: Rules, variable: Variable, sync: Sync, update: Update | None, still: bool, notes: list[str]
) -> Travelling:
    """Which rows an update of a table writes whose rows travel; what costs a pass over the table is noted."""
    if isinstance(sync, LocalSteps) and sync.is_geo and variable.sparse:
        return "touched"
    split = update in ("elementwise", "row-wise")
    if isinstance(sync, AllGather):
        _check_gathered(rules, variable, sync, split)
        return _written(variable, split and (still or sync.lazy), notes)
    if not isinstance(sync, ParameterServer):
        return ""
    if not variable.sparse or not split:
        for name, found in (("lazy", sync.lazy), ("reduce", sync.reduce == "mean_by_touch")):
            if found:
                why = "its update needs the whole tensor" if variable.sparse else "lookups are not all that reads it"
                raise PlanError(
                    f"{rules.source}: variable {variable.name!r}: found {name}: {getattr(sync, name)}, expected it for tables "
                    f"of which rows travel only: {why}. Leave it out for this variable."
                )
        return ""
    for name, why in _NOT_OF_ROWS.items():
        if getattr(sync, name) != type(sync).__dataclass_fields__[name].default:
            raise PlanError(
                f"{rules.source}: variable {variable.name!r}: found {name}: {getattr(sync, name)} for a table of which rows "
                f"travel; expected otherwise, as {why}. Leave it out for this variable."
            )
    return _written(variable, still or sync.lazy, notes)


def _check_gathered(rules: Rules, variable: Variable, sync: AllGather, split: bool) -> None:
    """Rows can be gathered of a table that is read by lookups alone; only a row-wise update can leave rows out."""
    if not variable.sparse:
        raise PlanError(
            f"{rules.source}: variable {variable.name!r}: found all_gather, expected it for tables that the step reads by "
            "lookups alone: of another variable every row of the gradient counts. Share it by all_reduce."
        )
    if sync.lazy and not split:
        raise PlanError(
            f"{rules.source}: variable {variable.name!r}: found lazy: True, expected it for row-wise updates only: this one "
            "needs the whole tensor. Leave it out for this variable."
        )


def _written(variable: Variable, touched: bool, notes: list[str]) -> Travelling:
    """Which rows an update writes; what costs a pass over the table is noted."""
    if touched:
        return "touched"
    notes.append(
        f"{variable.name} is updated whole in every step, as its optimizer moves rows that no lookup touches; lazy: true "
        "would leave them"
    )
    return "all"


def _placed(
    chosen: list[tuple[Variable, Sync, tuple[int, ...]]],
    rows: Mapping[str, Travelling],
    servers: int,
    keepers: Mapping[str, int],
) -> tuple[Sharing, ...]:
    served = [
        (variable, _in_rows(variable, by, sizes), by.place)
        for variable, sync, sizes in chosen
        if (by := served_by(sync)) is not None
    ]
    owners = {variable.name: found for (variable, _, _), found in zip(served, place(served, servers), strict=True)}
    return tuple(
        Sharing(v.name, sync, sizes, owners.get(v.name, ()), rows=rows[v.name], keeper=keepers.get(v.name))
        for v, sync, sizes in chosen
    )


def _in_rows(variable: Variable, sync: ParameterServer, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """How many rows pieces have, about; for their loads."""
    total = axis_length(variable.shape)
    by_id = isinstance(sync.partition, Hashed)
    return tuple(size * total // sum(sizes) for size in sizes) if by_id and sum(sizes) else sizes


def _buffer_policy(rules: Rules, buffer: Variable) -> BufferPolicy:
    floating = buffer.dtype.is_floating_point or buffer.dtype.is_complex
    policy: BufferPolicy = _last_match(rules.buffers, buffer, "mean" if floating else "trainer0")
    if policy == "mean" and not floating:
        raise PlanError(
            f"{rules.source}: buffer {buffer.name!r}: found mean for a buffer of {buffer.dtype}, expected "
            f"trainer0 or local: a mean of whole numbers is not one. Add a line for {buffer.name!r} "
            f"after the one that says mean."
        )
    return policy


def _names(variable: Variable) -> tuple[str, ...]:
    return (variable.name, *variable.aliases)


def _matches(pattern: str, variable: Variable) -> bool:
    return any(fnmatchcase(name, pattern) for name in _names(variable))


def _last_match(lines: Sequence[tuple[str, T]], variable: Variable, default: T) -> T:
    """What the last line whose pattern matches says; `default` where none matches."""
    return next((value for pattern, value in reversed(lines) if _matches(pattern, variable)), default)


def _refuse_idle_patterns(rules: Rules, parameters: list[Variable], buffers: list[Variable]) -> None:
    _refuse_idle(rules.source, "variables", [line[0] for line in rules.patterns], parameters, buffers)
    _refuse_idle(rules.source, "buffers", [line[0] for line in rules.buffers], buffers, parameters)


def _refuse_idle(source: str, key: str, patterns: list[str], meant: list[Variable], others: list[Variable]) -> None:
    wanted = "variable" if key == "variables" else "buffer that the step writes"
    other_key = "buffers" if key == "variables" else "variables"
    for index, pattern in enumerate(patterns):
        if any(_matches(pattern, variable) for variable in meant):
            continue
        elsewhere = [variable.name for variable in others if _matches(pattern, variable)]
        if elsewhere:
            advice = f"It matches {elsewhere[0]!r}: write the line under `{other_key}`."
        else:
            names = [name for variable in meant for name in _names(variable)]
            advice = did_you_mean(pattern, names, f"Take the line out, or name one of the {len(names)} there are.")
        raise PlanError(
            f"{source}, at {key}[{index}]: found the pattern {pattern!r}, which matches no {wanted}, "
            f"expected at least one match. {advice}"
        )
