"""The whole job in one process: no sockets, no threads, every run the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from syncwright.capture.own_scale import scaled_by
from syncwright.capture.state import Binding
from syncwright.errors import BatchError, DeadlineExceeded
from syncwright.job import Job
from syncwright.nn.hash_embedding import HashTable
from syncwright.planning import PlanSource, loss_scale_of, make_plan
from syncwright.runtime.executor import Blocked
from syncwright.runtime.gathers import CopiedGathered, Pieces
from syncwright.runtime.joint_server import JointServer
from syncwright.runtime.kept_whole import CopiedGift, CopiedSum
from syncwright.runtime.messages import Address, Kind, Message
from syncwright.runtime.on_host import Copies, Sum, Sums
from syncwright.runtime.programs import Prepared
from syncwright.runtime.replica import Examples, Part, Replica, check_not_empty, random_stream
from syncwright.runtime.scatters import CopiedScattered
from syncwright.runtime.session import Session, Training
from syncwright.runtime.ticking import check_scheduler
from syncwright.runtime.transport import Gathered, Scattered
from syncwright.tables import Saved

__all__ = ["Loopback", "loopback"]


def loopback(
    step: Callable,
    model: torch.nn.Module,
    optimizer: object,
    *,
    plan: PlanSource | str | Path = "all_reduce",
    trainers: int = 1,
    servers: int = 0,
    examples: Examples = None,
    without: Sequence[str] = (),
    state: Mapping[str, torch.nn.Module] | None = None,
    check_replicas: bool = False,
    dynamic_shapes: object = None,
    scheduler: object = None,
    hosts: Sequence[int] | None = None,
) -> Loopback:
    """A job of `trainers` and `servers` in this process, for tests and for trying a plan.

        job = syncwright.loopback(step, model, optimizer, plan="parameter_server", trainers=2, servers=1)
        loss = job.step([(x[:32], y[:32]), (x[32:], y[32:])])      # one tuple of step arguments per trainer
        job.state_dict()["model"]["fc.weight"]

    Everything above the transport is what real processes run. Interpreted. `hosts`: how many trainers each host has, in the
    order of their numbers, for plans to which it matters who shares one; default: all are on one.
    """
    source = plan
    training = Training(
        *(scaled_by(step, loss_scale_of(source)), model, optimizer, state, examples),
        plan=lambda program: check_scheduler(make_plan(source, program, trainers, servers, hosts), scheduler),
        without=without,
        check_replicas=check_replicas,
        dynamic_shapes=dynamic_shapes,
        scheduler=scheduler,
    )
    return Loopback(training, trainers)


class Loopback:
    """See `loopback`. Changes with every step."""

    def __init__(self, training: Training, trainers: int):
        self.session = Session(training)
        self.model, self.optimizer, self.trainers = training.model, training.optimizer, trainers
        self.network = Network(trainers)
        self.servers: list[JointServer] = []
        self.streams = [random_stream(k) for k in range(trainers)]

    @property
    def binding(self) -> Binding:
        """The user's objects as variables."""
        return self.session.binding

    @property
    def job(self) -> Job | None:
        """What every role runs; None before the first step."""
        return self.session.job

    @property
    def replicas(self) -> list[Replica]:
        """The trainers; none before the first step."""
        return self.session.replicas

    def step(self, batches: Sequence[tuple]) -> object:
        """One global step; returns the reduced loss, or loss and metrics (tensors along the batch: trainer 0's)."""
        if len(batches) != self.trainers:
            raise BatchError(
                f"step got {len(batches)} batches; expected {self.trainers}, one tuple of step arguments per trainer. "
                "Give a trainer without examples empty tensors."
            )
        parts = [self.session.part(batch) for batch in batches]
        check_not_empty(sum(part.examples for part in parts))
        full = next(p for p in parts if p.examples > 0)
        prepared = [self.session.programs().for_batch((p if p.examples > 0 else full).batch) for p in parts]
        self._start(prepared[0], parts[0])
        results = self.session.step(prepared, parts)
        return next(result for result, part in zip(results, parts, strict=True) if part.examples > 0)

    def evaluate(self, fn: Callable, loader: Iterable) -> object:
        """`fn(model, *batch)` over all batches, each example once over all trainers; see `Trainer.evaluate`."""
        return self.session.evaluate(fn, loader)

    def state_dict(self, deferred: bool = False) -> dict[str, object]:
        """`{"model": ..., "optimizer": ...}`, whole, as the user's own `state_dict()` calls name it; see `Trainer`'s."""
        return self.session.state_dict(deferred)

    def rows(self, name: str, at_a_time: int = 2**16) -> Iterator[tuple[int, torch.Tensor]]:
        """See `Trainer.rows`."""
        return self.session.rows(name, at_a_time)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes what `state_dict` gave, here under any plan or in plain PyTorch."""
        self.session.load_state_dict(state)

    def sync(self, deferred: bool = False) -> None:
        """Writes the trained values into the user's model and optimizer; see `Trainer.sync`."""
        self.session.sync(deferred)

    def export(self, table: HashTable, since: int | None = None) -> Saved:
        """What servers hold of a table of any ids; see `Trainer.export`."""
        return self.session.export(table, since)

    def restore(self, table: HashTable, saved: Saved) -> None:
        """Servers hold what was exported; see `Trainer.restore`."""
        self.session.restore(table, saved)

    def observe(self, table: HashTable, told: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        """Shows and clicks, of each trainer (ids, shows, clicks); see `Trainer.observe`."""
        self.session.observe(table, told)

    def shrink(self, table: HashTable) -> torch.Tensor:
        """Removes rows as the table's eviction says; see `Trainer.shrink`."""
        return self.session.shrink(table)

    def leave(self) -> None:
        """Ends the job: trainers that train alone meet a last time, servers go on without these trainers."""
        self.session.meet_last()
        self.session.leave()
        self._deliver()

    def gather(self, parts: Sequence[torch.Tensor], note: str) -> list[torch.Tensor]:
        """Every trainer's part: all trainers are here."""
        return list(parts)

    def open(self, batch: tuple) -> None:
        """Starts the job, captured on a batch, and lets all that is under way arrive."""
        part = self.session.part(batch)
        self._start(self.session.prepared(part), part)
        self._deliver()

    def _start(self, prepared: Prepared, part: Part) -> None:
        if self.replicas:
            return
        job, more = prepared.job, (self.session.ticking(prepared.job), self.session.records())
        self.servers = [JointServer(job, p.rank, None, *more) for p in job.servers]
        self.network.on_hosts = Sums(job.plan.hosts)
        self.network.copies = Copies(job.plan.hosts)
        outlets = [self.network.transport(rank) for rank in range(self.trainers)]
        self.session.open(prepared.job, outlets, part.examples or 1.0, self)

    def drive(self, runs: Sequence[Generator[Blocked, None, object]]) -> list:
        """Runs trainers in turn, each until it waits, and delivers messages in between, until all are done."""
        results: dict[int, object] = {}
        while len(results) < len(runs):
            blocked, moved = [], False
            for rank, run in enumerate(runs):
                if rank in results:
                    continue
                before = self.network.sent
                with stream(self.streams, rank):
                    try:
                        blocked.append((rank, next(run)))
                    except StopIteration as stop:
                        results[rank] = stop.value
                        moved = True
                moved |= self.network.sent != before
            moved |= self._deliver()
            if not moved and blocked:
                raise DeadlineExceeded("nothing moves any more: " + "; ".join(self._who(b) for b in blocked))
        return [results[rank] for rank in range(len(runs))]

    def _deliver(self) -> bool:
        any_moved = False
        while self.network.queue:
            any_moved = True
            sender, to, message = self.network.queue.popleft()
            if to.kind is Kind.SERVER:
                for target, answer in self.servers[to.rank].handle(sender, message):
                    self.network.post(to, target, answer)
            else:
                self.replicas[to.rank].take(sender, message)
        return any_moved

    def hand_over(self, sender: Address, to: Address, message: Message) -> None:
        """Lets one message arrive, and at once all that servers send because of it."""
        if to.kind is Kind.TRAINER:
            self.replicas[to.rank].take(sender, message)
            return
        for target, answer in self.servers[to.rank].handle(sender, message):
            self.hand_over(to, target, answer)

    def _who(self, blocked: tuple[int, Blocked]) -> str:
        rank, where = blocked
        return f"trainer {rank} waits at {where.node} for '{where.channel}'"


Given = tuple[torch.Tensor, torch.Tensor]
"""Where a trainer wants the result of a collective, and what it gives."""
Joining = tuple[str, str, int]
"""What a trainer joins: under which name, in which group, and its number."""


class Network:
    """Messages under way, and collectives that some trainers have joined. Changes with every send."""

    def __init__(self, trainers: int):
        self.groups: dict[str, Sequence[Sequence[int]]] = {"": (range(trainers),)}
        self.queue: deque[tuple[Address, Address, Message]] = deque()
        self.sent = 0
        self.on_hosts, self.copies = Sums(()), Copies(())
        self._rounds: dict[tuple[str, tuple[int, ...], int], dict[int, Given]] = {}
        self._joined: dict[Joining, int] = {}

    def post(self, sender: Address, to: Address, message: Message) -> None:
        self.sent += 1
        self.queue.append((sender, to, message))

    def members(self, group: str, rank: int) -> tuple[int, ...]:
        """Of the group of this name that trainer `rank` is in."""
        return tuple(next(each for each in self.groups[group] if rank in each))

    def join(self, at: Joining, tensor: torch.Tensor) -> LoopbackWork:
        """A trainer's n-th reduction of a name meets the n-th of everybody in its group."""
        return self._join(at, (tensor, tensor), _sum)

    def gather(self, at: Joining, whole: torch.Tensor, part: torch.Tensor) -> LoopbackWork:
        """A trainer's n-th gathering of a name meets the n-th of everybody in its group."""
        return self._join(at, (whole, part), _stack)

    def scatter(self, at: Joining, own: torch.Tensor, whole: torch.Tensor) -> LoopbackWork:
        """A trainer's n-th reduction to parts of a name meets the n-th of everybody in its group."""
        return self._join(at, (own, whole), _scatter)

    def broadcast(self, at: Joining, root: int, tensor: torch.Tensor) -> LoopbackWork:
        """A trainer's n-th broadcast of a name meets the n-th of everybody in its group."""
        return self._join(at, (tensor, tensor), partial(_copy, root))

    def _join(self, at: Joining, mine: Given, meet: Callable[[list[Given]], None]) -> LoopbackWork:
        self.sent += 1
        note, group, rank = at
        members, turn = self.members(group, rank), self._joined.get(at, 0)
        self._joined[at] = turn + 1
        given = self._rounds.setdefault((note, members, turn), {})
        given[rank] = mine
        if len(given) == len(members):
            meet([given[k] for k in members])
            del self._rounds[note, members, turn]
        return LoopbackWork(given, len(members))

    def transport(self, rank: int) -> LoopbackTransport:
        return LoopbackTransport(self, Address(Kind.TRAINER, rank))


def _sum(given: list[Given]) -> None:
    total = given[0][1].clone()
    for _, part in given[1:]:
        total += part
    for whole, _ in given:
        whole.copy_(total)


def _stack(given: list[Given]) -> None:
    for whole, _ in given:
        whole.copy_(torch.stack([part for _, part in given]).reshape(whole.shape))


def _copy(root: int, given: list[Given]) -> None:
    for rank, (whole, _) in enumerate(given):
        if rank != root:
            whole.copy_(given[root][1])


def _scatter(given: list[Given]) -> None:
    total = given[0][1].clone()
    for _, part in given[1:]:
        total += part
    for (own, _), part in zip(given, total.chunk(len(given)), strict=True):
        own.copy_(part)


class LoopbackWork:
    """A collective that is done when all trainers have joined."""

    def __init__(self, given: Mapping[int, Given], trainers: int):
        self._given, self._trainers = given, trainers

    def done(self) -> bool:
        return len(self._given) == self._trainers


class LoopbackTransport:
    """One trainer's end of the network."""

    def __init__(self, network: Network, me: Address):
        self.network, self.me = network, me

    def send(self, to: Address, message: Message) -> None:
        self.network.post(self.me, to, message)

    def flush(self) -> None:
        """Nothing waits: messages are queued one by one."""

    def meet(self, groups: Mapping[str, Sequence[Sequence[int]]]) -> None:
        self.network.groups |= groups

    def all_reduce(self, tensor: torch.Tensor, note: str, group: str = "") -> LoopbackWork:
        return self.network.join((note, group, self.me.rank), tensor)

    def reduce_scatter(self, tensors: Sequence[torch.Tensor], note: str, group: str = "") -> Scattered:
        scatter = partial(self.network.scatter, (note, group, self.me.rank))
        return CopiedScattered(len(self._members(group)), tensors, scatter)

    def reduce_to(self, tensors: Sequence[torch.Tensor], keeper: int, note: str, group: str = "") -> Scattered:
        is_keeper = self._members(group)[keeper] == self.me.rank
        return CopiedSum(tensors, is_keeper, partial(self.all_reduce, note=note, group=group))

    def give(self, nbytes: int, pieces: Pieces, keeper: int, note: str, group: str = "") -> Gathered:
        broadcast = partial(self.network.broadcast, (note, group, self.me.rank), keeper)
        return CopiedGift(nbytes, pieces, self._members(group)[keeper] == self.me.rank, broadcast)

    def _members(self, group: str) -> tuple[int, ...]:
        return self.network.members(group, self.me.rank)

    def sum_on_host(self, tensor: torch.Tensor, note: str) -> Sum:
        self.network.sent += 1
        return self.network.on_hosts.give(note, self.me.rank, tensor)

    def is_first_on_host(self) -> bool:
        return self.network.copies.is_first(self.me.rank)

    def give_on_host(self, tensor: torch.Tensor, note: str) -> None:
        self.network.sent += 1
        self.network.copies.give(self.me.rank, tensor)

    def take_on_host(self, shape: list[int], dtype: torch.dtype, note: str) -> torch.Tensor | None:
        return self.network.copies.take(self.me.rank)

    def leave_host(self) -> None:
        self.network.sent += 1
        self.network.on_hosts.leave(self.me.rank)
        self.network.copies.leave(self.me.rank)

    def all_gather(self, whole: torch.Tensor, part: torch.Tensor, note: str, group: str = "") -> LoopbackWork:
        return self.network.gather((note, group, self.me.rank), whole, part)

    def gather(self, nbytes: int, pieces: Pieces, note: str, group: str = "") -> Gathered:
        gather = partial(self.all_gather, note=note, group=group)
        return CopiedGathered(len(self._members(group)), nbytes, pieces, gather)

    def broadcast(self, tensor: torch.Tensor, note: str) -> None:
        """Nothing to send: all trainers have read the same objects of the user's."""

    def progress(self, step: int, node: str) -> None:
        """Nobody asks: a loopback that stands still says itself who waits for what."""


class stream:
    """While open, torch's global generator is trainer `rank`'s."""

    def __init__(self, streams: list[torch.Tensor], rank: int):
        self._streams, self._rank = streams, rank

    def __enter__(self) -> None:
        self._outside = torch.get_rng_state()
        torch.set_rng_state(self._streams[self._rank])

    def __exit__(self, *_: object) -> None:
        self._streams[self._rank] = torch.get_rng_state()
        torch.set_rng_state(self._outside)
