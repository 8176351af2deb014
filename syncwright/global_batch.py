"""Lookups that only the whole batch can tell: what `max_norm` and `scale_grad_by_freq` need no trainer knows."""

from __future__ import annotations

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.errors import LoweringError
from syncwright.plan import Local, LocalSteps, ParameterServer, Plan
from syncwright.program import Program

aten = torch.ops.aten
_SCALED = {
    aten.embedding_dense_backward.default: 4,
    aten._embedding_bag_dense_backward.default: 6,
    aten._embedding_bag_backward.default: 7,
}
"""Gradients of lookups, with the place of `scale_grad_by_freq` among their arguments."""


def check_lookups(program: Program, plan: Plan) -> None:
    """Raises `LoweringError` for tables whose lookups differ between parts of a batch and the whole.

    scale_grad_by_freq  divides a row's gradient by how often the *global* batch looks the row up
    max_norm            writes to the rows that the global batch looks up, in the forward: replicas would drift apart
    """
    for name, what in _asking(program).items():
        sync = plan.sharing(name).sync
        shared = plan.trainers > 1 and not isinstance(sync, Local | LocalSteps)
        if what == "scale_grad_by_freq" and shared:
            raise LoweringError(
                f"'{name}' is looked up with scale_grad_by_freq=True, which divides by how often the global batch looks a "
                "row up; a trainer sees its own part only. Expected gradients that add up over the parts of a batch. Leave "
                "the option out, train with one trainer, or share the variable by: local."
            )
        if what == "max_norm" and (shared or isinstance(sync, ParameterServer)):
            raise LoweringError(
                f"'{name}' is looked up with max_norm, which rescales the rows that a batch looks up, in the forward; each "
                "trainer would rescale those of its own part. Expected a table that only its update writes to. Rescale the "
                "rows that were looked up (rows / rows.norm(dim=-1, keepdim=True).clamp(min=1)), train with one trainer "
                "under all_reduce, or share the variable by: local."
            )


def _asking(program: Program) -> dict[str, str]:
    """Tables with such an option, and the option."""
    found = {}
    for node in program.graph.nodes:
        if node.target is aten.embedding_renorm.default:
            found[_table(node)] = "max_norm"
        elif node.target in _SCALED and node.args[_SCALED[node.target]] is True and (name := _marked(node)):
            found.setdefault(name, "scale_grad_by_freq")
    return found


def _table(node: Node) -> str:
    """The variable that a chain of rescalings begins with."""
    while node.target is aten.embedding_renorm.default:
        node = node.args[0]  # type: ignore[assignment]
    return str(node.meta.get("variable"))


def _marked(node: Node) -> str | None:
    """The parameter whose gradient `node` goes into."""
    stack, seen = [node], set()
    while stack:
        node = stack.pop()
        if node.target is ops.gradient:
            return str(node.args[1])
        if node not in seen:
            seen.add(node)
            stack.extend(node.users)
    return None
