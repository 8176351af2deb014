"""Sums of gradients that come one step late: they are on their way while the next step computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.meaning import find_marks
from syncwright.passes.average import read_mean
from syncwright.passes.insert import behind
from syncwright.plan import AllReduce, Plan
from syncwright.program import Program
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten
TOTAL = "delayed.total"
"""The channel of the weights that belong to gradients of the step before."""


def delay(program: Program, plan: Plan) -> Program:
    """Lets updates read the sums that the step before has begun, where the plan says `delay: 1`.

    before  %a = all_reduce(mul(%g, share), "w.grad"), %m = div(wait(%a), %total), %new = sub(w, %m)
    after   all_reduce.later(mul(%g, share), "w.grad"), all_reduce.later(%weight, "delayed.total"),
            %t = div(wait.before("delayed.total", [], f32), 2), %m = div(wait.before("w.grad", [2, 3], f32), %t),
            %new = sub(w, %m)

    One trainer waits for its own gradient. What there is before the first step and behind the last one, see `delayed`.
    """
    wanted = {s.variable for s in plan.sharings if isinstance(s.sync, AllReduce) and s.sync.delay}
    marks = {n: mark for n, mark in find_marks(program).items() if n in wanted and n in program.writes and mark.users}
    if not marks:
        return program
    program = program.edit()
    known, marks = Inference(mode_of(program.graph)), find_marks(program)
    if plan.trainers == 1:
        for name in [name for name in marks if name in wanted]:
            _delayed(marks[name], list(marks[name].users), f"{name}.grad", known)
        return program
    channels = {f"{name}.grad" for name in wanted}
    starts = [n for n in program.graph.find_nodes(op="call_function", target=ops.all_reduce) if n.args[1] in channels]
    program, mean = read_mean(program, plan)
    came: list[Node] = []
    for start in starts:
        (wait,) = start.users
        came.append(_delayed(start.args[0], list(wait.users), str(start.args[1]), known, wait))  # type: ignore[arg-type]
    divided = [division for node in came if (division := _divided_by(node, mean.total)) is not None]
    if divided:
        total = _total(mean.total, min(came), plan.trainers, known)
        for division in divided:
            division.replace_input_with(mean.total, total)
    remove_dead(program.graph)
    return program


def _delayed(sent: Node, readers: Sequence[Node], channel: str, known: Inference, wait: Node | None = None) -> Node:
    """Starts a sum, and what comes of the one before takes the place of what readers waited for."""
    with behind(sent):
        known.call(sent.graph, ops.all_reduce_later, sent, channel)
    old = wait or sent
    with sent.graph.inserting_before(min(readers)):
        came = before(channel, sent.meta["val"], sent, known)
    for reader in readers:
        reader.replace_input_with(old, came)
    return came


def before(channel: str, like: torch.Tensor, node: Node, known: Inference) -> Node:
    """The sum that the step before has begun, at the insertion point."""
    return known.call(node.graph, ops.wait_before, channel, list(like.shape), like.dtype, like.device)


def _divided_by(came: Node, total: Node) -> Node | None:
    """Where a sum is divided by the sum of weights, where it is."""
    users = list(came.users)
    if len(users) == 1 and users[0].target is aten._to_copy.default:
        users = list(users[0].users)
    return users[0] if len(users) == 1 and total in users[0].all_input_nodes else None


def _total(total: Node, first: Node, trainers: int, known: Inference) -> Node:
    """The sum of the weights of the step before, in front of the first sum that is divided by it."""
    started: Node = total.args[0].args[0]  # type: ignore[union-attr, assignment]
    weight: Node = started.args[0]  # type: ignore[assignment]
    with behind(weight):
        known.call(weight.graph, ops.all_reduce_later, weight, TOTAL)
    with weight.graph.inserting_before(first):
        summed = before(TOTAL, weight.meta["val"], weight, known)
        return known.call(weight.graph, aten.div.Tensor, summed, trainers)
