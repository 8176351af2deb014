"""Updates that are the same for many parameters run once, over one flat buffer that is also their bucket."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from operator import getitem
from typing import Any

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.meaning import is_pointwise
from syncwright.passes.insert import first_call
from syncwright.place import is_served
from syncwright.plan import Plan
from syncwright.program import Program, Role, Variable, new_placeholder, set_results
from syncwright.selection import Selection
from syncwright.shapes import Inference, call, fake, is_host, mode_of, substitute

aten = torch.ops.aten
ALIGNMENT_NBYTES = 64


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A parameter whose update may be joined with others.

    gradient   where its reduced gradient is, as its update reads it
    packed     the part of a waited bucket that it was; the gradient itself where there is no bucket
    state      its state variables by their place in the update
    nodes      the update's own nodes, in order
    signature  equal for updates that do the same
    """

    parameter: Variable
    gradient: Node
    packed: Node
    state: Mapping[str, Variable]
    nodes: tuple[Node, ...]
    signature: tuple


def flatten(program: Program, plan: Plan) -> Program:
    """Joins the updates of parameters that share one bucket, one dtype and one update program.

    before  %s = split(%w, [1000, 10]), %a = sub(fc.weight, mul(view(%s0), lr)), %b = sub(fc.bias, mul(view(%s1), lr))
    after   flat.0 = placeholder, fc.weight is view(slice(flat.0, 0, 1000)), ...
            %n = sub(flat.0, mul(slice(%w, 0, 1034), lr)), output({"flat.0": %n})

    The variables that a flat one stands for stay in `variables`, with `whole` and `part`. Parts begin at multiples of 64
    bytes. Results are the same, bit for bit. Only compiled programs gain (interpreted, flat is slower).
    """
    program = program.edit()
    members = _members(program)
    runs = [run for run in _runs(members) if len(run) > 1 and _is_together(run)]
    known = Inference(mode_of(program.graph))
    for index, run in enumerate(runs):
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


def _members(program: Program) -> list[Member]:
    owners, results, placeholders = _owners(program), program.results, program.placeholders
    state: dict[str, list[Variable]] = {}
    for variable in program.of_role(Role.STATE):
        state.setdefault(str(variable.of), []).append(variable)
    marks = {str(n.args[1]): n for n in program.graph.nodes if n.target is ops.gradient}
    own: dict[str, list[Node]] = {}
    for node, owner in owners.items():
        own.setdefault(str(owner), []).append(node)
    found = []
    for name, mark in marks.items():
        packed = _reduced(mark)
        gradient = _divided(packed)
        nodes = tuple(n for n in own.get(name, ()) if _behind(n, gradient))
        if (
            name in results
            and not is_served(results[name])
            and _is_elementwise(nodes, gradient, program.variables[name])
        ):
            facts = _Facts(program.variables[name], state.get(name, []), placeholders, results)
            member = _member(facts, gradient, packed, nodes)
            found += [member] if member is not None else []
    return sorted(found, key=lambda m: m.packed)


def _is_elementwise(nodes: tuple[Node, ...], gradient: Node, parameter: Variable) -> bool:
    """Every tensor of the update has the parameter's shape or none, and every op on them is pointwise."""
    for node in nodes:
        for value in (node, *node.all_input_nodes):
            val = value.meta["val"]
            if isinstance(val, tuple | list) or (
                isinstance(val, torch.Tensor) and val.shape not in ((), parameter.shape)
            ):
                return False
        if isinstance(val := node.meta["val"], torch.Tensor) and val.dim() and not is_pointwise(node):
            return False
    return bool(nodes)


def _behind(node: Node, gradient: Node) -> bool:
    val = node.meta["val"]
    return node > gradient or is_host(val) or (isinstance(val, torch.Tensor) and val.dim() == 0)


def _owners(program: Program) -> dict[Node, str | None]:
    """For every node that only one parameter's update uses, that parameter; in graph order."""
    variables, results = program.variables, program.results
    owners: dict[Node, str | None] = {}
    for name, node in results.items():
        variable = variables[name]
        owner = name if variable.role is Role.PARAM else variable.of if variable.role is Role.STATE else None
        owners[node] = owner if owners.get(node, owner) == owner else None
    for node in reversed(program.graph.nodes):
        if node.op != "call_function":
            continue
        mine = {owners.get(u) for u in node.users if u.op != "output"}
        mine |= {owners[node]} if node in owners else set()
        owners[node] = mine.pop() if len(mine) == 1 else None
    return {n: owners[n] for n in program.graph.nodes if owners.get(n) is not None and n.op == "call_function"}


