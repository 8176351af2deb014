"""How each variable's update may be split, found from graph edges alone.

Every node behind a gradient mark gets one of these meanings; `v` is a parameter:

    Free        made from hyper-parameters and constants: anyone can compute it
    Scalar(v)   made from v's own 0-d state (a step count): every owner of a piece of v computes it
    Cut(v)      aligned with v and made elementwise from it: a piece of it needs only that piece of v
    Rows(v)     aligned with v's axis 0: made row by row
    Whole(v)    needs all of v at once
    Joined      made from reductions, or from several variables: a global value, or on the way to one
    Foreign     reads the batch or the forward: only a trainer can compute it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import is_random
from syncwright.program import Program, Role

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Free:
    pass


@dataclass(frozen=True, slots=True)
class Scalar:
    of: str


@dataclass(frozen=True, slots=True)
class Cut:
    of: str


@dataclass(frozen=True, slots=True)
class Rows:
    of: str


@dataclass(frozen=True, slots=True)
class Whole:
    of: str


@dataclass(frozen=True, slots=True)
class Joined:
    pass


@dataclass(frozen=True, slots=True)
class Foreign:
    pass


Owned = Scalar | Cut | Rows | Whole
Meaning = Free | Scalar | Cut | Rows | Whole | Joined | Foreign


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
    meanings = _Reader(program, marks, follows).read()
    joins = _joins(program, meanings)
    return Updates(_updates(program, marks, meanings, joins, follows), joins, marks, meanings)


def find_marks(program: Program) -> dict[str, Node]:
    """Where the gradient of each parameter is complete."""
    return {str(n.args[1]): n for n in program.graph.find_nodes(op="call_function", target=ops.gradient)}


class _Reader:
    """Gives every node of the update region its meaning, in graph order."""

    def __init__(self, program: Program, marks: Mapping[str, Node], follows: Mapping[str, str]):
        self.program, self.follows = program, follows
        self.marks = set(marks.values())
        self.region = _region(program, self.marks, follows)
        self.found: dict[Node, Meaning] = {}

    def read(self) -> dict[Node, Meaning]:
        for node in self.program.graph.nodes:
            if node in self.region:
                self.found[node] = self._of(node)
        return self.found

    def _of(self, node: Node) -> Meaning:
        if node in self.marks:
            name = str(node.args[1])
            return Rows(name) if self.program.variables[name].lazy else Cut(name)
        if node.op == "placeholder":
            return self._of_variable(node)
        if is_random(node):
            return Foreign()
        given = [self.found.get(n, Foreign()) for n in node.all_input_nodes]
        return _combine(node, [g for g in given if not isinstance(g, Free)])

    def _of_variable(self, node: Node) -> Meaning:
        variable = self.program.variables[node.meta["variable"]]
        match variable.role:
            case Role.HYPER:
                return Free()
            case Role.PARAM:
                return Cut(variable.name)
            case Role.STATE:
                owner = self.program.variables[str(variable.of)]
                if not variable.shape and owner.shape:
                    return Scalar(owner.name)
                if variable.shape == owner.shape:
                    return Cut(owner.name)
                aligned = variable.shape[:1] == owner.shape[:1] and len(owner.shape) > 1
                return Rows(owner.name) if aligned else Whole(owner.name)
            case Role.BUFFER:
                return self._of_buffer(variable.name)
            case _:
                return Foreign()

    def _of_buffer(self, name: str) -> Meaning:
        """A buffer that follows a parameter (an average of weights) is aligned with it; others belong to the forward."""
        owner = self.follows.get(name)
        return Foreign() if owner is None else Cut(owner)


def followed(program: Program) -> dict[str, str]:
    """Buffers whose new value is made from one parameter's new value, with that parameter (same shape)."""
    results = program.results
    new = {results[v.name]: v.name for v in program.of_role(Role.PARAM) if v.name in results}
    found = {}
    for variable in program.of_role(Role.BUFFER):
        node = results.get(variable.name)
        parameter = _made_from(node, variable.name, new, program) if node is not None else None
        if parameter is not None and program.variables[parameter].shape == variable.shape:
            found[variable.name] = parameter
    return found


_LONGEST_FOLLOWING = 64


def _made_from(node: Node, buffer: str, new: Mapping[Node, str], program: Program) -> str | None:
    """The one parameter whose new value, with the buffer's old one and numbers, is all that `node` is made from."""
    seen: set[Node] = set()
    found: set[str] = set()
    stack = [node]
    while stack and len(seen) < _LONGEST_FOLLOWING:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in new:
            found.add(new[node])
        elif node.op != "placeholder":
            stack.extend(node.all_input_nodes)
        elif node.meta["variable"] != buffer and program.variables[node.meta["variable"]].role is not Role.HYPER:
            return None
    return found.pop() if len(found) == 1 and not stack else None


