"""Groups: which trainers communicate with each other, by the name that an operation gives their group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from syncwright.plan.sync import AllReduce, Local, LocalSteps, Shard, Sync

ALL = ""
NODE = "node"
"""The trainers of one host."""
ACROSS = "across"
"""Those that have the same place on their hosts, which have as many trainers each."""
FIRSTS = "firsts"
"""The first trainers of all hosts; every other is alone."""
BY_NODE = "by node"
"""All trainers, of whom those of a host communicate first: what `reduce_by_node` makes of it is among the groups above."""

Members = tuple[tuple[int, ...], ...]
"""Groups of trainers, by their numbers: every trainer is in one."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of so many trainers.

    hosts  how many trainers each host has, in the order of their numbers; () where nothing is by hosts
    """

    trainers: int
    hosts: tuple[int, ...] = ()

    @property
    def is_even(self) -> bool:
        """Whether all hosts have as many trainers."""
        return len(set(self.hosts)) == 1

    def of(self, sync: Sync) -> str:
        """Whose gradients of a variable are reduced together."""
        several = len(self.hosts) > 1
        match sync:
            case AllReduce(over="node"):
                return NODE if several else ALL
            case AllReduce(hierarchical=True):
                return BY_NODE if several and max(self.hosts) > 1 else ALL
            case AllReduce(over=tuple() as over):
                name = _name(over)
                return name if len(self.members(name)) > 1 else ALL
            case Shard(within="node"):
                return BY_NODE if several else ALL
        return ALL

    def members(self, name: str) -> Members:
        """The groups of this name."""
        match name:
            case "" | "by node":
                return (tuple(range(self.trainers)),)
            case "node":
                return tuple(tuple(range(*ends)) for ends in pairwise(accumulate(self.hosts, initial=0)))
            case "across":
                return tuple(zip(*self.members(NODE), strict=True))
            case "firsts":
                return self._with_others([each[0] for each in self.members(NODE)])
        return self._with_others(*([int(number) for number in each.split(",")] for each in name.split(";")))

    def alike(self, sync: Sync) -> Members:
        """The groups of trainers whose copies of a variable are equal after every step."""
        match sync:
            case Local() | LocalSteps():
                return tuple((trainer,) for trainer in range(self.trainers))
        return self.members(self.of(sync))

    def size(self, name: str) -> int | None:
        """How many trainers each of the groups has; None where they differ."""
        sizes = {len(each) for each in self.members(name)}
        return sizes.pop() if len(sizes) == 1 else None

    def around(self, name: str, trainer: int) -> tuple[int, ...]:
        """The group that a trainer is in, itself among them."""
        return next(each for each in self.members(name) if trainer in each)

    def cut_among(self, sync: Shard) -> int:
        """How many trainers keep parts that make up one variable."""
        return self.hosts[0] if self.of(sync) == BY_NODE else self.trainers

    def needed(self, syncs: Iterable[Sync]) -> list[str]:
        """The groups that trainers meet in, in an order that is the same for all."""
        found: dict[str, None] = {}
        for sync in syncs:
            name = self.of(sync.over if isinstance(sync, LocalSteps) and isinstance(sync.over, AllReduce) else sync)
            if name == BY_NODE:
                found |= dict.fromkeys((NODE, ACROSS if self.is_even else FIRSTS))
            elif name != ALL:
                found[name] = None
        return list(found)

    def _with_others(self, *groups: Sequence[int]) -> Members:
        """Groups, and all who are in none alone."""
        named = {trainer for each in groups for trainer in each}
        others = [(trainer,) for trainer in range(self.trainers) if trainer not in named]
        return tuple(sorted([*(tuple(sorted(each)) for each in groups), *others]))


def _name(over: tuple) -> str:
    """(0, 1) -> "0,1", ((0, 1), (2, 3)) -> "0,1;2,3\""""
    groups = over if isinstance(over[0], tuple) else (over,)
    return ";".join(",".join(map(str, sorted(each))) for each in sorted(groups))


def is_within(fine: Members, coarse: Members) -> bool:
    """Whether trainers that are together in `fine` are so in `coarse`."""
    of = {trainer: index for index, each in enumerate(coarse) for trainer in each}
    return all(len({of[trainer] for trainer in each}) == 1 for each in fine)


def fault(sync: Sync, groups: Groups) -> tuple[str, str, str] | None:
    """What was found, what was expected and what to do, where a variable cannot be shared so among these trainers."""
    if isinstance(sync, AllReduce) and isinstance(sync.over, tuple):
        flat = [t for each in sync.over for t in (each if isinstance(each, tuple) else (each,))]
        unknown = [trainer for trainer in flat if trainer >= groups.trainers]
        if unknown:
            expected = f"some of the {groups.trainers} trainers, which count from 0"
            return f"over with trainer {unknown[0]}", expected, "Name trainers that there are, or start as many."
    if isinstance(sync, Shard) and sync.within == "node" and not groups.is_even:
        found = f"within: node on hosts of {', '.join(map(str, groups.hosts))} trainers"
        expected = "as many on each: a part has its owner on every host, and these reduce its gradient"
        return found, expected, "Start as many on each host, or leave within out."
    return None
