"""Gradients of which trainers gather from each other what a compression has made of them: its sum cannot be made on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.errors import LoweringError
from syncwright.meaning import find_marks
from syncwright.passes.average import Mean, averaged, read_mean, scaled
from syncwright.passes.compress import residual_name
from syncwright.passes.insert import before_first_use, item, read_variable
from syncwright.plan import AllReduce, Int8, Plan, TopK
from syncwright.plan.compression import Compression, gathered_as
from syncwright.program import Program, Role, Variable, set_results
from syncwright.shapes import Inference, mode_of
from syncwright.typed import tag

aten = torch.ops.aten
_MOST = 2**31
"""Elements of which a place is known by 32 bits."""
_LEVELS = 127


def gather_compressed(program: Program, plan: Plan) -> Program:
    """Gathers the largest elements of gradients (Deep Gradient Compression, Lin et al., ICLR 2018), or gradients that are rounded
    to 8 bits (block-wise, Dettmers et al., ICLR 2022).

    before  %g = gradient(%mm, "w"), %new = sub(w, %g)                                                          (w is f32[2,2])
    after   (top_k: 0.5) %t = reshape(add(w.residual, mul(%g, share)), [4]), %p = largest(%t, 2),
            %a = gather_parts([index_select(%t, %p), %p], "w.grad", 2), %r = wait_whole(%a, [4, 4], [f32, i32]),
            %s = add_elements(%r[0], %r[1], 2, 4), %new = sub(w, div(view(%s), %total)),
            output({"w": %new, "w.residual": view(index_fill(%t, %p, 0))})
    after   (int8) %t = view(mul(%g, share), [1, 4]), %s = div(amax(abs(%t), 1), 127), %q = to_copy(round(div(%t, %s)), i8),
            %a = gather_parts([%q, %s], "w.grad", 2), %r = wait_whole(%a, [8, 2], [i8, f32]),
            %m = sum(mul(view(%r[0], [2, 1, 4]), view(%r[1], [2, 1, 1])), 0), %new = sub(w, div(view(%m), %total))

    The largest of [4, 1, -3, 2] are 4 and -3, at [0, 2]; [0, 1, 0, 2] is kept. With a momentum of 0.9, %t is made of w.residual
    and %u = add(mul(w.velocity, 0.9), mul(%g, share)), and output({"w.velocity": view(index_fill(%u, %p, 0))}).
    """
    wanted = _wanted(program, plan)
    if plan.trainers == 1 or not wanted:
        return program
    program, mean = program.edit(), None
    marks = {n: mark for n, mark in find_marks(program).items() if n in wanted and n in program.writes and mark.users}
    if any(wanted[name].reduce == "mean" for name in marks):
        program, mean = read_mean(program, plan)
    known = Inference(mode_of(program.graph))
    for name, mark in marks.items():
        own = mean if wanted[name].reduce == "mean" else None
        program = _gather(program, _Gradient(name, mark, own, wanted[name].compress), plan.trainers, known)
    return program


def _wanted(program: Program, plan: Plan) -> Mapping[str, AllReduce]:
    """What of a plan is this pass's: but for variables of no elements, of which there is nothing to send."""
    chosen = {s.variable: s.sync for s in plan.sharings if isinstance(s.sync, AllReduce)}
    variables, found = program.variables, {}
    for name, sync in chosen.items():
        by = gathered_as(sync.compress)
        if by is not None and variables[name].numel:
            _check(variables[name], by, [v for v in program.of_role(Role.STATE) if v.of == name and v.initial is None])
            found[name] = sync
    return found


