"""Tables of which every trainer keeps a replica: rows of gradients are gathered, and updates write the rows touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import getitem
from typing import NoReturn

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.errors import LoweringError
from syncwright.meaning import find_marks, followed
from syncwright.passes.average import Mean, read_mean, wait_before
from syncwright.passes.compact_lookups import is_alone, is_updated_whole
from syncwright.passes.insert import behind, read_share, read_variable, read_weight, times_number, weight_of_call
from syncwright.plan import AllGather, Plan, Sharing
from syncwright.program import Program, Role, Variable, set_results
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten


def gather_rows(program: Program, plan: Plan) -> Program:
    """Gathers the gradients of replicated tables where they are complete, row by row.

    before  %d = dense_rows(%c, %ids, 1000), %g = gradient(%d, "w"), %new = sub(w, %g), output({"w": %new})
    after   %t = gather_rows(mul(%c, share), "w.grad", %ids), %all = wait_rows(%t, "w.grad", "mean", 2),
            %r = div(%all[1], %total), %new = sub(take_rows(w, %all[0]), %r), output({"w": put_rows(w, %all[0], %new)})

    Where an update writes all rows (`rows: all`) it reads dense_rows(%r, %all[0], 1000) in place of %g. On one trainer nothing
    is gathered; an update that writes the touched rows alone takes own_rows(%c, %ids).
    """
    wanted = {s.variable: s for s in plan.sharings if isinstance(s.sync, AllGather)}
    marks = {name for name, mark in find_marks(program).items() if mark.users}
    names = [n for n, s in wanted.items() if n in marks and not (is_alone(plan) and is_updated_whole(s))]
    if not names:
        return program
    program, mean = program.edit(), None
    known = Inference(mode_of(program.graph))
    if not is_alone(plan) and any(wanted[name].sync.reduce == "mean" for name in names):  # type: ignore[union-attr]
        program, mean = read_mean(program, plan)
        program, weight = read_weight(program, weight_of_call(plan))
        mean = replace(mean, share=read_share(weight, plan.trainers))
    for name in names:
        mark = find_marks(program)[name]
        gradient = _Gradient(name, mark, known)
        gradient.gather(wanted[name], plan, mean)
        program = _Update(program, gradient, known).on_rows() if wanted[name].rows == "touched" else program
        for user in list(mark.users):
            user.replace_input_with(mark, gradient.rows if _needs_rows(user) else gradient.dense())
    remove_dead(program.graph)
    return program


class _Gradient:
    """The merged gradient of one table: `rows` of distinct `ids`. Changes as it is gathered."""

    def __init__(self, name: str, mark: Node, known: Inference):
        self.name, self.mark, self.known = name, mark, known
        (compact,) = mark.all_input_nodes
        assert compact.target is ops.dense_rows, f"lookups of '{name}' are compact"
        own, ids, self.length, *skip = compact.args
        self._own: tuple[Node, Node] = (own, ids)  # type: ignore[assignment]
        self._skip = tuple(skip)
        self._dense: Node | None = None
        self.ids = self.rows = mark

    def gather(self, sharing: Sharing, plan: Plan, mean: Mean | None) -> None:
        """Puts the gathering where the trainer's own gradient is complete, and the wait for it before the first use."""
        (rows, ids), merge = self._own, sharing.sync.reduce  # type: ignore[union-attr]
        mean = mean if merge == "mean" else None
        graph, call = self.mark.graph, self.known.call
        if is_alone(plan):
            with behind(self.mark):
                found = call(graph, ops.own_rows, rows, ids, *self._skip)
        else:
            channel = f"{self.name}.grad"
            if mean is not None:
                with behind(rows):
                    rows = call(graph, aten.mul.Tensor, rows, mean.share)
            with behind(self.mark):
                started = call(graph, ops.gather_rows, rows, channel, ids, *self._skip)
            with graph.inserting_before(min(self.mark.users)):
                found = call(graph, ops.wait_rows, started, channel, merge, plan.trainers)
        self.ids, self.rows = self._items(found)
        if mean is not None:
            with graph.inserting_after(self.rows):
                self.rows = call(graph, aten.div.Tensor, self.rows, mean.total)
            wait_before(mean, self.rows)

    def _items(self, found: Node) -> tuple[Node, Node]:
        with found.graph.inserting_after(found):
            ids = self.known.call(found.graph, getitem, found, 0)
        with found.graph.inserting_after(ids):
            return ids, self.known.call(found.graph, getitem, found, 1)

    def dense(self) -> Node:
        """All of it, with zeros in the other rows."""
        if self._dense is None:
            with self.mark.graph.inserting_after(self.rows):
                self._dense = self.known.call(self.mark.graph, ops.dense_rows, self.rows, self.ids, self.length)
        return self._dense


