"""Reductions by node: among the trainers of each host first, then among hosts, and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import getitem

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.passes.bucket import INSIDE
from syncwright.plan import ACROSS, BY_NODE, FIRSTS, NODE, Groups, Plan
from syncwright.program import Program
from syncwright.schema import argument, put_argument
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten
OVER, BACK = " across", " back"
"""Behind a channel: of what hosts reduce among each other, and of what then goes to all trainers of each."""


def reduce_by_node(program: Program, plan: Plan) -> Program:
    """Makes of reductions "by node" what trainers do in the groups that the plan's hosts are.

    before  %a = all_reduce(%x, "bucket.0", "by node"), ..., %w = wait(%a)                        (x is f32[10]; 2 hosts of 2)
    after   %a = reduce_scatter([%x], "bucket.0", 2, "node"), ...,
            %b = all_reduce(wait_own(%a), "bucket.0 across", "across"), ...,
            %c = gather_parts([wait(%b)], "bucket.0 back", 2, "node"), ..., %w = view(wait_whole(%c)[0], [10])
    after   %a = all_reduce(%x, "bucket.0", "node"), ..., %b = all_reduce(wait(%a), "bucket.0 across", "firsts"), ...,
            %c = give([wait(%b)], "bucket.0 back", 0, "node"), ..., %w = view(wait_whole(%c)[0], [10])   (hosts of 3 and 1)

    before  %a = reduce_scatter([%x], "parts.0", 2, "by node"), ..., %w = wait_own(%a)            (so of `reduce_to`)
    after   %a = reduce_scatter([%x], "parts.0", 2, "node"), ...,
            %b = all_reduce(wait_own(%a), "parts.0 across", "across"), ..., %w = wait(%b)

    What follows a phase begins behind the start of the next reduction, or before the next wait: so phases of one run beside the
    computation of others, and all trainers begin them in one order.
    """
    if not any(argument(node, "group") == BY_NODE for node in _starts(program)):
        return program
    program = program.edit()
    known = Inference(mode_of(program.graph))
    works = [_Work(node, plan.groups, known) for node in _starts(program) if argument(node, "group") == BY_NODE]
    points = _points(program, works)
    later = [work.later(points) for work in works]
    started = [work.begin(points[work.start]) for work in works]
    for work, first, (second, third) in zip(works, started, later, strict=True):
        work.go_on(first, second, third)
    for point in points.values():
        program.graph.erase_node(point)
    return program


def _starts(program: Program) -> list[Node]:
    kinds = (ops.all_reduce, ops.reduce_scatter, ops.reduce_to)
    return sorted(node for kind in kinds for node in program.graph.find_nodes(op="call_function", target=kind))


def _points(program: Program, works: list[_Work]) -> dict[Node, Node]:
    """Where phases may begin: behind each start and before each wait, by that node a point that stands there."""
    found = {}
    for work in works:
        with program.graph.inserting_after(work.start):
            found[work.start] = program.graph.call_function(aten.zeros.default, ([0],))
        with program.graph.inserting_before(work.wait):
            found[work.wait] = program.graph.call_function(aten.zeros.default, ([0],))
    return found


@dataclass(slots=True, eq=False)
class _Work:
    """One reduction by node. Rewrites the program."""

    start: Node
    groups: Groups
    known: Inference
    wait: Node = field(init=False)

    def __post_init__(self) -> None:
        (self.wait,) = self.start.users

    def later(self, points: dict[Node, Node]) -> tuple[Node, Node]:
        """Where the second and the third phase begin, of where they may, by the start or wait that each stands at."""
        between = sorted(point for node, point in points.items() if self.start < node < self.wait)
        second, third, *_ = [*between, points[self.wait], points[self.wait]]
        return second, third

    def begin(self, here: Node) -> Node:
        """Starts what trainers of a host reduce, in place of all."""
        if self.start.target is not ops.all_reduce:
            put_argument(self.start, "group", NODE)
            return self.start
        if self.groups.is_even:
            return self._started(
                here, ops.reduce_scatter, [self.start.args[0]], self._channel, self.groups.hosts[0], NODE
            )
        return self._started(here, ops.all_reduce, self.start.args[0], self._channel, NODE)

    def go_on(self, first: Node, second: Node, third: Node) -> None:
        """The further phases, in place of the wait.

        first          what trainers of a host have started
        second, third  where the others begin
        """
        graph, whole = self.start.graph, self.start.target is ops.all_reduce
        parts = self.groups.is_even or not whole
        with graph.inserting_before(second):
            own = self._call(ops.wait_own if parts else ops.wait, first, self._channel)
        over = self._started(second, ops.all_reduce, own, f"{self._channel}{OVER}", ACROSS if parts else FIRSTS)
        with graph.inserting_before(third if whole else self.wait):
            summed = self._call(ops.wait, over, over.args[1])
        if whole:
            summed = self._back(third, summed)
        self.wait.replace_all_uses_with(summed)
        graph.erase_node(self.wait)
        if whole:
            graph.erase_node(self.start)

    @property
    def _channel(self) -> str:
        return str(self.start.args[1])

    def _call(self, target: object, *args: object) -> Node:
        return self.known.call(self.start.graph, target, *args)  # type: ignore[arg-type]

    def _started(self, point: Node, target: object, *args: object) -> Node:
        with self.start.graph.inserting_before(point):
            node = self._call(target, *args)
        node.meta[INSIDE] = self.start.meta.get(INSIDE, ())
        return node

    def _back(self, point: Node, summed: Node) -> Node:
        """What hosts have reduced, whole on every trainer where it is waited for."""
        val, channel = self.start.meta["val"], f"{self._channel}{BACK}"
        if self.groups.is_even:
            started = self._started(point, ops.gather_parts, [summed], channel, self.groups.hosts[0], NODE)
        else:
            started = self._started(point, ops.give, [summed], channel, 0, NODE)
        with self.start.graph.inserting_before(self.wait):
            waited = self._call(ops.wait_whole, started, channel, [val.numel()])
            return self._call(aten.view.default, self._call(getitem, waited, 0), list(val.shape))
