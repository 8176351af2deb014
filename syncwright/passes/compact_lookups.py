"""Lookups of a table read the rows that a batch needs, and their gradient is of those rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import is_random
from syncwright.errors import LoweringError
from syncwright.meaning import find_marks
from syncwright.passes.insert import before_first_use, behind, item, made_of, move_before
from syncwright.plan import AllGather, ParameterServer, Plan, Sharing
from syncwright.program import Program, Role
from syncwright.schema import argument, put_argument
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten
READS = frozenset(
    {
        aten.embedding.default,
        aten._embedding_bag.default,
        aten._embedding_bag_forward_only.default,
        aten._embedding_bag_per_sample_weights_backward.default,
    }
)
"""Operations that read rows of a table."""
GRADIENTS = frozenset(
    {
        aten.embedding_dense_backward.default,
        aten._embedding_bag_backward.default,
        aten._embedding_bag_dense_backward.default,
    }
)


def compact_lookups(program: Program, plan: Plan) -> Program:
    """Lookups of tables whose rows travel work on the distinct rows of a batch, laid one behind another.

    before  %y = embedding(w, ids), ..., %d = embedding_dense_backward(%gy, ids, 1000, -1, False), %g = gradient(%d, "w")
    after   %u = unique([ids], -1), %rows = take_rows(w, %u[0]), %y = embedding(%rows, %u[1]), ...,
            %c = add_rows(%gy, %u[1], 12), %d = dense_rows(%c, %u[0], 1000), %g = gradient(%d, "w")

    12 is as many ids as the batch has, so shapes do not depend on how many are distinct. Duplicates are summed here, before
    anything else. A row of padding_idx comes first; its gradient is zero.
    """
    travelling = [s for s in plan.sharings if s.rows and isinstance(s.sync, AllGather | ParameterServer)]
    names = {s.variable for s in travelling if not (is_alone(plan) and is_updated_whole(s))}
    return compacted(program, names & set(program.placeholders))


def is_alone(plan: Plan) -> bool:
    """Whether a trainer gathers no rows: neither of others nor of calls before."""
    return plan.trainers == 1 and plan.accumulate == 1


def is_updated_whole(sharing: Sharing) -> bool:
    """Whether a table's rows travel among trainers to an update of all of it: on one trainer nothing is gained by them."""
    return isinstance(sharing.sync, AllGather) and sharing.rows == "all"


def compacted(program: Program, names: set[str]) -> Program:
    """See `compact_lookups`, for the tables of these names."""
    if not names:
        return program
    program = program.edit()
    known, marks, made = Inference(mode_of(program.graph)), find_marks(program), set[Node]()
    for name in sorted(names):
        table = _Table(name, program.placeholders[name], marks.get(name))
        if table.reads:
            made |= _compact(program, table, known)
    for node in program.graph.nodes:
        if node.op == "call_function" and node not in made:
            known.infer(node)
    return program


@dataclass(slots=True, eq=False)
class _Table:
    """The lookups of one table, and the gradients made from them."""

    name: str
    node: Node
    mark: Node | None
    reads: list[Node] = field(init=False)
    gradients: list[Node] = field(init=False)

    def __post_init__(self) -> None:
        self.reads = [user for user in self.node.users if user.target in READS]
        source = self.mark.all_input_nodes[0] if self.mark is not None else None
        self.gradients = sorted(set(_made_by_lookups(source))) if source is not None else []

    @property
    def calls(self) -> list[Node]:
        return sorted([*self.reads, *self.gradients])

    @property
    def padding(self) -> int:
        """The id whose gradient is zero; -1: none."""
        given = [argument(node, "padding_idx") for node in self.calls]
        wanted = {padding for padding in given if isinstance(padding, int) and padding >= 0}
        if len(wanted) > 1:
            raise LoweringError(
                f"'{self.name}' is looked up with padding_idx {' and '.join(map(str, sorted(wanted)))}; expected one for all "
                "lookups of a table whose rows travel. Use one, or share the variable by: all_reduce."
            )
        return wanted.pop() if wanted else -1

    @property
    def skip(self) -> tuple[int, ...]:
        """How many rows at the front have no gradient, where there are such."""
        return (1,) if all(argument(node, "padding_idx") == self.padding != -1 for node in self.gradients) else ()


