"""Cut at the gradients: what servers compute, as slices of the captured graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.fx import Node

from syncwright.errors import LoweringError
from syncwright.job import ServerPart
from syncwright.plan import AllReduce, Local, ParameterServer, Piece, Plan
from syncwright.program import Program, Role, Variable, new_placeholder
from syncwright.shapes import Inference, mode_of
from syncwright.update import Join, Scalar, Update, Updates

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Which of a program's parameters servers own, and which global values cross between roles.

    pieces  of every parameter that servers own
    joins   global values whose parts lie with several owners; others are computed inside one role's program
    state   names of each parameter's state
    stops   where slices end: at all gradients, and at global values that are made elsewhere
    """

    program: Program
    updates: Updates
    pieces: Mapping[str, tuple[Piece, ...]]
    joins: tuple[Join, ...]
    reducer: int
    state: Mapping[str, tuple[str, ...]]
    stops: Mapping[Node, Variable]


def split(program: Program, updates: Updates, plan: Plan) -> Split:
    """Finds what crosses between roles under `plan`."""
    pieces = {s.variable: s.pieces for s in plan.sharings if isinstance(s.sync, ParameterServer)}
    for name in pieces:
        _check_served(updates.by_parameter.get(name), name)
    for join in updates.joins:
        _check_local(join, plan)
    crossing = tuple(j for j in updates.joins if _crosses(j, pieces))
    state: dict[str, list[str]] = {}
    for variable in program.of_role(Role.STATE):
        state.setdefault(str(variable.of), []).append(variable.name)
    stops = {mark: grad_variable(program, name) for name, mark in updates.marks.items()}
    stops |= {node: global_variable(node) for join in crossing for node in join.values}
    named = {parameter: tuple(names) for parameter, names in state.items()}
    return Split(program, updates, pieces, crossing, plan.reducer or 0, named, stops)


def _crosses(join: Join, pieces: Mapping[str, tuple[Piece, ...]]) -> bool:
    """One owner who has all of it computes it inside its own program."""
    served = [p for p in join.parameters if p in pieces]
    return bool(served) and (len(join.parameters) > 1 or len(pieces[served[0]]) > 1)


def _check_local(join: Join, plan: Plan) -> None:
    """A global value that local variables take part in differs between trainers: it may not reach shared ones."""
    local = {s.variable for s in plan.sharings if isinstance(s.sync, Local)} & set(join.parameters)
    shared = set(join.readers) - local
    if plan.trainers > 1 and shared and local & set(join.partials.values()):
        raise LoweringError(
            f"'{sorted(local)[0]}' is local, but its gradient takes part in a global value (at {join.values[0].name}) that the "
            f"update of '{sorted(shared)[0]}' reads; its trainers would drift apart. Expected global values of shared gradients "
            "only. Clip local and shared parameters apart, or share them all."
        )


def _check_served(update: Update | None, name: str) -> None:
    if update is not None and update.kind == "foreign":
        raise LoweringError(
            f"'{name}' is planned for a server, but its update reads the batch or the forward, or draws random numbers. "
            "Expected an update made from the parameter, its gradient, its state and hyper-parameters. Make it so, or "
            "share the variable by: local."
        )


def piece_name(name: str, piece: Piece, pieces: int) -> str:
    """What a piece of a variable is called: "fc.weight[0]"; a variable in one piece keeps its name."""
    return name if pieces == 1 else f"{name}[{piece.index}]"


def piece_of(variable: Variable, parameter: Variable, piece: Piece, pieces: int) -> Variable:
    """The variable that stands for rows [start, stop) of `variable`; 0-d state goes to every piece whole."""
    name = piece_name(variable.name, piece, pieces)
    owner = None if variable.of is None else piece_name(variable.of, piece, pieces)
    if pieces == 1:
        return replace(variable, name=name, of=owner)
    aligned = bool(variable.shape) and variable.shape[0] == parameter.shape[0]
    shape = (piece.stop - piece.start, *variable.shape[1:]) if aligned else variable.shape
    part = (piece.start, piece.stop) if aligned else None
    return replace(variable, name=name, of=owner, shape=shape, whole=variable.name, part=part, aliases=())


def grad_variable(program: Program, parameter: str) -> Variable:
    """The gradient of a parameter as a variable."""
    variable = program.variables[parameter]
    shape = (*variable.shape[:-1], variable.shape[-1] + 1) if variable.lazy else variable.shape
    return Variable(f"{parameter}.grad", Role.GRAD, shape, variable.dtype, of=parameter)


