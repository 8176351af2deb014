"""Sums that come one step late, joined into buckets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.passes.bucket import INSIDE
from syncwright.passes.delay import before
from syncwright.passes.insert import item
from syncwright.plan import AllReduce, Plan
from syncwright.program import Program
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    """One sum: where it is begun, and where that of the step before is waited for."""

    start: Node
    wait: Node

    @property
    def val(self) -> torch.Tensor:
        return self.start.args[0].meta["val"]  # type: ignore[union-attr]

    @property
    def channel(self) -> str:
        return str(self.start.args[1])


def bucket_delayed(program: Program, plan: Plan) -> Program:
    """Joins sums that come one step late, as `bucket` does others: in the order in which gradients are complete.

    before  all_reduce.later(%x, "x.grad"), all_reduce.later(%y, "y.grad"), ...,
            %p = wait.before("x.grad"), %q = wait.before("y.grad")
    after   all_reduce.later(cat([%x, %y]), "delayed.0"), ..., %w = wait.before("delayed.0"), %p, %q = split(%w)

    The weights go with the first gradients of their type.
    """
    caps = {f"{s.variable}.grad": int(s.sync.bucket_mb * 2**20) for s in plan.sharings if isinstance(s.sync, AllReduce)}
    if len(program.graph.find_nodes(op="call_function", target=ops.wait_before)) < 2:
        return program
    program = program.edit()
    known = Inference(mode_of(program.graph))
    waits = {n.args[0]: n for n in program.graph.find_nodes(op="call_function", target=ops.wait_before)}
    starts = program.graph.find_nodes(op="call_function", target=ops.all_reduce_later)
    members = [_Member(start, waits[start.args[1]]) for start in sorted(starts)]
    for index, group in enumerate(_grouped(members, caps)):
        if len(group) > 1:
            _join(program, group, f"delayed.{index}", known)
    return program


def _grouped(members: list[_Member], caps: Mapping[str, int]) -> Iterator[list[_Member]]:
    """A bucket is closed by one that does not fit; a number fits everywhere."""
    for dtype in dict.fromkeys(member.val.dtype for member in members):
        group: list[_Member] = []
        for member in [each for each in members if each.val.dtype is dtype]:
            gradients = [each for each in (*group, member) if each.channel in caps]
            most = min((caps[each.channel] for each in gradients), default=0)
            if len(gradients) > 1 and sum(each.val.nbytes for each in gradients) > most:
                yield group
                group = []
            group.append(member)
        yield group


def _join(program: Program, group: list[_Member], channel: str, known: Inference) -> None:
    graph, last = program.graph, max(member.start for member in group)
    sizes = [member.val.numel() for member in group]
    with graph.inserting_before(last):
        flat = [
            known.call(graph, aten.reshape.default, m.start.args[0], [n]) for m, n in zip(group, sizes, strict=True)
        ]
        joined = known.call(graph, aten.cat.default, flat)
        started = known.call(graph, ops.all_reduce_later, joined, channel)
        started.meta[INSIDE] = tuple(member.channel for member in group)
    with graph.inserting_before(min(member.wait for member in group)):
        came = before(channel, joined.meta["val"], joined, known)
        parts = known.call(graph, aten.split_with_sizes.default, came, sizes)
        for index, member in enumerate(group):
            part = known.call(graph, aten.view.default, item(parts, index), list(member.val.shape))
            member.wait.replace_all_uses_with(part)
    for member in group:
        graph.erase_node(member.wait)
        graph.erase_node(member.start)
