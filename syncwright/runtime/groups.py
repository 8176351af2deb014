"""Groups of trainers that meet in collectives: by torch.distributed, and in the memory of the host that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist

from syncwright.runtime.shared_memory import HostGroup, is_available

Members = Sequence[int]


@dataclass(slots=True, eq=False)
class Group:
    """Trainers that meet, this one among them. Changes: its memory is let go when it ends.

    members  their numbers, in order
    handle   torch's; None: all trainers, or one alone
    host     what they share, where they are on one host
    """

    me: int
    members: tuple[int, ...]
    handle: dist.ProcessGroup | None = None
    host: HostGroup | None = None

    @property
    def is_alone(self) -> bool:
        return len(self.members) == 1

    @property
    def place(self) -> int:
        """This trainer's, among the members."""
        return self.members.index(self.me)

    def shared(self, tensor: torch.Tensor) -> HostGroup | None:
        """Shared memory for a tensor; None where it travels otherwise."""
        return self.host if tensor.device.type == "cpu" else None


def meet(
    me: int,
    groups: Mapping[str, Sequence[Members]],
    hosts: Sequence[int],
    connect: Callable[[Members], dist.ProcessGroup],
    share: Callable[[Members, str], HostGroup],
) -> dict[str, Group]:
    """By name the groups that trainer `me` is in. All trainers must come here with the same: each makes all, in one order.

    hosts    how many trainers each host has, in the order of their numbers; () where nobody knows
    connect  makes torch's group of these trainers
    share    makes this trainer's end of the memory that these share, under a name
    """
    ends = list(pairwise(accumulate(hosts, initial=0)))
    found = {}
    for name, several in groups.items():
        for members in several:
            handle = connect(members) if len(members) > 1 else None
            if me not in members:
                continue
            together = any(start <= min(members) and max(members) < stop for start, stop in ends)
            host = share(members, f"group {name}") if is_available(len(members), together) else None
            found[name] = Group(me, tuple(members), handle, host)
    return found
