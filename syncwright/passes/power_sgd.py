"""Gradients of matrices reduced as two thin factors (PowerSGD)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import getitem

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.meaning import find_marks
from syncwright.passes.average import Mean, averaged, read_means
from syncwright.passes.bucket import FIRST, SECOND
from syncwright.passes.compress import residual_name
from syncwright.passes.insert import before_first_use, behind, in_group, read_variable
from syncwright.plan import AllReduce, Plan
from syncwright.plan.compression import PowerSGD
from syncwright.program import Program, Role, Variable, set_results
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten


def power_sgd(program: Program, plan: Plan) -> Program:
    """Reduces the factors of matrices' gradients (Vogels et al., NeurIPS 2019), with error feedback and a warm start.

    before  %g = gradient(%mm, "w"), %new = sub(w, %g)                                                        (w is f32[n,m])
    after   %t = add(mul(%g, share), w.residual), %a = all_reduce(mm(%t, w.factor), "w.grad.left"),
            %p = qr(wait(%a))[0], %q = mm(t(%t), %p), %b = all_reduce(%q, "w.grad.right"), %r = wait(%b),
            %new = sub(w, div(mm(%p, t(%r)), %total)),
            output({"w": %new, "w.factor": %r, "w.residual": sub(%t, mm(%p, t(%q)))})

    The factor begins as fixed numbers. All left factors are waited for behind the last of them, so that they travel together,
    and so do the right ones. Axes behind the first count as one; variables of fewer than two axes travel as they are.
    """
    chosen = {s.variable: s.sync for s in plan.sharings if isinstance(s.sync, AllReduce)}
    wanted = {name: sync for name, sync in chosen.items() if is_factored(sync, program.variables[name])}
    if plan.trainers == 1 or not wanted:
        return program
    program = program.edit()
    marks = {n: mark for n, mark in find_marks(program).items() if n in wanted and n in program.writes and mark.users}
    program, means = read_means(program, plan, {name: wanted[name] for name in marks})
    known = Inference(mode_of(program.graph))
    begun = []
    for name, mark in marks.items():
        by = wanted[name].compress
        assert isinstance(by, PowerSGD), "looked at before"
        way = _Way(mark, list(mark.users), means.get(name), plan.groups.of(wanted[name]))
        program, one = _begin(program, name, way, by.rank, known)
        begun.append(one)
    for together in _in_time(begun):
        last = max(one.started for one in together)
        turned = [_turn(one, last, known) for one in reversed(together)]
        for one, its in zip(together, reversed(turned), strict=True):
            program = _end(program, one, its, known)
    return program


def is_factored(sync: AllReduce, variable: Variable) -> bool:
    """Whether a variable's gradient travels as factors: a matrix's, where they have fewer elements than it has itself."""
    wide = variable.dtype in (torch.float32, torch.float64)
    if not isinstance(sync.compress, PowerSGD) or len(variable.shape) < 2 or not wide:
        return False
    rows, columns = variable.shape[0], _columns(variable.shape)
    return (rows + columns) * sync.compress.rank < rows * columns


def _columns(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape[1:]:
        count *= size
    return count


@dataclass(frozen=True, slots=True, eq=False)
class _Way:
    """A gradient, who reads it, and in which group it is reduced."""

    mark: Node
    users: list[Node]
    mean: Mean | None
    group: str


@dataclass(frozen=True, slots=True, eq=False)
class _Factored:
    """One gradient on its way.

    total    this trainer's share and what it had not sent, as a matrix
    started  the reduction of the left factors
    """

    name: str
    way: _Way
    total: Node
    started: Node


@dataclass(frozen=True, slots=True, eq=False)
class _Turned:
    """Its left factor of all trainers, orthonormal; this trainer's own right one, and the reduction of these."""

    left: Node
    own: Node
    sent: Node