def _check(variable: Variable, by: TopK | Int8, state: Sequence[Variable]) -> None:
    """Raises LoweringError for what cannot be compressed so. A step count is no state here."""
    kept = [each for each in state if each.shape or not variable.shape]
    if isinstance(by, TopK) and by.momentum and kept:
        raise LoweringError(
            f"'{variable.name}' is compressed by top_k with momentum: {by.momentum:g}, and its optimizer keeps '{kept[0].name}'; "
            "expected plain SGD, whose momentum top_k takes over. Give the optimizer no momentum, or leave momentum out of top_k."
        )
    if not variable.dtype.is_floating_point or variable.numel > _MOST:
        raise LoweringError(
            f"'{variable.name}' is compressed by {tag(type(by))} and has {variable.numel} elements of {variable.dtype}; expected "
            f"floating-point numbers, at most {_MOST} of them, so that places are of 32 bits. Leave compress out for it."
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Gradient:
    """One gradient, and how it is reduced."""

    name: str
    mark: Node
    mean: Mean | None
    compress: Compression | None

    @property
    def by(self) -> TopK | Int8:
        found = gathered_as(self.compress)
        assert found is not None, "looked at before"
        return found

    @property
    def kept(self) -> list[str]:
        """Under which names a trainer keeps what it has not sent, and of what that is made."""
        if isinstance(self.compress, Int8):
            return []
        moving = isinstance(self.by, TopK) and self.by.momentum > 0
        return [residual_name(self.name), *([f"{self.name}.velocity"] if moving else [])]

    @property
    def numel(self) -> int:
        return self.mark.meta["val"].numel()


def _gather(program: Program, one: _Gradient, trainers: int, known: Inference) -> Program:
    graph, val, users, left = program.graph, one.mark.meta["val"], list(one.mark.users), []
    for name in one.kept:
        state = Variable(name, Role.STATE, tuple(val.shape), val.dtype, one.name, initial=0.0)
        program, old = read_variable(program, state, val.new_empty(val.shape))
        left.append(old)
    sent = scaled(one.mark, one.mean, known)
    point = graph.create_node("call_function", aten.zeros.default, ([0],))
    sent.append(point)
    with graph.inserting_before(point):
        if len(left) > 1:
            old = known.call(graph, aten.mul.Tensor, left[1], one.by.momentum)  # type: ignore[union-attr]
            sent = known.call(graph, aten.add.Tensor, old, sent)
        total = known.call(graph, aten.add.Tensor, left[0], sent) if left else sent
        parts = _largest(total, one.by, known) if isinstance(one.by, TopK) else _rounded(total, one.by, known)
        started = known.call(graph, ops.gather_parts, parts, f"{one.name}.grad", trainers)
        rests = _rests([total, sent][: len(left)], parts, one.by, known)
    graph.erase_node(point)
    with before_first_use(users):
        summed = _summed(_waited(started, parts, trainers, known), one, trainers, known)
        reduced = averaged(known.call(graph, aten.view.default, summed, list(val.shape)), one.mark, one.mean, known)
    for user in users:
        user.replace_input_with(one.mark, reduced)
    set_results(program, {**program.results, **dict(zip(one.kept, rests, strict=True))})
    return program


def _largest(total: Node, by: TopK, known: Inference) -> list[Node]:
    """The values of the elements that are sent, and their places."""
    graph, numel = total.graph, total.meta["val"].numel()
    flat = known.call(graph, aten.reshape.default, total, [numel])
    places = known.call(graph, ops.largest, flat, max(1, round(by.ratio * numel)))
    return [known.call(graph, aten.index_select.default, flat, 0, places), places]


def _rounded(total: Node, by: Int8, known: Inference) -> list[Node]:
    """Blocks in steps of a 127th of what is the largest magnitude in each, and these steps; zeros fill the last block."""
    graph, numel = total.graph, total.meta["val"].numel()
    blocks, width = _blocks(numel, by)
    flat = known.call(graph, aten.reshape.default, total, [numel])
    if blocks * width > numel:
        flat = known.call(graph, aten.constant_pad_nd.default, flat, [0, blocks * width - numel])
    rows = known.call(graph, aten.view.default, flat, [blocks, width])
    most = known.call(graph, aten.amax.default, known.call(graph, aten.abs.default, rows), [1], True)
    steps = known.call(graph, aten.div.Tensor, most, _LEVELS)
    empty = known.call(graph, aten.eq.Scalar, steps, 0)
    divisors = known.call(graph, aten.where.ScalarSelf, empty, 1.0, steps)
    counts = known.call(graph, aten.round.default, known.call(graph, aten.div.Tensor, rows, divisors))
    return [known.call(graph, aten._to_copy.default, counts, dtype=torch.int8), steps]


def _blocks(numel: int, by: Int8) -> tuple[int, int]:
    """How many blocks of how many elements."""
    width = min(by.block, max(1, numel))
    return -(-numel // width), width


def _rests(values: Sequence[Node], parts: Sequence[Node], by: TopK | Int8, known: Inference) -> list[Node]:
    """What is left of values: zeros where elements have been sent; what rounding has left out."""
    if not values:
        return []
    graph, val = values[0].graph, values[0].meta["val"]
    if isinstance(by, Int8):
        sent = known.call(
            graph, aten.view.default, _flat(_worth(parts[0], parts[1], known), val.numel(), known), list(val.shape)
        )
        return [known.call(graph, aten.sub.Tensor, value, sent) for value in values]
    places, found = known.call(graph, aten._to_copy.default, parts[1], dtype=torch.int64), []
    for value in values:
        flat = known.call(graph, aten.reshape.default, value, [val.numel()])
        left = known.call(graph, aten.index_fill.int_Scalar, flat, 0, places, 0.0)
        found.append(known.call(graph, aten.view.default, left, list(val.shape)))
    return found


def _worth(counts: Node, steps: Node, known: Inference) -> Node:
    """What so many steps make."""
    wide = known.call(counts.graph, aten._to_copy.default, counts, dtype=steps.meta["val"].dtype)
    return known.call(counts.graph, aten.mul.Tensor, wide, steps)


def _flat(rows: Node, numel: int, known: Inference) -> Node:
    """So many elements, without what fills the last block."""
    flat = known.call(rows.graph, aten.reshape.default, rows, [rows.meta["val"].numel()])
    return known.call(rows.graph, aten.slice.Tensor, flat, 0, 0, numel) if flat.meta["val"].numel() > numel else flat


def _waited(started: Node, parts: Sequence[Node], trainers: int, known: Inference) -> list[Node]:
    """What all trainers have sent, one behind another, of each kind."""
    vals = [part.meta["val"] for part in parts]
    sizes, dtypes = [trainers * val.numel() for val in vals], [str(val.dtype).removeprefix("torch.") for val in vals]
    waited = known.call(started.graph, ops.wait_whole, started, started.args[1], sizes, dtypes)
    return [item(waited, index) for index, _ in enumerate(vals)]


def _summed(found: Sequence[Node], one: _Gradient, trainers: int, known: Inference) -> Node:
    """The sum of what all trainers have sent, flat."""
    graph = found[0].graph
    if isinstance(one.by, TopK):
        return known.call(graph, ops.add_elements, *found, trainers, one.numel)
    blocks, width = _blocks(one.numel, one.by)
    counts = known.call(graph, aten.view.default, found[0], [trainers, blocks, width])
    steps = known.call(graph, aten.view.default, found[1], [trainers, blocks, 1])
    return _flat(known.call(graph, aten.sum.dim_IntList, _worth(counts, steps, known), [0]), one.numel, known)
