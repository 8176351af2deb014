"""Collectives: sums and copies among the trainers, by torch.distributed; errors name the late."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from itertools import accumulate, pairwise
from typing import cast

import torch
import torch.distributed as dist

from syncwright.errors import ClusterError, DeadlineExceeded, JobError
from syncwright.runtime.deadlines import Deadlines, Wait
from syncwright.runtime.gathers import CopiedGathered, HostGathered, Pieces
from syncwright.runtime.groups import Group, Members, meet
from syncwright.runtime.heartbeat import Heartbeat
from syncwright.runtime.host_copies import HostCopies
from syncwright.runtime.kept_whole import CopiedGift, CopiedSum, HostGift, HostSumToOne
from syncwright.runtime.messages import Address, Kind
from syncwright.runtime.rendezvous import Rendezvous, look_up
from syncwright.runtime.scatters import CopiedScattered, ExchangedScattered, HostScattered
from syncwright.runtime.shared_memory import HostGroup, can_share, is_available
from syncwright.runtime.transport import Gathered, HostWork, Scattered, Work

SLICE_SECONDS = 1.0
"""How long a wait sleeps before it looks whether somebody is lost (and lets Ctrl-C through)."""


class Collectives:
    """Changes: holds the trainers' process group, which it joins at first use, and groups of some of them.

    A group that the script has initialised itself is used as it is, and left as it is. With one trainer there
    is nothing to do, and no group. A Gloo operation that is under way cannot be stopped: if its peers live
    and never join it, the group is left as it is when this ends (it would wait for them).

    watch   raises when a role is known to be lost; called about once a second while waiting
    """

    def __init__(
        self,
        me: Address,
        rendezvous: Rendezvous,
        deadlines: Deadlines,
        heartbeat: Heartbeat,
        watch: Callable[[], None],
    ) -> None:
        self.me = me
        self._rendezvous = rendezvous
        self._deadlines = deadlines
        self._heartbeat = heartbeat
        self._watch = watch
        self._joined = self._created = False
        self._under_way: dict[str, dist.Work] = {}
        self._groups = {"": Group(me.rank, (me.rank,))}
        self._on_host: HostGroup | None = None
        self._copies: HostCopies | None = None

    @property
    def others(self) -> list[Address]:
        """The other trainers."""
        peers = [Address(Kind.TRAINER, rank) for rank in range(self._rendezvous.place.trainers)]
        return [peer for peer in peers if peer != self.me]

    def join(self) -> None:
        """Makes or finds the process group; all trainers must come to it."""
        if self.me.kind is not Kind.TRAINER:
            raise JobError(f"{self.me} takes part in no collective: they are among trainers only")
        trainers = self._rendezvous.place.trainers
        if self._joined or trainers == 1:
            return
        if dist.is_initialized():
            self._check_group(trainers)
        else:
            self._create_group(trainers)
        self._joined = True
        host = self._rendezvous.place.one_host and is_available(trainers, True)
        everyone = tuple(range(trainers))
        self._groups[""] = Group(self.me.rank, everyone, host=self._sharing(everyone, "host") if host else None)

    def meet(self, groups: Mapping[str, Sequence[Members]]) -> None:
        """See `Outlet.meet`."""
        self.join()
        if self._joined:
            found = meet(self.me.rank, groups, self._rendezvous.place.hosts, self._connected, self._sharing)
            self._groups |= found
        else:
            self._groups |= dict.fromkeys(groups, self._groups[""])

    def all_reduce(self, tensor: torch.Tensor, note: str, group: str = "") -> Work:
        """Starts the sum of `tensor` over the trainers of a group, in place."""
        its = self._group(group)
        if its.is_alone or not tensor.numel():  # of what one of each host keeps the others have nothing
            return Done()
        if (host := its.shared(tensor)) is not None:
            return host.all_reduce(tensor, note)
        work = dist.all_reduce(tensor, group=its.handle, async_op=True)
        return self._started(work, tensor, f"the all-reduce of {note}", group)

    def reduce_scatter(self, tensors: Sequence[torch.Tensor], note: str, group: str = "") -> Scattered:
        """See `Outlet.reduce_scatter`."""
        its = self._group(group)
        if (host := its.shared(tensors[0])) is not None:
            return HostScattered(host, tensors, note)

        def started(how: Callable[..., dist.Work | None], received: torch.Tensor, whole: torch.Tensor) -> Work:
            if its.is_alone:
                received.copy_(whole)
                return Done()
            work = how(received, whole, group=its.handle, async_op=True)
            return self._started(work, received, f"the reduce-scatter of {note}", group)

        if tensors[0].device.type == "cpu" and not its.is_alone:
            exchange = partial(started, dist.all_to_all_single)
            return ExchangedScattered(len(its.members), tensors, exchange)
        return CopiedScattered(len(its.members), tensors, partial(started, dist.reduce_scatter_tensor))

    def reduce_to(self, tensors: Sequence[torch.Tensor], keeper: int, note: str, group: str = "") -> Scattered:
        """See `Outlet.reduce_to`."""
        its = self._group(group)
        if (host := its.shared(tensors[0])) is not None:
            return HostSumToOne(host, tensors, keeper, note)

        def reduce(whole: torch.Tensor) -> Work:
            if its.is_alone:
                return Done()
            work = dist.reduce(whole, dst=its.members[keeper], group=its.handle, async_op=True)
            return self._started(work, whole, f"the reduction of {note}", group)

        return CopiedSum(tensors, its.place == keeper, reduce)

    def give(self, nbytes: int, pieces: Pieces, keeper: int, note: str, group: str = "") -> Gathered:
        """See `Outlet.give`."""
        its = self._group(group)
        if (host := its.shared(pieces[0][1])) is not None:
            return HostGift(host, nbytes, pieces, keeper, note)

        def broadcast(whole: torch.Tensor) -> Work:
            if its.is_alone:
                return Done()
            work = dist.broadcast(whole, src=its.members[keeper], group=its.handle, async_op=True)
            return self._started(work, whole, f"the broadcast of {note}", group)

        return CopiedGift(nbytes, pieces, its.place == keeper, broadcast)

    def sum_on_host(self, tensor: torch.Tensor, note: str) -> HostWork:
        """Starts the sum of `tensor` over the trainers of this host that have not left, in place on the first of them."""
        self._join_host()
        return Done() if self._on_host is None else self._on_host.reduce(tensor, note)

    def is_first_on_host(self) -> bool:
        """Whether this trainer gives the next value to the others of its host."""
        self._join_host()
        return self._copies is None or self._copies.is_first

    def give_on_host(self, tensor: torch.Tensor, note: str) -> None:
        """Gives the next value to the other trainers of this host."""
        if self._copies is not None:
            self._copies.give(tensor, note)

    def take_on_host(self, shape: list[int], dtype: torch.dtype, note: str) -> torch.Tensor | None:
        """Waits for the next value of the first trainer of this host; None where that is this one, as those before have left."""
        return None if self._copies is None else self._copies.take(shape, dtype, note)

    def leave_host(self) -> None:
        """Takes part in nothing more that trainers of this host do together. Meets them, if that is still to be done: they wait
        for it."""
        self._join_host()
        for group in (self._on_host, self._copies):
            if group is not None:
                group.leave()

    def _join_host(self) -> None:
        """Meets the other trainers of this host, if there are some, at first use."""
        starts = accumulate(self._rendezvous.place.hosts, initial=0)
        members = next(range(*ends) for ends in pairwise(starts) if ends[0] <= self.me.rank < ends[1])
        if self._on_host is not None or len(members) == 1:
            return
        if not can_share():
            raise ClusterError(
                "merge_on_host, copy_on_host: the trainers of this host share no memory; expected Linux, and "
                "SYNCWRIGHT_SHARED_MEMORY other than 0. Leave both out of the plan, or set the variable."
            )
        given = (self.me.rank, members, self._rendezvous.client(), self.wait, self._watch, self.error)
        self._on_host = HostGroup(*given, key="sums on host")
        self._copies = HostCopies(*given, key="copies on host")

    def all_gather(self, whole: torch.Tensor, part: torch.Tensor, note: str, group: str = "") -> Work:
        """Starts the gathering of every trainer's `part` into `whole`, part after part; parts have one shape.

        Into a tensor that is given: the functional form, which makes its own, corrupts the heap on Gloo with several
        under way (torch 2.13).
        """
        its = self._group(group)
        if its.is_alone:
            whole.copy_(part.reshape(whole.shape))
            return Done()
        work = dist.all_gather_into_tensor(whole, part.contiguous(), group=its.handle, async_op=True)
        return self._started(work, whole, f"the gathering of {note}", group)

    def gather(self, nbytes: int, pieces: Pieces, note: str, group: str = "") -> Gathered:
        """See `Outlet.gather`."""
        its = self._group(group)
        if (host := its.shared(pieces[0][1])) is not None:
            return HostGathered(host, nbytes, pieces, note)
        return CopiedGathered(len(its.members), nbytes, pieces, partial(self.all_gather, note=note, group=group))

    def broadcast(self, tensor: torch.Tensor, note: str) -> None:
        """Trainer 0's `tensor` becomes everybody's, in place."""
        self.join()
        if self._joined:
            work = dist.broadcast(tensor, src=0, async_op=True)
            self._started(work, tensor, f"the broadcast of {note}", "").done()

    def close(self) -> None:
        """Leaves the group if it was made here."""
        for group in (*(each.host for each in self._groups.values()), self._on_host, self._copies):
            if group is not None:
                group.close()
        self._on_host = self._copies = None
        handles = [each.handle for each in self._groups.values() if each.handle is not None]
        self._groups = {"": Group(self.me.rank, (self.me.rank,))}
        busy = any(not work.is_completed() for work in self._under_way.values())
        if self._created and busy:
            _abandon([dist.distributed_c10d._get_default_group(), *handles])
        elif self._created and dist.is_initialized():
            dist.destroy_process_group()
        self._created = False

    def _started(self, work: dist.Work | None, tensor: torch.Tensor, note: str, group: str) -> Work:
        if work is None:
            return Done()
        self._under_way[group] = work
        return Reduction(self, work, note, on_host=tensor.device.type == "cpu")

    def _group(self, name: str) -> Group:
        self.join()
        return self._groups[name]

    def _connected(self, members: Members) -> dist.ProcessGroup:
        """Of these trainers; all trainers come here."""
        try:
            return cast(dist.ProcessGroup, dist.new_group(list(members), timeout=self._longest))
        except RuntimeError as error:
            raise self.error(f"{self.me} could not join a group of trainers", error, late=False) from error

    def _sharing(self, members: Members, key: str) -> HostGroup:
        """What these trainers share, who are on this host."""
        store = self._rendezvous.client()
        return HostGroup(self.me.rank, members, store, self.wait, self._watch, self.error, key)

    @property
    def _longest(self) -> timedelta:
        """How long torch waits: beyond all that is waited for here."""
        return timedelta(seconds=self._deadlines.wait + self._deadlines.compile)

    def _check_group(self, trainers: int) -> None:
        found = (dist.get_world_size(), dist.get_rank())
        if found != (trainers, self.me.rank):
            raise ClusterError(
                f"the script has initialised torch.distributed as rank {found[1]} of {found[0]}, but this "
                f"process is {self.me} of {trainers}. Expected the same numbers. Initialise it among all trainers, or "
                "not at all."
            )

    def _create_group(self, trainers: int) -> None:
        everyone = [self.me, *self.others]
        wait = self._heartbeat.wait(self.others, self._deadlines.join)
        look_up(self._rendezvous.client(), self.me, self.others, everyone, wait, self._watch)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("trainers", self._rendezvous.client()),
                rank=self.me.rank,
                world_size=trainers,
                timeout=self._longest,
            )
        except RuntimeError as error:
            raise self.error(f"{self.me} could not join the other trainers", error, late=False) from error
        self._created = True

    def wait(self) -> Wait:
        """A wait for the other trainers that begins now."""
        return self._heartbeat.wait(self.others, self._deadlines.wait)

    def waited(self, work: dist.Work, note: str, wait: Wait) -> None:
        """Returns when `work` is done, before `wait` is over."""
        doing = f"{self.me} waits for {note}"
        while True:
            try:
                work.wait(timedelta(seconds=SLICE_SECONDS))
                return
            except RuntimeError as error:
                if work.is_completed() and _failed(work):
                    raise self.error(doing, error, late=False) from error
            self._watch()
            if wait.is_over():
                raise self.error(doing, None, late=True)

    def error(self, doing: str, cause: Exception | None, late: bool) -> JobError:
        """What to raise when `doing` failed: those who are late or lost, by their heartbeats."""
        if (told := self._heartbeat.told()) is not None:
            return told
        doing = f"{doing} at step {self._heartbeat.step}"
        if late:
            return DeadlineExceeded(
                f"{doing}, for more than {self._deadlines.wait:g} s: {self._heartbeat.late(self.others)}. Expected every "
                "trainer to take part in time. See the output of who is late; if it is only slow, give a longer "
                "Deadlines.wait."
            )
        return self._heartbeat.broken(
            f"{doing}, and a connection broke",
            self.others,
            "Expected every trainer to stay, and to make the same number of steps. See its output; "
            "trainer.shard(loader) gives every trainer as many batches.",
        )


class Done:
    """A collective of one trainer."""

    is_first = True

    def done(self) -> bool:
        """Always: there is nobody to wait for."""
        return True


class Reduction:
    """A collective under way."""

    def __init__(self, group: Collectives, work: dist.Work, note: str, on_host: bool) -> None:
        self._group = group
        self._work = work
        self._note = note
        self._on_host = on_host
        self._wait = group.wait()

    def done(self) -> bool:
        """Waits, then True: the result is there; on a GPU, what follows on its stream will find it there."""
        if self._on_host:
            self._group.waited(self._work, self._note, self._wait)
        else:
            self._work.wait()
        return True


def _abandon(groups: Sequence[dist.ProcessGroup]) -> None:
    """Keeps groups for ever: to free them, also at the process's exit, would wait for peers that never come."""
    for group in groups:
        for kept in (group, group._get_backend(torch.device("cpu"))):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def _failed(work: dist.Work) -> bool:
    """Whether a completed `work` failed: it says so each time it is waited for."""
    try:
        work.wait()
    except RuntimeError:
        return True
    return False
