"""Session: what a job is above the transport. A real trainer has one with its replica, loopback one with all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from syncwright.capture.state import Binding
from syncwright.capture.tables import as_its_own, into
from syncwright.errors import RequestError, TableError, TableFull
from syncwright.job import Job
from syncwright.nn.hash_embedding import HashTable
from syncwright.plan import ALL, Plan
from syncwright.program import Program
from syncwright.runtime import replica_tables as tables
from syncwright.runtime.agreement import alike, check_equal, digest, replicated
from syncwright.runtime.client import Client
from syncwright.runtime.evaluation import Evaluations, Rows
from syncwright.runtime.executor import NO_PORT, Blocked
from syncwright.runtime.own_parts import apart_from
from syncwright.runtime.programs import Busy, Prepared, Programs
from syncwright.runtime.records import (
    NO_RECORDS,
    SERVED,
    Records,
    apart,
    check_whole,
    leave_behind,
    leave_to_servers,
    rows_on_servers,
)
from syncwright.runtime.released import Released
from syncwright.runtime.replica import Examples, Part, Replica, count_examples
from syncwright.runtime.sharding import rows_of
from syncwright.runtime.ticking import Ticking
from syncwright.runtime.transport import Outlet
from syncwright.tables import Saved

log = logging.getLogger("syncwright")

OUTER = "outer"
"""The key of outer optimizers' state in a job's."""


@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """What the user gave, and how it is to be run (see `distribute`)."""

    step: Callable
    model: torch.nn.Module
    optimizer: object
    state: Mapping[str, torch.nn.Module] | None
    examples: Examples
    plan: Callable[[Program], Plan]
    without: Sequence[str] = ()
    compile: bool | str = False
    check_replicas: bool = False
    dynamic_shapes: object = None
    scheduler: object = None


class Peers(Protocol):
    """How a session's replicas are run beside those of other processes."""

    trainers: int

    def drive(self, runs: Sequence[Generator[Blocked, None, object]]) -> list:
        """Runs what this process's trainers do side by side until all are done; what they return, in order."""
        ...

    def gather(self, parts: Sequence[torch.Tensor], note: str) -> list[torch.Tensor]:
        """Every trainer's part, in the order of trainers, from those of this process's trainers; all of one shape."""
        ...


