"""The cut: from a whole program to a program for each role, and to what crosses between them.

Nothing is decided here. Nodes say where they run, variables say which parts of them servers keep, and crossings
(`push.merged`, `pull.value`, `send`, `gather`) name their channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from syncwright import ops
from syncwright.cut.crossing import calls, channel_of, part_name, ranks, senders, source_of
from syncwright.cut.servers import server_programs
from syncwright.cut.trainer import trainer_program
from syncwright.job import Channel, ServerPart
from syncwright.program import Program, Role, Variable
from syncwright.shapes import Inference, mode_of
from syncwright.split import piece_of


@dataclass(frozen=True, slots=True, eq=False)
class Roles:
    """What a whole program is cut into; see `Job`."""

    trainer: Program
    servers: tuple[ServerPart, ...]
    channels: Mapping[str, Channel]
    owners: Mapping[str, int]


def cut(program: Program, servers: int) -> Roles:
    """The programs of every role.

    before  %m = push.merged(%g, "w.grad", "mean") at owners "w", %n = sub(w, %m) at owners "w", output({"w": %n})
    after   trainer: push(%g, "w.grad"); server 0: reads w, w.grad; %n = sub(w, w.grad); output({"w": %n})

    What runs at the owners of a variable that is cut becomes one program for each piece, on that piece's rows. Where
    servers keep nothing there are none.
    """
    if not any(variable.kept for variable in program.variables.values()):
        return Roles(program, (), {}, {})
    known = Inference(mode_of(program.graph))
    parts = _parts(program, server_programs(program, known), _exports(program), servers)
    hypers = {part.rank: _hypers(part) for part in parts}
    return Roles(trainer_program(program, known), parts, _channels(program, hypers), _owners(program))


def _channels(program: Program, hypers: Mapping[int, tuple[str, ...]]) -> dict[str, Channel]:
    """What trainers push. Hyper-parameters travel with what a server computes with, not with what it only hands on."""
    found = {}
    for node in calls(program, ops.push_merged):
        computes = any(user.target is not ops.pull_value for user in node.users)
        variable = program.variables[channel_of(node)]
        for index, rank in enumerate(ranks(node, program)):
            part = piece_of(variable, index)
            found[part.name] = Channel(part, rank, node.args[2], hypers[rank] if computes else ())  # type: ignore[arg-type]
    return found


def _owners(program: Program) -> dict[str, int]:
    """Which server gives each value that trainers ask for."""
    found = {}
    for variable in program.variables.values():
        if variable.role is not Role.GRAD:
            found |= {piece_of(variable, i).name: int(part.server or 0) for i, part in enumerate(variable.kept)}
    for node in calls(program, ops.pull_value):
        if not program.variables[channel_of(node)].kept:
            found[channel_of(node)] = ranks(source_of(node), program)[0]
    return found


def _hypers(part: ServerPart) -> tuple[str, ...]:
    found = {n for p in part.programs for n in p.reads if p.variables[n].role is Role.HYPER}
    return tuple(sorted(found))


def _parts(
    program: Program,
    programs: Mapping[int, Sequence[Program]],
    exports: Mapping[int, Mapping[str, tuple[int, ...]]],
    servers: int,
) -> tuple[ServerPart, ...]:
    holds: dict[int, list[Variable]] = {rank: [] for rank in range(servers)}
    for variable in _by_parameter(v for v in program.variables.values() if v.role is not Role.GRAD and v.kept):
        for index, part in enumerate(variable.kept):
            holds[int(part.server or 0)].append(piece_of(variable, index))
    return tuple(ServerPart(r, tuple(holds[r]), tuple(programs.get(r, ())), exports.get(r, {})) for r in holds)


def _by_parameter(variables: Iterable[Variable]) -> list[Variable]:
    """Parameters in their order, each with what goes where it goes."""
    groups: dict[str, list[Variable]] = {}
    for variable in variables:
        groups.setdefault(variable.of or variable.name, []).append(variable)
    return [variable for group in groups.values() for variable in group]


def _exports(program: Program) -> dict[int, dict[str, tuple[int, ...]]]:
    """What each server computes for others, with those others."""
    readers: dict[tuple[int, str], list[int]] = {}
    for node in calls(program, ops.send, ops.gather):
        for index, rank in enumerate(senders(node, program)):
            name = part_name(node, index)
            readers.setdefault((rank, name), []).extend(r for r in ranks(node, program) if r != rank)
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for (rank, name), others in sorted(readers.items()):
        if others:
            found.setdefault(rank, {})[name] = tuple(sorted(set(others)))
    return found
