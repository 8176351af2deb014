"""Reductions to parts, and gatherings of parts, joined into buckets; parameters gathered ahead of where they are read."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from operator import getitem

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.passes.bucket import INSIDE
from syncwright.passes.insert import first_call
from syncwright.passes.read_gathered import AGAIN, AS
from syncwright.plan import AllReduce, Plan, Shard
from syncwright.program import Program
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Member:
    """One value: where its reduction or gathering starts, where it is waited for, its bytes.

    name     of its channel
    cap      of a bucket; None: a number, of which all go together
    again    gathered by backward, after forward
    ahead    gathered so many buckets ahead; None: it is sent as soon as it is there
    sources  what it is sent as: itself, or what a compression has made of it
    """

    start: Node
    wait: Node
    sources: tuple[Node, ...]
    name: str
    nbytes: int
    cap: int | None
    again: bool = False
    ahead: int | None = None

    @property
    def source(self) -> Node:
        """The last that is there of what is sent."""
        return max(self.sources)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...] | None:
        """Of what is sent; None where a compression says them itself."""
        return None if len(self.wait.args) > 3 else tuple(each.meta["val"].dtype for each in self.sources)

    def is_like(self, other: Member) -> bool:
        """Whether both may be in one bucket."""
        mine, its = (self.cap, self.again, self.ahead), (other.cap, other.again, other.ahead)
        return self.dtypes == other.dtypes and mine == its

    @property
    def way(self) -> tuple[object, ...]:
        """How it travels: between trainers of which group, or to or from one of them."""
        return self.start.target, *self.start.args[2:]


Bucket = list[Member]


def bucket_parts(program: Program, plan: Plan) -> Program:
    """Joins reductions to parts and gatherings of parts; a bucket is gathered before the one in front of it is read.

    before  %a = reduce_scatter([%x], "x.grad"), %b = reduce_scatter([%y], "y.grad"), ..., %p = wait_own(%a), %q = wait_own(%b)
    after   %a = reduce_scatter([%x, %y], "parts.0"), ..., %w = wait_own(%a), %p, %q = split(%w)

    before  %a = gather_parts([x[own]], "x"), %p = wait_whole(%a), %b = gather_parts([y[own]], "y"), %q = wait_whole(%b)
    after   %a = gather_parts([x[own], y[own]], "whole.0"), %w = wait_whole(%a), %p = %w[0], %q = %w[1]

    Buckets are made as `bucket` makes them: consecutive in order of completion, or of first use. What forward gathers last and
    backward reads first is gathered once. What one trainer gets or gives (`reduce_to`, `give`) has buckets of its own. Compressed
    gradients that are gathered are joined as what is reduced is: their bytes are what travels of them.
    """
    syncs = {s.variable: s.sync for s in plan.sharings if isinstance(s.sync, Shard)}
    caps = {f"{s.variable}.grad": int(s.sync.bucket_mb * 2**20) for s in plan.sharings if isinstance(s.sync, AllReduce)}
    if not _calls(program, ops.gather_parts, ops.give):
        return program
    program = program.edit()
    known = Inference(mode_of(program.graph))
    for index, members in enumerate(_grouped(_scattered(program, syncs))):
        _join_scattered(program, f"parts.{index}", members, known)
    compressed = _compressed(program, caps)
    gathered = [
        (members, _join_gathered(program, f"whole.{index}", members, known))
        for index, members in enumerate(_grouped(_gathered(program, syncs, {member.start for member in compressed})))
    ]
    for index, members in enumerate(_grouped(compressed)):
        _join_gathered(program, f"compressed.{index}", members, known)
    ahead = [(members, *nodes) for members, nodes in gathered if members[0].ahead is not None]
    once = _gathered_once(ahead)
    remove_dead(program.graph)
    _gather_ahead(program, once)
    return program


def _calls(program: Program, *targets: Callable) -> list:
    return sorted(node for target in targets for node in program.graph.find_nodes(op="call_function", target=target))


def _scattered(program: Program, syncs: Mapping[str, Shard]) -> list[Member]:
    """In the order in which they are complete."""
    found = []
    for start in _calls(program, ops.reduce_scatter, ops.reduce_to):
        (wait,) = start.users
        (source,), channel = start.args[:2]
        sync = syncs[str(channel).removesuffix(".grad")]
        found.append(
            Member(start, wait, (source,), str(channel), source.meta["val"].nbytes, int(sync.bucket_mb * 2**20))
        )
    return found


def _compressed(program: Program, caps: Mapping[str, int]) -> list[Member]:
    """In the order in which they are complete."""
    found = []
    for start in program.graph.find_nodes(op="call_function", target=ops.gather_parts):
        sources, channel = start.args[:2]
        if channel in caps:
            (wait,) = start.users
            nbytes = sum(source.meta["val"].nbytes for source in sources)
            found.append(Member(start, wait, tuple(sources), channel, nbytes, caps[channel]))
    return found


def _gathered(program: Program, syncs: Mapping[str, Shard], others: Container[Node]) -> list[Member]:
    """In the order in which they are waited for."""
    found = []
    for start in _calls(program, ops.gather_parts, ops.give):
        if start in others:
            continue
        (wait,) = start.users
        (source,), channel, number = start.args[:3]
        trainers = 1 if start.target is ops.give else number
        name, again = str(channel).removesuffix(f" {AGAIN}"), str(channel).endswith(f" {AGAIN}")
        sync, nbytes = syncs.get(name.partition(AS)[0]), source.meta["val"].nbytes * trainers
        cap = None if sync is None else int(sync.bucket_mb * 2**20)
        ahead = sync.prefetch if sync is not None and _is_kept(source) else None
        found.append(Member(start, wait, (source,), str(channel), nbytes, cap, again, ahead))
    return sorted(found, key=lambda member: member.wait)


def _is_kept(source: Node) -> bool:
    """Whether a part is there from the beginning: a parameter's, or a cast of it."""
    return source.op == "placeholder" or (
        source.target is aten._to_copy.default and source.all_input_nodes[0].op == "placeholder"
    )


