"""Traced graph to Program: named placeholders, writes in the output, nothing that only tracing needed."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from syncwright import ops
from syncwright.capture import private
from syncwright.capture.private import FakeTensor
from syncwright.capture.trace import Traced
from syncwright.dead import is_random, remove_dead
from syncwright.errors import CaptureError
from syncwright.program import Guard, Program, Role, Variable, copy_node, new_placeholder

_IDENTITY = frozenset(
    {
        torch.ops.aten.detach.default,
        torch.ops.aten.alias.default,
        torch.ops.aten.lift_fresh.default,
        torch.ops.aten.lift_fresh_copy.default,
    }
)
_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_functional.default
_SCALAR = torch.ops.aten.scalar_tensor.default


def normalize(traced: Traced, constants: dict[str, torch.Tensor]) -> Program:
    """Builds the Program; tensors that tracing found outside the arguments go to `constants`, by variable name.

    before  %arg0_1, ..., %detach_3, %gradient(%detach_3, "w"), ..., copy_(%arg0_1, %addcdiv), return (%loss, ...)
    after   w = placeholder, ..., %gradient(%mm, "w"), ..., output({"loss": %loss, "w": %addcdiv})
    """
    return _Builder(traced, constants).build()


class _Builder:
    """Walks the traced graph once."""

    def __init__(self, traced: Traced, constants: dict[str, torch.Tensor]):
        self.traced, self.constants = traced, constants
        self.graph = Graph()
        self.made: dict[Node, Node] = {}
        self.variables: dict[str, Variable] = {}
        self.written: dict[str, Node] = {}
        self.marks: dict[str, Node] = {}
        self.draws = _first_draws(traced)
        self.dynamic = any(variable.dynamic for variable in traced.arguments)

    def build(self) -> Program:
        nodes = list(self.traced.graph.nodes)
        self._placeholders([n for n in nodes if n.op == "placeholder"], [n for n in nodes if n.op == "get_attr"])
        last = _last_marks(nodes)
        for node in nodes:
            if node.op == "call_function":
                self._call(node, last)
            elif node.op == "get_attr" and node not in self.made:
                self.made[node] = self._number(node)
        self.graph.output(self._results(nodes[-1]))
        self._start_from_nothing()
        remove_dead(self.graph)
        self._refuse_stale()
        return Program(self.graph, self.variables, self._guards())

    def _placeholders(self, placeholders: list[Node], constants: list[Node]) -> None:
        for node, variable in zip(placeholders, self.traced.arguments, strict=True):
            self.made[node] = new_placeholder(self.graph, variable, host_type(node.meta["val"]))
            self.variables[variable.name] = variable
        for node in constants:
            value = getattr(self.traced.module, str(node.target))
            if value.dim() == 0:
                continue
            known = next((m for n, m in self.made.items() if n.op == "get_attr" and n.target == node.target), None)
            self.made[node] = known if known is not None else self._constant(node, value)

    def _number(self, node: Node) -> Node:
        """A 0-d tensor that the step makes from a number stays a number in the graph."""
        value = getattr(self.traced.module, str(node.target))
        made = self.graph.call_function(_SCALAR, (value.item(),), {"dtype": value.dtype})
        made.meta = {"val": host_type(node.meta["val"])}
        return made

    def _constant(self, node: Node, value: torch.Tensor) -> Node:
        name = f"constant.{len(self.constants)}"
        variable = Variable(name, Role.BUFFER, tuple(value.shape), value.dtype)
        self.constants[name] = value
        self.variables[name] = variable
        return new_placeholder(self.graph, variable, node.meta["val"])

    def _call(self, node: Node, last: Mapping[str, Node]) -> None:
        target = node.target
        if self.draws.get(node, node) is not node:
            self.made[node] = self.made[self.draws[node]]
        elif target in _IDENTITY or (target is ops.gradient and last.get(str(node.args[1])) is not node):
            self.made[node] = self.made[node.args[0]]  # type: ignore[index]
        elif (chosen := _unwritten(node)) is not None:
            self.made[node] = self.made[chosen]
        elif (statistic := _unchanged_statistic(node)) is not None:
            self.made[node] = self.made[statistic]
        elif target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder":  # type: ignore[union-attr]
            name = self.made[node.args[0]].meta["variable"]  # type: ignore[index]
            if self.made[node.args[1]] is not self.made[node.args[0]]:  # type: ignore[index]
                self.written[name] = self.made[node.args[1]]  # type: ignore[index]
        elif not _only_tracing(target):
            copied = copy_node(self.graph, node, self.made, self._name(node))
            copied.meta = {"val": host_type(node.meta.get("val"))}
            self.made[node] = copied

    def _name(self, node: Node) -> str:
        """Arithmetic on sizes does not count, so that other nodes are called as where all sizes are fixed."""
        if not self.dynamic:
            return node.name
        return "size" if host_type(node.meta.get("val")) is int else re.sub(r"_\d+$", "", node.name)

    def _results(self, output: Node) -> dict[str, Node]:
        flat = pytree.tree_leaves(output.args[0], is_leaf=lambda x: isinstance(x, Node))
        returned, replaced = flat[: self.traced.leaves], flat[self.traced.leaves :]
        results: dict[str, Node] = {}
        for name, node in zip(output_names(self.traced.returned), returned, strict=True):
            own = f"returned.{name}" if name in self.variables else name
            results[own] = self._returned(own, node)
        self.written.update({name: self.made[node] for name, node in zip(self.traced.replaced, replaced, strict=True)})
        for variable in self.traced.arguments:
            if variable.name in self.written and variable.role is not Role.GRAD:
                results[variable.name] = self.written[variable.name]
        return results

    def _returned(self, name: str, node: object) -> Node:
        if not isinstance(node, Node):
            raise CaptureError(
                f"the step returns {node!r} as '{name}', which no batch changes; expected tensors or numbers computed "
                "from the batch. Return the loss, or the loss and a dict of metrics."
            )
        made = self.made[node]
        val = made.meta["val"]
        shape, dtype = (tuple(val.shape), val.dtype) if isinstance(val, torch.Tensor) else ((), torch.float64)
        self.variables[name] = Variable(name, Role.OUTPUT, shape, dtype)
        return made

    def _start_from_nothing(self) -> None:
        """`zero_grad(set_to_none=False)`: adding to zeros is starting from nothing, and no old value is read."""
        for node in list(self.graph.nodes):
            if node.target is torch.ops.aten.zero.default and self._is_stale(node.args[0]):
                for user in [u for u in node.users if u.target is torch.ops.aten.add.Tensor and not u.kwargs]:
                    if user.args[0] is node:
                        user.replace_all_uses_with(user.args[1])

    def _is_stale(self, node: Node) -> bool:
        return node.op == "placeholder" and self.variables[node.meta["variable"]].role is Role.GRAD

    def _refuse_stale(self) -> None:
        for node in [n for n in self.graph.nodes if n.op == "placeholder"]:
            variable = self.variables[node.meta["variable"]]
            if variable.role is not Role.GRAD:
                continue
            if node.users:
                raise CaptureError(
                    f"the gradient of '{variable.of}' outlives the step: the step adds to what the last one left. "
                    "Expected each step to start from no gradient. Call optimizer.zero_grad() in the step; to "
                    "accumulate over several batches, call backward() several times in one step."
                )
            self.graph.erase_node(node)
            del self.variables[variable.name]

    def _guards(self) -> tuple[Guard, ...]:
        names = self.traced.symbols
        return tuple(
            _guard(expression, symbols, [names[s] for s in symbols])
            for expression, symbols in self.traced.guards
            if symbols and all(s in names for s in symbols)
        )


def _guard(expression: str, symbols: tuple[str, ...], read: list[tuple[str, int | None]]) -> Guard:
    axes = tuple(axis for _, axis in read)
    return Guard(expression, symbols, tuple(n for n, _ in read), axes if any(a is not None for a in axes) else ())


def output_names(returned: pytree.TreeSpec) -> list[str]:
    """A name per leaf of what a step returns: `loss`, or `loss` and the metrics' own keys, or positions."""
    skeleton = pytree.tree_unflatten(list(range(returned.num_leaves)), returned)
    if returned.num_leaves == 1 and not isinstance(skeleton, dict | tuple | list):
        return ["loss"]
    names = []
    for path, _ in pytree.tree_flatten_with_path(skeleton)[0]:
        keys = [str(getattr(k, "key", getattr(k, "idx", k))) for k in path]
        names.append("loss" if keys == ["0"] else ".".join(["metrics" if keys[0] == "1" else keys[0], *keys[1:]]))
    return names


