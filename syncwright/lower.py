"""Program and plan to a job: the passes, then the cut by role, verified after every pass."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from syncwright import ops
from syncwright.cut import cut
from syncwright.delayed import after_last_step, delayed, of_first_step
from syncwright.errors import LoweringError
from syncwright.exchanges import OuterStep, outer_steps
from syncwright.global_batch import check_lookups
from syncwright.idle import idle
from syncwright.job import (
    BETWEEN,
    FIRST,
    IDLE,
    IDLE_BETWEEN,
    IDLE_FIRST,
    LAST,
    STEP,
    Exchange,
    Job,
    ServerPart,
    Span,
    Table,
)
from syncwright.passes import COMPILED, PIPELINE, Pass, between
from syncwright.passes.average import communicates, is_local
from syncwright.passes.clip_per_trainer import clip_per_trainer
from syncwright.passes.flat import flat_parts
from syncwright.passes.insert import in_group
from syncwright.passes.join_served import as_joined
from syncwright.passes.share_globals import parts_of
from syncwright.plan import (
    AllGather,
    AllReduce,
    Collective,
    Local,
    LocalSteps,
    ParameterServer,
    Plan,
    Sync,
    is_within,
    plan_at,
    shown,
    starts_of,
)
from syncwright.program import Program, Role, Variable
from syncwright.schema import argument
from syncwright.selection import Selection
from syncwright.split import grad_variable
from syncwright.text import op_name
from syncwright.update import Join, Updates, find_marks, find_updates
from syncwright.verify import verify, verify_after, verify_job


def lower(
    program: Program,
    plan: Plan,
    without: Sequence[str] = (),
    passes: Sequence[Pass] = PIPELINE,
    exchanges: Sequence[Exchange] | None = None,
) -> Job:
    """Everything that every role runs under `plan`.

    without    names of passes to leave out, to find the one at fault; only those that no other needs
    passes     `PIPELINE`, or `COMPILED` for programs that will be compiled
    exchanges  those of an earlier job of the plan, where there is one

    Raises `LoweringError` where the plan cannot be carried out exactly, `ProgramError` where a pass is at fault.
    """
    with _no_collection():
        verify(program)
        job = _lowered(program, plan, without, passes)
        spans = tuple(Span(n, _lowered(program, plan_at(plan, n - 1), without, passes)) for n in starts_of(plan))
        if exchanges is None:
            exchanges = [_exchange(each, without) for each in outer_steps(program, plan)]
    return _joined(job, spans, tuple(exchanges)) if spans or exchanges else job


def _lowered(program: Program, plan: Plan, without: Sequence[str], passes: Sequence[Pass]) -> Job:
    """The job of steps that are all alike."""
    check_lookups(program, plan)
    _check_gathered(program, plan)
    _check_scaled(program, plan)
    _check_delayed(program, plan)
    _check_replicated(find_updates(clip_per_trainer(program, plan)), plan)
    step = _passed(program, plan, pipeline(passes, without))
    _refuse_without(step, plan, without)
    job = _job(program, step, plan)
    if delayed(plan):
        job = _delaying(job)
    if plan.accumulate > 1:
        job = _accumulating(job, _passed(program, plan, between(pipeline(passes, without))))
    _check_touched(job)
    verify_job(job)
    return job


def _passed(program: Program, plan: Plan, passes: Sequence[Pass]) -> Program:
    """What passes make of a program, each verified."""
    for each in passes:
        program = _applied(each, program, as_joined(program, plan))
    return program


def _delaying(job: Job) -> Job:
    """The job with what trainers run in the first step, and behind the last one."""
    first, last = (make(job.trainer[STEP], job.plan) for make in (of_first_step, after_last_step))
    return replace(job, trainer={**job.trainer, FIRST: first, IDLE_FIRST: idle(first), LAST: last})


def _accumulating(job: Job, whole: Program) -> Job:
    """The job with what trainers run in the calls between two updates, of which `whole` is the whole program."""
    program = cut(whole, job.plan.servers).trainer
    phases = {**job.trainer, BETWEEN: program, IDLE_BETWEEN: idle(program)}
    pushed = {str(n.args[1]) for n in communications(program) if n.target is ops.push_rows}
    pieces = {name for table in pushed for name, _ in job.tables[table].pieces}
    calls = job.plan.accumulate
    channels = {n: replace(c, calls=calls) if n in pieces else c for n, c in job.channels.items()}
    lines = [job.digest, f"{calls} calls", *(f"{n.target} {n.args[1]}" for n in communications(program))]
    return replace(job, trainer=phases, channels=channels, digest=_hash(lines))


def _exchange(outer: OuterStep, without: Sequence[str]) -> Exchange:
    """An outer step, lowered. It moves every byte once, every so many steps: it is never compiled."""
    return Exchange(outer.clock, outer.interface, outer.hypers, _lowered(outer.program, outer.plan, without, PIPELINE))


def _joined(job: Job, spans: tuple[Span, ...], exchanges: tuple[Exchange, ...]) -> Job:
    """The job with what holds before and beside its steps. Raises `LoweringError` where servers would have to change."""
    for span in spans:
        if _server_lines(span.job.servers) != _server_lines(job.servers):
            raise LoweringError(
                f"before step {span.until} servers would run other programs than from then on: a value that joins variables of "
                "servers and of local_steps. Expected servers to do the same in all steps. Leave `start` out, or share these "
                "variables alike."
            )
    lines = [job.digest, *(f"{span.until} {span.job.digest}" for span in spans)]
    lines += [f"{each.clock} {sorted(each.hypers.items())} {each.job.digest}" for each in exchanges]
    channels = {name: channel for each in (*(s.job for s in spans), job) for name, channel in each.channels.items()}
    owners = {name: owner for each in (*(s.job for s in spans), job) for name, owner in each.owners.items()}
    servers = job.servers
    if not servers and any(each.is_served for each in exchanges):
        servers = tuple(ServerPart(rank, (), (), {}) for rank in range(job.plan.servers))
    return replace(
        job, servers=servers, channels=channels, owners=owners, digest=_hash(lines), spans=spans, exchanges=exchanges
    )


def _job(program: Program, step: Program, plan: Plan) -> Job:
    """The job of a captured program of which the passes have made the whole program `step`."""
    roles = cut(step, plan.servers)
    local = tuple(v.name for v in program.of_role(Role.OUTPUT) if not _reduced(v, program, plan))
    phases = {STEP: roles.trainer, IDLE: idle(roles.trainer)}
    digest = _digest(roles.trainer, roles.servers, plan.hosts)
    kept = {variable.name for part in roles.servers for variable in part.holds}
    joined = {name: tuple(parts) for name, parts in flat_parts(step).items() if name in kept}
    shared = as_joined(step, plan).sharings
    ticked = [s.variable for s in shared if isinstance(s.sync, ParameterServer) and s.sync.ticks]
    gradients = {grad_variable(step, name).name for name in ticked}
    channels = {
        name: replace(each, ticks=(each.variable.whole or name) in gradients) for name, each in roles.channels.items()
    }
    job = Job(plan, phases, roles.servers, channels, roles.owners, local, digest, roles.casts, roles.tables, joined)
    return _with_below(job)


def _with_below(job: Job) -> Job:
    """Trainers may ask for tables that are joined, and for their state per row, each by its own name."""
    below = {name: (part, job.owners[str(part.whole)]) for name, part in job.below.items()}
    owners = {name: owner for name, (_, owner) in below.items()}
    alone = {n: Table(n, ((n, Selection(n, server=owner)),)) for n, (p, owner) in below.items() if p.role is Role.PARAM}
    return replace(job, owners={**job.owners, **owners}, tables={**job.tables, **alone})


@contextmanager
def _no_collection() -> Iterator[None]:
    """Graphs are many small objects that all stay: walking over them in search of garbage doubles the time.

    Behind it they count as old (frozen and thawed), or the next small object would have all of them walked over at once.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if not gc.get_freeze_count():  # else somebody has frozen what is to stay so
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def _check_touched(job: Job) -> None:
    """An update of the rows that a batch touches runs on as many rows as there are: it may not hold the table's size."""
    touched = {name: channel.variable.of for name, channel in job.channels.items() if channel.rows == "touched"}
    by_id = job.by_id
    for program in [p for part in job.servers for p in part.programs]:
        table = next((touched[name] for name in program.reads if name in touched), None)
        whole = sorted(by_id.intersection(program.reads)) if by_id.isdisjoint(program.writes) else []
        if whole:
            raise LoweringError(
                f"'{whole[0]}' is kept by ids that nobody has counted, and {program.writes[0]}, which updates read, is made from "
                "all of it. Expected values made from gradients. Leave out what reads the table's values (a norm of weights, a "
                "trust ratio), or use nn.Embedding."
            )
        for node in program.graph.nodes if table is not None else ():
            made = (
                node.op == "call_function" and not node.all_input_nodes and isinstance(node.meta["val"], torch.Tensor)
            )
            if made and node.meta["val"].dim() > 0:
                raise LoweringError(
                    f"the update of '{table}' makes a tensor of sizes of its own (at {node.name}), so it cannot run on some of "
                    "the table's rows. Expected tensors made from the gradient, the parameter or its state (zeros_like). Make "
                    "it so, or share the variable by: all_reduce."
                )


