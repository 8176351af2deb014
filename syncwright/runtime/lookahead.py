"""The next batch, known one step ahead: the rows of tables that it needs are asked for while the present step runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.fx import GraphModule, Node

from syncwright import ops
from syncwright.program import Program, Role
from syncwright.tree import leaves, skeleton

Found = Mapping[str, list[torch.Tensor]]
"""By the name of a node that makes ids distinct, what it gives."""


class Announced(Protocol):
    """Who is told what the next batch is."""

    @property
    def looks_ahead(self) -> bool: ...

    def announce(self, batch: object) -> None: ...


def looking_ahead(batches: Iterable, session: Announced) -> Iterator:
    """The same batches, each announced before the one in front of it is given, from when that helps."""
    given, end = iter(batches), object()
    batch = next(given, end)
    while batch is not end:
        if not session.looks_ahead:
            yield batch
            batch = next(given, end)
            continue
        following = next(given, end)
        if following is not end:
            session.announce(following)
        yield batch
        batch = following


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """Rows that a step pulls: the node that makes their ids distinct, the channel, and as of when."""

    unique: str
    channel: str
    when: str


class IndexProgram:
    """The part of a trainer's step that leads from its batch to the ids of rows.

    before  the step: %u = unique([view(ids)], -1), %rows = pull_rows(%u[0], "w", ...), everything else
    after   %u = unique([view(ids)], -1)
    """

    def __init__(self, program: Program):
        made: dict[str, Node] = {}
        lookups = []
        for node in program.graph.find_nodes(op="call_function", target=ops.pull_rows):
            unique = node.args[0].args[0]  # type: ignore[union-attr]
            if _is_of_batch(unique, program):  # type: ignore[arg-type]
                made[unique.name] = unique  # type: ignore[union-attr, assignment]
                lookups.append(
                    Lookup(unique.name, str(node.args[1]), str(node.args[4] if len(node.args) > 4 else "step"))
                )  # type: ignore[union-attr]
        self.lookups = tuple(lookups)
        sliced = program.slice(made) if made else None
        self._reads = () if sliced is None else sliced.reads
        # As Python code: between so small operations an interpreter of nodes takes as long as they do.
        self._code = None if sliced is None else GraphModule({}, sliced.graph)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, torch.Tensor]) -> Found:
        """What the nodes give for a batch."""
        assert self._code is not None, "there are lookups"
        return self._code(*[inputs[name] for name in self._reads])


def _is_of_batch(node: Node, program: Program) -> bool:
    """Whether a value is made from the batch alone."""
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in ops.COMMUNICATION:
            return False
        if node.op == "placeholder" and program.variables[node.meta["variable"]].role is not Role.INPUT:
            return False
        stack.extend(node.all_input_nodes)
    return True


def is_same(one: tuple, other: tuple) -> bool:
    """Whether two batches are the same objects."""
    mine, theirs = leaves(one), leaves(other)
    return len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))


def is_alike(one: tuple, other: tuple) -> bool:
    """Whether two batches have the same tree, with tensors of the same shapes."""
    return skeleton(one) == skeleton(other) and all(
        (a.shape, a.dtype) == (b.shape, b.dtype)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        else a == b
        for a, b in zip(leaves(one), leaves(other), strict=True)
    )
