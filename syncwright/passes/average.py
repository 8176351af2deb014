"""The weighted mean over trainers: of gradients, and of what a step returns and writes beside parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.errors import LoweringError
from syncwright.meaning import find_marks, followed
from syncwright.passes.compress import compressed
from syncwright.passes.insert import (
    CALL,
    CALL_TOTAL,
    KEPT,
    SAME,
    TOTAL,
    WEIGHT,
    before_first_use,
    behind,
    first_call,
    read_first,
    read_share,
    read_weight,
    weight_of_call,
)
from syncwright.place import Server, put
from syncwright.plan import AllReduce, Collective, ParameterServer, Plan
from syncwright.plan.compression import Compression
from syncwright.program import Program, Role, Variable, set_results
from syncwright.shapes import Inference, call, is_host, mode_of

aten = torch.ops.aten


def average_gradients(program: Program, plan: Plan) -> Program:
    """Reduces the gradients of replicated parameters where they are complete.

    before  %g = gradient(%mm, "w"), %new = sub(w, %g)
    after   %g = gradient(%mm, "w"), %a = all_reduce(mul(%g, share), "w.grad"), %m = div(wait(%a), %total), %new = sub(w, %m)

    A gradient is scaled by weight / trainers before the sum; the sum is divided by the sum of these weights, which is
    exactly 1 for equal batches (then the result is DDP's, bit for bit).
    """
    chosen = {s.variable: s.sync for s in plan.sharings if isinstance(s.sync, AllReduce)}
    if plan.trainers == 1 or not chosen:
        return program
    program = program.edit()
    written = program.results
    factored = {name for name, sync in chosen.items() if f"{name}.factor" in written and sync.compress is not None}
    gathered = {str(n.args[1]) for n in program.graph.find_nodes(op="call_function", target=ops.gather_parts)}
    marks = {
        name: mark
        for name, mark in find_marks(program).items()
        if name in chosen and name in written and name not in factored and f"{name}.grad" not in gathered
    }
    known, mean = Inference(mode_of(program.graph)), None
    if any(chosen[name].reduce == "mean" for name in marks):
        program, mean = read_mean(program, plan)
    for name, mark in marks.items():
        used = mean if chosen[name].reduce == "mean" else None
        program = _average(program, mark, name, used, chosen[name].compress, known)
    return program


def average_values(program: Program, plan: Plan) -> Program:
    """Reduces what the step returns and the buffers that it writes, by collective or, without any, at the reducer.

    before  output({"loss": %loss, "bn.running_mean": %m})
    after   output({"loss": div(wait(all_reduce(mul(%loss, share)))), %total), "bn.running_mean": ...})

    Returned: float scalars by weighted mean, integer scalars by sum; tensors along the batch axis stay local.
    Buffers: as the plan's policy says.
    """
    if plan.trainers == 1 or not communicates(plan):
        return program
    program = program.edit()
    policies, follows = dict(plan.buffers), followed(program)
    for name, node in program.results.items():
        variable = program.variables[name]
        if variable.role is Role.OUTPUT:
            program = _returned(program, plan, variable, node)
        elif variable.role is Role.BUFFER and name not in follows and SAME not in node.meta:
            program = _buffer(program, plan, name, node, policies.get(name, "mean"))
    return program


def communicates(plan: Plan) -> bool:
    """Whether trainers keep step with each other: where all updates are asynchronous there is no step to average over."""
    return any(
        isinstance(s.sync, Collective) or (isinstance(s.sync, ParameterServer) and s.sync.in_step)
        for s in plan.sharings
    )


def by_collective(plan: Plan) -> bool:
    """Whether values travel by all-reduce, as gradients do among trainers; else through the reducer."""
    return any(isinstance(s.sync, Collective) for s in plan.sharings)


def is_local(variable: Variable) -> bool:
    """A tensor along the batch axis."""
    return variable.along == "batch"


def _returned(program: Program, plan: Plan, variable: Variable, node: Node) -> Program:
    if is_local(variable):
        return program
    if variable.along == "unknown":
        raise LoweringError(
            f"the step returns '{variable.name}' of shape {list(variable.shape)}, whose leading size is the batch's; it cannot "
            "be told whether it has a value per example, as the step does not run on twice as many. Expected a step that "
            "runs on batches of any size. Return scalars, or give the batch another size than what else is as long."
        )
    if variable.shape or variable.dtype is torch.bool or variable.dtype.is_complex:
        raise LoweringError(
            f"the step returns '{variable.name}' of shape {list(variable.shape)} and {variable.dtype}; expected float "
            "scalars (averaged over trainers), integer scalars (summed), or tensors along the batch axis (kept local). "
            "Return its mean, or compute it from gathered outputs in trainer.evaluate."
        )
    if is_host(node.meta["val"]):
        with behind(node):
            node = call(program.graph, mode_of(program.graph), aten.scalar_tensor.default, node, dtype=torch.float64)
    how = "mean" if variable.dtype.is_floating_point else "sum"
    return _rewrite_result(program, plan, variable.name, node, how)


def _buffer(program: Program, plan: Plan, name: str, node: Node, policy: str) -> Program:
    if policy == "local":
        return program
    if policy == "mean":
        return _rewrite_result(program, plan, name, node, "mean")
    program, first = read_first(program)
    with behind(node):
        node = call(program.graph, mode_of(program.graph), aten.mul.Tensor, node, first)
    node.meta[KEPT] = name
    return _rewrite_result(program, plan, name, node, "sum")


def _rewrite_result(program: Program, plan: Plan, name: str, node: Node, how: str) -> Program:
    """The result `name` becomes the reduced `node`."""
    if by_collective(plan):
        mean = None
        if how == "mean":
            program, mean = read_mean(program, plan, weight_of_call(plan))
        known = Inference(mode_of(program.graph))
        reduced = _reduced(program, node, name, mean, [program.output], known)
    else:
        program, reduced = _through_reducer(program, plan, node, name, how)
    set_results(program, {**program.results, name: reduced})
    return program


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """What makes a sum a weighted mean: this trainer's share of it, and the reduced total of all shares."""

    share: Node
    total: Node