def _check_replicated(updates: Updates, plan: Plan) -> None:
    """Replicas stay equal only where their update reads nothing that differs between trainers."""
    for join in updates.joins:
        _check_local(join, plan)
        _check_arriving(join, plan)
    kinds = updates.kinds()
    for sharing in plan.sharings:
        shared = isinstance(sharing.sync, Collective) and plan.trainers > 1
        if shared and kinds.get(sharing.variable) == "foreign":
            raise LoweringError(
                f"the update of '{sharing.variable}' reads the batch or the forward, or draws random numbers, so the "
                "replicas of it would drift apart. Expected an update made from the parameter, its gradient, its state and "
                "hyper-parameters. Move what differs in front of backward(), or share the variable by: local."
            )


def _check_scaled(program: Program, plan: Plan) -> None:
    """All trainers scale alike and skip the same steps, or each does so for itself alone."""
    scale = next((v.name for v in program.of_role(Role.STATE) if v.of is None), None)
    if scale is None:
        return
    syncs = {s.variable: s.sync for s in plan.sharings if s.variable in find_marks(program)}
    arriving = [name for name, sync in syncs.items() if isinstance(sync, ParameterServer) and not sync.in_step]
    if arriving:
        raise LoweringError(
            f"'{arriving[0]}' is updated asynchronously, but the step scales its loss by '{scale}', which follows from all "
            "gradients of a step; here each is applied as it comes. Expected updates in step. Say mode: sync, or train in "
            "bfloat16 or float32, without a GradScaler."
        )
    alike = {name: plan.groups.alike(sync) for name, sync in syncs.items()}
    if plan.trainers > 1 and len(set(alike.values())) > 1:
        name, shared = (max(alike, key=lambda each: len(alike[each])), min(alike, key=lambda each: len(alike[each])))
        raise LoweringError(
            f"'{name}' is {_word(syncs[name])} and '{shared}' is {_word(syncs[shared])}, but the step scales its loss by "
            f"'{scale}', which follows from the gradients of both; trainers would scale differently. Expected all variables to "
            "be shared among the same trainers, or none. Share them so, or train in bfloat16 or float32, without a GradScaler."
        )