def _made_by_lookups(node: Node) -> Iterator[Node]:
    """The gradients of lookups that a table's gradient is made from (see `capture.lookups.from_lookups`)."""
    if node.target in GRADIENTS:
        yield node
        return
    for source in node.all_input_nodes:
        if source.meta["val"].dim():  # else what a gradient is scaled by, which others may have a part in
            yield from _made_by_lookups(source)


def _compact(program: Program, table: _Table, known: Inference) -> set[Node]:
    """The new nodes whose meta is right already; that of what is computed from them is not."""
    graph = program.graph
    ids = list(dict.fromkeys(_node(argument(node, "indices")) for node in table.calls))
    if max(ids) > table.calls[0]:
        _hoist(table, ids)
    with behind(max(ids)):
        found = known.call(graph, ops.unique, ids, table.padding)
    made = [found]
    for index in range(len(ids) + 1):
        with graph.inserting_after(made[-1]):
            made.append(item(found, index))
    unique, *places = made[1:]
    size: object = unique.meta["val"].shape[0]
    if any(variable.dynamic for variable in program.of_role(Role.INPUT)):
        with graph.inserting_after(made[-1]):
            size = graph.call_function(aten.sym_size.int, (unique, 0))
            size.meta["val"] = int  # type: ignore[attr-defined]
    _rewrite(table, unique, dict(zip(ids, places, strict=True)), size, known)
    return set(made)


def _hoist(table: _Table, ids: list[Node]) -> None:
    """Moves what ids are made of in front of the first lookup, so that all rows of a step are asked for together."""
    wanted = made_of(ids)
    unmovable = next((node for node in sorted(wanted) if node in table.calls or is_random(node)), None)
    if unmovable is not None:
        raise LoweringError(
            f"'{table.name}' is looked up by ids (at {max(ids).name}) that are made from {unmovable.name}, a lookup of it or a "
            "random draw; expected ids that are known before the first lookup, so that all rows of a step can be asked for "
            "together. Share the variable by: all_reduce."
        )
    move_before(table.calls[0], wanted)


def _rewrite(table: _Table, unique: Node, place: dict[Node, Node], size: object, known: Inference) -> None:
    """Lookups read the rows of `unique`, and gradients are of them, until the table's is complete."""
    if table.mark is not None and table.gradients:
        mark, length = table.mark, table.node.meta["val"].shape[0]
        (source,) = mark.all_input_nodes
        with mark.graph.inserting_before(mark):
            dense = mark.graph.call_function(ops.dense_rows, (source, unique, length, *table.skip))
        mark.replace_input_with(source, dense)
    with before_first_use(table.reads):
        rows = known.call(table.node.graph, ops.take_rows, table.node, unique)
    for node in table.calls:
        put_argument(node, "indices", place[_node(argument(node, "indices"))])
        put_argument(node, *(("weight", rows) if node in table.reads else ("num_weights", size)))
        if argument(node, "padding_idx") not in (None, -1):
            put_argument(node, "padding_idx", 0)
    for node in table.gradients:
        _add_in_order(node)


def _add_in_order(node: Node) -> None:
    """Gradients of plain lookups are added in a third of the time to few rows that lie together, to the same bits.

    Those of bags are not: what is added in which order there, only the operation itself says.
    """
    plain = argument(node, "padding_idx") == -1 and not argument(node, "scale_grad_by_freq")
    if node.target is aten.embedding_dense_backward.default and plain:
        given, indices, size = (argument(node, name) for name in ("grad_output", "indices", "num_weights"))
        node.args, node.kwargs = (given, indices, size), {}  # type: ignore[assignment]
        node.target = ops.add_rows


def _node(value: object) -> Node:
    assert isinstance(value, Node), "ids are computed"
    return value
