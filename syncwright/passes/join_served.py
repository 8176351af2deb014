"""Small parameters that one server keeps become one: they travel together and are updated together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.passes.alike import Member, members
from syncwright.passes.flat import flat_parts, join_updates, laid_out, padded, view_of
from syncwright.plan import AllGather, ParameterServer, Plan, Sharing
from syncwright.program import Program
from syncwright.shapes import Inference, mode_of

_JOINED = ParameterServer | AllGather
aten = torch.ops.aten
MB = 2**20


def join_served(program: Program, plan: Plan) -> Program:
    """Joins parameters that are shared alike, by one server, and updated alike, in the order in which their gradients are
    complete, up to `bucket_mb` of them.

    before  %a = gradient(%x, "fc.weight"), %b = gradient(%y, "fc.bias"), %n = sub(fc.weight, mul(%a, lr)), ...
    after   %f = placeholder "fc.weight and 1 more", fc.weight is view(slice(%f, 0, 1000)), ...,
            %g = gradient(cat([reshape(%x), reshape(%y)]), "fc.weight and 1 more"), %n = sub(%f, mul(%g, lr))

    To all that comes behind, the joined one is a parameter like any other (`as_joined`). A message costs as much as the
    copying of a hundred kilobytes, and an update of one element as much as one of ten thousand.
    """
    served = {s.variable: s for s in plan.sharings if isinstance(s.sync, ParameterServer)}
    if not served:
        return program
    edited = program.edit()
    runs = [run for run in _runs(edited, served) if len(run) > 1]
    if not runs:
        return program
    known = Inference(mode_of(edited.graph))
    for run in runs:
        edited = _join(edited, run, known)
    remove_dead(edited.graph)
    return edited


def as_joined(program: Program, plan: Plan) -> Plan:
    """The plan of a program of which passes have joined parameters: each is shared as its parts are."""
    parts = {part.name: whole for whole, members in flat_parts(program).items() for part in members}
    if not any(isinstance(s.sync, _JOINED) and s.variable in parts for s in plan.sharings):
        return plan
    found: dict[str, Sharing] = {}
    for sharing in plan.sharings:
        name = parts.get(sharing.variable, sharing.variable)
        if name == sharing.variable or not isinstance(sharing.sync, _JOINED):
            found[sharing.variable] = sharing
        else:
            found.setdefault(name, replace(sharing, variable=name, sizes=program.variables[name].shape[:1]))
    return replace(plan, sharings=tuple(found.values()))


def _runs(program: Program, served: Mapping[str, Sharing]) -> Iterator[list[Member]]:
    """Parameters to be joined: alike, and not more than may be together."""
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for member in members(program):
        sharing = served.get(member.parameter.name)
        if sharing is not None and not sharing.rows and len(sharing.owners) == 1:
            groups.setdefault((sharing.sync, sharing.owners, member.signature), []).append(member)
    for (sync, *_), group in groups.items():
        for run in _cut(group, int(sync.bucket_mb * MB)):
            if _is_together(run):
                yield run


def _is_together(run: list[Member]) -> bool:
    """All gradients are there before anything reads one of them."""
    return max(m.gradient for m in run) < min(user for m in run for user in m.gradient.users)


def _cut(group: Sequence[Member], most: int) -> Iterator[list[Member]]:
    run: list[Member] = []
    for member in group:
        nbytes = sum(m.parameter.numel * m.parameter.dtype.itemsize for m in [*run, member])
        if run and nbytes > most:
            yield run
            run = []
        run.append(member)
    if run:
        yield run


def _join(program: Program, run: list[Member], known: Inference) -> Program:
    graph = program.graph
    marks = [member.gradient for member in run]
    name = f"{run[0].parameter.name} and {len(run) - 1} more"
    offsets, numel = laid_out(run)
    with graph.inserting_after(max(marks)):
        end = graph.call_function(ops.gradient, (marks[-1], name))
    with graph.inserting_before(end):
        given = [known.call(graph, aten.reshape.default, mark.args[0], [mark.meta["val"].numel()]) for mark in marks]
        flat = known.call(graph, aten.cat.default, padded(program, given, offsets, numel, run[0].parameter.dtype))
        gradient = known.call(graph, ops.gradient, flat, name)
    graph.erase_node(end)
    program = join_updates(program, run, name, {marks[0]: gradient}, known)
    for member, offset in zip(run, offsets, strict=True):
        own = set(member.nodes)
        others = [user for user in member.gradient.users if user not in own or not own.issuperset(user.users)]
        if others:
            with graph.inserting_before(gradient.next):
                view = view_of(program, gradient, offset, member.parameter, known)
            for user in others:
                user.replace_input_with(member.gradient, view)
    return program
