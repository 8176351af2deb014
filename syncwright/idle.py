"""The program of a trainer whose part of a batch is empty: it takes part in every communication, with nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.passes.insert import KEPT, SUMMED, TOTAL, made_of, read_first, read_variable
from syncwright.plan import ALL
from syncwright.program import Program, Role, Variable, set_results
from syncwright.schema import argument
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten


def idle(program: Program) -> Program:
    """A lowered trainer program without its forward and backward.

    before  %c = cat([%weight, %loss, %g]), %a = all_reduce(%c, "bucket.0"), ..., %n = norm(%m), %t = push(%n, "global.n")
    after   %z = zeros([11]), %c = cat([%weight, %z]), %a = all_reduce(%c, "bucket.0"), ..., %t = push(%n, "global.n")

    The mean over no examples is NaN, and 0 x NaN is NaN: so such a trainer does not run its step, but contributes
    zeros of weight 0 to each communication of the step's static list, in the same order; what trainers of one host pull
    together it pulls with them. What is not made from its
    own batch (a norm of reduced gradients) it sends as everybody does. A buffer that is trainer 0's stays as
    it was where trainer 0 has nothing: its contribution is the old value. What it has added up in calls before it goes on.

    It also writes the reduced total of all weights, where there is one: 0 where no trainer has an example. What is made with the
    total of a group stays as it was where this is 0, and so does the state of what no gradient has come for.
    """
    program, tainted = _silence(program.edit())
    alone = {name for name, n in program.results.items() if n in tainted and program.variables[name].role is Role.PARAM}
    left = [n for n in program.results if program.variables[n].of in alone and program.variables[n].role is Role.STATE]
    results = {name: n for name, n in program.results.items() if n not in tainted and name not in left}
    totals = {str(n.meta[TOTAL]): n for n in program.graph.nodes if TOTAL in n.meta}
    for total in [total for group, total in totals.items() if group]:
        program, results = _kept_without(program, results, total)
    total = totals.get(ALL)
    if total is not None:
        results[TOTAL] = total
        program = replace(program, variables={**program.variables, TOTAL: _total(total)})
    set_results(program, results)
    remove_dead(program.graph, kept=_is_common)
    for node in program.placeholders.values():
        if not node.users:
            program.graph.erase_node(node)
    named = {*program.reads, *program.writes}
    return Program(program.graph, {n: v for n, v in program.variables.items() if n in named}, ())


def _is_common(node: Node) -> bool:
    """Whether others rely on it that each trainer does this."""
    shared = node.target is ops.pull and bool(argument(node, "on_host"))
    return shared or node.target in {*ops.SENDS, *ops.WAITS, ops.wait_before}


def _kept_without(program: Program, results: dict[str, Node], total: Node) -> tuple[Program, dict[str, Node]]:
    """Parameters of a group, and their state, stay as they are where its total is 0; their gradients are zeros then."""
    graph, known, variables = program.graph, Inference(mode_of(program.graph)), program.variables
    updated = {n for n in results if variables[n].role is Role.PARAM and total in made_of([results[n]])}
    with graph.inserting_after(total):
        there = known.call(graph, aten.gt.Scalar, total, 0)
    with graph.inserting_after(there):
        divisor = known.call(graph, aten.where.ScalarOther, there, total, 1.0)
    total.replace_all_uses_with(divisor, lambda user: user not in (there, divisor))
    for name in [n for n in results if n in updated or variables[n].of in updated]:
        program, old = read_variable(program, variables[name], results[name].meta["val"])
        with graph.inserting_before(program.output):
            results[name] = known.call(graph, aten.where.self, there, results[name], old)
    return program, results


def _total(node: Node) -> Variable:
    return Variable(TOTAL, Role.GLOBAL, (), node.meta["val"].dtype)


def _silence(program: Program) -> tuple[Program, set[Node]]:
    """Sends nothing in place of all that is made from a batch; what else is made from it."""
    tainted: set[Node] = set()
    known = Inference(mode_of(program.graph))
    for node in list(program.graph.nodes):
        if node.target in ops.SENDS:
            sources = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
            for source in [each for each in sources if each in tainted]:
                with program.graph.inserting_before(node):
                    program, nothing = _nothing(program, source, tainted, known)  # type: ignore[arg-type]
                node.replace_input_with(source, nothing)  # type: ignore[arg-type]
            if node.target in ops.STARTS_ROWS:
                with program.graph.inserting_before(node):
                    none = known.call(program.graph, aten.full.default, [0], 0, dtype=torch.int64)
                node.update_arg(2, none)
        elif SUMMED in node.meta and any(source in tainted for source in node.all_input_nodes):
            node.replace_all_uses_with(program.placeholders[node.meta[SUMMED]])
        elif _is_own(program, node) or any(source in tainted for source in node.all_input_nodes):
            tainted.add(node)
    return program, tainted


def _is_own(program: Program, node: Node) -> bool:
    """A batch input, or trainer 0's contribution to a buffer."""
    if node.op == "placeholder":
        return program.variables[node.meta["variable"]].role is Role.INPUT
    return KEPT in node.meta


def _nothing(program: Program, sent: Node, tainted: set[Node], known: Inference) -> tuple[Program, Node]:
    """What stands for `sent`, which is made from a batch; of a bucket, only the members that are."""
    graph, val = program.graph, sent.meta["val"]
    if sent.target is aten.reshape.default and KEPT in sent.args[0].meta:  # type: ignore[union-attr]
        program, old = _nothing(program, sent.args[0], tainted, known)  # type: ignore[arg-type]
        return program, known.call(graph, aten.reshape.default, old, *sent.args[1:])
    if KEPT in sent.meta:
        name = sent.meta[KEPT]
        program, old = read_variable(program, program.variables[name], val)
        program, first = read_first(program)
        return program, known.call(graph, aten.mul.Tensor, old, first)
    if sent.target is not aten.cat.default or val.dim() != 1:
        return program, known.call(graph, aten.zeros.default, list(val.shape), dtype=val.dtype)
    parts: list[Node] = []
    for kind, members in groupby(sent.args[0], key=lambda member: _kind(member, tainted)):  # type: ignore[arg-type]
        run = list(members)
        if kind == "silent":
            size = sum(member.meta["val"].numel() for member in run)
            run = [known.call(graph, aten.zeros.default, [size], dtype=val.dtype)]
        for member in run:
            if kind == "kept":
                program, member = _nothing(program, member, tainted, known)
            parts.append(member)
    return program, parts[0] if len(parts) == 1 else known.call(graph, aten.cat.default, parts)


def _kind(member: Node, tainted: set[Node]) -> str:
    if member not in tainted:
        return "shared"
    return "kept" if any(KEPT in n.meta for n in (member, *member.all_input_nodes)) else "silent"
