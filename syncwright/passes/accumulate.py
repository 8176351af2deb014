"""Gradients of several calls of a step, added up on each trainer until one of them updates."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from syncwright.meaning import find_marks
from syncwright.passes.insert import CALL, INVERSE, SUMMED, behind, read_variable, read_weight
from syncwright.plan import AllGather, Local, ParameterServer, Plan, Shard, Sharing, Sync
from syncwright.program import Program, Role, Variable, set_results
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten


def accumulate(program: Program, plan: Plan) -> Program:
    """Lets an update read the mean of a trainer's gradients of all calls since the last update, weighted by examples.

    before  %g = gradient(%mm, "w"), %new = sub(w, %g), output({"w": %new})
    after   w.accumulated = placeholder, %s = add(w.accumulated, mul(%mm, call.weight)),
            %g = gradient(mul(%s, batch.inverse), "w"), %new = sub(w, %g),
            output({"w": %new, "w.accumulated": zeros_like(w.accumulated)})

    This is the call that updates; of those before it see `only_accumulate`. `call.weight` is this call's number of examples /
    the nominal one, `batch.inverse` is 1 / the sum of these over the calls, and `batch.weight`, by which all that follows
    weighs the trainer, is that sum. Where gradients are added up (`reduce: sum`) nothing is weighed. Under `shard` in stages 2
    and 3 what is reduced is added up (see `accumulate_parts`), rows of tables where they are sent.
    """
    if plan.accumulate == 1:
        return program
    marks = {name: mark for name, mark in find_marks(program).items() if name in program.writes and mark.users}
    program = program.edit()
    adding = _Adding(program, Inference(mode_of(program.graph)))
    for sharing in plan.sharings:
        if sharing.variable in marks and not rows_travel(sharing):
            mark = find_marks(program)[sharing.variable]
            if in_parts(sharing, plan):
                adding.weigh(mark, sharing.sync)
            else:
                adding.add(mark, sharing.variable, sharing.sync)
    return adding.program


def rows_travel(sharing: Sharing) -> bool:
    """Whether of a table's gradient only rows travel."""
    return bool(sharing.rows) and isinstance(sharing.sync, AllGather | ParameterServer)


def in_parts(sharing: Sharing, plan: Plan) -> bool:
    """Whether a variable's gradient is reduced in every call, and a trainer adds up its own part of it."""
    sync = sharing.sync
    return isinstance(sync, Shard) and sync.stage > 1 and sharing.keeper is None and plan.trainers > 1


def accumulated(parameter: str, gradient: torch.Tensor) -> Variable:
    """What a trainer has added up of gradients like this one."""
    shape = tuple(gradient.shape)
    return Variable(f"{parameter}.accumulated", Role.GRAD, shape, gradient.dtype, of=parameter, initial=0.0)


@dataclass(slots=True, eq=False)
class _Adding:
    """Rewrites gradients. Changes with each."""

    program: Program
    known: Inference

    def add(self, mark: Node, name: str, sync: Sync) -> None:
        """The mark is of all calls."""
        gradient: Node = mark.args[0]  # type: ignore[assignment]
        averaged = is_mean(sync)
        if averaged:
            self.program, weight = read_weight(self.program, CALL)
            self.program, inverse = read_weight(self.program, INVERSE)
            with self.program.graph.inserting_before(mark):
                gradient = self.known.call(mark.graph, aten.mul.Tensor, gradient, weight)
        variable = accumulated(name, mark.meta["val"])
        self.program, summed = add_to(self.program, variable, gradient, mark, self.known)
        if averaged:
            with self.program.graph.inserting_before(mark):
                summed = self.known.call(mark.graph, aten.mul.Tensor, summed, inverse)
        mark.update_arg(0, summed)

    def weigh(self, mark: Node, sync: Sync) -> None:
        """The mark is of this call, and weighs as much as it has of all."""
        if not is_mean(sync):
            return
        graph = self.program.graph
        self.program, weight = read_weight(self.program, CALL)
        self.program, inverse = read_weight(self.program, INVERSE)
        part = next((u for u in weight.users if u.target is operator.mul and u.args == (weight, inverse)), None)
        if part is None:
            with behind(inverse):
                part = graph.create_node("call_function", operator.mul, (weight, inverse), name="part")
                part.meta["val"] = float
        with graph.inserting_before(mark):
            mark.update_arg(0, self.known.call(graph, aten.mul.Tensor, mark.args[0], part))


def is_mean(sync: Sync) -> bool:
    """Whether gradients are averaged, and not added up."""
    return isinstance(sync, Local) or sync.reduce == "mean"  # type: ignore[union-attr]


def add_to(program: Program, variable: Variable, value: Node, before: Node, known: Inference) -> tuple[Program, Node]:
    """What a trainer has added up with this call's value, in front of a node; the call that updates begins anew."""
    graph = program.graph
    program, old = read_variable(program, variable, value.meta["val"].new_empty(variable.shape))
    with graph.inserting_before(before):
        summed = known.call(graph, aten.add.Tensor, old, value)
    summed.meta[SUMMED] = variable.name
    with graph.inserting_before(program.output):
        nothing = known.call(graph, aten.zeros_like.default, old)
    set_results(program, {**program.results, variable.name: nothing})
    return replace(program, variables={**program.variables, variable.name: variable}), summed
