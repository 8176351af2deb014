"""Program and plan to a job: the passes, then the cut by role, verified after every pass."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch.fx import Node
from torch.fx.node import map_arg

from syncwright import ops
from syncwright.errors import LoweringError
from syncwright.global_batch import check_lookups
from syncwright.idle import idle
from syncwright.job import Channel, Job, ServerPart
from syncwright.passes import COMPILED, PIPELINE
from syncwright.passes.average import by_collective, communicates, is_local
from syncwright.plan import AllReduce, Plan
from syncwright.program import Program, Role, Variable
from syncwright.split import (
    Split,
    global_variable,
    grad_variable,
    held_by_servers,
    merges,
    piece_of,
    server_parts,
    split,
)
from syncwright.text import target_text
from syncwright.update import Updates, find_updates, followed
from syncwright.verify import verify, verify_after, verify_job

Pass = Callable[[Program, Plan], Program]


def lower(program: Program, plan: Plan, without: Sequence[str] = (), passes: Sequence[Pass] = PIPELINE) -> Job:
    """Everything that every role runs under `plan`.

    without  names of passes to leave out, to find the one at fault; only those that no other needs
    passes   `PIPELINE`, or `COMPILED` for programs that will be compiled

    Raises `LoweringError` where the plan cannot be carried out exactly, `ProgramError` where a pass is at fault.
    """
    with _no_collection():
        verify(program)
        updates = find_updates(program)
        check_lookups(program, plan)
        _check_replicated(updates, plan)
        step = program
        for each in pipeline(passes, without):
            step = _applied(each, step, plan)
        job = _job(split(program, updates, plan), plan, step, without)
        verify_job(job)
    return job


def _job(parts: Split, plan: Plan, step: Program, without: Sequence[str]) -> Job:
    """The job of a captured program that the passes have turned into a trainer's `step`."""
    _refuse_without(parts, without)
    program = parts.program
    servers = server_parts(parts, plan) if parts.pieces else ()
    channels, owners = _channels(program, plan, parts, servers)
    local = tuple(v.name for v in program.of_role(Role.OUTPUT) if not _reduced(v, program, plan))
    phases = {"step": step, "idle": idle(step)}
    return Job(plan, phases, servers, channels, owners, local, _digest(step, servers))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Graphs are many small objects that all stay: walking over them in search of garbage doubles the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_replicated(updates: Updates, plan: Plan) -> None:
    """Replicas stay equal only where their update reads nothing that differs between trainers."""
    kinds = updates.kinds()
    for sharing in plan.sharings:
        shared = isinstance(sharing.sync, AllReduce) and plan.trainers > 1
        if shared and kinds.get(sharing.variable) == "foreign":
            raise LoweringError(
                f"the update of '{sharing.variable}' reads the batch or the forward, or draws random numbers, so the "
                "replicas of it would drift apart. Expected an update made from the parameter, its gradient, its state and "
                "hyper-parameters. Move what differs in front of backward(), or share the variable by: local."
            )


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


def _refuse_without(parts: Split, without: Sequence[str]) -> None:
    """Servers' programs wait for what these passes make trainers send."""
    served = next(iter(parts.pieces), None)
    needed = {"serve_parameters"} if served else set()
    needed |= {"share_globals"} if parts.joins else set()
    for name in without:
        if name in needed:
            raise LoweringError(
                f"the pass '{name}' is left out, but the plan keeps '{served}' on a server, whose program waits for "
                "what the pass makes trainers send. Leave the pass in, or share all variables by all_reduce."
            )


def _reduced(variable: Variable, program: Program, plan: Plan) -> bool:
    return communicates(plan) and not is_local(variable)


def _channels(
    program: Program, plan: Plan, parts: Split, servers: Sequence[ServerPart]
) -> tuple[dict[str, Channel], dict[str, int]]:
    channels: dict[str, Channel] = {}
    owners = {name: rank for name, (rank, _) in held_by_servers(parts).items()}
    hypers = {part.rank: _hypers(part) for part in servers}
    merge = merges(plan)
    for parameter, pieces in parts.pieces.items():
        grad = grad_variable(program, parameter)
        for piece in pieces:
            variable = piece_of(grad, program.variables[parameter], piece, len(pieces))
            rank = int(piece.owner or 0)
            channels[variable.name] = Channel(variable, rank, merge[parameter], hypers[rank])
    for join in parts.joins:
        for node, parameter in join.partials.items():
            if parameter not in parts.pieces:
                variable = global_variable(node)
                channels[variable.name] = Channel(variable, parts.reducer, "first", hypers[parts.reducer])
        owners.update({global_variable(node).name: parts.reducer for node in join.values})
    if servers and not by_collective(plan) and plan.trainers > 1:
        _value_channels(program, plan, parts.reducer, channels, owners)
    return channels, owners


def _value_channels(program: Program, plan: Plan, reducer: int, channels: dict[str, Channel], owners: dict) -> None:
    """A channel for every value that `average_values` sends through the reducer."""
    policies, follows = dict(plan.buffers), followed(program)
    for name in program.writes:
        variable = program.variables[name]
        match variable.role:
            case Role.OUTPUT if not is_local(variable):
                mean = variable.dtype.is_floating_point
            case Role.BUFFER if name not in follows and policies.get(name) != "local":
                mean = policies.get(name, "mean") == "mean"
            case _:
                continue
        channels[name] = Channel(variable, reducer, "mean" if mean else "sum")
        owners[name] = reducer


def _hypers(part: ServerPart) -> tuple[str, ...]:
    found = {n for p in part.programs for n in p.reads if p.variables[n].role is Role.HYPER}
    return tuple(sorted(found))


def communications(program: Program) -> list[Node]:
    """A trainer's communications in order: the n-th is the same on every trainer."""
    return [n for n in program.graph.nodes if n.target in ops.COMMUNICATION]


def _digest(step: Program, servers: Sequence[ServerPart]) -> str:
    """Equal on all roles that derived the same job. Batch shapes are left out."""
    lines = [f"{n.target} {_channel(n)}" for n in communications(step)]
    lines += [repr(replace(v, aliases=())) for v in step.variables.values() if v.role in (Role.PARAM, Role.STATE)]
    for part in servers:
        lines += [repr(v) for v in part.holds]
        lines += [line for p in part.programs for line in _lines(p)]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _channel(node: Node) -> str:
    return str(next(a for a in node.args if isinstance(a, str)))


def _lines(program: Program) -> list[str]:
    """A program's nodes by their numbers: names differ where the forward does."""
    number = {node: f"%{index}" for index, node in enumerate(program.graph.nodes)}
    return [
        f"{n.op} {target_text(n.target) if n.op == 'call_function' else n.meta.get('variable')} "
        f"{map_arg((n.args, n.kwargs), number.__getitem__)}"
        for n in program.graph.nodes
    ]
