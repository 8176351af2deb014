"""Gradients of one host's trainers are added up there, and pushed to servers once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.passes.insert import WEIGHT, behind, read_share, read_weight
from syncwright.plan import ParameterServer, Plan
from syncwright.program import Program, Role
from syncwright.schema import argument
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten


def merge_on_host(program: Program, plan: Plan) -> Program:
    """Adds up the contributions of each host's trainers where the plan says so, and their weights.

    before  %m = push.merged(mul(%g, share), "w.grad", "mean") at owners "w"
    after   %s = sum_on_host(mul(%g, share), "w.grad on host"), %t = wait_on_host(%s),
            %m = push.merged(%t, "w.grad", "mean", weight=%weights) at owners "w"

    Asynchronous pushes, which nobody has scaled, carry the mean over the host: %t is divided by the sum of its weights. A sum
    is waited for when the next one has begun: so trainers of a host need not be at the same node.
    """
    chosen = {s.variable: s.sync for s in plan.sharings if isinstance(s.sync, ParameterServer) and s.sync.merge_on_host}
    if not chosen or max(plan.hosts) == 1:
        return program
    program = program.edit()
    pushes = [
        node
        for node in program.graph.find_nodes(op="call_function", target=ops.push_merged)
        if program.variables[node.args[1]].role is Role.GRAD and program.variables[node.args[1]].of in chosen
    ]
    if not pushes:
        return program
    known = Inference(mode_of(program.graph))
    program, weight = read_weight(program)
    started = [_started(push, weight, plan.trainers, known) for push in pushes]
    sums = _Weights.begun(min(started), weight, plan.trainers, known)
    for push, start, following in zip(pushes, started, [*started[1:], None], strict=True):
        _finish(push, start, following, sums, known)
    return program


@dataclass(slots=True, eq=False)
class _Weights:
    """The sum of the weights of a host's trainers. Changes when it is first waited for.

    total  the same, divided by the number of all trainers: by what a sum of shares is divided to be a mean
    """

    start: Node
    trainers: int
    known: Inference
    sum: Node | None = None
    total: Node | None = None

    @classmethod
    def begun(cls, first: Node, weight: Node, trainers: int, known: Inference) -> _Weights:
        """Begins in front of the first other sum: what is pulled for a whole host stands before, as a rule."""
        graph = first.graph
        with graph.inserting_before(first):
            own = known.call(graph, aten.scalar_tensor.default, weight, dtype=torch.float64)
            return cls(known.call(graph, ops.sum_on_host, own, f"{WEIGHT} on host"), trainers, known)

    def wait(self, mean: bool) -> tuple[Node, Node | None]:
        """The sum, and (of a mean) the total, made at the insertion point of the graph the first time."""
        graph = self.start.graph
        if self.sum is None:
            self.sum = self.known.call(graph, ops.wait_on_host, self.start, self.start.args[1])
        if mean and self.total is None:
            self.total = self.known.call(graph, aten.div.Tensor, self.sum, self.trainers)
        return self.sum, self.total if mean else None


def _started(push: Node, weight: Node, trainers: int, known: Inference) -> Node:
    """The sum of what is pushed, begun where it is complete: of a mean each trainer's share, in the gradient's own dtype."""
    sent, graph = push.args[0], push.graph
    assert isinstance(sent, Node), "gradients are computed"
    if _is_cast(push):
        sent = sent.args[0]
        assert isinstance(sent, Node), "a cast is of a node"
    if _is_unscaled_mean(push):
        with behind(sent):
            sent = known.call(graph, aten.mul.Tensor, sent, read_share(weight, trainers))
    with behind(sent):
        return known.call(graph, ops.sum_on_host, sent, f"{push.args[1]} on host")


def _finish(push: Node, start: Node, following: Node | None, weights: _Weights, known: Inference) -> None:
    """Waits for a sum and pushes it: as soon as the following one has begun, or before what reads it."""
    graph, first = push.graph, min(push.users)
    if following is not None and push < following < first:
        following.append(push)
    cast, dtype = _is_cast(push), start.meta["val"].dtype
    with graph.inserting_before(push):
        merged = known.call(graph, ops.wait_on_host, start, start.args[1])
        weight, total = weights.wait(_is_unscaled_mean(push))
        if total is not None:
            merged = known.call(graph, aten.div.Tensor, merged, total)
        wire = push.args[0].meta["val"].dtype if cast else dtype  # type: ignore[union-attr]
        if merged.meta["val"].dtype is not wire:
            merged = known.call(graph, aten._to_copy.default, merged, dtype=wire)
    old: Sequence[object] = push.args
    push.args = (merged, *old[1:])  # type: ignore[assignment]
    push.kwargs = {**push.kwargs, "weight": weight}
    if cast:
        graph.erase_node(old[0])  # type: ignore[arg-type]


def _is_cast(push: Node) -> bool:
    """Whether what is pushed travels in another dtype than the gradient's."""
    return "dtype" in push.kwargs


def _is_unscaled_mean(push: Node) -> bool:
    return push.args[2] == "mean" and bool(argument(push, "take"))