def _average(
    program: Program, mark: Node, parameter: str, mean: Mean | None, by: Compression | None, known: Inference
) -> Program:
    users = list(mark.users)
    if not users:
        return program
    sent = scaled(mark, mean, known)
    program, sent = compressed(program, sent, parameter, by, known)
    reduced = _summed(program, mark, sent, f"{parameter}.grad", mean, users, known)
    for user in users:
        user.replace_input_with(mark, reduced)
    return program


def _reduced(program: Program, node: Node, channel: str, mean: Mean | None, users: list[Node], known) -> Node:
    return _summed(program, node, scaled(node, mean, known), channel, mean, users, known)


def scaled(node: Node, mean: Mean | None, known: Inference) -> Node:
    """A trainer's share of a mean, behind its contribution."""
    if mean is None:
        return node
    with behind(node):
        return known.call(node.graph, aten.mul.Tensor, node, mean.share)


def averaged(summed: Node, node: Node, mean: Mean | None, known: Inference) -> Node:
    """The mean that a sum of shares is of, in the type of one contribution, at the insertion point."""
    found = _as(summed, node, known)  # it may have travelled in another
    if mean is None:
        return found
    divided = known.call(node.graph, aten.div.Tensor, found, mean.total)
    found = _as(divided, node, known)  # a 0-d half divided by a 0-d float
    wait_before(mean, divided)
    return found


def _as(value: Node, node: Node, known: Inference) -> Node:
    dtype = node.meta["val"].dtype
    if value.meta["val"].dtype is dtype:
        return value
    return known.call(node.graph, aten._to_copy.default, value, dtype=dtype)


def _summed(
    program: Program, node: Node, started: Node, channel: str, mean: Mean | None, users: list[Node], known: Inference
) -> Node:
    """The reduced value of what is sent for `node`."""
    graph = program.graph
    with behind(started):
        started = known.call(graph, ops.all_reduce, started, channel)
    with before_first_use(users):
        return averaged(known.call(graph, ops.wait, started, channel), node, mean, known)


def _through_reducer(program: Program, plan: Plan, node: Node, name: str, how: str) -> tuple[Program, Node]:
    mode, sent = mode_of(program.graph), node
    if how == "mean":
        program, weight = read_weight(program, weight_of_call(plan))
        with behind(node):
            sent = call(program.graph, mode, aten.mul.Tensor, node, read_share(weight, plan.trainers))
    with behind(sent):
        merged = call(program.graph, mode, ops.push_merged, sent, name, how)
    put(merged, Server(plan.reducer or 0))
    with program.graph.inserting_before(program.output):
        return program, call(program.graph, mode, ops.pull_value, merged, name)


def read_mean(program: Program, plan: Plan, of: str = WEIGHT) -> tuple[Program, Mean]:
    """The trainers' weights and their sum / trainers, as a tensor; reduced once, with the first value that is."""
    program, weight = read_weight(program, of)
    graph, mode, channel = program.graph, mode_of(program.graph), CALL_TOTAL if of == CALL else TOTAL
    known = next((n for n in graph.find_nodes(op="call_function", target=ops.wait) if n.args[1] == channel), None)
    if known is not None:
        return program, Mean(read_share(weight, plan.trainers), next(iter(known.users)))
    wide = any(v.dtype is torch.float64 for v in program.of_role(Role.PARAM))
    with graph.inserting_before(first_call(graph)):
        own = call(graph, mode, aten.scalar_tensor.default, weight, dtype=torch.float64 if wide else torch.float32)
        started = call(graph, mode, ops.all_reduce, own, channel)
    with graph.inserting_before(graph.output_node()):
        summed = call(graph, mode, ops.wait, started, channel)
        total = call(graph, mode, aten.div.Tensor, summed, plan.trainers)
        if of == weight_of_call(plan):
            total.meta[TOTAL] = True
    return program, Mean(read_share(weight, plan.trainers), total)


def wait_before(mean: Mean, user: Node) -> None:
    """The wait for the weights stands where it is first needed."""
    if user < mean.total:
        user.prepend(mean.total.args[0])  # type: ignore[arg-type]
        user.prepend(mean.total)
