"""Updates that may be joined: elementwise, alike, with gradients that are neighbours in one bucket."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import getitem

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.meaning import is_partial, is_pointwise
from syncwright.place import is_served
from syncwright.program import Program, Role, Variable
from syncwright.shapes import substitute

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A parameter whose update may be joined with others.

    gradient   where its reduced gradient is, as its update reads it
    packed     the part of a waited bucket that it was; the gradient itself where there is no bucket
    state      its state variables by their place in the update
    nodes      the update's own nodes, in order
    signature  equal for updates that do the same
    """

    parameter: Variable
    gradient: Node
    packed: Node
    state: Mapping[str, Variable]
    nodes: tuple[Node, ...]
    signature: tuple


def members(program: Program) -> list[Member]:
    """Parameters whose updates may be joined with others, in the order of their reduced gradients."""
    owners, results, placeholders = _owners(program), program.results, program.placeholders
    state: dict[str, list[Variable]] = {}
    for variable in [v for v in program.of_role(Role.STATE) if v.initial is None]:
        state.setdefault(str(variable.of), []).append(variable)
    marks = {str(n.args[1]): n for n in program.graph.nodes if n.target is ops.gradient}
    own: dict[str, list[Node]] = {}
    for node, owner in owners.items():
        own.setdefault(str(owner), []).append(node)
    found = []
    parts = _parts(program)
    for name, mark in marks.items():
        parameter = parts.get(name) or program.variables[name]
        packed = _reduced(mark)
        gradient = _divided(packed)
        nodes = _update_nodes(own.get(name, ()), mark, gradient)
        if (
            parameter.name in results
            and not is_served(results[parameter.name])
            and parameter.shape
            and _is_elementwise(nodes, gradient, parameter)
        ):
            facts = _Facts(parameter, state.get(name, []), placeholders, results)
            member = _member(facts, gradient, packed, nodes)
            found += [member] if member is not None else []
    return sorted(found, key=lambda m: m.packed)


def _is_elementwise(nodes: tuple[Node, ...], gradient: Node, parameter: Variable) -> bool:
    """Every tensor of the update has the parameter's shape or none, and every op on them is pointwise."""
    for node in nodes:
        for value in (node, *node.all_input_nodes):
            val = value.meta["val"]
            if isinstance(val, tuple | list) or (
                isinstance(val, torch.Tensor) and val.shape not in ((), parameter.shape)
            ):
                return False
        if _has_axes(node) and not is_pointwise(node):
            return False
        if not _has_axes(node) and any(_has_axes(source) for source in node.all_input_nodes):
            return False  # a number of each parameter's own, such as its norm
    return bool(nodes)


def _has_axes(node: Node) -> bool:
    return isinstance(val := node.meta["val"], torch.Tensor) and val.dim() > 0


def _update_nodes(own: Sequence[Node], mark: Node, gradient: Node) -> tuple[Node, ...]:
    """What belongs to the update: of the nodes that serve one parameter alone, those that its gradient is not made of.

    Some may stand in front of the gradient: AdamW's decay, the `momentum * buffer` of SGD.
    """
    mine, behind = set(own), set()
    stack = [gradient, mark]
    while stack:
        node = stack.pop()
        if node not in behind:
            behind.add(node)
            stack += [n for n in node.all_input_nodes if n in mine]
    return tuple(n for n in own if n not in behind)


def _owners(program: Program) -> dict[Node, str | None]:
    """For every node that only one parameter's update uses, that parameter; in graph order."""
    variables, results, parts = program.variables, program.results, _parts(program)
    owners: dict[Node, str | None] = {}
    for name, node in results.items():
        owner = None if name in parts else _owner(variables[name])  # else gathered of what its update has made
        owners[node] = owner if owners.get(node, owner) == owner else None
    for node in reversed(program.graph.nodes):
        if node.op != "call_function":
            continue
        users = [u for u in node.users if u.op != "output" and u.target is not ops.gather_parts]
        mine = {owners.get(u) for u in users if not (_is_unscaled(node) and is_partial(u))}
        mine |= {owners[node]} if node in owners else set()
        owners[node] = mine.pop() if len(mine) == 1 else None
    return {n: owners[n] for n in program.graph.nodes if owners.get(n) is not None and n.op == "call_function"}


def _is_unscaled(node: Node) -> bool:
    """A gradient by a number of all updates (the inverse of a loss scale): for a norm of it, it is computed once more."""
    if node.target is not aten.mul.Tensor or not _has_axes(node):
        return False
    number = node.args[1]
    return isinstance(number, Node) and isinstance(number.meta["val"], torch.Tensor) and not _has_axes(number)


def _parts(program: Program) -> dict[str, Variable]:
    """The parameters of which each trainer updates its own part."""
    return {v.own.of: v for v in program.of_role(Role.PARAM) if v.own is not None}


def _owner(variable: Variable) -> str | None:
    """With whose update a variable goes; what a pass keeps beside it goes with none."""
    if variable.role is Role.PARAM:
        return _whole_name(variable)
    return variable.of if variable.role is Role.STATE and variable.initial is None else None


