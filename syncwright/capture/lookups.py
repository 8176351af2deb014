"""Which parameters are sparse: read by lookups alone, so that few rows of their gradient are not zero."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.fx import Node

from syncwright.errors import CaptureError
from syncwright.program import Program, Role, Variable
from syncwright.update import find_marks, followed

log = logging.getLogger("syncwright")
aten = torch.ops.aten

LOOKUPS = {
    aten.embedding.default: 0,
    aten._embedding_bag.default: 0,
    aten._embedding_bag_forward_only.default: 0,
    aten._embedding_bag_per_sample_weights_backward.default: 1,
}
"""Operations that read rows of a table, with the place of the table among their arguments."""
SPARSE_GRADIENTS = frozenset(
    {
        aten.embedding_dense_backward.default,
        aten._embedding_bag_backward.default,
        aten._embedding_bag_dense_backward.default,
    }
)


def with_sparsity(program: Program) -> dict[str, Variable]:
    """The program's variables, with `sparse` where the gradient is made by lookups and nothing else reads the table.

    A table that a trainer also reads whole (a tied output layer, a penalty, its norm as a metric, also without a
    gradient) is dense: a trainer needs all of it. The log says which read makes it so.
    """
    variables, dense = dict(program.variables), _read_whole(program)
    for name, mark in find_marks(program).items():
        if not _looked_up(program, name):
            continue
        lazy = mark.meta["val"].shape != variables[name].shape
        gradient = mark.args[0].args[0][0] if lazy else mark.args[0]  # type: ignore[index, union-attr]
        looked_up = from_lookups(gradient)  # type: ignore[arg-type]
        if lazy and not looked_up:
            raise CaptureError(
                f"'{name}' is looked up with sparse=True, but its gradient is also made otherwise (at {gradient}), and "
                "so dense, which SparseAdam does not take. Expected lookups with sparse=True alone. Use Adam for this table, "
                "or detach what else reads it."
            )
        if name in dense:
            log.info("'%s' is looked up, and also read whole (at %s): it counts as dense", name, dense[name].name)
        variables[name] = replace(variables[name], sparse=looked_up and name not in dense, lazy=lazy)
    return variables


def from_lookups(node: Node) -> bool:
    """The gradient is a lookup's, or the sum of several lookups' of one table (also of several backward passes)."""
    if node.target is aten.clone.default:
        return from_lookups(node.args[0])  # type: ignore[arg-type]
    if node.target is aten.slice.Tensor and node.args[0].target is aten.cat.default:  # type: ignore[union-attr]
        return from_lookups(node.args[0].args[0][0])  # type: ignore[index, union-attr]
    if node.target is aten.add.Tensor:
        return not node.kwargs and all(isinstance(a, Node) and from_lookups(a) for a in node.args)
    return node.target in SPARSE_GRADIENTS


def _looked_up(program: Program, name: str) -> bool:
    table = program.placeholders.get(name)
    return table is not None and any(_is_lookup_of(user, table) for user in table.users)


def _is_lookup_of(node: Node, table: Node) -> bool:
    place = LOOKUPS.get(node.target)  # type: ignore[call-overload]
    return place is not None and node.args[place] is table


def _read_whole(program: Program) -> dict[str, Node]:
    """Parameters that a trainer reads otherwise than by lookups, each with one such read.

    A trainer computes the gradients, what the step returns, and buffers; updates, which read parameters whole, run
    where the parameter is.
    """
    results, follows = program.results, followed(program)
    own = (Role.OUTPUT, Role.BUFFER)
    roots = [n for name, n in results.items() if program.variables[name].role in own and name not in follows]
    stack, seen, found = [*find_marks(program).values(), *roots], set(), {}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for source in _read_by(node):
            if source.op == "placeholder" and program.variables[source.meta["variable"]].role is Role.PARAM:
                found.setdefault(source.meta["variable"], node)
            else:
                stack.append(source)
    found |= {node.meta["variable"]: program.output for node in roots if node.op == "placeholder"}
    return found


def _read_by(node: Node) -> Iterator[Node]:
    """What a node reads, without the table of a lookup."""
    return (source for source in node.all_input_nodes if not (source.op == "placeholder" and _only_rows(node, source)))


def _only_rows(node: Node, table: Node) -> bool:
    return _is_lookup_of(node, table) and sum(argument is table for argument in node.args) == 1