@dataclass(slots=True, eq=False)
class _Update:
    """The update of one table, from its gradient's rows to its new rows. Changes as nodes are rewired.

    written  what it writes that has a row for each row of the table, and that changes
    """

    program: Program
    gradient: _Gradient
    known: Inference
    written: list[Variable] = field(init=False)

    def __post_init__(self) -> None:
        program, name, follows = self.program, self.gradient.name, followed(self.program)
        mine = [v for v in program.variables.values() if name in (v.name, v.of, follows.get(v.name))]
        self.written = [v for v in mine if v.shape and v.name in program.results and v.role is not Role.GRAD]
        self.written = [v for v in self.written if program.results[v.name].op != "placeholder"]

    def on_rows(self) -> Program:
        """Rewrites the update so that it reads and writes the rows of the gradient only."""
        results = dict(self.program.results)
        nodes = sorted(self._aligned([results[v.name] for v in self.written]))
        self._check_alone(set(nodes))
        sources = {source for node in nodes for source in node.all_input_nodes if self._is_kept(source)}
        taken, last = self._taken(sorted(sources))
        for node in nodes:
            for source in node.all_input_nodes:
                node.replace_input_with(source, taken.get(source, source))
            if node < last:  # a decay of weights may stand in front of the gradient
                last.append(node)
                last = node
            _say_no_sizes(node, self.gradient.length)
            self.known.infer(node)
        for variable in self.written:
            results[variable.name] = self._put(variable, results[variable.name])
        set_results(self.program, results)
        return self.program

    def _aligned(self, ends: Iterable[Node]) -> set[Node]:
        """The calls between the gradient and what is written, of tensors with axes."""
        found: set[Node] = set()
        stack = [node for node in ends if node is not self.gradient.mark]
        while stack:
            node = stack.pop()
            if node in found:
                continue
            sources = [n for n in node.all_input_nodes if _has_axes(n)]
            if node.target in ops.CROSSINGS:
                self._refuse(node, "is made on a server in part")
            if not sources or any(n.op == "placeholder" and not self._is_kept(n) for n in sources):
                self._refuse(node, "meets a tensor of sizes of its own")
            found.add(node)
            stack += [n for n in sources if n is not self.gradient.mark and n.op != "placeholder"]
        return found

    def _is_kept(self, node: Node) -> bool:
        """Whether it is the old value of something with a row for each row of the table."""
        return node.op == "placeholder" and node.meta["variable"] in {
            self.gradient.name,
            *[v.name for v in self.written],
        }

    def _check_alone(self, nodes: set[Node]) -> None:
        """What has become rows may be read by the update only."""
        names = {variable.name for variable in self.written}
        for name, node in self.program.results.items():
            if node in nodes and name not in names:
                self._refuse(node, f"makes what is also written to '{name}'")
        for node in nodes:
            for user in node.users:
                if user not in nodes and user.op != "output" and not self._adds_up(node, user):
                    self._refuse(node, f"makes what {user.name} reads, outside of it")

    def _adds_up(self, node: Node, user: Node) -> bool:
        """Whether a reader adds up a multiple of the gradient, of which the other rows are zeros."""
        source = times_number(node)
        while source.target in (aten.clone.default, aten.slice.Tensor):
            source = times_number(source.args[0])  # type: ignore[arg-type]
        return source is self.gradient.mark and _needs_rows(user)

    def _taken(self, sources: Sequence[Node]) -> tuple[dict[Node, Node], Node]:
        """The rows of what the update reads, as they are before it, and the last node that stands in front of it."""
        taken, last = {self.gradient.mark: self.gradient.rows}, self.gradient.rows
        for source in sources:
            with last.graph.inserting_after(last):
                last = taken[source] = self.known.call(last.graph, ops.take_rows, source, self.gradient.ids)
        return taken, last

    def _put(self, variable: Variable, rows: Node) -> Node:
        """All of the new value."""
        rows = self.gradient.rows if rows is self.gradient.mark else rows
        self.program, old = read_variable(self.program, variable, self.known.fake_of(variable))
        with behind(rows):
            return self.known.call(rows.graph, ops.put_rows, old, self.gradient.ids, rows)

    def _refuse(self, node: Node, what: str) -> NoReturn:
        raise LoweringError(
            f"the update of '{self.gradient.name}' {what} (at {node.name}), so it cannot run on some of the table's rows. "
            "Expected an update that is made from the gradient, the parameter and its state alone, and read by nobody else. Make "
            "it so, or share the variable by: all_reduce."
        )


def _has_axes(node: Node) -> bool:
    val = node.meta["val"]
    return isinstance(val, torch.Tensor) and val.dim() > 0


def _needs_rows(node: Node) -> bool:
    """A norm or a sum of a multiple to which zeros add nothing, also of no numbers at all."""
    if times_number(node) is not node:
        return all(user.target is aten.sum.default for user in node.users)
    order = node.args[1] if len(node.args) > 1 else 2
    return node.target is aten.linalg_vector_norm.default and not node.args[2:] and 0 < order < math.inf  # type: ignore[operator]


_SIZED = frozenset({aten.view.default, aten.reshape.default, aten.expand.default})


def _say_no_sizes(node: Node, length: object) -> None:
    """How many rows there are follows from the others, or from what is given."""
    if node.target in _SIZED and node.args[1][:1] == [length]:  # type: ignore[index]
        node.update_arg(1, [-1, *node.args[1][1:]])  # type: ignore[index]
