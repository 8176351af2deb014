"""Whether an update leaves the rows of a table alone whose gradient is zero: proven from the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.fx import Node

from syncwright.meaning import Free, Meaning, Scalar
from syncwright.program import Program, Role
from syncwright.shapes import is_host
from syncwright.update import Updates

aten = torch.ops.aten

ZERO, FALSE, TRUE, OTHER = "zero", "false", "true", "other"
"""What is known of a value where the gradient is zero; or a variable's name, where it is the variable's old value."""
Known = str


def leaves_rows_alone(program: Program, updates: Updates, parameter: str) -> bool:
    """Whether a row whose gradient is zero keeps its value and its state, whatever these are.

    SGD without momentum and decay: w - lr * 0 is w: yes. Adagrad: sum + 0 * 0 is the sum: yes. Momentum: 0.9 * buffer is
    another buffer: no. SparseAdam: where(touched > 0, new, old), and a row that nobody touches has 0 there: yes.
    Values are taken to be finite. State that is one number for the whole table (a step count) does not count.
    """
    update = updates.by_parameter.get(parameter)
    if update is None or parameter not in updates.marks:
        return False
    known = _Reader(program, updates, parameter).read()
    written = [name for name in update.writes if program.variables[name].shape]
    return all(known.get(program.results[name]) == name for name in written)


class _Reader:
    """Finds for every node of an update what is known of it where the gradient is zero."""

    def __init__(self, program: Program, updates: Updates, parameter: str):
        self.program, self.meanings = program, updates.meanings
        self.mark = updates.marks[parameter]
        self.found: dict[Node, Known] = {}

    def read(self) -> Mapping[Node, Known]:
        for node in self.meanings:
            self.found[node] = self._of(node)
        return self.found

    def _of(self, node: Node) -> Known:
        if node is self.mark:
            return ZERO
        if node.op == "placeholder":
            variable = self.program.variables[node.meta["variable"]]
            return variable.name if variable.role is not Role.HYPER else OTHER
        rule = _RULES.get(node.target)  # type: ignore[arg-type]
        return rule(self, node) if rule is not None else OTHER

    def of(self, value: object) -> Known:
        if isinstance(value, Node):
            return self.found.get(value, OTHER)
        return ZERO if isinstance(value, int | float) and value == 0 else OTHER

    def is_nonzero(self, value: object) -> bool:
        """A number on the host, or a root and an epsilon: where that is 0, one device divides 0 by 0 as well."""
        if not isinstance(value, Node):
            return value != 0
        meaning: Meaning | None = self.meanings.get(value)
        if isinstance(meaning, Free | Scalar) or is_host(value.meta["val"]):
            return True
        adds = value.target in (aten.add.Tensor, aten.add.Scalar)
        return adds and (not isinstance(value.args[1], Node) or is_host(value.args[1].meta["val"]))


Rule = Callable[[_Reader, Node], Known]


def _first(reader: _Reader, node: Node) -> Known:
    return reader.of(node.args[0])


def _keeps_zero(reader: _Reader, node: Node) -> Known:
    return ZERO if reader.of(node.args[0]) == ZERO else OTHER


def _add(reader: _Reader, node: Node) -> Known:
    first, second = (reader.of(argument) for argument in node.args[:2])
    if second == ZERO:
        return first
    return second if first == ZERO and "alpha" not in node.kwargs and node.target is aten.add.Tensor else OTHER


def _mul(reader: _Reader, node: Node) -> Known:
    return ZERO if ZERO in (reader.of(node.args[0]), reader.of(node.args[1])) else OTHER


def _div(reader: _Reader, node: Node) -> Known:
    return ZERO if reader.of(node.args[0]) == ZERO and reader.is_nonzero(node.args[1]) else OTHER


def _pow(reader: _Reader, node: Node) -> Known:
    power = node.args[1]
    return ZERO if reader.of(node.args[0]) == ZERO and isinstance(power, int | float) and power > 0 else OTHER


def _addcmul(reader: _Reader, node: Node) -> Known:
    return reader.of(node.args[0]) if ZERO in (reader.of(node.args[1]), reader.of(node.args[2])) else OTHER


def _addcdiv(reader: _Reader, node: Node) -> Known:
    gone = reader.of(node.args[1]) == ZERO and reader.is_nonzero(node.args[2])
    return reader.of(node.args[0]) if gone else OTHER


def _where(reader: _Reader, node: Node) -> Known:
    condition, yes, no = (reader.of(argument) for argument in node.args)
    if condition in (TRUE, FALSE):
        return yes if condition == TRUE else no
    return yes if yes == no else OTHER


def _compare(when_zero: Known) -> Rule:
    def rule(reader: _Reader, node: Node) -> Known:
        return when_zero if reader.of(node.args[0]) == ZERO and reader.of(node.args[1]) == ZERO else OTHER

    return rule


def _zeros(reader: _Reader, node: Node) -> Known:
    return ZERO


def _same_size(reader: _Reader, node: Node) -> Known:
    """A view: of zeros zeros, of a variable the variable where the shape stays."""
    (source,) = node.all_input_nodes
    known = reader.of(source)
    same = source.meta["val"].shape == node.meta["val"].shape and source.meta["val"].dtype is node.meta["val"].dtype
    return known if known == ZERO or same else OTHER


def _copy(reader: _Reader, node: Node) -> Known:
    """The second argument, in the first one's shape and dtype."""
    target, source = (argument.meta["val"] for argument in node.args[:2])  # type: ignore[union-attr]
    known = reader.of(node.args[1])
    return known if known == ZERO or (source.shape, source.dtype) == (target.shape, target.dtype) else OTHER


_RULES: Mapping[object, Rule] = {
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.div.Tensor: _div,
    aten.pow.Tensor_Scalar: _pow,
    aten.addcmul.default: _addcmul,
    aten.addcdiv.default: _addcdiv,
    aten.where.self: _where,
    aten.copy.default: _copy,
    aten.gt.Scalar: _compare(FALSE),
    aten.ne.Scalar: _compare(FALSE),
    aten.eq.Scalar: _compare(TRUE),
    aten.ge.Scalar: _compare(TRUE),
    aten.le.Scalar: _compare(TRUE),
    **dict.fromkeys((aten.neg.default, aten.abs.default, aten.sqrt.default, aten.sign.default), _keeps_zero),
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.dim, aten.amax.default), _keeps_zero),
    **dict.fromkeys((aten.zeros_like.default, aten.zeros.default), _zeros),
    **dict.fromkeys(
        (aten.clone.default, aten.detach.default, aten.alias.default, aten._to_copy.default, aten.view.default),
        _same_size,
    ),
    **dict.fromkeys((aten.slice.Tensor, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim), _same_size),
}
"""By operation, what is known of its result; of others nothing is."""