def _check_delayed(program: Program, plan: Plan) -> None:
    """A value that gradients make together is of gradients of one step; a loss scale is that of the step that it scales."""
    late = delayed(plan) & find_marks(program).keys()
    scale = next((v.name for v in program.of_role(Role.STATE) if v.of is None), None)
    if late and scale is not None:
        raise LoweringError(
            f"'{min(late)}' is all-reduced with delay: 1, but the step scales its loss by '{scale}', which may be another when "
            "the gradient is applied, one step later. Expected no loss scale. Train in bfloat16 or float32, without a "
            "GradScaler, or leave delay out."
        )
    for join in find_updates(clip_per_trainer(program, plan)).joins if late else ():
        parts, readers = set(join.parameters), set(join.readers)
        if readers and late & parts and parts - late:
            raise LoweringError(
                f"'{min(late & parts)}' is all-reduced with delay: 1 and '{min(parts - late)}' is not, but a value (at "
                f"{join.values[0].name}) that their gradients make together, as clipping by a norm does, would be of gradients "
                "of two steps. Expected all or none of them to be delayed. Give them the same delay, or say clip: per_trainer."
            )


def _check_gathered(program: Program, plan: Plan) -> None:
    """A plan may have been written by hand."""
    for sharing in plan.sharings:
        if isinstance(sharing.sync, AllGather) and not program.variables[sharing.variable].sparse:
            raise LoweringError(
                f"'{sharing.variable}' is shared by all_gather, but the step reads it otherwise than by lookups, or not at all; "
                "expected a table of whose gradient only rows travel. Share it by: all_reduce."
            )


def _check_arriving(join: Join, plan: Plan) -> None:
    """Gradients that are applied as they come, one by one, have no value in common."""
    arriving = [s.variable for s in plan.sharings if isinstance(s.sync, ParameterServer) and not s.sync.in_step]
    joined = [name for name in arriving if name in (*join.parameters, *join.readers)]
    if joined and len({*join.parameters, *join.readers}) > 1:
        raise LoweringError(
            f"'{joined[0]}' is updated asynchronously, but its update and those of others read a value that several gradients "
            f"make together (at {join.values[0].name}), as clipping by a global norm does; no consistent set of gradients "
            "exists then. Say clip: per_trainer in the rules, so that each trainer clips by its own norm, or mode: sync."
        )


