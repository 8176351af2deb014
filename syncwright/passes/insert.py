"""Where passes put new nodes: behind a value, before its first use, or as a new variable that the program reads."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch.fx import Graph, Node

from syncwright.plan import Groups, Plan
from syncwright.program import Program, Role, Variable, new_placeholder

aten = torch.ops.aten
WEIGHT = "batch.weight"
TOTAL = "batch.total"
"""The sum of the weights of all trainers; in the meta of the node that is this sum / trainers."""
CALL = "call.weight"
CALL_TOTAL = "call.total"
"""Likewise of this call alone, where several make one update; `WEIGHT` is then of all of them."""
INVERSE = "batch.inverse"
"""1 / `WEIGHT`; 0 where that is 0."""
SUMMED = "summed"
"""In the meta of a sum of gradients over the calls so far: the variable that it was before this call."""
FIRST = "trainer.first"
RANK = "trainer.rank"
PEERS = "trainer.peers"
SAME = "same"
"""In the meta of what all trainers compute alike: it is not averaged."""
KEPT = "kept"
"""In the meta of trainer 0's contribution to a buffer: the buffer whose old value it is where trainer 0 runs no step."""


def behind(node: Node) -> AbstractContextManager:
    """The point behind `node`, and behind all placeholders where it is one."""
    return (
        node.graph.inserting_before(first_call(node.graph))
        if node.op == "placeholder"
        else node.graph.inserting_after(node)
    )


def before_first_use(users: Iterable[Node]) -> AbstractContextManager:
    first = min(users)
    return first.graph.inserting_before(first)


def item(found: Node, index: int) -> Node:
    """One of several values that a node gives, at the graph's insertion point."""
    node = found.graph.call_function(operator.getitem, (found, index))
    node.meta["val"] = found.meta["val"][index]
    return node


def times_number(node: Node) -> Node:
    """What a value is a multiple of, by numbers: %g of `mul(mul(%g, 0.5), %coefficient)`; itself where it is none."""
    while node.target is aten.mul.Tensor and not _has_axes(node.args[1]):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _has_axes(value: object) -> bool:
    val = value.meta["val"] if isinstance(value, Node) else None
    return isinstance(val, torch.Tensor) and val.dim() > 0


def made_of(nodes: Iterable[Node]) -> set[Node]:
    """The calls that values are computed by, their own among them."""
    found, stack = set[Node](), list(nodes)
    while stack:
        node = stack.pop()
        if node.op == "call_function" and node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def move_before(first: Node, nodes: Iterable[Node]) -> None:
    """Moves calls in front of one, in their order; those that stand there already stay."""
    for node in sorted(node for node in nodes if node > first):
        first.prepend(node)


def first_call(graph: Graph) -> Node:
    return next(n for n in graph.nodes if n.op != "placeholder")


def read_variable(program: Program, variable: Variable, val: object) -> tuple[Program, Node]:
    """The placeholder of `variable`, added where the program does not read it yet."""
    known = program.placeholders.get(variable.name)
    if known is not None:
        return program, known
    with program.graph.inserting_before(first_call(program.graph)):
        node = new_placeholder(program.graph, variable, val)
    return replace(program, variables={**program.variables, variable.name: variable}), node


def read_weight(program: Program, name: str = WEIGHT) -> tuple[Program, Node]:
    """This trainer's examples / the nominal number, as a number on the host."""
    return read_variable(program, Variable(name, Role.HYPER, (), torch.float64), float)


def weight_of_call(plan: Plan) -> str:
    """The weight of what every call gives: the loss, buffers, rows of gradients."""
    return CALL if plan.accumulate > 1 else WEIGHT


def read_first(program: Program) -> tuple[Program, Node]:
    """1 on the first trainer, 0 on the others."""
    return read_variable(program, Variable(FIRST, Role.HYPER, (), torch.int64), int)


def read_rank(program: Program) -> tuple[Program, Node]:
    """This trainer's number."""
    return read_variable(program, Variable(RANK, Role.HYPER, (), torch.int64), int)


def read_size(program: Program, groups: Groups, group: str) -> tuple[Program, int | Node]:
    """How many trainers this one's group has; where groups differ, as a number on the host."""
    size = groups.size(group)
    return (program, size) if size is not None else read_variable(program, peers_of(group), int)


def peers_of(group: str) -> Variable:
    """How many trainers a trainer's group of this name has."""
    return Variable(f"{PEERS} {group}", Role.HYPER, (), torch.int64)


def in_group(group: str) -> tuple[str, ...]:
    """The last argument of a communication in a group; none where it is among all trainers."""
    return (group,) if group else ()


def read_share(weight: Node, trainers: int | Node) -> Node:
    """weight / trainers: what a trainer's contribution to a mean is multiplied by."""
    share = next((u for u in weight.users if u.target is operator.truediv and u.args[1] == trainers), None)
    if share is None:
        with weight.graph.inserting_before(first_call(weight.graph)):
            share = weight.graph.create_node("call_function", operator.truediv, (weight, trainers), name="share")
            share.meta["val"] = float
    return share
