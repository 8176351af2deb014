"""Collectives joined into buckets: consecutive in order of completion, one dtype, up to `bucket_mb`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import getitem

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.passes.average import PIECE
from syncwright.passes.insert import in_group
from syncwright.plan import ALL, BY_NODE, AllReduce, Plan
from syncwright.program import Program
from syncwright.schema import argument
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten
FIRST, SECOND = "left", "right"
"""What stands behind a gradient's channel for its factors (see `power_sgd`)."""
INSIDE = "inside"
"""The key in an all-reduce's meta under which the names of its values stand."""


@dataclass(frozen=True, slots=True)
class Member:
    """One value to reduce: where its reduction starts, where it is waited for, its bytes, and its cap."""

    start: Node
    wait: Node
    nbytes: int
    cap: int | None

    @property
    def group(self) -> str:
        """Of the trainers that reduce it."""
        return str(argument(self.start, "group"))

    @property
    def dtype(self) -> torch.dtype:
        return self.start.meta["val"].dtype

    @property
    def numel(self) -> int:
        return self.start.meta["val"].numel()


def bucket(program: Program, plan: Plan) -> Program:
    """Joins all-reduces.

    before  %a = all_reduce(%x, "x"), %b = all_reduce(%y, "y"), ..., %p = wait(%a), %q = wait(%b)
    after   %c = cat([%x, %y]), %a = all_reduce(%c, "bucket.0"), ..., %w = wait(%a), %p, %q = split(%w)

    A bucket starts when its last member is complete and is waited for where the first of it is used. Values that are
    not gradients (the weights, the loss) ride with the next gradient of their dtype, whatever the cap. Groups of trainers have
    buckets of their own.
    Sizes [20, 10, 5, 40, 1] with cap 32 give [20, 10], [5], [40], [1] (PyTorch DDP's rule, in order of completion).
    """
    reduced = {s.variable: int(s.sync.bucket_mb * 2**20) for s in plan.sharings if isinstance(s.sync, AllReduce)}
    caps = {f"{name}.grad{part}": cap for name, cap in reduced.items() for part in ("", f".{FIRST}", f".{SECOND}")}
    if not program.graph.find_nodes(op="call_function", target=ops.all_reduce):
        return program
    program = program.edit()
    known = Inference(mode_of(program.graph))
    for index, members in enumerate(_group(_members(program, caps))):
        _join(program, f"bucket.{index}", members, known)
    remove_dead(program.graph)
    return program


def _members(program: Program, caps: Mapping[str, int]) -> list[Member]:
    found = []
    for node in program.graph.nodes:
        if node.target is ops.all_reduce:
            (wait,) = node.users
            val = node.meta["val"]
            cap = caps.get(str(node.args[1]).partition(PIECE)[0])
            found.append(Member(node, wait, val.numel() * val.element_size(), cap))
    return found


def _group(members: list[Member]) -> list[list[Member]]:
    """Next fit per dtype: a bucket is closed by a member that does not fit, and never opened again. Those of other trainers have
    buckets of their own."""
    groups: list[list[Member]] = []
    riding: dict[tuple[torch.dtype, str], list[Member]] = {}
    open_: dict[str, list[Member]] = {}
    for member in members:
        if member.cap is None:
            riding.setdefault((member.dtype, member.group), []).append(member)
            continue
        current = open_.get(member.group, [])
        riders = riding.pop((member.dtype, ALL if member.group == BY_NODE else member.group), [])
        early = [rider for rider in riders if rider.wait < member.start]
        if early:  # what gathered rows are divided by may be waited for before any gradient is complete
            groups.append(early)
            riders = [rider for rider in riders if rider not in early]
        if current and _fits(current, member, riders):
            current += [*riders, member]
        else:
            open_[member.group] = [*riders, member]
            groups.append(open_[member.group])
    return groups + [group for left in riding.values() for group in _in_time(left)]


def _in_time(members: list[Member]) -> list[list[Member]]:
    """Values that no gradient takes along: each starts before any of its group is waited for."""
    groups: list[list[Member]] = []
    for member in members:
        if groups and all(member.start < other.wait for other in groups[-1]):
            groups[-1].append(member)
        else:
            groups.append([member])
    return groups


def _fits(group: list[Member], member: Member, riders: list[Member]) -> bool:
    first = next(m for m in group if m.cap is not None)
    used = sum(m.nbytes for m in group if m.cap is not None)
    used_before_complete = any(m.wait < member.start for m in [*group, *riders])
    same = first.dtype is member.dtype and first.cap == member.cap
    return same and used + member.nbytes <= int(first.cap or 0) and not used_before_complete


def _join(program: Program, channel: str, members: list[Member], known: Inference) -> None:
    graph = program.graph
    last, first_wait = max(m.start for m in members), min(m.wait for m in members)
    group = next((m.group for m in members if m.cap is not None), members[0].group)
    inside = tuple(str(m.start.args[1]) for m in sorted(members, key=lambda m: m.cap is None))  # gradients first
    if len(members) == 1:
        members[0].start.meta[INSIDE] = inside
        members[0].start.args = (members[0].start.args[0], channel, *in_group(group))
        members[0].wait.args = (members[0].start, channel)
        return
    with graph.inserting_before(last):
        flat = [known.call(graph, aten.reshape.default, m.start.args[0], [m.numel]) for m in members]
        joined = known.call(graph, aten.cat.default, flat)
        started = known.call(graph, ops.all_reduce, joined, channel, *in_group(group))
        started.meta[INSIDE] = inside
    with graph.inserting_before(first_wait):
        waited = known.call(graph, ops.wait, started, channel)
        parts = known.call(graph, aten.split_with_sizes.default, waited, [m.numel for m in members])
        for index, member in enumerate(members):
            part = known.call(graph, getitem, parts, index)
            member.wait.replace_all_uses_with(
                known.call(graph, aten.view.default, part, list(member.start.meta["val"].shape))
            )
    for member in members:
        graph.erase_node(member.wait)
        graph.erase_node(member.start)
