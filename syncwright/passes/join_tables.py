"""Tables whose rows travel, to one server or among trainers, become one: with one lookup, one message, one update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from syncwright import kernels, ops
from syncwright.dead import is_random, remove_dead
from syncwright.passes.alike import Member, members
from syncwright.passes.flat import join_updates, row_layout
from syncwright.passes.insert import item, made_of, move_before
from syncwright.plan import AllGather, ParameterServer, Plan, Sharing
from syncwright.program import Program, Role
from syncwright.schema import argument, put_argument
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten
_BAG_GRADIENTS = frozenset({aten._embedding_bag_backward.default, aten._embedding_bag_dense_backward.default})
_SAME = ("mode", "sparse")
"""Options of lookups, and of their gradients, that are the same for lookups that become one."""


def join_tables(program: Program, plan: Plan) -> Program:
    """Joins tables of rows of one form that are shared alike (by one server, or by trainers that gather rows), looked up alike
    (once in a step), and updated alike: rows of one below rows of the other.

    before  %y = embedding(a, %i), %z = embedding(b, %j), ..., %g = gradient(embedding_dense_backward(%gy, %i, 10), "a"),
            %h = gradient(embedding_dense_backward(%gz, %j, 20), "b"), %n = sub(a, mul(%g, lr)), %m = sub(b, mul(%h, lr))
    after   %f = placeholder "a and 1 more", a is rows 0 to 9 of it, b the others,
            %k = join_ids([%i, %j], [10, 20], ["a", "b"]), %x = embedding(%f, %k), %y = view(slice(%x, 0, ...)), ...,
            %g = gradient(embedding_dense_backward(cat([%gy, %gz]), %k, 30), "a and 1 more"), %n = sub(%f, mul(%g, lr))

    To all that comes behind the joined one is a table like any other (`join_served.as_joined`); outside of steps trainers ask
    for the parts of it, by their own names. A request, an answer and a push cost as much as a thousand rows.

    Left alone: tables with an id of padding, with weights per id, of which a global value (a norm) is made; and tables with
    which there would be more rows than ids are made distinct by marks for (`kernels.MOST_MARKS`).
    """
    travelling = {s.variable: s for s in plan.sharings if s.rows and _travels_whole(s, plan)}
    if len(travelling) < 2:
        return program
    edited = program.edit()
    runs = [run for run in _runs(edited, travelling) if len(run) > 1]
    if not runs:
        return program
    known = Inference(mode_of(edited.graph))
    for run in runs:
        edited = _join(edited, run, known)
    remove_dead(edited.graph)
    return edited


def _travels_whole(sharing: Sharing, plan: Plan) -> bool:
    """To and from one server, or among trainers."""
    if isinstance(sharing.sync, AllGather):
        return plan.trainers > 1
    return isinstance(sharing.sync, ParameterServer) and len(sharing.owners) == 1 and not sharing.shards


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """A table with its one lookup and the one gradient made of it."""

    member: Member
    read: Node
    gradient: Node

    @property
    def rows(self) -> int:
        return self.member.parameter.shape[0]

    @property
    def ids(self) -> Node:
        return argument(self.read, "indices")  # type: ignore[return-value]

    @property
    def offsets(self) -> Node | None:
        """Where each bag begins."""
        return argument(self.read, "offsets")  # type: ignore[return-value]

    @property
    def out(self) -> Node:
        """The rows, or the bags."""
        return self.read if self.offsets is None else _parts(self.read)[0]

    @property
    def sources(self) -> list[Node]:
        """What a lookup is made of beside the table."""
        return [self.ids] if self.offsets is None else [self.ids, self.offsets]

    @property
    def of_outputs(self) -> Node:
        """What has one item for each row, or bag, that comes out."""
        return self.ids if self.offsets is None else self.offsets


def _runs(program: Program, travelling: Mapping[str, Sharing]) -> Iterator[list[_Table]]:
    groups: dict[Any, list[_Table]] = {}
    for member in members(program):
        sharing = travelling.get(member.parameter.name)
        table = None if sharing is None else _table(program, member)
        if table is not None and sharing is not None:
            key = (sharing.sync, sharing.owners, sharing.rows, member.signature, *_form(table))
            groups.setdefault(key, []).append(table)
    for group in groups.values():
        for run in _cut(group):
            if _is_together(run):
                yield run


def _table(program: Program, member: Member) -> _Table | None:
    """None where a table is read or trained otherwise than by one lookup, or something else is made of its gradient."""
    mark, own = member.gradient, {member.gradient, *member.nodes}
    reads = [user for user in program.placeholders[member.parameter.name].users if user not in member.nodes]
    source = mark.args[0]
    if len(reads) != 1 or not isinstance(source, Node) or set(source.users) != {mark}:
        return None
    placeholders, results = program.placeholders, program.results
    state = [variable for variable in member.state.values() if variable.shape]
    values = [placeholders[v.name] for v in state if v.name in placeholders]
    values += [results[v.name] for v in (member.parameter, *state) if v.name in results]
    alone = all(user in own or user.op == "output" for value in (mark, *values) for user in value.users)
    return _Table(member, reads[0], source) if alone and _is_simple(reads[0], source) else None


def _is_simple(read: Node, gradient: Node) -> bool:
    """A lookup and its gradient, whose ids count alike: none is one of padding, or has a weight."""
    plain = (read.target, gradient.target) == (aten.embedding.default, aten.embedding_dense_backward.default)
    bags = read.target is aten._embedding_bag.default and gradient.target in _BAG_GRADIENTS
    if not (plain or bags) or argument(read, "indices") is not argument(gradient, "indices"):
        return False
    special = ("scale_grad_by_freq", "per_sample_weights", "include_last_offset")
    if any(argument(each, option) for each in (read, gradient) for option in special):
        return False
    return all(argument(each, "padding_idx") == -1 for each in (read, gradient)) and _only_gradient_reads(
        read, gradient
    )


def _only_gradient_reads(read: Node, gradient: Node) -> bool:
    """Of what bags give beside themselves (where their ids are), for their gradient."""
    if read.target is aten.embedding.default:
        return True
    return all(set(part.users) <= {gradient} for index, part in _parts(read).items() if index)


def _parts(bags: Node) -> dict[int, Node]:
    return {user.args[1]: user for user in bags.users}  # type: ignore[misc]


def _form(table: _Table) -> tuple[object, ...]:
    """What is the same for tables that are joined."""
    calls = (table.read, table.gradient)
    rest = [(n.target, *(argument(n, name) for name in _SAME)) for n in calls]
    ids, shape = table.ids.meta["val"], table.member.parameter.shape[1:]
    sizes = () if table.offsets is None else (table.offsets.meta["val"].dtype,)
    return (shape, ids.dtype, *sizes, *rest, tuple(_parts(table.read)) if table.offsets is not None else ())


def _cut(group: Sequence[_Table]) -> Iterator[list[_Table]]:
    run: list[_Table] = []
    for table in group:
        if run and sum(each.rows for each in run) + table.rows > kernels.MOST_MARKS:
            yield run
            run = []
        run.append(table)
    if run:
        yield run


def _is_together(run: list[_Table]) -> bool:
    """All ids are known before the first lookup, or may be; and all gradients before anything reads one of them."""
    ids = made_of([node for table in run for node in table.sources])
    marks = [table.member.gradient for table in run]
    first = min(user for mark in marks for user in mark.users)
    return not any(is_random(node) or node in {table.read for table in run} for node in ids) and max(marks) < first


def _join(program: Program, run: list[_Table], known: Inference) -> Program:
    run = sorted(run, key=lambda table: table.read)
    graph, joined = program.graph, [table.member for table in run]
    name = f"{joined[0].parameter.name} and {len(run) - 1} more"
    layout = row_layout(joined)
    first, end = min(table.read for table in run), max(member.gradient for member in joined).next
    move_before(first, made_of([node for table in run for node in table.sources]))
    with graph.inserting_before(first):
        read, ids = _one_lookup(run, known)
        _part(run, read, _dynamic(program), known)
    with graph.inserting_before(end):
        gradient = _one_gradient(run, read, ids, layout.shape[0], known)
        mark = known.call(graph, ops.gradient, gradient, name)
    return join_updates(program, joined, name, {joined[0].gradient: mark}, known, layout)


def _dynamic(program: Program) -> bool:
    return any(variable.dynamic for variable in program.of_role(Role.INPUT))


def _one_lookup(run: list[_Table], known: Inference) -> tuple[Node, Node]:
    """The lookup of all ids, one table's behind another's: of the first table, which will be all of them; and these ids."""
    graph, first = run[0].read.graph, run[0].read
    tables = [table.member.parameter for table in run]
    rows, names = [each.shape[0] for each in tables], [each.name for each in tables]
    ids = known.call(graph, ops.join_ids, [table.ids for table in run], rows, names)
    read = graph.create_node("call_function", first.target, first.args, dict(first.kwargs))
    put_argument(read, "indices", ids)
    if run[0].offsets is not None:
        each = [[table.offsets for table in run], [table.ids for table in run]]
        put_argument(read, "offsets", known.call(graph, ops.join_offsets, *each))
        read.prepend(argument(read, "offsets"))  # type: ignore[arg-type]
    known.infer(read)
    return read, ids


def _part(run: list[_Table], read: Node, dynamic: bool, known: Inference) -> None:
    """Every table's part of what was looked up takes the place of its own lookup."""
    graph = read.graph

    def size(node: Node, axis: int) -> object:
        if not dynamic:
            return node.meta["val"].shape[axis]
        found = graph.call_function(aten.sym_size.int, (node, axis))
        found.meta["val"] = int
        return found

    flat = [known.call(graph, aten.reshape.default, table.of_outputs, [-1]) for table in run]
    out = read if run[0].offsets is None else item(read, 0)
    parts = known.call(graph, aten.split_with_sizes.default, out, [size(node, 0) for node in flat])
    for index, table in enumerate(run):
        part, sizes = item(parts, index), table.of_outputs
        if sizes.meta["val"].dim() != 1:
            shape = [size(sizes, axis) for axis in range(sizes.meta["val"].dim())]
            part = known.call(graph, aten.view.default, part, [*shape, *out.meta["val"].shape[1:]])
        table.out.replace_all_uses_with(part)


def _one_gradient(run: list[_Table], read: Node, ids: Node, rows: int, known: Inference) -> Node:
    """The gradient of all tables, from those of all that was looked up."""
    graph, width = read.graph, run[0].member.parameter.shape[1:]
    name = run[0].gradient.target._schema.arguments[0].name  # type: ignore[union-attr]
    given = [argument(table.gradient, name) for table in run]
    flat = [known.call(graph, aten.reshape.default, each, [-1, *width]) for each in given]
    whole = known.call(graph, aten.cat.default, flat)
    old = run[0].gradient
    made = graph.create_node("call_function", old.target, old.args, dict(old.kwargs))
    put_argument(made, name, whole)
    put_argument(made, "indices", ids)
    put_argument(made, "num_weights", rows)
    if run[0].offsets is not None:
        if argument(old, "offsets") is not None:
            put_argument(made, "offsets", argument(read, "offsets"))
        for index, each in enumerate(("offset2bag", "bag_size", "maximum_indices"), start=1):
            with graph.inserting_after(read):
                put_argument(made, each, item(read, index))
    known.infer(made)
    return made
