"""Updates that are the same for many parameters run once, over one flat buffer that is also their bucket."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch.fx import Node

from syncwright.dead import remove_dead
from syncwright.passes.alike import Member, bucket_of, members, pick_of, runs
from syncwright.passes.flat import ALIGNMENT_NBYTES, join_updates, laid_out, own_layout, padded, view_of, zeros
from syncwright.plan import Plan
from syncwright.program import Program
from syncwright.shapes import Inference, call, mode_of

aten = torch.ops.aten


def flatten(program: Program, plan: Plan) -> Program:
    """Joins the updates of parameters that share one bucket, one dtype and one update program.

    before  %s = split(%w, [1000, 10]), %a = sub(fc.weight, mul(view(%s0), lr)), %b = sub(fc.bias, mul(view(%s1), lr))
    after   flat.0 = placeholder, fc.weight is view(slice(flat.0, 0, 1000)), ...
            %n = sub(flat.0, mul(slice(%w, 0, 1034), lr)), output({"flat.0": %n})

    The variables that a flat one stands for stay in `variables`, with `whole` and `part`. Parts begin at multiples of 64
    bytes. Results are the same, bit for bit. Only compiled programs gain (interpreted, flat is slower).
    """
    program = program.edit()
    joined = [run for run in runs(members(program)) if len(run) > 1 and _is_together(run)]
    known = Inference(mode_of(program.graph))
    for index, run in enumerate(joined):
        program = _join(program, run, f"flat.{index}", known)
    remove_dead(program.graph)
    return program


def _join(program: Program, run: list[Member], name: str, known: Inference) -> Program:
    if run[0].parameter.own is not None:
        return _join_own(program, run, name, known)
    offsets, numel = laid_out(run)
    flat_gradient, own = _flat_gradient(program, run, offsets, numel, known)
    return join_updates(program, run, name, {own: flat_gradient}, known)


def _join_own(program: Program, run: list[Member], name: str, known: Inference) -> Program:
    """Parts of trainers' own lie as close together as their gradients do: these are a stretch of what came."""
    graph, layout, split = program.graph, own_layout(run), bucket_of(run[0].packed)
    if split is None:
        with graph.inserting_after(max(m.gradient for m in run)):
            flat = known.call(graph, aten.cat.default, [m.gradient for m in run])
        return join_updates(program, run, name, {run[0].gradient: flat}, known, layout)
    wait, widths = split.args[:2]
    first = pick_of(run[0].packed).args[1]  # type: ignore[union-attr]
    start = sum(widths[:first])  # type: ignore[arg-type, index]
    with graph.inserting_before(min(m.gradient for m in run)):
        flat = known.call(graph, aten.slice.Tensor, wait, 0, start, start + layout.shape[0])
        if run[0].gradient is not run[0].packed:
            flat = known.call(graph, aten.div.Tensor, flat, run[0].gradient.args[1])
        views = [view_of(program, flat, at, m.parameter, known) for m, at in zip(run, layout.offsets, strict=True)]
    for member, view in zip(run, views, strict=True):
        member.gradient.replace_all_uses_with(view)
    return join_updates(program, run, name, {views[0]: flat}, known, layout)


def _is_together(run: list[Member]) -> bool:
    """All gradients are there before the first of the updates begins; always so behind one bucket."""
    if bucket_of(run[0].packed) is not None:
        return True
    begun = min(n for m in run for n in m.nodes if m.gradient in n.all_input_nodes)
    return max(m.gradient for m in run) < begun


def _flat_gradient(
    program: Program, run: list[Member], offsets: list[int], numel: int, known: Inference
) -> tuple[Node, Node]:
    """The gradients of the run as one tensor (a part of the bucket, padded so that every part is aligned), and the
    first member's own gradient."""
    graph, mode, split = program.graph, mode_of(program.graph), bucket_of(run[0].packed)
    dtype = run[0].parameter.dtype
    if split is None:
        with graph.inserting_after(max(m.gradient for m in run)):
            point = graph.call_function(aten.zeros.default, ([0],))
        with graph.inserting_before(point):
            pieces = [call(graph, mode, aten.reshape.default, m.gradient, [m.parameter.numel]) for m in run]
            flat = call(graph, mode, aten.cat.default, padded(program, pieces, offsets, numel, dtype))
        graph.erase_node(point)
        return flat, run[0].gradient
    return _repack(program, run, offsets, numel, split, known)


def _repack(
    program: Program, run: list[Member], offsets: list[int], numel: int, split: Node, known: Inference
) -> tuple[Node, Node]:
    graph, mode = program.graph, mode_of(program.graph)
    wait: Any = split.args[0]
    joined: Any = wait.args[0].args[0]
    widths: Any = split.args[1]
    dtype, sizes, parts = run[0].parameter.dtype, list(widths), list(joined.args[0])
    picks: dict[Any, Node] = {u.args[1]: u for u in split.users}
    picked: Any = run[0].packed.args[0]
    first: int = picked.args[1]
    last = first + len(run)
    lead = -sum(sizes[:first]) % (ALIGNMENT_NBYTES // dtype.itemsize)
    with graph.inserting_before(joined):
        middle = padded(program, parts[first:last], offsets, numel, dtype)
        head = [zeros(program, lead, dtype)] if lead else []
        packed = call(graph, mode, aten.cat.default, [*parts[:first], *head, *middle, *parts[last:]])
    joined.replace_all_uses_with(packed)
    for node in (wait.args[0], wait):
        node.meta = {**node.meta, "val": packed.meta["val"]}
    new_sizes = [*sizes[:first], *([lead] if lead else []), numel, *sizes[last:]]
    with graph.inserting_before(split):
        again = call(graph, mode, aten.split_with_sizes.default, wait, new_sizes)
    flat_at = first + bool(lead)
    for index, pick in picks.items():
        if first <= index < last:
            continue
        moved = index if index < first else index - len(run) + 1 + bool(lead)
        with graph.inserting_before(pick):
            pick.replace_all_uses_with(call(graph, mode, getitem, again, moved))
    with graph.inserting_before(split):
        flat = call(graph, mode, getitem, again, flat_at)
    if run[0].gradient is not run[0].packed:
        with graph.inserting_before(min(m.gradient for m in run)):
            flat = call(graph, mode, aten.div.Tensor, flat, run[0].gradient.args[1])
    views = []
    for member, offset in zip(run, offsets, strict=True):
        with graph.inserting_before(member.gradient):
            views.append(view_of(program, flat, offset, member.parameter, known))
        member.gradient.replace_all_uses_with(views[-1])
    return flat, views[0]
