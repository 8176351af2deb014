"""Who owns what under a plan: parts of variables, and the place of every node of an update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from syncwright.errors import LoweringError
from syncwright.meaning import Cut, Free, Owned, Rows, Scalar
from syncwright.place import EVERYWHERE, Owners, Place, Server
from syncwright.plan import ParameterServer, Piece, Plan
from syncwright.program import Program, Role, Variable
from syncwright.selection import Along, Selection
from syncwright.update import Update, Updates


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Which of a program's parameters servers own, and what goes where they go.

    pieces  of every parameter that servers own
    owned   by parameter: itself, its state, buffers made from it
    """

    program: Program
    updates: Updates
    pieces: Mapping[str, tuple[Piece, ...]]
    owned: Mapping[str, tuple[str, ...]]
    reducer: int


def split(program: Program, updates: Updates, plan: Plan) -> Split:
    """Finds what servers own under `plan`. Raises `LoweringError` for an update that no server can run."""
    pieces = {s.variable: s.pieces for s in plan.sharings if isinstance(s.sync, ParameterServer)}
    for name in pieces:
        _check_served(updates.by_parameter.get(name), name)
    owned = {parameter: [parameter] for parameter in pieces}
    for variable in program.of_role(Role.STATE):
        if variable.of in owned:
            owned[variable.of].append(variable.name)
    for parameter, names in owned.items():
        update = updates.by_parameter.get(parameter)
        names += update.writes if update else ()
    found = {parameter: tuple(dict.fromkeys(names)) for parameter, names in owned.items()}
    return Split(program, updates, pieces, found, plan.reducer or 0)


def _check_served(update: Update | None, name: str) -> None:
    if update is not None and update.kind == "foreign":
        raise LoweringError(
            f"'{name}' is planned for a server, but its update reads the batch or the forward, or draws random numbers. "
            "Expected an update made from the parameter, its gradient, its state and hyper-parameters. Make it so, or "
            "share the variable by: local."
        )


def places(parts: Split) -> dict[Node, Place]:
    """Where each node runs that servers run; gradients' marks, and all that is not here, stay on trainers.

    The update of a parameter runs where its pieces are kept. A global value (a clip coefficient) that several owners
    have a part in is made at the reducer, from partials made at the owners.
    """
    found: dict[Node, Place] = {}
    meanings, marks = parts.updates.meanings, set(parts.updates.marks.values())
    for node, meaning in meanings.items():
        if isinstance(meaning, Owned) and meaning.of in parts.pieces and node not in marks:
            found[node] = Owners(meaning.of)
    for join in parts.updates.joins:
        if not join.partials:  # made from state of no parameter, which trainers have: theirs
            continue
        served = [p for p in join.parameters if p in parts.pieces]
        if not served:
            continue
        alone = len(join.parameters) == 1 and len(parts.pieces[served[0]]) == 1
        nodes = [node for node in join.nodes if node.op != "placeholder"]
        found |= dict.fromkeys(nodes, Owners(served[0]) if alone else Server(parts.reducer))
        found |= {n: Owners(p) for n, p in join.partials.items() if p in parts.pieces and n not in marks}
    placeholders, results = parts.program.placeholders, parts.program.results
    for parameter, names in parts.owned.items():
        found |= {placeholders[name]: Owners(parameter) for name in names if name in placeholders}
    free = [node for node, meaning in meanings.items() if isinstance(meaning, Free)]
    wanted = {results[name] for names in parts.owned.values() for name in names if name in results}
    for node in reversed(free):
        if node in wanted or any(user in found for user in node.users):
            found[node] = EVERYWHERE
    return found


def kept(parts: Split, name: str, parameter: str) -> tuple[Selection, ...]:
    """The parts of a variable that goes where `parameter` goes, one for each piece of it."""
    pieces = parts.pieces[parameter]
    if len(pieces) == 1 or not _has_rows(parts, name, parameter):
        return tuple(Selection(name, server=p.owner) for p in pieces)
    unbounded = parts.program.variables[parameter].unbounded is not None
    along: Along = "ids" if unbounded else "shards" if pieces[0].shards else "rows"
    return tuple(Selection(name, along, p.start, p.stop, p.owner, p.shards) for p in pieces)


def _has_rows(parts: Split, name: str, parameter: str) -> bool:
    """Whether a piece of the parameter goes with the same rows of the variable: as the update uses it."""
    if name == parameter:
        return True
    program, meanings = parts.program, parts.updates.meanings
    node = program.placeholders.get(name) or program.results.get(name)
    match meanings.get(node) if node is not None else None:
        case Cut() | Rows():
            return True
        case Scalar():
            return False
    raise LoweringError(
        f"'{name}' goes where '{parameter}' goes, which is cut into {len(parts.pieces[parameter])} pieces, but nothing in "
        f"the update says which rows of it belong to a piece. Expected state that the update reads or writes row by row. "
        "Keep the variable whole: partition: whole."
    )


def piece_of(variable: Variable, index: int) -> Variable:
    """The variable that stands for a kept part of `variable`: "fc.weight[0]"; what is in one piece keeps its name."""
    if len(variable.kept) < 2:
        return replace(variable, kept=())
    part = variable.kept[index]
    of = None if variable.of is None else piece_name(variable.of, index)
    name, shape = piece_name(variable.name, index), part.shape(variable.shape)
    return replace(variable, name=name, of=of, shape=shape, selection=part, kept=(), aliases=())


def piece_name(name: str, index: int) -> str:
    return f"{name}[{index}]"


def own_name(name: str) -> str:
    """Under which a trainer's own part of a variable stands: "fc.weight[own]"."""
    return f"{name}[own]"


def grad_variable(program: Program, parameter: str) -> Variable:
    """The gradient of a parameter as a variable."""
    variable = program.variables[parameter]
    shape = (*variable.shape[:-1], variable.shape[-1] + 1) if variable.lazy else variable.shape
    return Variable(f"{parameter}.grad", Role.GRAD, shape, variable.dtype, of=parameter, unbounded=variable.unbounded)


def global_variable(node: Node) -> Variable:
    """A global value, or one owner's part of it, as a variable; named by its node in the captured graph."""
    val = node.meta["val"]
    if isinstance(val, torch.Tensor):
        return Variable(f"global.{node.name}", Role.GLOBAL, tuple(val.shape), val.dtype)
    return Variable(f"global.{node.name}", Role.GLOBAL, (), torch.float64)