def _grouped(members: Bucket) -> list[Bucket]:
    """Next fit: a bucket is closed by a member that does not fit, or is not there where the first is waited for."""
    groups: list[Bucket] = []
    open_: dict[tuple[object, ...], Bucket] = {}
    for member in members:
        current = open_.get(member.way, [])
        if current and member.is_like(current[0]) and _fits(current, member):
            current.append(member)
        else:
            groups.append([member])
            open_[member.way] = groups[-1]
    return groups


def _fits(group: Bucket, member: Member) -> bool:
    there = all(member.source < each.wait for each in group)
    full = member.cap is not None and sum(each.nbytes for each in (*group, member)) > member.cap
    return there and not full


def _join_scattered(program: Program, channel: str, members: Bucket, known: Inference) -> None:
    graph, (target, *among) = program.graph, members[0].way
    counts = [member.start.meta["val"].numel() for member in members]
    with graph.inserting_before(max(member.start for member in members)):
        started = known.call(graph, target, [member.source for member in members], channel, *among)
        started.meta[INSIDE] = tuple(member.name for member in members)
    with graph.inserting_before(min(member.wait for member in members)):
        parts = [known.call(graph, ops.wait_own, started, channel)]
        if len(members) > 1:
            split = known.call(graph, aten.split_with_sizes.default, parts[0], counts)
            parts = [known.call(graph, getitem, split, index) for index, _ in enumerate(members)]
    for member, part in zip(members, parts, strict=True):
        member.wait.replace_all_uses_with(part)
        graph.erase_node(member.wait)
        graph.erase_node(member.start)


def _join_gathered(program: Program, channel: str, members: Bucket, known: Inference) -> tuple[Node, Node]:
    graph, (target, *among) = program.graph, members[0].way
    sizes = [size for member in members for size in member.wait.args[2]]  # type: ignore[union-attr]
    sources = [source for member in members for source in member.sources]
    dtypes = [[name for member in members for name in member.wait.args[3]]] if members[0].dtypes is None else []  # type: ignore[union-attr]
    calls = [source for source in sources if source.op != "placeholder"]
    with graph.inserting_after(max(calls)) if calls else graph.inserting_before(min(m.wait for m in members)):
        started = known.call(graph, target, sources, channel, *among)
        started.meta[INSIDE] = tuple(member.name for member in members)
    with graph.inserting_before(min(member.wait for member in members)):
        waited = known.call(graph, ops.wait_whole, started, channel, sizes, *dtypes)
        parts = [known.call(graph, getitem, waited, index) for index, _ in enumerate(sources)]
    for member in members:
        own, parts = parts[: len(member.sources)], parts[len(member.sources) :]
        for pick in list(member.wait.users):
            pick.replace_all_uses_with(own[pick.args[1]])  # type: ignore[index]
            graph.erase_node(pick)
        graph.erase_node(member.wait)
        graph.erase_node(member.start)
    return started, waited


Ahead = tuple[Bucket, Node, Node]
"""A bucket of parameters, where its gathering starts and where it is waited for."""


def _gathered_once(buckets: list[Ahead]) -> list[Ahead]:
    """Without what backward reads first of what forward has gathered last: it is still there."""
    last = next((each for each in reversed(buckets) if not each[0][0].again), None)
    first = next((each for each in buckets if each[0][0].again), None)
    if last is None or first is None:
        return buckets
    there = {member.source: pick for member, pick in zip(last[0], _picks(last[2]), strict=True)}
    if not all(member.source in there for member in first[0]):
        return buckets
    for member, pick in zip(first[0], _picks(first[2]), strict=True):
        pick.replace_all_uses_with(there[member.source])
    return [each for each in buckets if each is not first]


def _picks(waited: Node) -> list[Node]:
    return sorted(waited.users, key=lambda pick: pick.args[1])  # type: ignore[arg-type, return-value]


def _gather_ahead(program: Program, buckets: list[Ahead]) -> None:
    """Starts each bucket before so many others are read that stand in front of it."""
    waits = [waited for _, _, waited in buckets]
    for index, (members, started, _) in enumerate(buckets):
        before = index - int(members[0].ahead or 0)
        calls = [member.source for member in members if member.source.op != "placeholder"]
        if before >= 0:
            for node in [*(call for call in calls if call > waits[before]), started]:
                waits[before].prepend(node)
        elif calls:
            max(calls).append(started)
        elif (first := first_call(program.graph)) is not started:
            first.prepend(started)
