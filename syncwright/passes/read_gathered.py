"""Where a step reads a parameter of which trainers keep their own (ZeRO's stage 3), it gathers it, once for forward and once
for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from syncwright.passes.insert import before_first_use, behind, first_call
from syncwright.program import Program
from syncwright.regions import turn
from syncwright.shapes import Inference, substitute
from syncwright.text import dtype_text

aten = torch.ops.aten
AS = " as "
AGAIN = "again"
"""Of a channel by which backward gathers what forward has gathered before."""

Whole = Callable[[Node, str], Node]
"""Puts the whole together, in the variable's own shape, at the insertion point, from what this trainer has; by a channel."""


def read_gathered(
    program: Program, node: Node, own: Node, readers: list[Node], keep: bool, whole: Whole, known: Inference
) -> None:
    """Forward reads what it gathers; backward gathers again, unless it is kept. Casts to fewer bytes are made before.

    before  %y = mm(%x, w), %t = mm(%d, t(w))
    after   %y = mm(%x, whole(w[own], "w")), %t = mm(%d, t(whole(w[own], "w again")))
    """
    _Reading(program, str(node.meta["variable"]), keep, whole, known).gather_parameter(node, own, readers)


@dataclass(frozen=True, slots=True, eq=False)
class _Reading:
    program: Program
    name: str
    keep: bool
    whole: Whole
    known: Inference

    def gather_parameter(self, node: Node, own: Node, readers: list[Node]) -> None:
        casts: dict[torch.dtype, list[Node]] = {}
        for reader in readers:
            dtype = reader.meta["val"].dtype if reader.target is aten._to_copy.default else None
            if dtype is not None and dtype.itemsize < node.meta["val"].dtype.itemsize:
                casts.setdefault(dtype, []).append(reader)
        for dtype, same in casts.items():
            with self.program.graph.inserting_before(first_call(self.program.graph)):
                part = self.known.call(self.program.graph, aten._to_copy.default, own, dtype=dtype)
            self._gather_read(part, f"{self.name}{AS}{dtype_text(dtype)}", {cast: list(cast.users) for cast in same})
        rest = [reader for reader in readers if not any(reader in same for same in casts.values())]
        self._gather_read(own, self.name, {node: rest})

    def _gather_read(self, part: Node, channel: str, readers: Mapping[Node, list[Node]]) -> None:
        """Puts values together that stand for one part, where they are read."""
        begins = None if self.keep else turn(self.program)
        uses = [use for node, its in readers.items() for use in _uses(node, its)]
        late = [use for use in uses if begins is not None and use.reader >= begins]
        early = [use for use in uses if use not in late]
        if late:
            with before_first_use(use.reader for use in late):
                again = self.whole(part, f"{channel} {AGAIN}")
            looks = dict.fromkeys(readers, again)
            for use in late:
                use.reader.replace_input_with(use.source, self._look(use.source, looks))
        if early:
            with before_first_use(use.first for use in early):
                whole = self.whole(part, channel)
            for first in {use.first for use in early}:
                for node in readers:
                    first.replace_input_with(node, whole)

    def _look(self, source: Node, looks: dict[Node, Node]) -> Node:
        """The same look at what was gathered again."""
        if source not in looks:
            args, kwargs = substitute((source.args, source.kwargs), lambda node: self._look(node, looks))
            with behind(max(looks.values())):
                looks[source] = self.known.call(self.program.graph, source.target, *args, **kwargs)
        return looks[source]


@dataclass(frozen=True, slots=True, eq=False)
class _Use:
    """Who computes with a variable.

    source  what it reads: the variable, or a look at it
    first   the first look on the way there; the reader itself where there is none
    """

    reader: Node
    source: Node
    first: Node


_LOOKS = frozenset(
    {
        *(aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default, aten.reshape.default),
        *(aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.slice.Tensor, aten.detach.default),
        *(aten.alias.default, aten._to_copy.default, aten.select.int, aten._unsafe_view.default),
    }
)
"""Who reads what these give has the variable itself."""


def _uses(node: Node, readers: Iterable[Node], first: Node | None = None) -> list[_Use]:
    """All that is computed with a value, also through looks at it."""
    found = []
    for reader in readers:
        if reader.target in _LOOKS and len(reader.all_input_nodes) == 1:
            found += _uses(reader, list(reader.users), first or reader)
        else:
            found.append(_Use(reader, node, first or reader))
    return found
