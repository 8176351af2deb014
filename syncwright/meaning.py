"""What each node of an update is made from, found from graph edges alone.

Every node behind a gradient mark gets one of these meanings; `v` is a parameter:

    Free        made from hyper-parameters and constants: anyone can compute it
    Scalar(v)   made from v's own 0-d state (a step count): every owner of a piece of v computes it
    Cut(v)      aligned with v and made elementwise from it: a piece of it needs only that piece of v
    Rows(v)     aligned with v's axis 0: made row by row
    Whole(v)    needs all of v at once
    Joined      made from reductions, from several variables, or from state of no parameter (a loss scale): a global value,
                or on the way to one
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


def find_meanings(program: Program, marks: Mapping[str, Node], follows: Mapping[str, str]) -> dict[Node, Meaning]:
    """The meaning of every node behind the `marks`, in graph order; `follows` as `followed` finds it."""
    return _Reader(program, marks, follows).read()


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
            variable = self.program.variables.get(name)  # none where trainers keep parts of it
            return Rows(name) if variable is not None and variable.lazy else Cut(name)
        if node.op == "placeholder":
            return self._of_variable(node)
        if is_random(node):
            return Foreign()
        given = [self.found.get(n, Foreign()) for n in node.all_input_nodes]
        meaning = _combine(node, [g for g in given if not isinstance(g, Free)])
        if isinstance(meaning, Cut | Rows) and is_pointwise(node) and not self._meets_rows(node):
            return Whole(meaning.of)
        return meaning

    def _meets_rows(self, node: Node) -> bool:
        """Whether row r of the result is made from row r of all that is aligned. A state of as many elements as there
        are rows is not aligned because of that: in [4] x [4, 4] its elements meet columns."""
        shape = _axes(node)
        rows = [_axes(n) for n in node.all_input_nodes if isinstance(self.found.get(n), Cut | Rows)]
        return not shape or all(not axes or (len(axes), axes[0]) == (len(shape), shape[0]) for axes in rows)

    def _of_variable(self, node: Node) -> Meaning:
        variable = self.program.variables[node.meta["variable"]]
        match variable.role:
            case Role.HYPER:
                return Free()
            case Role.PARAM:
                return Cut(variable.name) if variable.own is None else Whole(variable.own.of)
            case Role.STATE if variable.of is None:
                return Joined()
            case Role.STATE:
                owner = self.program.variables.get(str(variable.of))
                if owner is None or variable.own is not None:
                    return Whole(str(variable.of)) if variable.shape else Scalar(str(variable.of))
                if not variable.shape and owner.shape:
                    return Scalar(owner.name)
                if variable.shape == owner.shape:
                    return Cut(owner.name)
                aligned = variable.shape[:1] == owner.shape[:1] and len(owner.shape) > 1
                return Rows(owner.name) if aligned else Whole(owner.name)
            case Role.BUFFER:
                return self._of_buffer(variable.name)
            case Role.GRAD:
                return Whole(str(variable.of))  # what a trainer has added up of its own part
            case _:
                return Foreign()

    def _of_buffer(self, name: str) -> Meaning:
        """A buffer that follows a parameter (an average of weights) is aligned with it; others belong to the forward."""
        owner = self.follows.get(name)
        return Foreign() if owner is None else Cut(owner)


def _axes(node: Node) -> tuple[int, ...]:
    val = node.meta["val"]
    return tuple(val.shape) if isinstance(val, torch.Tensor) else ()


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
    """Ancestors of everything an update writes, stopping at the marks. State of no parameter is written by no update."""
    results = program.results
    roots = [
        results[v.name]
        for v in program.variables.values()
        if v.name in results and (v.role is Role.PARAM or (v.role is Role.STATE and v.of) or v.name in follows)
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
        together = any(isinstance(g, Joined) for g in given) and not any(_axes(n) for n in node.all_input_nodes)
        return Joined() if together else Whole(parameter)  # norms of several parameters, one of them of a part of it
    if not aligned:
        return Joined() if any(isinstance(g, Joined) for g in given) else Scalar(parameter)
    if is_partial(node):
        return Joined()
    return Rows(parameter) if _keeps_rows(node) else Whole(parameter)


def _pointwise(node: Node, given: Sequence[Meaning], aligned: Sequence[Meaning], parameter: str) -> Meaning:
    if not aligned:
        joined = any(isinstance(g, Joined) for g in given) and not _is_choice(node, given)
        return Joined() if joined else Scalar(parameter)
    for kind in (Whole, Rows):
        if any(isinstance(g, kind) for g in aligned):
            return kind(parameter)
    return Cut(parameter)


def _is_choice(node: Node, given: Sequence[Meaning]) -> bool:
    """`where` of a global condition and of two numbers that every owner has (a step count that a skipped step leaves alone)."""
    return node.target is aten.where.self and not any(isinstance(g, Joined) for g in given[1:])


def is_partial(node: Node) -> bool:
    """A reduction over everything to one number, which pieces can add up (see `passes.share_globals`)."""
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