def host_type(val: object) -> object:
    """What `meta["val"]` keeps: fake tensors, of the example's sizes where they are dynamic; host numbers as their type."""
    for symbolic, plain in ((torch.SymFloat, float), (torch.SymInt, int), (torch.SymBool, bool)):
        if isinstance(val, symbolic) or type(val) is plain:
            return plain
    if isinstance(val, list | tuple):
        return type(val)(host_type(v) for v in val)
    if not isinstance(val, FakeTensor):
        return val
    if any(isinstance(size, torch.SymInt) for size in (*val.shape, *val.stride())):
        return _as_example(val)
    return val.detach() if val.requires_grad else val


def _as_example(val: FakeTensor) -> torch.Tensor:
    sizes, strides = ([private.plain_size(size) for size in each] for each in (val.shape, val.stride()))
    with val.fake_mode:
        return torch.empty_strided(sizes, strides, dtype=val.dtype, device=val.device)


def _unwritten(node: Node) -> Node | None:
    """Where nothing is written, what a choice between an old and a new value does not need copied: the old value, which only
    `where` reads, and the choice, which only the copy into the old value's place reads.

    before  %old = clone(%w), %c = where(%skipped, %old, %new), %k = copy(%new, %c)
    after   %c = where(%skipped, %w, %new)
    """
    where, target = torch.ops.aten.where.self, node.target
    if target is torch.ops.aten.clone.default and all(user.target is where for user in node.users):
        return node.args[0]  # type: ignore[return-value]
    if target is not torch.ops.aten.copy.default or node.args[1].target is not where:  # type: ignore[union-attr]
        return None
    old, chosen = (argument.meta["val"] for argument in node.args[:2])  # type: ignore[union-attr]
    alike = (old.shape, old.dtype, old.stride()) == (chosen.shape, chosen.dtype, chosen.stride())
    return node.args[1] if alike and len(node.args[1].users) == 1 else None  # type: ignore[return-value, union-attr]