def _reduced(mark: Node) -> Node:
    """Where the gradient that is complete at `mark` is, after its reduction."""
    node = mark
    while True:
        if node.target is ops.wait:
            return _unpacked(node, mark)
        step = [u for u in node.users if u.target in _WAY]
        if len(step) != 1:
            return mark
        node = step[0]


_WAY = frozenset({aten.mul.Tensor, aten.reshape.default, aten.cat.default, ops.all_reduce, ops.wait})


def _unpacked(wait: Node, mark: Node) -> Node:
    """The part of a waited bucket that is this gradient's: by its place in the `cat`."""
    joined = wait.args[0].args[0]  # type: ignore[union-attr]
    if joined.target is not aten.cat.default:  # type: ignore[union-attr]
        return wait
    place = next(i for i, n in enumerate(joined.args[0]) if mark in _sources(n))  # type: ignore[arg-type, union-attr]
    (split,) = wait.users
    picked = next(u for u in split.users if u.args[1] == place)
    (view,) = picked.users
    return view


def _divided(packed: Node) -> Node:
    """Behind the division by the sum of weights, where there is one."""
    users = list(packed.users)
    return users[0] if len(users) == 1 and users[0].target is aten.div.Tensor and packed.op != "placeholder" else packed


def _sources(node: Node) -> set[Node]:
    """The gradient behind a reshape and a scale."""
    found = {node}
    while node.target in (aten.reshape.default, aten.mul.Tensor):
        node = node.args[0]  # type: ignore[assignment]
        found.add(node)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Facts:
    """A parameter, its state, and what all parameters share: the program's placeholders and results."""

    parameter: Variable
    state: list[Variable]
    placeholders: Mapping[str, Node]
    results: Mapping[str, Node]


def _member(facts: _Facts, gradient: Node, packed: Node, nodes: tuple[Node, ...]) -> Member | None:
    parameter, results = facts.parameter, facts.results
    state = {v.name[len(parameter.name) :]: v for v in facts.state}
    places = {facts.placeholders[v.name]: key for key, v in state.items() if v.name in facts.placeholders}
    if any(v.shape not in ((), parameter.shape) for v in state.values()):
        return None
    places[facts.placeholders[parameter.name]] = ""
    index = {node: i for i, node in enumerate(nodes)}

    def known(node: Node) -> object:
        if node is gradient:
            return "gradient"
        return ("own", index[node]) if node in index else ("state", places[node]) if node in places else node

    lines = tuple((n.target, _frozen(substitute(n.args, known)), _frozen(substitute(n.kwargs, known))) for n in nodes)
    written = tuple(
        (key, index.get(results[v.name])) for key, v in {"": parameter, **state}.items() if v.name in results
    )
    return Member(parameter, gradient, packed, state, nodes, (parameter.dtype, lines, written))


def _frozen(value: object) -> object:
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(_frozen(v) for v in value)
    return value


def _runs(members: Iterable[Member]) -> list[list[Member]]:
    """Neighbours in one bucket with the same update."""
    return [list(run) for _, run in groupby(members, key=lambda m: (_bucket(m.packed), _divisor(m), m.signature))]


def _divisor(member: Member) -> object:
    return member.gradient.args[1] if member.gradient is not member.packed else None


def _bucket(gradient: Node) -> Node | None:
    """The split that a gradient is a part of; None where it is on its own."""
    if gradient.target is aten.view.default and gradient.args[0].target is getitem:  # type: ignore[union-attr]
        return gradient.args[0].args[0]  # type: ignore[union-attr]
    return None


def _join(program: Program, run: list[Member], name: str, known: Inference) -> Program:
    offsets, numel = _offsets(run)
    flat_gradient, own = _flat_gradient(program, run, offsets, numel, known)
    program, reads = _flat_variables(program, run, name, offsets, numel, known)
    made = _copy_update(program, run[0], {own: flat_gradient}, reads)
    return _write_flat(program, run, name, made, offsets, known)


def _is_together(run: list[Member]) -> bool:
    """All gradients are there before the first of the updates begins; always so behind one bucket."""
    if _bucket(run[0].packed) is not None:
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
    graph, mode, split = program.graph, mode_of(program.graph), _bucket(run[0].packed)
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
    """The first member's update, on flat values. Values of no one's (0-d state, numbers) are computed as before."""
    graph, mode = program.graph, mode_of(program.graph)
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
        with graph.inserting_after(node):
            made[node] = call(
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
