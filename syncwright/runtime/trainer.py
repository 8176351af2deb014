"""distribute(): the user's training step on all trainers and servers of the job."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import zmq
from torch.distributed import Store
from torch.utils import _pytree as pytree

from syncwright.capture.state import Binding
from syncwright.errors import DeadlineExceeded, Disagreement, JobError, PeerLost
from syncwright.job import Job
from syncwright.plan import Plan
from syncwright.planning import PlanSource, make_plan
from syncwright.program import Program
from syncwright.runtime.client import Client
from syncwright.runtime.executor import Blocked
from syncwright.runtime.intercept import FirstStep, intercepted
from syncwright.runtime.membership import disabled_passes, membership
from syncwright.runtime.messages import Address, Kind
from syncwright.runtime.programs import Prepared, Programs
from syncwright.runtime.rendezvous import Rendezvous, failure, reaching_the_store, tell_failure
from syncwright.runtime.replica import Examples, Part, Replica, check_not_empty, count_examples, random_stream
from syncwright.runtime.server import Server
from syncwright.runtime.serving import ServerThread, serve
from syncwright.runtime.sharding import bounds, check_rows, rows_of, shard
from syncwright.runtime.sockets import STAY, Deadlines, SocketTransport

log = logging.getLogger("syncwright")
_generations = itertools.count()


def distribute(
    step: Callable,
    model: torch.nn.Module,
    optimizer: object,
    *,
    plan: PlanSource | str | Path = "all_reduce",
    examples: Examples = None,
    example: tuple | None = None,
    compile: bool | str = "auto",
    state: Mapping[str, torch.nn.Module] | None = None,
    deadlines: Deadlines | None = None,
) -> Trainer:
    """The training step `step(model, optimizer, *batch)` on every process of this job.

        trainer = syncwright.distribute(step, model, optimizer, plan="parallax")
        for batch in trainer.shard(loader):
            loss = trainer.step(*batch)

    plan      a strategy's name, a YAML file (rules, or a complete plan), `Rules` or a `Plan`
    examples  how many examples a batch counts as: a number, or a function of the batch; default: its leading size
    example   a batch: capture now, and not at the first step (a server then serves at once)
    compile   "auto": by Inductor where there is a C++ compiler; True, False
    state     further modules that the step writes, by a name of your choice

    The same script runs alone (servers are threads), under torchrun (servers are threads of the trainers) and under
    `syncwright run --trainers N --servers S` (servers are processes). A server's process serves from the first
    `.step(...)` until the job ends and then exits with status 0; nothing behind it runs.
    """
    trainer = Trainer(step, model, optimizer, plan, examples, compile, state, deadlines or Deadlines())
    if example is not None:
        trainer.start(tuple(example))
    return trainer


class Trainer:
    """What `distribute` returns. Changes with every step; use it as a context manager, or call `close`."""

    def __init__(self, step, model, optimizer, plan, examples, compile, state, deadlines: Deadlines):
        self.place = membership(os.environ)
        self.model, self.optimizer = model, optimizer
        self._user_step, self._examples, self._deadlines = step, examples, deadlines
        self._plan_source = plan
        self._binding = Binding(model, optimizer, state)
        without = disabled_passes(os.environ)
        counted = examples is not None
        self._programs = Programs(step, self._binding, optimizer, self._make_plan, without, compile, counted)
        self._rendezvous = Rendezvous(self.place, next(_generations), deadlines.join)
        self._stores: tuple[Store, Store] | None = None
        self._threads: list[ServerThread] = []
        self._transport: SocketTransport | None = None
        self._replica: Replica | None = None
        self._shared_states = 0
        self._failure: BaseException | None = None
        self._closed = False
        if self.place.me.kind is Kind.TRAINER:
            torch.set_rng_state(random_stream(self.rank))

    @property
    def rank(self) -> int:
        """This trainer's number; a server's process takes trainer 0's part until it serves."""
        return self.place.me.rank if self.place.me.kind is Kind.TRAINER else 0

    @property
    def trainers(self) -> int:
        return self.place.trainers

    @property
    def plan(self) -> Plan:
        """The complete plan; known after the first step, or with `example=`."""
        return self._job.plan

    @property
    def job(self) -> Job:
        """What every role runs; known after the first step, or with `example=`."""
        return self._job

    def step(self, *batch: object) -> object:
        """One global step on this trainer's part of the batch; returns what the user's step returns, reduced.

        Raises `BatchError`, `CaptureError`, `PlanError`, `LoweringError` at the first call; `PeerLost` and
        `DeadlineExceeded`, which name who is gone or late, at any.
        """
        self._check_open()
        self._intercepted(batch)
        part = Part(batch, count_examples(batch, self._examples))
        if self.trainers == 1:
            check_not_empty(part.examples)
        prepared = self._prepared(part)
        self._started(prepared, part)
        assert self._replica is not None, "started"
        assert self._transport is not None, "started"
        returned = self._drive(self._replica.step(prepared, part))
        self._transport.progress(self._replica.step_count, "between steps")
        return returned

    def start(self, batch: tuple) -> None:
        """Captures on `batch` and meets the other roles, without a step."""
        self._intercepted(batch)
        part = Part(batch, count_examples(batch, self._examples))
        self._started(self._programs.for_batch(batch), part)

    def shard(self, loader: Iterable, whole: Collection[str] = ()) -> Iterator:
        """This trainer's parts of the global batches that `loader` yields (see `runtime.sharding.shard`).

        Tensors as long as the first are cut, but for those named in `whole` ("batch.2" is the third): they go to all.
        """
        for batch in shard(loader, self.trainers, self.rank, self._share_state, whole):
            yield batch if isinstance(batch, tuple | list) else (batch,)

    @torch.no_grad()
    def evaluate(self, fn: Callable, loader: Iterable, whole: Collection[str] = ()) -> object:
        """`fn(model, *batch)` over all batches, each example once over all trainers, outputs in order on every trainer.

        Outputs are tensors along the batch axis, in any tree; they come back joined. Values are those of the steps
        done; nothing is updated. `whole` as for `shard`.
        """
        if self._replica is None and self.trainers > 1:
            raise JobError(
                "evaluate() was called before the trainers have met; expected a step first. Give distribute(..., example=batch) "
                "to meet at once."
            )
        self.sync()
        sizes, collected, structure = [], [], None
        for batch in loader:
            batch = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
            count = int(count_examples(batch, None))
            start, stop = bounds(count, self.trainers, self.rank)
            part = rows_of(batch, start, stop, whole)
            outputs, structure = pytree.tree_flatten(fn(self.model, *part))  # type: ignore[misc]
            check_rows(outputs, stop - start)
            collected.append(outputs)
            sizes.append((count, start, stop))
        if structure is None:
            return None
        columns = [self._gathered(list(column), sizes) for column in zip(*collected, strict=True)]
        return structure.unflatten(columns)

    def sync(self) -> None:
        """Writes the trained values, whole, into the user's model and optimizer."""
        if self._replica is None:
            return
        values = dict(self._replica.values)
        values.update(self._drive(self._replica.served()))  # type: ignore[arg-type]
        self._binding.write(values)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, object]:
        """`{"model": ..., "optimizer": ...}`, whole tensors under the names of the user's own `state_dict()` calls."""
        self.sync()
        return self._binding.state_dict(self.optimizer)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes what `state_dict` gave, here under any plan or in plain PyTorch. All trainers must call it."""
        self._binding.load_state_dict(self.optimizer, state)
        if self._replica is not None:
            self._replica.reload()
            if self.rank == 0:
                self._replica.give(self._binding.values(), self._replica.step_count)
            self._broadcast_values()

    def close(self) -> None:
        """Writes the trained values back, leaves the job and frees everything. Safe to call twice.

        After an error that ended the job only the last: there are no values to be had from those who are gone.
        """
        if self._closed:
            return
        if self._failure is not None:
            self._abandon(self._failure)
            return
        try:
            self.sync()
            if self._replica is not None:
                self._replica.client.leave(self._replica.step_count)
        except BaseException as error:
            self._abandon(error)
            raise
        self._end(failed=False)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self._abandon(error)

    def _abandon(self, error: BaseException) -> None:
        """Ends here, and tells the others why, unless one of them is the reason."""
        if not isinstance(error, PeerLost | SystemExit):
            self._tell(f"{self.place.me} cannot go on: {type(error).__name__}: {error}".rstrip(": "))
        self._end(failed=True)

    def _tell(self, reason: str) -> None:
        """Best effort: servers by a message, and all who wait elsewhere by the store."""
        if self._stores is not None:
            tell_failure(self._stores, reason)
        if self._replica is not None:
            self._replica.client.fail(reason)

    def _end(self, failed: bool) -> None:
        """Servers that live here go on until the last trainer has left, unless this one fails."""
        self._closed = True
        if self._transport is not None:
            self._transport.close()
        for thread in self._threads:
            if failed:
                thread.stop.set()
            while thread.is_alive():
                thread.join(1.0)

    def _check_open(self) -> None:
        if self._closed:
            raise JobError("this trainer is closed; expected steps before close(). Call distribute again to go on.")

    def _intercepted(self, batch: tuple) -> None:
        if self._replica is None:
            parts = (self._user_step, self.model, self.optimizer, self._binding.extra)
            intercepted(FirstStep(*parts, self._plan_source, self._examples, batch))

    def _make_plan(self, program: Program) -> Plan:
        return make_plan(self._plan_source, program, self.trainers, self._server_count())

    def _server_count(self) -> int:
        """Of processes; or, where servers are threads, as many as a complete plan says, or one per trainer."""
        if self.place.servers:
            return self.place.servers
        return self._plan_source.servers if isinstance(self._plan_source, Plan) else self.trainers

    def _prepared(self, part: Part) -> Prepared:
        if part.examples > 0 or self._programs.latest is None:
            return self._programs.for_batch(part.batch)
        return self._programs.latest

    def _started(self, prepared: Prepared, part: Part) -> None:
        if self._replica is not None:
            return
        self._job = prepared.job
        try:
            self._meet(prepared, part)
        except Exception as error:
            self._failure = error
            raise

    def _meet(self, prepared: Prepared, part: Part) -> None:
        """Agrees with the other roles on the job, starts the servers that live here, and joins. A server ends here."""
        self._agree(prepared.job)
        embedded = zmq.Context() if self.place.alone else None
        for address in self.place.hosted(len(prepared.job.servers)):
            self._host(address, prepared.job, embedded)
        if self.place.me.kind is Kind.SERVER:
            sys.exit(0)
        self._join(prepared.job, part, embedded)

    def _host(self, address: Address, job: Job, context: zmq.Context | None) -> None:
        server = Server(job, address.rank)
        transport = SocketTransport(
            address, self._rendezvous, len(job.servers), context=context, deadlines=self._deadlines
        )
        if self.place.me.kind is Kind.SERVER:
            with _closing(transport):
                serve(server, transport, self._deadlines.wait)
        else:
            self._threads.append(ServerThread(server, transport, self._deadlines.wait))
            self._threads[-1].start()

    def _join(self, job: Job, part: Part, context: zmq.Context | None) -> None:
        self._transport = SocketTransport(
            self.place.me, self._rendezvous, len(job.servers), context=context, deadlines=self._deadlines
        )
        client = Client(job, self._transport)
        self._replica = Replica(self.rank, self._binding, client, job)
        self._replica.nominal = float(self._published("nominal", str(part.examples or 1.0)))
        client.hello()
        if self.rank == 0:
            self._replica.give(self._binding.values(), 0)
        self._broadcast_values()
        if self.rank == 0:
            log.info("%d trainers and %d servers have met", self.trainers, len(job.servers))

    def _agree(self, job: Job) -> None:
        """All roles compare what they derived with what trainer 0 derived."""
        theirs = self._published("digest", job.digest)
        if theirs != job.digest:
            raise Disagreement(
                f"{self.place.me} derived another job than trainer 0 (digest {job.digest[:12]}, expected "
                f"{theirs[:12]}). Expected all roles to build the same model, optimizer, step and plan. Start all of "
                "them from the same script with the same arguments, and take care that nothing in it depends on the "
                "rank."
            )

    def _published(self, key: str, mine: str) -> str:
        """Trainer 0's word on `key`, the same for all."""
        if self._stores is None:
            self._stores = self._rendezvous.clients()
        store, seconds = self._stores[0], max(self._deadlines.join, self._deadlines.wait)
        if self.place.me == Address(Kind.TRAINER, 0):
            store.set(key, mine)
            return mine
        deadline = time.monotonic() + seconds
        with reaching_the_store(self.place.me):
            while not store.check([key]):
                if (why := failure(self._stores)) is not None:
                    raise PeerLost(f"{self.place.me} cannot go on: {why.rstrip('.')}. {STAY}")
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(
                        f"{self.place.me} has waited {seconds:g} s for trainer 0's {key}. Expected trainer 0 to come "
                        "to its first step. See its output."
                    )
                time.sleep(0.01)
            return store.get(key).decode()

    def _share_state(self, state: torch.Tensor) -> torch.Tensor:
        self._shared_states += 1
        text = self._published(f"sampler/{self._shared_states}", state.numpy().tobytes().hex())
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    @torch.no_grad()
    def _broadcast_values(self) -> None:
        """Replicas start from trainer 0's values, one collective per dtype."""
        assert self._replica is not None, "joined"
        assert self._transport is not None, "joined"
        if self.trainers == 1:
            return
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for value in self._replica.values.values():
            if isinstance(value, torch.Tensor) and value.numel():
                by_dtype.setdefault(value.dtype, []).append(value)
        for dtype, values in by_dtype.items():
            flat = torch.cat([v.reshape(-1) for v in values])
            self._transport.broadcast(flat, f"the initial values of type {dtype}")
            for value, part in zip(values, flat.split([v.numel() for v in values]), strict=True):
                value.copy_(part.view(value.shape))

    def _gathered(self, outputs: list[torch.Tensor], sizes: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """Every trainer's rows in the order of the loader. Parts are padded to one length on the way."""
        rows = torch.cat(outputs)
        if self.trainers == 1:
            return rows
        assert self._transport is not None, "more than one trainer, so joined"
        counts = [[stop - start for start, stop in spans] for spans in self._spans(sizes)]
        longest = max(sum(each) for each in counts)
        part = rows.new_zeros((longest, *rows.shape[1:]))
        part[: len(rows)] = rows
        whole = rows.new_empty((self.trainers, *part.shape))
        self._transport.all_gather(_bytes_of(whole), _bytes_of(part), "the outputs of an evaluation").done()
        parts = [list(theirs[: sum(each)].split(each)) for theirs, each in zip(whole, counts, strict=True)]
        return torch.cat([part for batch in zip(*parts, strict=True) for part in batch])

    def _spans(self, sizes: Sequence[tuple[int, int, int]]) -> list[list[tuple[int, int]]]:
        """Per trainer, its rows of every batch."""
        return [[bounds(count, self.trainers, rank) for count, _, _ in sizes] for rank in range(self.trainers)]

    def _drive(self, run: Generator[Blocked, None, object]) -> object:
        """Runs until done, taking messages in whenever it waits."""
        assert self._replica is not None, "joined"
        assert self._transport is not None, "joined"
        try:
            while True:
                self._wait(next(run))
        except StopIteration as stop:
            return stop.value
        except JobError as error:
            self._failure = error
            raise

    def _wait(self, blocked: Blocked) -> None:
        assert self._replica is not None, "joined"
        assert self._transport is not None, "joined"
        deadline = time.monotonic() + self._deadlines.wait
        while True:
            got = self._transport.receive(1.0)
            if got is not None:
                self._replica.client.take(*got)
                return
            self._check_threads()
            if time.monotonic() > deadline:
                raise DeadlineExceeded(self._late(blocked))

    def _late(self, blocked: Blocked) -> str:
        assert self._replica is not None, "joined"
        assert self._transport is not None, "joined"
        owner = Address(Kind.SERVER, self._job.owners[blocked.channel])
        others = [Address(Kind.TRAINER, k) for k in range(self.trainers) if k != self.rank]
        return (
            f"{self.place.me} has waited {self._deadlines.wait:g} s at {blocked.node} of step "
            f"{self._replica.step_count} for '{blocked.channel}' of {owner}: {self._transport.late([owner, *others])}. "
            "Expected it in time. See the output of who is late; if it is only slow, give a longer Deadlines.wait."
        )

    def _check_threads(self) -> None:
        for thread in self._threads:
            if thread.error is not None:
                raise thread.error


class _closing:
    """Closes a transport when a server's process ends, however."""

    def __init__(self, transport: SocketTransport):
        self._transport = transport

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._transport.close()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory: collectives do not take every dtype."""
    return tensor.view(-1).view(torch.uint8)