def _in_time(begun: list[_Factored]) -> list[list[_Factored]]:
    """Those of which all start before the first of them is read."""
    groups: list[list[_Factored]] = []
    for one in begun:
        if groups and all(one.started < user for other in groups[-1] for user in other.way.users):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _begin(program: Program, name: str, way: _Way, rank: int, known: Inference) -> tuple[Program, _Factored]:
    graph, mark, mean = program.graph, way.mark, way.mean
    val = mark.meta["val"]
    shape = [val.shape[0], _columns(tuple(val.shape))]
    residual = Variable(residual_name(name), Role.STATE, tuple(shape), val.dtype, name, initial=0.0)
    factor = Variable(f"{name}.factor", Role.STATE, (shape[1], rank), val.dtype, name, initial=0.0)
    program, left_out = read_variable(program, residual, val.new_empty(shape))
    program, kept = read_variable(program, factor, val.new_empty(factor.shape))
    program = replace(program, variables={**program.variables, residual.name: residual, factor.name: factor})
    point = graph.create_node("call_function", aten.zeros.default, ([0],))
    mark.append(point)
    with graph.inserting_before(point):
        sent = mark if mean is None else known.call(graph, aten.mul.Tensor, mark, mean.share)
        total = known.call(graph, aten.add.Tensor, known.call(graph, aten.view.default, sent, shape), left_out)
        left = known.call(graph, aten.mm.default, total, _warm(kept, known))
        started = known.call(graph, ops.all_reduce, left, f"{name}.grad.{FIRST}", *in_group(way.group))
    graph.erase_node(point)
    return program, _Factored(name, way, total, started)


def _warm(kept: Node, known: Inference) -> Node:
    """The right factor of the step before; in the first step fixed numbers, the same on all trainers."""
    graph, val = kept.graph, kept.meta["val"]
    places = known.call(graph, aten.arange.default, val.numel(), dtype=val.dtype)
    drawn = known.call(graph, aten.sin.default, known.call(graph, aten.mul.Tensor, places, 12.9898))
    first = known.call(graph, aten.view.default, drawn, list(val.shape))
    is_new = known.call(
        graph, aten.eq.Scalar, known.call(graph, aten.amax.default, known.call(graph, aten.abs.default, kept)), 0
    )
    return known.call(graph, aten.where.self, is_new, first, kept)


def _turn(one: _Factored, last: Node, known: Inference) -> _Turned:
    """Behind the last left factor that starts: this one is there, and the right one starts."""
    graph = one.total.graph
    point = graph.create_node("call_function", aten.zeros.default, ([0],))
    last.append(point)
    with graph.inserting_before(point):
        summed = known.call(graph, ops.wait, one.started, one.started.args[1])
        left = known.call(graph, getitem, known.call(graph, aten.linalg_qr.default, summed), 0)
        own = known.call(graph, aten.mm.default, known.call(graph, aten.t.default, one.total), left)
        sent = known.call(graph, ops.all_reduce, own, f"{one.name}.grad.{SECOND}", *in_group(one.way.group))
    graph.erase_node(point)
    return _Turned(left, own, sent)


def _end(program: Program, one: _Factored, turned: _Turned, known: Inference) -> Program:
    graph, way = program.graph, one.way
    with before_first_use(way.users):
        right = known.call(graph, ops.wait, turned.sent, turned.sent.args[1])
        matrix = known.call(graph, aten.mm.default, turned.left, known.call(graph, aten.t.default, right))
        summed = known.call(graph, aten.view.default, matrix, list(way.mark.meta["val"].shape))
        reduced = averaged(summed, way.mark, way.mean, known)
    for user in way.users:
        user.replace_input_with(way.mark, reduced)
    with behind(turned.own):
        back = known.call(graph, aten.t.default, turned.own)
    with behind(back):
        approximate = known.call(graph, aten.mm.default, turned.left, back)
    with behind(approximate):
        kept = known.call(graph, aten.sub.Tensor, one.total, approximate)
    set_results(program, {**program.results, residual_name(one.name): kept, f"{one.name}.factor": right})
    return program
