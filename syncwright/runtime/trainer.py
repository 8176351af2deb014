"""distribute(): the user's training step on all trainers and servers of the job."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from syncwright.capture.own_scale import scaled_by
from syncwright.errors import JobError, PeerLost
from syncwright.job import Job
from syncwright.nn.hash_embedding import HashTable
from syncwright.plan import Plan
from syncwright.planning import PlanSource, loss_scale_of, make_plan
from syncwright.runtime.deadlines import Deadlines
from syncwright.runtime.heap import keep_freed_memory
from syncwright.runtime.hosting import Hosted
from syncwright.runtime.intercept import FirstStep, intercepted
from syncwright.runtime.joined import Joined
from syncwright.runtime.limits import limits_of
from syncwright.runtime.lookahead import looking_ahead
from syncwright.runtime.meeting import FIRST, Meeting
from syncwright.runtime.membership import Membership, disabled_passes, membership
from syncwright.runtime.messages import Kind
from syncwright.runtime.programs import Prepared
from syncwright.runtime.rendezvous import Rendezvous
from syncwright.runtime.replica import Examples, Part, check_not_empty, random_stream
from syncwright.runtime.session import Session, Training
from syncwright.runtime.sharding import shard
from syncwright.runtime.sockets import SocketTransport
from syncwright.runtime.ticking import check_scheduler
from syncwright.runtime.uneven import Ends
from syncwright.tables import Saved

log = logging.getLogger("syncwright")
_generations = itertools.count()

CHECK_REPLICAS = "SYNCWRIGHT_CHECK_REPLICAS"


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
    check_replicas: bool | None = None,
    dynamic_shapes: object = None,
    metrics: bool | None = None,
    scheduler: object = None,
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
    check_replicas  compare the replicas of every variable after every step, bit for bit: for looking for faults.
              None: as SYNCWRIGHT_CHECK_REPLICAS=1 says
    dynamic_shapes  axes of the batch that may have any size without another capture, as `torch.export` takes them:
              `({0: "n"}, {0: "n"})`; or mark the first batch by `torch._dynamo.mark_dynamic(tensor, axis)`
    metrics   every role serves its numbers over HTTP (see docs/metrics.md). None: as SYNCWRIGHT_METRICS=1 says

    scheduler  of the optimizer (or several, in a list): of it servers tick a copy where the plan says `clock: global_update`

    The same script runs alone (servers are threads), under torchrun (servers are threads of the trainers) and under
    `syncwright run --trainers N --servers S` (servers are processes). A server's process serves from the first
    `.step(...)` until the job ends and then exits with status 0; nothing behind it runs.
    """
    place = membership(os.environ, metrics)
    given = Training(
        *(scaled_by(step, loss_scale_of(plan)), model, optimizer, state, examples),
        plan=lambda program: check_scheduler(
            make_plan(plan, program, place.trainers, _server_count(place, plan), place.hosts), scheduler
        ),
        without=disabled_passes(os.environ),
        compile=compile,
        check_replicas=os.environ.get(CHECK_REPLICAS) == "1" if check_replicas is None else check_replicas,
        dynamic_shapes=dynamic_shapes,
        scheduler=scheduler,
    )
    trainer = Trainer(given, plan, place, deadlines or Deadlines())
    if example is not None:
        trainer.start(tuple(example))
    return trainer


