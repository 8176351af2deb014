"""The weighted mean over trainers: of gradients, and of what a step returns and writes beside parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from operator import getitem

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
    in_group,
    read_first,
    read_share,
    read_size,
    read_weight,
    weight_of_call,
)
from syncwright.place import Server, put
from syncwright.plan import ALL, BY_NODE, AllReduce, Collective, ParameterServer, Plan, Shard
from syncwright.program import Program, Role, Variable, set_results
from syncwright.shapes import Inference, call, is_host, mode_of

aten = torch.ops.aten
PIECE = " piece "
"""Of a channel by which one piece of a gradient travels."""


def average_gradients(program: Program, plan: Plan) -> Program:
    """Reduces the gradients of replicated parameters where they are complete.

    before  %g = gradient(%mm, "w"), %new = sub(w, %g)
    after   %g = gradient(%mm, "w"), %a = all_reduce(mul(%g, share), "w.grad"), %m = div(wait(%a), %total), %new = sub(w, %m)

    A gradient is scaled by weight / trainers before the sum; the sum is divided by the sum of these weights, which is
    exactly 1 for equal batches (then the result is DDP's, bit for bit). Trainers, and their weights, are those of the
    variable's group.
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
    known = Inference(mode_of(program.graph))
    program, means = read_means(program, plan, {name: chosen[name] for name in marks})
    for name, mark in marks.items():
        value = _Value(mark, list(mark.users), means.get(name), plan.groups.of(chosen[name]))
        program = _average(program, value, name, chosen[name], known)
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
            program, mean = read_mean(program, plan, of=weight_of_call(plan))
        known = Inference(mode_of(program.graph))
        value = _Value(node, [program.output], mean)
        reduced = _summed(value, scaled(node, mean, known), name, known)
    else:
        program, reduced = _through_reducer(program, plan, node, name, how)
    set_results(program, {**program.results, name: reduced})
    return program


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """What makes a sum a weighted mean: this trainer's share of it, and the reduced total of all shares."""

    share: Node
    total: Node


@dataclass(frozen=True, slots=True, eq=False)
class _Value:
    """What is reduced for its users, and in which group."""

    node: Node
    users: list[Node]
    mean: Mean | None
    group: str = ALL


def _average(program: Program, value: _Value, parameter: str, sync: AllReduce, known: Inference) -> Program:
    if not value.users:
        return program
    sent = scaled(value.node, value.mean, known)
    program, sent = compressed(program, sent, parameter, sync.compress, known)
    rows = rows_of_pieces(sent.meta["val"], sync.piece_mb)
    summed = _summed if len(rows) == 1 else partial(_summed_in_pieces, rows)
    reduced = summed(value, sent, f"{parameter}.grad", known)
    for user in value.users:
        user.replace_input_with(value.node, reduced)
    return program


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


def _summed(value: _Value, sent: Node, channel: str, known: Inference) -> Node:
    """The reduced value, of what is sent for it."""
    graph = sent.graph
    with behind(sent):
        started = known.call(graph, ops.all_reduce, sent, channel, *in_group(value.group))
    with before_first_use(value.users):
        return averaged(known.call(graph, ops.wait, started, channel), value.node, value.mean, known)


def _summed_in_pieces(rows: list[int], value: _Value, sent: Node, channel: str, known: Inference) -> Node:
    """Like `_summed`, each so many rows by themselves."""
    graph, works = sent.graph, list[Node]()
    with behind(sent):
        point = graph.call_function(aten.zeros.default, ([0],))
    with graph.inserting_before(point):
        cut = known.call(graph, aten.split_with_sizes.default, sent, rows)
        for index, _ in enumerate(rows):
            piece = known.call(graph, getitem, cut, index)
            works.append(known.call(graph, ops.all_reduce, piece, f"{channel}{PIECE}{index}", *in_group(value.group)))
    graph.erase_node(point)
    with before_first_use(value.users):
        pieces = [known.call(graph, ops.wait, work, work.args[1]) for work in works]
        return averaged(known.call(graph, aten.cat.default, pieces), value.node, value.mean, known)


def rows_of_pieces(val: torch.Tensor, piece_mb: float | None) -> list[int]:
    """How many rows each piece of a gradient has; one piece where it is no larger.

    (10, 4) of f32, 16 bytes a row, in pieces of at most 64 bytes  ->  [4, 3, 3]
    """
    if piece_mb is None or val.dim() == 0 or val.nbytes <= piece_mb * 2**20:
        return [val.shape[0] if val.dim() else 1]
    rows = max(1, int(piece_mb * 2**20 * val.shape[0] // val.nbytes))
    least, larger = divmod(val.shape[0], count := -(-val.shape[0] // rows))
    return [least + (index < larger) for index in range(count)]


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


def read_means(program: Program, plan: Plan, syncs: Mapping[str, AllReduce | Shard]) -> tuple[Program, dict[str, Mean]]:
    """What makes a mean of each variable's gradient, of those that have one, over the trainers of its group."""
    means: dict[str, Mean] = {}
    groups = {name: plan.groups.of(sync) for name, sync in syncs.items() if sync.reduce == "mean"}
    for group in dict.fromkeys(groups.values()):
        program, mean = read_mean(program, plan, ALL if group == BY_NODE else group)
        means |= {name: mean for name, its in groups.items() if its == group}
    return program, means


def read_mean(program: Program, plan: Plan, group: str = ALL, of: str = WEIGHT) -> tuple[Program, Mean]:
    """The weights of a group's trainers and their sum / trainers, as a tensor; reduced once, with the first value that is."""
    program, weight = read_weight(program, of)
    program, size = read_size(program, plan.groups, group)
    graph, mode = program.graph, mode_of(program.graph)
    channel = f"{CALL_TOTAL if of == CALL else TOTAL} {group}".strip()
    known = next((n for n in graph.find_nodes(op="call_function", target=ops.wait) if n.args[1] == channel), None)
    if known is not None:
        return program, Mean(read_share(weight, size), next(iter(known.users)))
    wide = any(v.dtype is torch.float64 for v in program.of_role(Role.PARAM))
    with graph.inserting_before(first_call(graph)):
        own = call(graph, mode, aten.scalar_tensor.default, weight, dtype=torch.float64 if wide else torch.float32)
        started = call(graph, mode, ops.all_reduce, own, channel, *in_group(group))
    with graph.inserting_before(graph.output_node()):
        summed = call(graph, mode, ops.wait, started, channel)
        total = call(graph, mode, aten.div.Tensor, summed, size)
        if of == weight_of_call(plan):
            total.meta[TOTAL] = group
    return program, Mean(read_share(weight, size), total)


def wait_before(mean: Mean, user: Node) -> None:
    """The wait for the weights stands where it is first needed."""
    if user < mean.total:
        user.prepend(mean.total.args[0])  # type: ignore[arg-type]
        user.prepend(mean.total)