def _check_local(join: Join, plan: Plan) -> None:
    """A global value that differs between trainers may not reach variables that are equal on them: it does where a gradient takes
    part that is reduced among fewer."""
    syncs = {s.variable: s.sync for s in plan.sharings}
    for name in sorted(set(join.partials.values()) & syncs.keys() if plan.trainers > 1 else ()):
        own = plan.groups.alike(syncs[name])
        reader = next((r for r in sorted(join.readers) if not is_within(plan.groups.alike(syncs[r]), own)), None)
        if reader is not None:
            raise LoweringError(
                f"'{name}' is {_word(syncs[name])}, but its gradient takes part in a global value (at {join.values[0].name}) "
                f"that the update of '{reader}' reads; its trainers would drift apart. Expected global values of gradients "
                "that are shared among the same trainers. Clip these parameters apart, or share them alike."
            )


def _word(sync: Sync) -> str:
    match sync:
        case Local():
            return "local"
        case LocalSteps():
            return "local between exchanges"
        case AllReduce(over=over) if over != "all":
            return f"reduced over: {shown(over)}"
    return "shared"


def _applied(each: Pass, program: Program, plan: Plan) -> Program:
    """What a pass makes of a program, verified."""
    after = each(program, plan)
    if after is not program:
        verify_after(each.__name__, program, after)
    return after


def pipeline(passes: Sequence[Pass], without: Sequence[str] = ()) -> tuple[Pass, ...]:
    """The passes in order, without some. Raises `LoweringError` for a name that no pass has."""
    names = [each.__name__ for each in COMPILED]
    for name in without:
        if name not in names:
            raise LoweringError(f"no pass is called '{name}'; expected one of {', '.join(names)}. Correct `without`.")
    return tuple(each for each in passes if each.__name__ not in without)


def _refuse_without(step: Program, plan: Plan, without: Sequence[str]) -> None:
    """Servers' programs are made of what these passes place on them."""
    served = next((s.variable for s in plan.sharings if isinstance(s.sync, ParameterServer)), None)
    sends = step.graph.find_nodes(op="call_function", target=ops.send)
    needed = {"serve_parameters"} if served else set()
    needed |= {"share_globals"} if any(parts_of(node, step) for node in sends) else set()
    for name in without:
        if name in needed:
            raise LoweringError(
                f"the pass '{name}' is left out, but the plan keeps '{served}' on a server, whose program waits for "
                "what the pass makes trainers send. Leave the pass in, or share all variables by all_reduce."
            )


def _reduced(variable: Variable, program: Program, plan: Plan) -> bool:
    return communicates(plan) and not is_local(variable)


def communications(program: Program) -> list[Node]:
    """A trainer's communications in order: the n-th is the same on every trainer."""
    return [n for n in program.graph.nodes if n.target in ops.COMMUNICATION]


def _digest(step: Program, servers: Sequence[ServerPart], hosts: Sequence[int]) -> str:
    """Equal on all roles that derived the same job. Batch shapes are left out."""
    lines = [
        " ".join([str(n.target), str(n.args[1]), *in_group(str(argument(n, "group") or ""))])
        for n in communications(step)
    ]
    lines += [f"{n.args[1]} on host" for n in communications(step) if argument(n, "on_host")]
    lines += [repr(replace(v, aliases=())) for v in step.variables.values() if v.role in (Role.PARAM, Role.STATE)]
    lines += [f"hosts {hosts}"] if hosts else []
    return _hash([*lines, *_server_lines(servers)])


def _server_lines(servers: Sequence[ServerPart]) -> list[str]:
    lines: list[str] = []
    for part in servers:
        lines += [repr(v) for v in part.holds]
        lines += [v.unbounded.to_text() for v in part.holds if v.unbounded is not None]
        lines += [line for p in part.programs for line in _lines(p)]
    return lines


def _hash(lines: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _lines(program: Program) -> list[str]:
    """A program's nodes by their numbers: names differ where the forward does."""
    number = {node: f"%{index}" for index, node in enumerate(program.graph.nodes)}
    return [
        f"{n.op} {op_name(n.target) if n.op == 'call_function' else n.meta.get('variable')} "
        f"{map_arg((n.args, n.kwargs), number.__getitem__)}"
        for n in program.graph.nodes
    ]
