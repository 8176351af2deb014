"""The servers' programs: slices of what is placed on them, from crossing to crossing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.cut.crossing import calls, channel_of, source_of
from syncwright.cut.piece import specialise
from syncwright.place import AT, Owners, Place, Server, place_of
from syncwright.program import Program, Variable, new_placeholder
from syncwright.selection import Selection
from syncwright.shapes import Inference
from syncwright.split import piece_name

aten = torch.ops.aten


def server_programs(program: Program, known: Inference) -> dict[int, list[Program]]:
    """By server: updates first, then what is computed for others, each once per step."""
    return _Servers(program, known).by_rank()


class _Servers:
    """Makes the programs of servers: slices of what is placed on them, from crossing to crossing."""

    def __init__(self, program: Program, known: Inference):
        self.program, self.known = program, known
        self.made: dict[int, list[Program]] = {}
        gathers = {node: _gathered(node, program) for node in calls(program, ops.gather)}
        crossings = calls(program, *ops.PUSHES, ops.send)
        self.stops = {node: program.variables[channel_of(node)] for node in crossings} | gathers
        self.parts = {variable.name: variable.shape[0] for variable in gathers.values()}

    def by_rank(self) -> dict[int, list[Program]]:
        """Updates first, then what is computed for others, each once per step."""
        for parameter, results in self._updates().items():
            self._add(Owners(parameter), self._slice(results))
        outgoing = self._outgoing()
        for node, name in outgoing.items():
            if isinstance(place_of(node), Owners):
                self._add_part(node, name)
        for group in _together([n for n in outgoing if isinstance(place_of(n), Server)], self.stops):
            self._add(place_of(group[0]), self._slice({outgoing[node]: node for node in group}))
        return self.made

    def _updates(self) -> dict[str, dict[str, Node]]:
        """What is written where each parameter is kept."""
        found: dict[str, dict[str, Node]] = {}
        for name, node in self.program.results.items():
            variable = self.program.variables[name]
            if variable.kept:
                found.setdefault(variable.of or name, {})[name] = node
        return {name: found[name] for name in self.program.variables if name in found}

    def _outgoing(self) -> dict[Node, str]:
        """What servers compute for others, by its channel; what trainers pushed is there without a program."""
        found = {source_of(node): channel_of(node) for node in calls(self.program, ops.send, ops.gather)}
        for node in calls(self.program, ops.pull_value):
            if not self.program.variables[channel_of(node)].kept and source_of(node).target is not ops.push_merged:
                found[source_of(node)] = channel_of(node)
        return dict(sorted(found.items()))

    def _slice(self, results: Mapping[str, Node]) -> Program:
        sliced = self.program.slice(results, self.stops)
        for node in sliced.graph.nodes:
            node.meta.pop(AT, None)
        return _with_parts(sliced, self.parts, self.known)

    def _add(self, place: Place, program: Program) -> None:
        """A program for a server, or one for each owner of a piece."""
        match place:
            case Server(rank):
                self.made.setdefault(rank, []).append(program)
            case Owners(parameter):
                for index, part in enumerate(self.program.variables[parameter].kept):
                    piece = specialise(program, parameter, index, self.known)
                    self.made.setdefault(int(part.server or 0), []).append(piece)

    def _add_part(self, node: Node, name: str) -> None:
        """A program for what is made of one piece: by every owner where all parts are wanted, else by the first."""
        place, variable = place_of(node), self.program.variables[name]
        assert isinstance(place, Owners), "parts are made where variables are kept"
        kept = self.program.variables[place.variable].kept
        all_wanted = any(user.target is ops.gather for user in node.users)
        if all_wanted:
            parts = tuple(Selection(name, server=part.server) for part in kept)
            variable = replace(variable, kept=parts)
        program = self._slice({name: node})
        program = replace(program, variables={**program.variables, name: variable})
        for index, part in enumerate(kept if all_wanted else kept[:1]):
            piece = specialise(program, place.variable, index, self.known)
            self.made.setdefault(int(part.server or 0), []).append(piece)


def _gathered(node: Node, program: Program) -> Variable:
    """What stands for the stacked parts until they are read one by one."""
    variable = program.variables[channel_of(node)]
    return replace(variable, shape=(node.args[2], *variable.shape))  # type: ignore[arg-type]


def _with_parts(program: Program, gathered: Mapping[str, int], known: Inference) -> Program:
    """Reads the parts that owners send, and stacks them.

    before  %p = read "global.n" (as gathered), %c = vector_norm(%p)
    after   %p0 = read "global.n[0]", %p1 = read "global.n[1]", %s = stack([%p0, %p1]), %c = vector_norm(%s)
    """
    graph, placeholders, variables = program.graph, program.placeholders, dict(program.variables)
    wanted = [name for name in placeholders if name in gathered and variables[name].shape[:1] == (gathered[name],)]
    if not wanted:
        return program
    for name in wanted:
        old, whole = placeholders[name], variables.pop(name)
        parts = [
            replace(whole, name=piece_name(name, index), shape=whole.shape[1:], selection=Selection(name))
            for index in range(gathered[name])
        ]
        with graph.inserting_before(old):
            read = [new_placeholder(graph, part, known.fake_of(part)) for part in parts]
        with graph.inserting_before(min(old.users)):
            old.replace_all_uses_with(known.call(graph, aten.stack.default, read))
        graph.erase_node(old)
        variables |= {part.name: part for part in parts}
    made = {name: program.variables[name] for name in program.writes}
    return replace(program, variables={**variables, **made})


def _together(nodes: Sequence[Node], stops: Mapping[Node, Variable]) -> list[list[Node]]:
    """Nodes of servers in groups that are computed from one another, in order; crossings part them."""
    graph = nodes[0].graph if nodes else None
    parent: dict[Node, Node] = {}

    def root(node: Node) -> Node:
        while parent[node] is not node:
            parent[node] = node = parent[parent[node]]
        return node

    for node in graph.nodes if graph is not None else ():
        if isinstance(place_of(node), Server) and node not in stops:
            parent[node] = node
            for source in node.all_input_nodes:
                if source in parent:
                    parent[root(source)] = root(node)
    groups: dict[Node, list[Node]] = {}
    for node in nodes:
        parent.setdefault(node, node)  # what only passes through: it came over a crossing, and goes over another
        groups.setdefault(root(node), []).append(node)
    return list(groups.values())
