"""Which reductions a bucket pass joins, on a program made of nothing but reductions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph

from syncwright import ops
from syncwright.passes.bucket import bucket
from syncwright.plan import AllReduce, Plan, Sharing
from syncwright.program import Program, Role, Variable, new_placeholder
from syncwright.shapes import call, fake_of, mode_of


def buckets_of(sizes: Sequence[int], cap: int) -> list[list[int]]:
    """The sizes (in bytes) that each collective carries, for gradients that are complete in this order."""
    program = _program(sizes)
    sharings = tuple(Sharing(f"p{i}", AllReduce(cap / 2**20), (size,)) for i, size in enumerate(sizes))
    joined = bucket(program, Plan("", 2, 0, None, sharings))
    sent = [n.args[0] for n in joined.graph.nodes if n.target is ops.all_reduce]
    return [_members(node) for node in sent]


def _members(node) -> list[int]:
    joined = node.target is torch.ops.aten.cat.default
    return [m.meta["val"].numel() for m in (node.args[0] if joined else [node])]


def _program(sizes: Sequence[int]) -> Program:
    graph, mode = Graph(), mode_of(Graph())
    variables = [Variable(f"p{i}", Role.PARAM, (size,), torch.uint8) for i, size in enumerate(sizes)]
    given = [new_placeholder(graph, v, fake_of(mode, v)) for v in variables]
    started = [call(graph, mode, ops.all_reduce, x, f"{v.name}.grad") for x, v in zip(given, variables, strict=True)]
    waited = [call(graph, mode, ops.wait, x, f"{v.name}.grad") for x, v in zip(started, variables, strict=True)]
    graph.output({v.name: x for v, x in zip(variables, waited, strict=True)})
    return Program(graph, {v.name: v for v in variables})