def _region(program: Program, marks: set[Node], follows: Mapping[str, str]) -> set[Node]:
    """Ancestors of everything an update writes, stopping at the marks."""
    results = program.results
    roots = [
        results[v.name]
        for v in program.variables.values()
        if v.name in results and (v.role in (Role.PARAM, Role.STATE) or v.name in follows)
    ]
    seen: set[Node] = set()
    while roots:
        node = roots.pop()
        if node not in seen:
            seen.add(node)
            if node not in marks:
                roots.extend(node.all_input_nodes)
    return seen


_SHAPE_ONLY = frozenset(
    {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default}
)
_POINTWISE = _SHAPE_ONLY | {aten._to_copy.default, aten.copy.default, aten.fill.Scalar, aten.fill.Tensor}
_NORM = aten.linalg_vector_norm.default
_REDUCTIONS = frozenset({_NORM, aten.sum.default, aten.amax.default, aten.amin.default})


def is_pointwise(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    if node.target is aten.index_put.default:
        return _is_masked_fill(node)
    return torch.Tag.pointwise in node.target.tags or node.target in _POINTWISE


def _is_masked_fill(node: Node) -> bool:
    """`x[mask] = number` with a mask of x's shape is elementwise."""
    target, indices, value = node.args[0], node.args[1], node.args[2]
    if len(indices) != 1 or indices[0] is None:  # type: ignore[arg-type]
        return False
    mask = indices[0].meta["val"]  # type: ignore[index, union-attr]
    same = mask.dtype is torch.bool and mask.shape == target.meta["val"].shape  # type: ignore[union-attr]
    return same and value.meta["val"].dim() == 0  # type: ignore[union-attr]


def _combine(node: Node, given: list[Meaning]) -> Meaning:
    if not given:
        return Free()
    if any(isinstance(g, Foreign) for g in given):
        return Foreign()
    parameters = {g.of for g in given if isinstance(g, Owned)}
    aligned = [g for g in given if isinstance(g, Cut | Rows | Whole)]
    if len(parameters) > 1 or not parameters:
        return Joined()
    (parameter,) = parameters
    if is_pointwise(node):
        return _pointwise(node, given, aligned, parameter)
    if any(isinstance(g, Whole) for g in aligned):
        return Whole(parameter)
    if not aligned:
        return Joined() if any(isinstance(g, Joined) for g in given) else Scalar(parameter)
    if _is_partial(node):
        return Joined()
    return Rows(parameter) if _keeps_rows(node) else Whole(parameter)


def _pointwise(node: Node, given: Sequence[Meaning], aligned: Sequence[Meaning], parameter: str) -> Meaning:
    if not aligned:
        return Joined() if any(isinstance(g, Joined) for g in given) else Scalar(parameter)
    for kind in (Whole, Rows):
        if any(isinstance(g, kind) for g in aligned):
            return kind(parameter)
    return Cut(parameter)


def _is_partial(node: Node) -> bool:
    """A reduction over everything to one number, which pieces can add up (see `split._combine_parts`)."""
    if node.target not in _REDUCTIONS or _counts(node):
        return False
    value = node.meta["val"]
    return bool(value.dim() == 0 and not node.kwargs.get("dtype"))


def _counts(node: Node) -> bool:
    """The "norm" of order 0 counts; counts of pieces do not combine as norms do."""
    return bool(node.target is _NORM and len(node.args) > 1 and node.args[1] == 0)


def _keeps_rows(node: Node) -> bool:
    """A reduction along the last axes of a matrix keeps every row by itself, and so does taking columns."""
    if node.target is aten.slice.Tensor:
        return bool(node.args[1:2] not in ((), (0,)))
    if torch.Tag.reduction not in getattr(node.target, "tags", ()):
        return False
    first = node.all_input_nodes[0].meta["val"]
    dims = next((a for a in node.args[1:] if isinstance(a, list | tuple)), None)
    return dims is not None and first.dim() > 1 and all(d % first.dim() != 0 for d in dims)


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
            case Role.STATE:
                found.setdefault(str(variable.of), []).append(name)
            case _ if name in follows:
                found[follows[name]].append(name)
    return found


def _needed_whole(meanings: Mapping[Node, Meaning], joins: tuple[Join, ...]) -> set[str]:
    """Parameters with a part in a global value that pieces cannot add up (a mean, a median)."""
    parts = [(node, parameter) for join in joins for node, parameter in join.partials.items()]
    return {parameter for node, parameter in parts if not (isinstance(meanings[node], Scalar) or _is_partial(node))}


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