def global_variable(node: Node) -> Variable:
    """A global value, or one owner's part of it, as a variable; named by its node in the captured graph."""
    val = node.meta["val"]
    if isinstance(val, torch.Tensor):
        return Variable(f"global.{node.name}", Role.GLOBAL, tuple(val.shape), val.dtype)
    return Variable(f"global.{node.name}", Role.GLOBAL, (), torch.float64)


def partial_pieces(node: Node, parameter: str, split: Split) -> list[Variable]:
    """The parts of one partial: one per piece of its parameter; of a number that every piece knows, one."""
    whole, pieces = global_variable(node), split.pieces.get(parameter, ())
    if len(pieces) < 2 or isinstance(split.updates.meanings[node], Scalar):
        return [whole]
    return [replace(whole, name=f"{whole.name}[{p.index}]", whole=whole.name) for p in pieces]


def held_by_servers(split: Split) -> dict[str, tuple[int, Variable]]:
    """Every variable or piece that lives on a server, with that server."""
    found = {}
    for parameter, pieces in split.pieces.items():
        whole = split.program.variables[parameter]
        for piece in pieces:
            for name in owned(split, parameter):
                part = piece_of(split.program.variables[name], whole, piece, len(pieces))
                found[part.name] = (int(piece.owner or 0), part)
    return found


def owned(split: Split, parameter: str) -> tuple[str, ...]:
    """The parameter itself and what goes where it goes: its state, buffers made from it."""
    update = split.updates.by_parameter.get(parameter)
    return tuple(dict.fromkeys([parameter, *split.state.get(parameter, ()), *(update.writes if update else ())]))


def server_parts(split: Split, plan: Plan) -> tuple[ServerPart, ...]:
    """Every server's part.

    before  %g = gradient(%mm, "w"); %m = mul(%g, 0.1); %new = sub(w, %m); output({"loss": %loss, "w": %new})
    after   server 0: reads w.grad, w; %m = mul(w.grad, 0.1); %new = sub(w, %m); output({"w": %new})
    """
    programs: dict[int, list[Program]] = {rank: [] for rank in range(plan.servers)}
    known = Inference(mode_of(split.program.graph))
    for parameter, pieces in split.pieces.items():
        if parameter in split.updates.by_parameter:
            update = _update_slice(split, parameter)
            for piece in pieces:
                programs[int(piece.owner or 0)].append(_specialise(split, update, parameter, piece, known))
    for join in split.joins:
        for node, parameter in join.partials.items():
            pieces = split.pieces.get(parameter, ())
            for piece in pieces[: len(partial_pieces(node, parameter, split))]:
                part = _partial_slice(split, node, parameter, piece)
                programs[int(piece.owner or 0)].append(_specialise(split, part, parameter, piece, known))
        programs[split.reducer].append(global_program(split, join, known))
    holds: dict[int, list[Variable]] = {rank: [] for rank in programs}
    for rank, variable in held_by_servers(split).values():
        holds[rank].append(variable)
    exports = _exports(programs)
    return tuple(ServerPart(r, tuple(holds[r]), tuple(programs[r]), exports[r]) for r in programs)


def _exports(programs: Mapping[int, list[Program]]) -> dict[int, dict[str, tuple[int, ...]]]:
    """What each server computes for others, with those others."""
    readers: dict[str, list[int]] = {}
    for rank, own in programs.items():
        for name in {name for p in own for name in p.reads if p.variables[name].role is Role.GLOBAL}:
            readers.setdefault(name, []).append(rank)
    found = {}
    for rank, own in programs.items():
        made = {name for p in own for name in p.writes if p.variables[name].role is Role.GLOBAL}
        elsewhere = {name: tuple(r for r in readers.get(name, ()) if r != rank) for name in sorted(made)}
        found[rank] = {name: others for name, others in elsewhere.items() if others}
    return found


def _update_slice(split: Split, parameter: str) -> Program:
    """The slice that computes a parameter's new value and state from its gradient and the global values it reads."""
    results = split.program.results
    wanted = {name: results[name] for name in split.updates.by_parameter[parameter].writes}
    return split.program.slice(wanted, split.stops)


def _partial_slice(split: Split, node: Node, parameter: str, piece: Piece) -> Program:
    """The slice that computes one owner's part of a global value."""
    variable = partial_pieces(node, parameter, split)[piece.index]
    stops = {n: v for n, v in split.stops.items() if n is not node} if node in split.stops else split.stops
    program = split.program.slice({variable.name: node}, stops)
    return replace(program, variables={**program.variables, variable.name: variable})


