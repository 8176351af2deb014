"""The cut: from a whole program to a program for each role, and to what crosses between them.

Nothing is decided here. Nodes say where they run, variables say which parts of them servers keep, and crossings
(`push.merged`, `pull.value`, `send`, `gather`) name their channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.cut.crossing import calls, channel_of, part_name, ranks, senders, source_of
from syncwright.cut.servers import server_programs
from syncwright.cut.trainer import trainer_program
from syncwright.job import Channel, ServerPart, Table
from syncwright.program import Program, Role, Variable
from syncwright.schema import argument
from syncwright.shapes import Inference, mode_of
from syncwright.split import piece_of


@dataclass(frozen=True, slots=True, eq=False)
class Roles:
    """What a whole program is cut into; see `Job`."""

    trainer: Program
    servers: tuple[ServerPart, ...]
    channels: Mapping[str, Channel]
    owners: Mapping[str, int]
    casts: Mapping[str, tuple[str, torch.dtype]]
    tables: Mapping[str, Table]


def cut(program: Program, servers: int) -> Roles:
    """The programs of every role.

    before  %m = push.merged(%g, "w.grad", "mean") at owners "w", %n = sub(w, %m) at owners "w", output({"w": %n})
    after   trainer: push(%g, "w.grad"); server 0: reads w, w.grad; %n = sub(w, w.grad); output({"w": %n})

    What runs at the owners of a variable that is cut becomes one program for each piece, on that piece's rows. Where
    servers keep nothing there are none.
    """
    if not any(variable.kept for variable in program.variables.values()):
        return Roles(program, (), {}, {}, {}, {})
    known = Inference(mode_of(program.graph))
    parts = _parts(program, server_programs(program, known), _exports(program), servers)
    hypers = {part.rank: _hypers(part) for part in parts}
    trainer, channels = trainer_program(program, known), _channels(program, hypers)
    return Roles(trainer, parts, channels, _owners(program), _casts(program), _tables(program))


def _channels(program: Program, hypers: Mapping[int, tuple[str, ...]]) -> dict[str, Channel]:
    """What trainers push. Hyper-parameters travel with what a server computes with, not with what it only hands on."""
    found = {}
    for node in calls(program, *ops.PUSHES):
        computes = any(user.target not in ops.PULLS for user in node.users)
        variable = program.variables[channel_of(node)]
        for index, rank in enumerate(ranks(node, program)):
            part = piece_of(variable, index)
            travelling = hypers[rank] if computes else ()
            found[part.name] = Channel(part, rank, argument(node, "merge"), travelling, **_counting(node))  # type: ignore[arg-type]
    return found


def _counting(node: Node) -> dict[str, object]:
    """How many contributions count together and how many travel together, in which dtype, and which rows are written."""
    wire = source_of(node).meta["val"].dtype if "dtype" in node.kwargs else None
    found = {"take": argument(node, "take"), "up_to": argument(node, "up_to"), "wire": wire}
    return found | {"rows": argument(node, "written") or "", "on_host": "weight" in node.kwargs}


def _tables(program: Program) -> dict[str, Table]:
    """What trainers push and pull rows of; in an evaluation they pull rows of the table itself, in its own dtype."""
    found = {}
    for node in calls(program, ops.push_rows_merged, ops.pull_rows_value):
        variable = program.variables[channel_of(node)]
        of = str(variable.of if variable.role is Role.GRAD else variable.kept[0].of)
        for each in (variable, program.variables[of]):
            pieces = tuple((piece_of(each, index).name, part) for index, part in enumerate(each.kept))
            found[each.name] = Table(of, pieces)
    return found


def _owners(program: Program) -> dict[str, int]:
    """Which server gives each value that trainers ask for."""
    found = {}
    for variable in program.variables.values():
        if variable.role not in (Role.GRAD, Role.GLOBAL):
            found |= {piece_of(variable, i).name: int(part.server or 0) for i, part in enumerate(variable.kept)}
    for node in calls(program, *ops.PULLS):
        variable = program.variables[channel_of(node)]
        if not variable.kept:
            found[variable.name] = ranks(source_of(node), program)[0]
        elif variable.role is Role.GLOBAL:
            found |= {piece_of(variable, i).name: int(part.server or 0) for i, part in enumerate(variable.kept)}
    return found


def _casts(program: Program) -> dict[str, tuple[str, torch.dtype]]:
    """Values that are pulled in another dtype, with the variables that are kept."""
    pulled = [program.variables[channel_of(node)] for node in calls(program, *ops.PULLS) if "dtype" in node.kwargs]
    return {
        piece_of(variable, index).name: (piece_of(program.variables[part.of], index).name, variable.dtype)
        for variable in pulled
        for index, part in enumerate(variable.kept)
    }


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
    kept = [v for v in program.variables.values() if v.kept and v.role not in (Role.GRAD, Role.GLOBAL)]
    for variable in _by_parameter(kept):
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