def _whole_name(variable: Variable) -> str:
    return variable.name if variable.own is None else variable.own.of


def _reduced(mark: Node) -> Node:
    """Where the gradient that is complete at `mark` is, after its reduction."""
    node = mark
    while True:
        if node.target in (ops.wait, ops.wait_own):
            return _unpacked(node, mark)
        step = [u for u in node.users if u.target in _WAY]
        if len(step) != 1:
            return mark
        node = step[0]


_WAY = frozenset(
    {
        aten.mul.Tensor,
        aten.reshape.default,
        aten.cat.default,
        ops.all_reduce,
        ops.reduce_scatter,
        ops.wait,
        ops.wait_own,
    }
)


def _unpacked(wait: Node, mark: Node) -> Node:
    """The part of a waited bucket that is this gradient's: by its place in the `cat`, or among those that are scattered."""
    joined = wait.args[0].args[0]  # type: ignore[union-attr]
    if wait.target is ops.wait_own:
        if len(joined) == 1:  # type: ignore[arg-type]
            return wait
        place = next(i for i, n in enumerate(joined) if mark in _sources(n))  # type: ignore[arg-type]
        (split,) = wait.users
        return next(u for u in split.users if u.args[1] == place)
    if joined.target is not aten.cat.default:  # type: ignore[union-attr]
        return wait
    place = next(i for i, n in enumerate(joined.args[0]) if mark in _sources(n))  # type: ignore[arg-type, union-attr]
    (split,) = wait.users
    picked = next(u for u in split.users if u.args[1] == place)
    (view,) = picked.users
    return view


def _divided(packed: Node) -> Node:
    """Behind the division by the sum of weights, where there is one."""
    users = list(packed.users)
    return users[0] if len(users) == 1 and users[0].target is aten.div.Tensor and packed.op != "placeholder" else packed


def _sources(node: Node) -> set[Node]:
    """The gradient behind a reshape and a scale."""
    found = {node}
    while node.target in (aten.reshape.default, aten.mul.Tensor):
        node = node.args[0]  # type: ignore[assignment]
        found.add(node)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Facts:
    """A parameter, its state, and what all parameters share: the program's placeholders and results."""

    parameter: Variable
    state: list[Variable]
    placeholders: Mapping[str, Node]
    results: Mapping[str, Node]


def _member(facts: _Facts, gradient: Node, packed: Node, nodes: tuple[Node, ...]) -> Member | None:
    parameter, results = facts.parameter, facts.results
    state = {_whole_name(v)[len(_whole_name(parameter)) :]: v for v in facts.state}
    places = {facts.placeholders[v.name]: key for key, v in state.items() if v.name in facts.placeholders}
    if any(v.shape not in ((), parameter.shape) for v in state.values()):
        return None
    places[facts.placeholders[parameter.name]] = ""
    index = {node: i for i, node in enumerate(nodes)}

    def known(node: Node) -> object:
        if node is gradient:
            return "gradient"
        return ("own", index[node]) if node in index else ("state", places[node]) if node in places else node

    lines = tuple((n.target, _frozen(substitute(n.args, known)), _frozen(substitute(n.kwargs, known))) for n in nodes)
    written = tuple(
        (key, index.get(results[v.name])) for key, v in {"": parameter, **state}.items() if v.name in results
    )
    return Member(parameter, gradient, packed, state, nodes, (parameter.dtype, lines, written))


def _frozen(value: object) -> object:
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(_frozen(v) for v in value)
    return value


def runs(members: Iterable[Member]) -> list[list[Member]]:
    """Neighbours in one bucket with the same update."""
    found: list[list[Member]] = []
    for _, group in groupby(members, key=lambda m: (bucket_of(m.packed), _divisor(m), m.signature)):
        for member in group:
            if found and found[-1] and _is_next(found[-1][-1], member):
                found[-1].append(member)
            else:
                found.append([member])
        found.append([])
    return [run for run in found if run]


def _is_next(one: Member, other: Member) -> bool:
    """Whether nothing lies between two parts of a bucket; so of gradients that are in none."""
    bucket = bucket_of(one.packed)
    return bucket is None or _place(other) == _place(one) + 1


def _place(member: Member) -> int:
    """Where a gradient lies in its bucket."""
    return pick_of(member.packed).args[1]  # type: ignore[union-attr, return-value]


def _divisor(member: Member) -> object:
    return member.gradient.args[1] if member.gradient is not member.packed else None


def bucket_of(gradient: Node) -> Node | None:
    """The split that a gradient is a part of; None where it is on its own."""
    pick = pick_of(gradient)
    return None if pick is None else pick.args[0]  # type: ignore[return-value]


def pick_of(gradient: Node) -> Node | None:
    """Where a gradient, or a trainer's own part of it, is taken out of a bucket; None where it is on its own."""
    pick = gradient.args[0] if gradient.target is aten.view.default else gradient
    return pick if isinstance(pick, Node) and pick.target is getitem else None
