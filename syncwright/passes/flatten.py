"""Updates that are the same for many parameters run once, over one flat buffer that is also their bucket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch.fx import Node

from syncwright.dead import remove_dead
from syncwright.passes.alike import Member, bucket_of, members, runs
from syncwright.passes.insert import first_call
from syncwright.plan import Plan
from syncwright.program import Program, Role, Variable, new_placeholder, set_results
from syncwright.selection import Selection
from syncwright.shapes import Inference, call, fake, mode_of, substitute

aten = torch.ops.aten
ALIGNMENT_NBYTES = 64


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


def flat_parts(program: Program) -> dict[str, list[Variable]]:
    """The variables that each flat variable stands for."""
    found: dict[str, list[Variable]] = {}
    for variable in program.variables.values():
        if variable.whole in program.variables and variable.role in (Role.PARAM, Role.STATE):
            found.setdefault(str(variable.whole), []).append(variable)
    return found


def _join(program: Program, run: list[Member], name: str, known: Inference) -> Program:
    offsets, numel = _offsets(run)
    flat_gradient, own = _flat_gradient(program, run, offsets, numel, known)
    program, reads = _flat_variables(program, run, name, offsets, numel, known)
    made = _copy_update(program, run[0], {own: flat_gradient}, reads)
    return _write_flat(program, run, name, made, offsets, known)


def _is_together(run: list[Member]) -> bool:
    """All gradients are there before the first of the updates begins; always so behind one bucket."""
    if bucket_of(run[0].packed) is not None:
        return True
    begun = min(n for m in run for n in m.nodes if m.gradient in n.all_input_nodes)
    return max(m.gradient for m in run) < begun


def _offsets(run: list[Member]) -> tuple[list[int], int]:
    grain = ALIGNMENT_NBYTES // run[0].parameter.dtype.itemsize
    offsets, at = [], 0
    for member in run:
        offsets.append(at)
        at += -(-member.parameter.numel // grain) * grain
    return offsets, at


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
            flat = call(graph, mode, aten.cat.default, _padded(program, pieces, offsets, numel, dtype))
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
        middle = _padded(program, parts[first:last], offsets, numel, dtype)
        head = [_zeros(program, lead, dtype)] if lead else []
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
            views.append(_view_of(program, flat, offset, member.parameter, known))
        member.gradient.replace_all_uses_with(views[-1])
    return flat, views[0]


def _view_of(program: Program, flat: Node, offset: int, variable: Variable, known: Inference) -> Node:
    rows = known.call(program.graph, aten.slice.Tensor, flat, 0, offset, offset + variable.numel)
    return known.call(program.graph, aten.view.default, rows, list(variable.shape))


def _padded(program: Program, pieces: list[Node], offsets: list[int], numel: int, dtype: torch.dtype) -> list[Node]:
    found = []
    for piece, start, stop in zip(pieces, offsets, [*offsets[1:], numel], strict=True):
        gap = stop - start - piece.meta["val"].numel()
        found += [piece, _zeros(program, gap, dtype)] if gap else [piece]
    return found


def _zeros(program: Program, numel: int, dtype: torch.dtype) -> Node:
    return call(program.graph, mode_of(program.graph), aten.zeros.default, [numel], dtype=dtype)


def _flat_variables(
    program: Program, run: list[Member], name: str, offsets: list[int], numel: int, known: Inference
) -> tuple[Program, dict[str, Node]]:
    """Placeholders of the flat parameter and state; reads of the members become views of them."""
    graph, mode = program.graph, mode_of(program.graph)
    placeholders, variables, reads = program.placeholders, dict(program.variables), {}
    for key, variable in {"": run[0].parameter, **run[0].state}.items():
        if variable.role is Role.STATE and not variable.shape:
            if variable.name in placeholders:
                reads[key] = placeholders[variable.name]
            continue
        of = None if variable.role is Role.PARAM else name
        flat = Variable(f"{name}{key}", variable.role, (numel,), variable.dtype, of=of)
        with graph.inserting_before(first_call(graph)):
            reads[key] = new_placeholder(graph, flat, fake(mode, (numel,), variable.dtype))
        variables[flat.name] = flat
    program = replace(program, variables=variables)
    for member, offset in zip(run, offsets, strict=True):
        old = placeholders[member.parameter.name]
        if any(u not in member.nodes for u in old.users):
            with graph.inserting_before(first_call(graph)):
                view = _view_of(program, reads[""], offset, member.parameter, known)
            for user in [u for u in old.users if u not in member.nodes]:
                user.replace_input_with(old, view)
    return program, reads


def _copy_update(
    program: Program, first: Member, gradient: Mapping[Node, Node], reads: Mapping[str, Node]
) -> dict[Node, Node]:
    """The first member's update, on flat values, behind its gradient. 0-d state and numbers are computed as before."""
    graph, mode = program.graph, mode_of(program.graph)
    last = max(gradient.values())
    own = {
        program.placeholders[v.name]: key
        for key, v in {"": first.parameter, **first.state}.items()
        if v.name in program.reads
    }
    made: dict[Node, Node] = dict(gradient)
    made.update({node: reads[key] for node, key in own.items() if key in reads})
    for node in first.nodes:
        sources = [n for n in node.all_input_nodes if n in made]
        if not sources or not isinstance(node.meta["val"], torch.Tensor) or node.meta["val"].dim() == 0:
            continue
        last = max(last, node)
        with graph.inserting_after(last):
            made[node] = last = call(
                graph,
                mode,
                node.target,
                *substitute(node.args, lambda n: made.get(n, n)),
                **substitute(node.kwargs, lambda n: made.get(n, n)),
            )
    return made


def _write_flat(
    program: Program,
    run: list[Member],
    name: str,
    made: Mapping[Node, Node],
    offsets: list[int],
    known: Inference,
) -> Program:
    results, variables = program.results, dict(program.variables)
    before, first = program.results, run[0]
    for key, variable in {"": first.parameter, **first.state}.items():
        if variable.name not in results:
            continue
        scalar = variable.role is Role.STATE and not variable.shape
        target = variable.name if scalar else f"{name}{key}"
        new = results[variable.name] if scalar else made[results[variable.name]]
        for member, offset in zip(run, offsets, strict=True):
            part = member.parameter if key == "" else member.state[key]
            bounds = None if scalar else (offset, offset + part.numel)
            if part.name != target:
                results.pop(part.name, None)
                along = "all" if bounds is None else "elements"
                variables[part.name] = replace(part, selection=Selection(target, along, *(bounds or (0, 0))))
            if bounds is not None and part.name in before:
                _redirect(program, part, member, before[part.name], _Slice(new, offset), known)
        results[target] = new
    set_results(program, results)
    program = replace(program, variables=variables)
    return program


@dataclass(frozen=True, slots=True, eq=False)
class _Slice:
    """Where a part begins in a flat value."""

    flat: Node
    offset: int


def _redirect(program: Program, part: Variable, member: Member, old: Node, new: _Slice, known: Inference) -> None:
    """Reads of a member's new value elsewhere in the step become views of the flat one's."""
    users = [u for u in old.users if u not in member.nodes and u.op != "output"]
    if users:
        with program.graph.inserting_before(min(users)):
            view = _view_of(program, new.flat, new.offset, part, known)
        for user in users:
            user.replace_input_with(old, view)