class Trainer:
    """What `distribute` returns. Changes with every step; use it as a context manager, or call `close`."""

    def __init__(self, training: Training, plan: PlanSource | str | Path, place: Membership, deadlines: Deadlines):
        self.place = place
        self.model, self.optimizer = training.model, training.optimizer
        self._plan_source = plan
        self._meeting = Meeting(Rendezvous(place, next(_generations), deadlines.join), deadlines)
        self._session = Session(training, self._meeting.busy)
        self._ends = Ends(self._meeting, self.rank, self.trainers)
        self._hosted = Hosted(self._meeting)
        self._transport: SocketTransport | None = None
        self._failure: BaseException | None = None
        self._closed = False
        if place.me.kind is Kind.TRAINER:
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
        return self.job.plan

    @property
    def job(self) -> Job:
        """What every role runs; known after the first step, or with `example=`."""
        if self._session.job is None:
            raise JobError(
                "there is no job yet; expected a step first. Give distribute(..., example=batch) to meet at once."
            )
        return self._session.job

    def step(self, *batch: object) -> object:
        """One global step on this trainer's part of the batch; returns what the user's step returns, reduced.

        Raises `BatchError`, `CaptureError`, `PlanError`, `LoweringError` at the first call; `PeerLost` and
        `DeadlineExceeded`, which name who is gone or late, at any.
        """
        self._check_open()
        self._intercepted(batch)
        part = Part(batch, 0.0) if self._ends.is_without_examples(batch) else self._session.part(batch)
        if self.trainers == 1:
            check_not_empty(part.examples)
        prepared = self._started(part)
        with self._noting():
            (returned,) = self._session.step([prepared], [part])
        self._meeting.heartbeat.progress(self._session.step_count, "between steps")
        return returned

    def start(self, batch: tuple) -> None:
        """Captures on `batch` and meets the other roles, without a step."""
        self._ends.know(batch)
        self._intercepted(batch)
        self._started(self._session.part(batch))

    def shard(self, loader: Iterable, whole: Collection[str] = ()) -> Iterator:
        """This trainer's parts of the global batches that `loader` yields (see `runtime.sharding.shard`).

        Tensors as long as the first are cut, but for those named in `whole` ("batch.2" is the third): they go to all.
        Where rows of tables travel, the next batch is read before this one is given: its rows are asked for ahead.
        """
        parts = shard(loader, self.trainers, self.rank, self._meeting.share_state, whole)
        for batch in looking_ahead(parts, self._session):
            yield batch if isinstance(batch, tuple | list) else (batch,)

    def own(self, loader: Iterable) -> Iterator:
        """The batches of `loader`, which are this trainer's already: read from files of its own, say.

        The n-th batches of all trainers, joined in the order of trainers, are the n-th global batch. Where trainers wait for each
        other, one whose loader has ended goes on with batches without examples (its last one, of leading size 0) until all have
        ended: all call it, as often, and take a step for every batch. The next batch is read before this one is given. Raises
        `BatchError` where a loader is empty from the start: give `distribute(..., example=batch)`.
        """
        if self.trainers > 1:
            yield from self._ends.batches(loader, lambda: self._session.job, self._session.announce_ahead)
            return
        for batch in looking_ahead(loader, self._session):
            yield batch if isinstance(batch, tuple | list) else (batch,)

    def evaluate(self, fn: Callable, loader: Iterable, whole: Collection[str] = ()) -> object:
        """`fn(model, *batch)` over all batches, each example once over all trainers, outputs in order on every trainer.

        Captured without gradients, like the step: values are those that `sync` gives, pulled from where the plan keeps them;
        nothing is updated, buffers included. Outputs are tensors of one row per example, in any tree; they come back joined. A
        function that needs a tensor's value is refused (`CaptureError`): run it on the model after `sync()`. `whole`: `shard`'s.
        """
        if not self._session.replicas and self.trainers > 1:
            raise JobError(
                "evaluate() was called before the trainers have met; expected a step first. Give distribute(..., "
                "example=batch) to meet at once."
            )
        with self._noting():
            return self._session.evaluate(fn, loader, whole)

    def sync(self, deferred: bool = False) -> None:
        """Writes the trained values, whole, into the user's model and optimizer; under `local_steps`, of the last exchange.

        deferred  also what servers keep of deferred parameters, which are made by it; otherwise these stay with the servers

        Where variables are cut among trainers (`shard`), all trainers must call it: each gives its parts.
        """
        with self._noting():
            self._session.sync(deferred)

    def state_dict(self, deferred: bool = False) -> dict[str, object]:
        """`{"model": ..., "optimizer": ...}`, whole tensors under the names of the user's own `state_dict()` calls.

        Where servers, or trainers in parts, keep deferred parameters: raises `DeferredError`, or with `deferred=True` brings them
        here. Where variables are cut among trainers (`shard`), all trainers must call it.
        """
        with self._noting():
            return self._session.state_dict(deferred)

    def rows(self, name: str, at_a_time: int = 2**16) -> Iterator[tuple[int, torch.Tensor]]:
        """What servers keep of a variable ("table.weight", or state: "table.weight.sum"), as of the steps done: (number of
        the first row, rows), in order, without ever holding the whole. Rows of a variable that is no table come a piece at a
        time. Any trainer may ask, between two of its steps; raises `RequestError` for a name that servers do not keep, and for
        rows by virtual shards or of any ids, which have no order.
        """
        with self._noting():
            yield from self._session.rows(name, at_a_time)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes what `state_dict` gave, here under any plan or in plain PyTorch. All trainers must call it."""
        with self._noting():
            self._session.load_state_dict(state)

    def export(self, table: HashTable, since: int | None = None) -> Saved:
        """All rows of a `HashEmbedding` that servers keep, or those that changed since the export with the mark `since`, with
        the optimizer's state per row; as `HashEmbedding.export`. Like the next three, all trainers call it, between the same
        two steps: it is done once, when all have. Raises `TableError` where it cannot be."""
        with self._noting():
            return self._session.export(table, since)

    def restore(self, table: HashTable, saved: Saved) -> None:
        """Servers, however many, hold what was exported: trainer 0's `saved`. What changed goes on top of what is there."""
        with self._noting():
            self._session.restore(table, saved)

    def observe(self, table: HashTable, ids: torch.Tensor, shows: torch.Tensor, clicks: torch.Tensor) -> None:
        """Adds to the shows and clicks of ids, of this trainer's own; those of all trainers count."""
        with self._noting():
            self._session.observe(table, [(ids, shows, clicks)])

    def shrink(self, table: HashTable) -> torch.Tensor:
        """Removes rows as the table's `eviction` says; their ids, ascending, on every trainer."""
        with self._noting():
            return self._session.shrink(table)

    def close(self) -> None:
        """Writes the trained values back, leaves the job and frees everything. Safe to call twice. After an error that ended
        the job only the last: there are no values to be had from those who are gone.

        Under `local_steps` trainers exchange once more before, so that all end alike: all must call it. What is updated as
        contributions come has its last value when every trainer has left: it is waited for.
        """
        if self._closed:
            return
        if self._failure is not None:
            self._abandon(self._failure)
            return
        with suppress(JobError):  # who hosts the store may be gone
            self._ends.leave()
        try:
            with self._noting():
                self._session.meet_last()
                self._session.finish()
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

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Notes an error that ends the job, so that `close` waits for nobody."""
        try:
            yield
        except JobError as error:
            self._failure = error
            raise

    def _abandon(self, error: BaseException) -> None:
        """Ends here, and tells the others why, unless one of them is the reason."""
        if not isinstance(error, PeerLost | SystemExit):
            reason = f"{self.place.me} cannot go on: {type(error).__name__}: {error}".rstrip(": ")
            self._meeting.tell(reason)
            self._session.fail(reason)
        self._end(failed=True)

    def _end(self, failed: bool) -> None:
        """Servers that live here go on until the last trainer has left, unless this one fails."""
        self._closed = True
        atexit.unregister(self._at_exit)
        if self._transport is not None:
            self._transport.close()
        self._meeting.close()
        self._hosted.end(failed)

    def _at_exit(self) -> None:
        """The script has ended without `close`: if an error has ended it, the others are told which."""
        if not self._closed and hasattr(sys, "last_value") and sys.last_value is not None:
            self._abandon(sys.last_value)

    def _check_open(self) -> None:
        if self._closed:
            raise JobError("this trainer is closed; expected steps before close(). Call distribute again to go on.")

    def _intercepted(self, batch: tuple) -> None:
        if not self._session.replicas:
            given = self._session.training
            parts = (given.step, given.model, given.optimizer, dict(given.state or {}))
            intercepted(FirstStep(*parts, self._plan_source, given.examples, batch))

    def _started(self, part: Part) -> Prepared:
        """The captured step for a part; before the first, the roles meet."""
        if self._session.replicas:
            return self._session.prepared(part)
        try:
            prepared = self._session.prepared(part)
        except Exception:
            self._meeting.close()
            raise
        try:
            self._meet(prepared.job, part)
        except Exception as error:
            self._failure = error
            raise
        return prepared

    def _meet(self, job: Job, part: Part) -> None:
        """Agrees with the other roles on the job, starts the servers that live here, and joins. A server ends here."""
        self._meeting.agree(job)
        if job.survives_losses and self.place.servers and self.place.me == FIRST:
            self._meeting.survive()
        keep_freed_memory()
        compiles = self._session.programs().compiles()
        self._hosted.start(job, self._session.ticking(job), self._session.records(), compiles)
        atexit.register(self._at_exit)
        self._transport = SocketTransport(
            *(self.place.me, self._meeting.rendezvous, len(job.servers)),
            limit=limits_of(job, self.place.me),
            context=self._hosted.context,
            deadlines=self._meeting.deadlines,
            heartbeat=self._meeting.heartbeat,
        )
        joined = Joined(job, self._transport, self._meeting.deadlines.wait, self._hosted.check)
        nominal = float(self._meeting.published("nominal", str(part.examples or 1.0)))
        self._session.open(job, [self._transport], nominal, joined)
        joined.replica = self._session.replicas[0]
        if self.rank == 0:
            log.info("%d trainers and %d servers have met", self.trainers, len(job.servers))


def _server_count(place: Membership, plan: PlanSource | str | Path) -> int:
    """Of processes; or, where servers are threads, as many as a complete plan says, or one per trainer."""
    if place.servers:
        return place.servers
    return plan.servers if isinstance(plan, Plan) else place.trainers
