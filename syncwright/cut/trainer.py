"""The trainer's program: what is placed on trainers; crossings become pushes and pulls."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from syncwright import ops
from syncwright.cut.crossing import channel_of, source_of
from syncwright.dead import trim
from syncwright.errors import LoweringError
from syncwright.place import AT, Owners, is_served, place_of
from syncwright.program import Program, copy_node
from syncwright.schema import argument
from syncwright.shapes import Inference
from syncwright.split import piece_of

aten = torch.ops.aten


def trainer_program(program: Program, known: Inference) -> Program:
    """What every trainer runs.

    before  %v = pull.value(w, "w"), ..., %m = push.merged(%g, "w.grad", "mean") at owners "w"        (w in two pieces)
    after   %p0 = pull([], "w[0]", ...), %p1 = pull([], "w[1]", ...), %v = cat([%p0, %p1]), ...,
            push(slice(%g, 0, 0, 3), "w.grad[0]"), push(slice(%g, 0, 3, 5), "w.grad[1]")
    """
    return _Trainer(program, known).program()


class _Trainer:
    """Makes the program of a trainer: crossings become pushes and pulls."""

    def __init__(self, program: Program, known: Inference):
        self.whole, self.known, self.graph = program, known, Graph()
        self.made: dict[Node, Node] = {}
        self.tokens: dict[Node, Node] = {}

    def program(self) -> Program:
        for node in self.whole.graph.nodes:
            if node.target is ops.push_merged:
                self._push(node)
            elif node.target is ops.push_rows_merged:
                self._push_rows(node)
            elif node.target is ops.pull_rows_value:
                self.made[node] = self._pull_rows(node)
            elif node.target is ops.pull_value:
                self.made[node] = self._pull(node)
            elif node.op != "output" and not is_served(node):
                self.made[node] = copy_node(self.graph, node, self.made)
                self.made[node].meta.pop(AT, None)
        variables = self.whole.variables
        results = {n: self.made[r] for n, r in self.whole.results.items() if not variables[n].kept}
        self.graph.output(results)
        return trim(Program(self.graph, variables, self.whole.guards))

    def _push(self, node: Node) -> None:
        """The token of a push, or of the last of the pushes of pieces: they leave in this order."""
        sent, variable = self.made[source_of(node)], self.whole.variables[channel_of(node)]
        weight = [self.made[node.kwargs["weight"]]] if "weight" in node.kwargs else []  # type: ignore[index]
        for index, part in enumerate(variable.kept or (None,)):
            rows = sent
            if part is not None and part.bounds is not None:
                rows = self.known.call(self.graph, aten.slice.Tensor, sent, 0, part.start, part.stop)
            self.tokens[node] = self.known.call(self.graph, ops.push, rows, piece_of(variable, index).name, *weight)

    def _push_rows(self, node: Node) -> None:
        sent, ids, skip = self.made[source_of(node)], self.made[argument(node, "ids")], argument(node, "skip")  # type: ignore[index]
        self.tokens[node] = self.known.call(
            self.graph, ops.push_rows, sent, channel_of(node), ids, *([skip] if skip else [])
        )

    def _pull_rows(self, node: Node) -> Node:
        ids, val = self.made[argument(node, "ids")], node.meta["val"]  # type: ignore[index]
        when = node.args[3:4]
        return self.known.call(self.graph, ops.pull_rows, ids, channel_of(node), list(val.shape), val.dtype, *when)

    def _pull(self, node: Node) -> Node:
        variable = self.whole.variables[channel_of(node)]
        cut = variable.kept[1:] and variable.kept[0].bounds is not None
        if cut and variable.kept[0].shards:
            raise LoweringError(
                f"{node.name} reads all of '{variable.name}', which is kept by virtual shards; expected lookups of rows alone. "
                "Give it another partition, such as blocks, or take out what reads it whole."
            )
        parts = [piece_of(variable, index) for index in range(len(variable.kept) if cut else 1)]
        after = [self.tokens[push] for push in self._awaited(node)]
        when = node.args[2:3]
        if argument(node, "on_host"):
            when = (argument(node, "when"), True)
        pulled = [self.known.call(self.graph, ops.pull, after, p.name, list(p.shape), p.dtype, *when) for p in parts]
        return self.known.call(self.graph, aten.cat.default, pulled) if len(pulled) > 1 else pulled[0]

    def _awaited(self, node: Node) -> list[Node]:
        """The pushes that a pulled value is made from; what stands at the start of the step waits for none."""
        source = source_of(node)
        if source.op == "placeholder":
            return []
        pushes = _pushes(source, over=False) or _pushes(source, over=True)
        if not pushes:
            raise LoweringError(
                f"{node.name} reads the new value of '{channel_of(node)}' from a server, but no gradient goes into it, so "
                "nothing says when it is there. Expected an update that reads a gradient. Share it by all_reduce."
            )
        return sorted(pushes, key=lambda push: (isinstance(place_of(push), Owners), push))


def _pushes(node: Node, over: bool) -> set[Node]:
    """The pushes that `node` is made from; `over` what other servers send too. A server waits for these by itself."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        ends = node.target in ops.PUSHES or (
            node.target is ops.send and isinstance(place_of(node), Owners) and not over
        )
        if not ends:
            stack.extend(node.all_input_nodes)
    return {node for node in seen if node.target in ops.PUSHES}