def _specialise(split: Split, program: Program, parameter: str, piece: Piece, known: Inference) -> Program:
    """The same program on rows [start, stop) of the parameter and of all that is aligned with it."""
    whole, count = split.program.variables[parameter], len(split.pieces[parameter])
    if count == 1:
        return program
    mine = {parameter, f"{parameter}.grad", *owned(split, parameter)}
    renamed = {
        name: piece_of(program.variables[name], whole, piece, count) for name in program.variables if name in mine
    }
    program = program.edit()
    for name, node in program.placeholders.items():
        if name in renamed:
            node.meta = {"variable": renamed[name].name, "val": known.fake_of(renamed[name])}
    _resize(program, whole.shape, piece)
    known.propagate(program)
    variables = {renamed.get(n, v).name: renamed.get(n, v) for n, v in program.variables.items()}
    program.output.args = ({renamed[n].name if n in renamed else n: r for n, r in program.results.items()},)
    program = replace(program, variables=variables)
    _check_pieces(program, parameter)
    return program


def _resize(program: Program, shape: tuple[int, ...], piece: Piece) -> None:
    """Sizes written into the graph (`full([10, 4])`) become the piece's."""
    for node in program.graph.nodes:
        if node.op == "call_function" and any(isinstance(a, list | tuple) and tuple(a) == shape for a in node.args):
            rows = [piece.stop - piece.start, *shape[1:]]
            node.args = tuple(rows if isinstance(a, list | tuple) and tuple(a) == shape else a for a in node.args)


def _check_pieces(program: Program, parameter: str) -> None:
    for name, node in program.results.items():
        val, variable = node.meta["val"], program.variables[name]
        if isinstance(val, torch.Tensor) and tuple(val.shape) != variable.shape:
            raise LoweringError(
                f"'{parameter}' cannot be cut: from a piece of it '{name}' comes out as {tuple(val.shape)}, expected "
                f"{variable.shape} (at {node.name}). Keep the variable whole: partition: whole."
            )


def global_program(split: Split, join: Join, known: Inference) -> Program:
    """The slice that makes global values from all partials, at the reducer.

    before  %n0 = vector_norm(%g0), %n1 = vector_norm(%g1), %s = stack([%n0, %n1]), ..., %c = clamp(...)
    after   reads global.n0, global.n1; %s = stack([global.n0, global.n1]); ...; output({"global.c": %c})
    """
    stops = {node: global_variable(node) for node in join.partials}
    stops |= {n: global_variable(n) for j in split.joins if j is not join for n in j.values}
    wanted = {global_variable(node).name: node for node in join.values}
    program = split.program.slice(wanted, stops)
    made = {global_variable(node).name: global_variable(node) for node in join.values}
    program = replace(program, variables={**program.variables, **made})
    parts = {node: partial_pieces(node, parameter, split) for node, parameter in join.partials.items()}
    return _combine_parts(program, {node: of_node for node, of_node in parts.items() if len(of_node) > 1}, known)


_COMBINE = {
    aten.linalg_vector_norm.default: lambda stacked, node: (aten.linalg_vector_norm.default, stacked, *node.args[1:2]),
    aten.sum.default: lambda stacked, node: (aten.sum.default, stacked),
    aten.amax.default: lambda stacked, node: (aten.amax.default, stacked),
    aten.amin.default: lambda stacked, node: (aten.amin.default, stacked),
}


def _combine_parts(program: Program, parts: Mapping[Node, Sequence[Variable]], known: Inference) -> Program:
    """Reads the parts of partials and adds them up as their ops add: a norm of norms, a sum of sums."""
    graph, placeholders, variables = program.graph, program.placeholders, dict(program.variables)
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for partial, own in parts.items():
        whole = f"global.{partial.name}"
        old = placeholders[whole]
        with graph.inserting_before(old):
            read = [new_placeholder(graph, part, known.fake_of(part)) for part in own]
        with graph.inserting_before(first):
            stacked = known.call(graph, aten.stack.default, read)
            target, *args = _COMBINE[partial.target](stacked, partial)  # type: ignore[index]
            combined = known.call(graph, target, *args)
        old.replace_all_uses_with(combined)
        graph.erase_node(old)
        del variables[whole]
        variables |= {part.name: part for part in own}
    return replace(program, variables=variables)


def merges(plan: Plan) -> dict[str, Literal["mean", "sum"]]:
    """How the contributions to each parameter's gradient become one."""
    return {s.variable: s.sync.reduce for s in plan.sharings if isinstance(s.sync, AllReduce | ParameterServer)}