class Session:
    """Changes with every step: the trainers that live in this process, none before `open`."""

    def __init__(self, training: Training, busy: Busy = nullcontext) -> None:
        self.training = training
        self.binding = Binding(training.model, training.optimizer, training.state)
        self.replicas: list[Replica] = []
        self.job: Job | None = None
        self._busy = busy
        self._programs: Programs | None = None
        self._evaluations: Evaluations | None = None
        self._peers: Peers | None = None
        self._next: tuple | None = None
        self._read_at: int | None = None
        self._said_unfinished = False
        self._records = NO_RECORDS
        self._released = Released(self.binding, ())

    @property
    def looks_ahead(self) -> bool:
        """Whether it helps to know the batch of the next step: rows of tables are asked for while this one runs."""
        return any(replica.looks_ahead for replica in self.replicas)

    def announce(self, batch: object) -> None:
        """This process's part of the next step, if the batch that comes then is this very one."""
        self._next = tuple(batch) if isinstance(batch, tuple | list) else (batch,)

    def announce_ahead(self, batch: object) -> None:
        """`announce`, where it helps."""
        if self.looks_ahead:
            self.announce(batch)

    @property
    def step_count(self) -> int:
        """How many steps have been done."""
        return self.replicas[0].step_count if self.replicas else 0

    def part(self, batch: tuple) -> Part:
        """A trainer's part of a global batch, its examples counted."""
        return Part(batch, count_examples(batch, self.training.examples))

    def prepared(self, part: Part) -> Prepared:
        """The captured step for a part; for one without examples the latest, if there is one."""
        programs = self.programs()
        return programs.latest if part.examples == 0 and programs.latest is not None else programs.for_batch(part.batch)

    def programs(self) -> Programs:
        """Captured steps. Reads the user's objects anew at the first call: a schedule may have been built since."""
        if self._programs is None:
            given = self.training
            loaded, self.binding = self.binding.scaler_states, Binding(given.model, given.optimizer, given.state)
            self.binding.scaler_states = loaded
            self._programs = Programs(
                *(given.step, self.binding, given.optimizer, given.plan, given.without, given.compile),
                busy=self._busy,
                dynamic_shapes=given.dynamic_shapes,
                counted=given.examples is not None,
            )
        return self._programs

    def ticking(self, job: Job) -> Ticking | None:
        """The user's schedulers as they are now, where servers are to tick them."""
        ticked = any(channel.ticks for channel in job.channels.values())
        return Ticking.of(self.training.scheduler, self.binding) if ticked else None

    def use(self, programs: Programs) -> None:
        """Captured steps from elsewhere, over the same binding."""
        self._programs = programs

    def open(self, job: Job, outlets: Sequence[Outlet], nominal: float, peers: Peers) -> None:
        """Meets the servers through one outlet per trainer of this process; all start from trainer 0's values."""
        self.job, self._peers = job, peers
        for outlet in outlets:
            if job.groups:
                outlet.meet(job.groups)
            replica = Replica(outlet.me.rank, self.binding, Client(job, outlet), job)
            replica.nominal = nominal
            replica.client.hello()
            self.replicas.append(replica)
        parts = apart_from(job.trainer["step"])
        self._released = Released(self.binding, [part.own.of for part in parts if part.own is not None])
        self._spread()

    def step(self, prepared: Sequence[Prepared], parts: Sequence[Part]) -> list[object]:
        """One global step: every replica's part of it; what the user's step returns, by replica."""
        following, self._next = self._next, None
        self._released.release()
        runs = [r.step(p, part, following) for r, p, part in zip(self.replicas, prepared, parts, strict=True)]
        returned = self._joined.drive(runs)
        if self.training.check_replicas:
            self._check_replicas(prepared[0].captured.program)
        return returned

    def evaluate(self, fn: Callable, loader: Iterable, whole: Collection[str] = ()) -> object:
        """`fn(model, *batch)` over all batches of `loader`, each example once; outputs joined in order."""
        if self._evaluations is None:
            compiles, given = self.programs().compiles, self.training
            self._evaluations = Evaluations(self.binding, given.optimizer, compiles, self._busy)
        rows = Rows(self._peers.trainers if self._peers is not None else 1)
        for batch in loader:
            given = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
            rows.begin(int(count_examples(given, None)))
            self._evaluate(self._evaluations, fn, given, rows, whole)
        for replica in self.replicas:
            replica.client.release()
        return rows.joined(self._peers.gather if self._peers is not None else None)

    def records(self) -> Records:
        """What deferred() has recorded, for the servers that begin here."""
        self._records = Records(self.binding.values())
        return self._records

    def sync(self, deferred: bool = False) -> None:
        """Writes the trained values, whole, into the user's model and optimizer; of deferred ones that servers keep only
        where they are asked for: they are deferred no more then."""
        if self.replicas:
            self._say_unfinished()
            values = {**self.replicas[0].shared, **self._gathered(set() if deferred else self._released.deferred)}
            without = set() if deferred else self.apart()
            (served,) = self._joined.drive([self.replicas[0].served(without)])
            self._write({**values, **served})
            self._released.put_back()

    def _say_unfinished(self) -> None:
        """Once, of gradients that no update has had yet."""
        done, of = self.replicas[0].calls.done, self.replicas[0].job.plan.accumulate
        if done and not self._said_unfinished:
            self._said_unfinished = True
            log.warning(
                "of the %d calls that make one update (accumulate) only %d are done: the values are those before them, and their "
                "gradients are in no state that is saved. Save and end after a multiple of %d calls",
                *(of, done, of),
            )

    def _gathered(self, without: Collection[str]) -> dict[str, torch.Tensor]:
        """What trainers keep in parts, whole; all trainers must ask for it."""
        return self._joined.drive([replica.gathered(without) for replica in self.replicas])[0]

    def apart(self) -> set[str]:
        """What servers keep of parameters that are deferred."""
        return set() if self.job is None else apart(self.binding, self.job)

    def rows(self, name: str, at_a_time: int) -> Iterator[tuple[int, torch.Tensor]]:
        """What servers keep of a variable, so many rows at a time, each with the number of the first."""
        self._read_at = self.step_count
        if self.job is None or not self.replicas:
            raise RequestError(f"rows of '{name}': no servers keep anything yet. Expected a step before.")
        yield from rows_on_servers(self.job, name, at_a_time, self.replicas[0], self._joined.drive)

    def state_dict(self, deferred: bool = False) -> dict[str, object]:
        """`{"model": ..., "optimizer": ...}`, whole, as the user's own `state_dict()` calls name it; and the state of outer
        optimizers, where there is some: `"outer": {"fc.weight.momentum_buffer": ...}`."""
        if not deferred and self.job is not None:
            check_whole(self.binding, self.job)
            self._released.check_whole()
        self.sync(deferred)
        found = self.binding.state_dict(self.training.optimizer)
        outer = self._joined.drive([self.replicas[0].outer_state()])[0] if self.replicas else {}
        return {**found, OUTER: outer} if outer else found

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes what `state_dict` gave, here under any plan or in plain PyTorch."""
        self.binding.load_state_dict(self.training.optimizer, state)
        for replica in self.replicas:
            replica.reload(cast(Mapping, state.get(OUTER, {})))
        self._spread()

    def finish(self) -> None:
        """Leaves the job and writes what was trained, whole, into the user's model and optimizer."""
        if self.replicas:
            self._say_unfinished()
            without = self.apart()
            gathered = self._gathered(self._released.deferred)
            served = self._joined.drive([replica.finish(without) for replica in self.replicas])
            self._write({**self.replicas[0].shared, **gathered, **served[0]}, ends=True)
            if without and self.job is not None:
                leave_behind(self.binding, self.job, asked_for=self._read_at == self.step_count)
            self._released.leave_behind()

    def meet_last(self) -> None:
        """Trainers apply what is under way, and those that train alone meet a last time, over the steps since the last meeting;
        all must call it."""
        if self.replicas:
            self._joined.drive([replica.apply_last() for replica in self.replicas])
            self._joined.drive([replica.meet_last() for replica in self.replicas])

    def export(self, table: HashTable, since: int | None) -> Saved:
        """What servers hold of a table of any ids, or what changed in it since an export; all trainers ask for it."""
        name = self._name_of(table)
        number = -1 if since is None else since
        found = self._joined.drive([replica.order(name, "export", number=number) for replica in self.replicas])
        return as_its_own(self.binding, name, tables.exported(found[0]))

    def restore(self, table: HashTable, saved: Saved) -> None:
        """Servers hold what trainer 0 gives; of what changed, on top of what is there."""
        name, brings = self._name_of(table), tables.part_of_saved(saved)
        given = [brings if replica.rank == 0 else tables.nothing for replica in self.replicas]
        self._joined.drive([r.order(name, "restore", each) for r, each in zip(self.replicas, given, strict=True)])

    def observe(self, table: HashTable, told: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        """Tells servers shows and clicks of ids, from each trainer of this process."""
        name, brings = self._name_of(table), [tables.told(*each) for each in told]
        self._joined.drive([r.order(name, "observe", each) for r, each in zip(self.replicas, brings, strict=True)])

    def shrink(self, table: HashTable) -> torch.Tensor:
        """Removes rows on servers; their ids, ascending."""
        name = self._name_of(table)
        found = self._joined.drive([replica.order(name, "shrink") for replica in self.replicas])
        return torch.cat([each["ids"] for each in found[0]]).sort().values

    def leave(self) -> None:
        """Tells servers that these trainers take part in no further step."""
        for replica in self.replicas:
            replica.leave()

    def fail(self, reason: str) -> None:
        """Tells servers that these trainers end early."""
        for replica in self.replicas:
            replica.client.fail(reason)

    def _name_of(self, table: HashTable) -> str:
        """The name of a table that servers keep. Raises `TableError` for any other."""
        kept = self.job.unbounded if self.job is not None else ()
        name = next((name for name in kept if self.binding.tables[name] is table), None)
        if name is None:
            raise TableError(
                f"found {type(table).__name__}, which servers do not keep; expected one of: {', '.join(kept) or 'none'}. Give a "
                "HashEmbedding of the model that the job trains, after the first step (or with distribute(..., example=))."
            )
        return name

    def _write(self, values: Mapping[str, object], ends: bool = False) -> None:
        """Into the user's objects. A table that its module cannot hold stays as it was, which at the end is only said."""
        for name in [name for name in values if name in self.binding.tables]:
            found = values[name]
            if isinstance(found, Saved):
                into(self.binding, name, found)
            elif isinstance(found, int):
                why = (
                    f"'{name}' has {found} rows on servers, and its module has a capacity of "
                    f"{self.binding.tables[name].capacity}. Its rows stay there: take them by export(), or give the module a "
                    "larger capacity."
                )
                if not ends:
                    raise TableFull(why)
                log.warning("%s", why)
        rest = {
            n: value for n, value in values.items() if n not in self.binding.tables or isinstance(value, torch.Tensor)
        }
        self.binding.write(rest)  # type: ignore[arg-type]

    @property
    def _joined(self) -> Peers:
        assert self._peers is not None, "the session is open"
        return self._peers

    def _spread(self) -> None:
        """Trainer 0's values become everyone's: servers' and replicas'."""
        for replica in self.replicas:
            if replica.rank == 0:
                replica.give(self.binding.values(), replica.step_count, self._records)
            replica.take_first()
            replica.begin_alone()
        if self.job is not None:
            leave_to_servers(self.binding, self.job, SERVED)
        self._released.put_back()
        self._released.release()

    def _evaluate(
        self, evaluations: Evaluations, fn: Callable, batch: tuple, rows: Rows, whole: Collection[str]
    ) -> None:
        """Every trainer of this process takes its part of a batch; before they have met, this one the whole."""
        ranks = [replica.rank for replica in self.replicas] or [0]
        runs: list[Generator[Blocked, None, list]] = []
        for index, rank in enumerate(ranks):
            span = rows.span(rank)
            part = cast(tuple, rows_of(batch, *((span.start, span.stop) if span.start < span.stop else (0, 1)), whole))
            evaluated = evaluations.for_batch(fn, part, max(1, span.stop - span.start), self.job)
            rows.structure = evaluated.structure
            if span.start == span.stop and not evaluated.gathers:
                runs.append(_given(evaluated.nothing()))
            elif self.replicas:
                runs.append(self.replicas[index].evaluate(evaluated, part, span.start < span.stop))
            else:
                runs.append(evaluated.run({**self.binding.values(), **self.binding.hyper_values()}, part, NO_PORT, 0))
        drive = self._peers.drive if self._peers is not None else _run
        for rank, outputs in zip(ranks, drive(runs), strict=True):
            rows.add(rank, outputs)

    def _check_replicas(self, program: Program) -> None:
        assert self.job is not None, "the session is open"
        first = self.replicas[0]
        plan = self.job.at(first.trained - 1).plan
        names = replicated(program, plan, first.values)
        met = [f"{name} (after the last exchange)" for outer in first.outers for name in outer.all]
        mine = [
            digest([*(r.values[name] for name in names), *(v for outer in r.outers for v in outer.all.values())])
            for r in self.replicas
        ]
        if (names or met) and self._joined.trainers > 1:
            groups = {name: alike(name, program, plan) for name in names}
            groups |= dict.fromkeys(met, plan.groups.members(ALL))
            check_equal(groups, self._joined.gather(mine, "the check of replicas"), self.step_count)


def _given(outputs: list[torch.Tensor]) -> Generator[Blocked, None, list[torch.Tensor]]:
    """A run that has nothing to do."""
    yield from ()
    return outputs


def _run(runs: Sequence[Generator[Blocked, None, list]]) -> list[list]:
    """Runs that wait for nobody."""
    done = []
    for run in runs:
        try:
            next(run)
        except StopIteration as stop:
            done.append(stop.value)
    return done
