"""How each variable's update may be split, and which global values updates read; see `meaning`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from syncwright.meaning import (
    Cut,
    Foreign,
    Free,
    Joined,
    Meaning,
    Owned,
    Rows,
    Scalar,
    Whole,
    find_marks,
    find_meanings,
    followed,
    is_partial,
)
from syncwright.program import Program, Role

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Join:
    """Global values and what they are made of.

    partials   nodes computed where one parameter is owned, with that parameter (one norm per parameter)
    values     nodes that updates read (the clip coefficient)
    nodes      everything between, in graph order, without the partials
    readers    parameters whose updates read `values`
    """

    partials: Mapping[Node, str]
    values: tuple[Node, ...]
    nodes: tuple[Node, ...]
    readers: tuple[str, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.partials.values(), *self.readers]))


@dataclass(frozen=True, slots=True)
class Update:
    """One parameter's update: what it writes (the parameter, its state, buffers made from it) and its kind."""

    parameter: str
    writes: tuple[str, ...]
    kind: str


@dataclass(frozen=True, slots=True, eq=False)
class Updates:
    """All updates of a program.

    marks     the node where each parameter's gradient is complete
    meanings  of every node behind the marks
    """

    by_parameter: Mapping[str, Update]
    joins: tuple[Join, ...]
    marks: Mapping[str, Node]
    meanings: Mapping[Node, Meaning]

    def kinds(self) -> dict[str, str]:
        return {name: update.kind for name, update in self.by_parameter.items()}


def find_updates(program: Program) -> Updates:
    """Classifies the update of every parameter: `elementwise`, `row-wise`, `whole` or `foreign`.

    before  %g = gradient(%mm, "w"); %n = linalg_vector_norm(%g); ...; %c = clamp(...); %s = mul(%g, %c); %new = sub(w, %s)
    after   w: elementwise, reads the global value %c, whose partial of w is %n
    """
    marks = find_marks(program)
    follows = followed(program)
    meanings = find_meanings(program, marks, follows)
    joins = _joins(program, meanings)
    return Updates(_updates(program, marks, meanings, joins, follows), joins, marks, meanings)


def skipped_by(program: Program, name: str) -> Node | None:
    """The condition on which a step leaves a variable as it was: that a gradient is not finite, under a loss scale.

    %c of `output({"w": where(%c, w, %new)})`; None for a variable that every step changes.
    """
    old, new = program.placeholders.get(name), program.results.get(name)
    if old is None or new is None or new.target is not aten.where.self or new.args[1] is not old:
        return None
    condition: Node = new.args[0]  # type: ignore[assignment]
    return condition if condition.meta["val"].dim() == 0 else None


def _joins(program: Program, meanings: Mapping[Node, Meaning]) -> tuple[Join, ...]:
    """Connected groups of joined nodes."""
    joined = [n for n, m in meanings.items() if isinstance(m, Joined)]
    parent = {n: n for n in joined}

    def root(node: Node) -> Node:
        while parent[node] is not node:
            parent[node] = node = parent[parent[node]]
        return node

    for node in joined:
        for source in node.all_input_nodes:
            if source in parent:
                parent[root(source)] = root(node)
    groups: dict[Node, list[Node]] = {}
    for node in joined:
        groups.setdefault(root(node), []).append(node)
    return tuple(_join(program, group, meanings) for group in groups.values())


def _join(program: Program, group: list[Node], meanings: Mapping[Node, Meaning]) -> Join:
    members = set(group)
    partials: dict[Node, str] = {}
    for node in group:
        owners = [m for n in node.all_input_nodes if n not in members and isinstance(m := meanings[n], Owned)]
        if owners and len({o.of for o in owners}) == 1 and not any(n in members for n in node.all_input_nodes):
            partials[node] = owners[0].of
        else:
            crossing = [n for n in node.all_input_nodes if n not in members]
            partials.update({n: m.of for n in crossing if isinstance(m := meanings[n], Owned)})
    outside = {n: [u for u in n.users if u in meanings and u not in members] for n in group}
    written = set(program.results.values())
    values = tuple(n for n in group if outside[n] or n in written)
    readers = {m.of for n in values for u in outside[n] if isinstance(m := meanings[u], Owned)}
    inner = tuple(n for n in group if n not in partials)
    return Join(partials, values, inner, tuple(sorted(readers)))


_ORDER = {Free: 0, Scalar: 0, Joined: 0, Cut: 0, Rows: 1, Whole: 2, Foreign: 3}
_KINDS = ("elementwise", "row-wise", "whole", "foreign")


def _updates(
    program: Program,
    marks: Mapping[str, Node],
    meanings: Mapping[Node, Meaning],
    joins: tuple[Join, ...],
    follows: Mapping[str, str],
) -> dict[str, Update]:
    uncuttable, ends = _needed_whole(meanings, joins), set(marks.values())
    results, found = program.results, {}
    for parameter, writes in _writes_by_parameter(program, follows).items():
        if parameter in writes:
            kind = _kind([results[name] for name in writes], ends, meanings)
            cuttable = kind in ("whole", "foreign") or parameter not in uncuttable
            found[parameter] = Update(parameter, tuple(writes), kind if cuttable else "whole")
    return found


def _writes_by_parameter(program: Program, follows: Mapping[str, str]) -> dict[str, list[str]]:
    """What the update of each parameter writes: itself, its state, buffers made from it."""
    found: dict[str, list[str]] = {v.name: [] for v in program.of_role(Role.PARAM)}
    for name in program.writes:
        variable = program.variables[name]
        match variable.role:
            case Role.PARAM:
                found[name].append(name)
            case Role.STATE if variable.of is not None:
                found.setdefault(variable.of, []).append(name)
            case _ if name in follows:
                found[follows[name]].append(name)
    return found


def _needed_whole(meanings: Mapping[Node, Meaning], joins: tuple[Join, ...]) -> set[str]:
    """Parameters with a part in a global value that pieces cannot add up (a mean, a median)."""
    parts = [(node, parameter) for join in joins for node, parameter in join.partials.items()]
    return {parameter for node, parameter in parts if not (isinstance(meanings[node], Scalar) or is_partial(node))}


def _kind(written: list[Node], marks: set[Node], meanings: Mapping[Node, Meaning]) -> str:
    """The hardest node on the way from the marks to what is written; joined values are somebody else's work."""
    stack, seen, worst = list(written), set(), 0
    while stack and worst < len(_KINDS) - 1:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        meaning = meanings.get(node, Foreign())
        if isinstance(meaning, Joined):
            continue
        worst = max(worst, _ORDER[type(meaning)])
        if node not in marks:
            stack.extend(node.all_input_nodes)
    return _KINDS[worst]