def _unchanged_statistic(node: Node) -> Node | None:
    """Batch norm that does not train gives its running statistics back: then `node` is one of the two given."""
    source = node.args[0] if node.target is operator.getitem else None
    if not isinstance(source, Node) or source.target is not _BATCH_NORM or source.args[5]:
        return None
    given = source.args[node.args[1]] if node.args[1] in (3, 4) else None  # type: ignore[index]
    return given if isinstance(given, Node) else None


def _first_draws(traced: Traced) -> dict[Node, Node]:
    """For every random call the one that drew the same numbers first: itself, or one whose result is drawn again.

    before  %mask = bernoulli(%x, 0.5), ..., %again = bernoulli(%y, 0.5)      draws (0, 0)
    after   %mask = bernoulli(%x, 0.5), ...                                   %mask wherever %again was read
    """
    nodes = [n for n in traced.graph.nodes if is_random(n)]
    first: dict[int, Node] = {}
    return {node: first.setdefault(number, node) for node, number in zip(nodes, traced.draws, strict=True)}


def _last_marks(nodes: list[Node]) -> dict[str, Node]:
    """Of those that are used in the end: of a parameter whose optimizer has stepped, a gradient may be made that nobody reads."""
    used: set[Node] = set()
    for node in reversed(nodes):
        if node in used or node.op == "output" or node.target is torch.ops.aten.copy_.default:
            used.update(node.all_input_nodes, [node])
    return {str(n.args[1]): n for n in nodes if n.target is ops.gradient and n in used}


def _only_tracing(target: Callable | str) -> bool:
    name = str(target)
    return name.startswith(("profiler.", "aten._assert_", "aten.sym_constrain")) or target is operator.le
