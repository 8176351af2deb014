"""Parameters laid out one behind another in one tensor, and their one update: flat, or the rows of tables of one width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.passes.alike import Member
from syncwright.passes.insert import first_call
from syncwright.program import Program, Role, Variable, new_placeholder, set_results
from syncwright.selection import Selection
from syncwright.shapes import Inference, call, fake, mode_of, substitute

aten = torch.ops.aten
ALIGNMENT_NBYTES = 64


def flat_parts(program: Program) -> dict[str, list[Variable]]:
    """The variables that each flat variable stands for."""
    found: dict[str, list[Variable]] = {}
    for variable in program.variables.values():
        if variable.whole in program.variables and variable.role in (Role.PARAM, Role.STATE):
            found.setdefault(str(variable.whole), []).append(variable)
    return found


def laid_out(run: list[Member]) -> tuple[list[int], int]:
    """Where each parameter begins, and how many elements there are, with the gaps."""
    grain = ALIGNMENT_NBYTES // run[0].parameter.dtype.itemsize
    offsets, at = [], 0
    for member in run:
        offsets.append(at)
        at += -(-member.parameter.numel // grain) * grain
    return offsets, at


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parameters of a run lie in the variable that stands for all of them.

    along    "elements": laid out flat, each at a multiple of 64 bytes; "rows": as they are, of one width
    offsets  where each begins
    shape    of all together
    """

    along: Literal["elements", "rows"]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def part(self, variable: Variable, of: str, offset: int) -> Selection:
        """Which part another variable is of the one that stands for it; of a number all."""
        size = variable.numel if self.along == "elements" else variable.shape[0] if variable.shape else 0
        return Selection(of, self.along, offset, offset + size) if variable.shape else Selection(of)


def flat_layout(run: list[Member]) -> Layout:
    """One behind another, with gaps, in one dimension."""
    offsets, numel = laid_out(run)
    return Layout("elements", tuple(offsets), (numel,))


def own_layout(run: list[Member]) -> Layout:
    """Trainers' own parts, one behind another, without gaps."""
    counts = [member.parameter.numel for member in run]
    return Layout("elements", tuple(accumulate(counts[:-1], initial=0)), (sum(counts),))


def row_layout(run: list[Member]) -> Layout:
    """Tables of rows of one form, one below another."""
    rows = [member.parameter.shape[0] for member in run]
    return Layout("rows", tuple(accumulate(rows[:-1], initial=0)), (sum(rows), *run[0].parameter.shape[1:]))


def view_of(program: Program, flat: Node, offset: int, variable: Variable, known: Inference) -> Node:
    rows = known.call(program.graph, aten.slice.Tensor, flat, 0, offset, offset + variable.numel)
    return known.call(program.graph, aten.view.default, rows, list(variable.shape))


def padded(program: Program, pieces: list[Node], offsets: list[int], numel: int, dtype: torch.dtype) -> list[Node]:
    found = []
    for piece, start, stop in zip(pieces, offsets, [*offsets[1:], numel], strict=True):
        gap = stop - start - piece.meta["val"].numel()
        found += [piece, zeros(program, gap, dtype)] if gap else [piece]
    return found


def zeros(program: Program, numel: int, dtype: torch.dtype) -> Node:
    return call(program.graph, mode_of(program.graph), aten.zeros.default, [numel], dtype=dtype)


def join_updates(
    program: Program,
    run: list[Member],
    name: str,
    gradient: Mapping[Node, Node],
    known: Inference,
    layout: Layout | None = None,
) -> Program:
    """One update of one variable for those of a run, which become parts of it.

    gradient  by the first member's own gradient, that of all of them
    layout    where they lie in it, where that is not flat. Of "rows", what reads the first parameter beside its update then
              reads all of them; nothing may read the others
    """
    layout = layout or flat_layout(run)
    program, reads = _flat_variables(program, run, name, layout, known)
    made = _copy_update(program, run[0], gradient, reads)
    return _write_flat(program, run, name, made, layout, known)


def _copy_update(
    program: Program, first: Member, gradient: Mapping[Node, Node], reads: Mapping[str, Node]
) -> dict[Node, Node]:
    """The first member's update, on flat values, behind its gradient. Numbers are computed as before."""
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


def _flat_variables(
    program: Program, run: list[Member], name: str, layout: Layout, known: Inference
) -> tuple[Program, dict[str, Node]]:
    """Placeholders of the flat parameter and state; reads of the members become views of them."""
    graph, mode = program.graph, mode_of(program.graph)
    placeholders, variables, reads = program.placeholders, dict(program.variables), {}
    for key, variable in {"": run[0].parameter, **run[0].state}.items():
        shape = layout.shape if variable.shape or variable.role is Role.PARAM else ()
        of, sparse = (None, variable.sparse) if variable.role is Role.PARAM else (name, False)
        flat = Variable(f"{name}{key}", variable.role, shape, variable.dtype, of=of, sparse=sparse)
        with graph.inserting_before(first_call(graph)):
            reads[key] = new_placeholder(graph, flat, fake(mode, shape, variable.dtype))
        if not shape and variable.name in placeholders:
            placeholders[variable.name].replace_all_uses_with(reads[key])
        variables[flat.name] = flat
    program = replace(program, variables=variables)
    for member, offset in zip(run, layout.offsets, strict=True):
        old = placeholders[member.parameter.name]
        if layout.along == "rows":
            for user in [u for u in old.users if u not in member.nodes]:
                user.replace_input_with(old, reads[""])
        elif any(u not in member.nodes for u in old.users):
            with graph.inserting_before(first_call(graph)):
                view = view_of(program, reads[""], offset, member.parameter, known)
            for user in [u for u in old.users if u not in member.nodes]:
                user.replace_input_with(old, view)
    return program, reads


def _write_flat(
    program: Program,
    run: list[Member],
    name: str,
    made: Mapping[Node, Node],
    layout: Layout,
    known: Inference,
) -> Program:
    results, variables = program.results, dict(program.variables)
    before, first = program.results, run[0]
    for key, variable in {"": first.parameter, **first.state}.items():
        target, old = f"{name}{key}", before.get(variable.name)
        for member, offset in zip(run, layout.offsets, strict=True):
            part = member.parameter if key == "" else member.state[key]
            variables[part.name] = replace(part, selection=layout.part(part, target, offset))
            results.pop(part.name, None)
            if part.shape and part.name in before and old is not None:
                _redirect(program, part, member, before[part.name], _Slice(made[old], offset), known)
        if old is not None:
            results[target] = made.get(old, old)
    set_results(program, results)
    return replace(program, variables=variables)


@dataclass(frozen=True, slots=True, eq=False)
class _Slice:
    """Where a part begins in a flat value."""

    flat: Node
    offset: int


def _redirect(program: Program, part: Variable, member: Member, old: Node, new: _Slice, known: Inference) -> None:
    """Reads of a member's new value elsewhere in the step become views of the flat one's."""
    users = [u for u in old.users if u not in member.nodes and u.op != "output"]
    for user in [u for u in users if u.target is ops.gather_parts and u < new.flat]:
        new.flat.append(user)  # what is waited for at the end of the step starts when it is there
    if users:
        with program.graph.inserting_before(min(users)):
            view = view_of(program, new.flat, new.offset, part, known)
        for user in users:
            user.replace_input_with(old, view)
