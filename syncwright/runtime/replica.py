"""One trainer without its network: the values that it keeps, and its part of every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass

import torch

from syncwright.capture.state import Binding
from syncwright.deferred.tensor import Deferred, real
from syncwright.errors import BatchError
from syncwright.job import LAST, Job
from syncwright.passes.flat import flat_parts
from syncwright.passes.insert import FIRST, RANK, TOTAL, peers_of
from syncwright.plan import ParameterServer
from syncwright.program import Program, Role, Variable
from syncwright.runtime import replica_tables as tables
from syncwright.runtime.calls import Calls
from syncwright.runtime.client import Client, When
from syncwright.runtime.evaluation import Evaluated
from syncwright.runtime.executor import Blocked
from syncwright.runtime.flat_values import equal, laid_flat
from syncwright.runtime.lane import Lane
from syncwright.runtime.lookahead import Found, is_alike, is_same
from syncwright.runtime.merging import no_examples
from syncwright.runtime.messages import Act, Address, Message
from syncwright.runtime.outer import Outer
from syncwright.runtime.own_parts import apart_from, own_part, variables_of
from syncwright.runtime.pieces import UNTIL_ALL_LEFT, begun, give, joined
from syncwright.runtime.programs import Prepared
from syncwright.runtime.records import NO_RECORDS, Records
from syncwright.tree import tensors

Served = dict[str, torch.Tensor | tables.Saved | int]
"""By variable its value; by table of any ids its rows, or how many, where the user's module cannot hold them."""
Examples = Callable[..., float] | float | None
CLOCKS = "clocks"
"""What a trainer waits for that is too far ahead."""


@dataclass(frozen=True, slots=True)
class Part:
    """A trainer's part of a global batch: its arguments and how many examples they count as."""

    batch: tuple
    examples: float


class Replica:
    """Trainer `rank`. Changes with every step: its values, its counts, its random stream's state.

    step_count  of steps and of times that all values were set anew: versions of what servers keep
    trained     how many steps it has taken
    """

    def __init__(self, rank: int, binding: Binding, client: Client, job: Job):
        self.rank, self.binding, self.client, self.job = rank, binding, client, job
        self.step_count = self.trained = 0
        self.calls = Calls(job.plan)
        self.nominal = 1.0
        self._replicated, self._ahead = job.replicated, _tables_ahead(job)
        groups = job.plan.groups
        self._peers = {peers_of(name).name: len(groups.around(name, rank)) for name in job.groups}
        self._layout: Prepared | None = None
        self._found: tuple[tuple, Found] | None = None
        self._parts: dict[str, list[Variable]] = {}
        self._cut = variables_of(job.trainer["step"].variables)
        self._own = {name: own for name, own in self._cut.items() if own.is_with(rank)}
        self._elsewhere = job.served | binding.table_buffers(job.unbounded)
        self._elsewhere |= {v.own.of for v in apart_from(job.trainer["step"]) if v.own is not None}
        self.values: dict[str, object] = self._begun()
        lanes = [Lane(client.transport, number) for number, _ in enumerate(job.exchanges, start=1)]
        self.outers = [Outer(each, lane) for each, lane in zip(job.exchanges, lanes, strict=True)]

    def _begun(self) -> dict[str, object]:
        """What this trainer keeps, as the user's objects have it; state that they do not hold, as it begins."""
        given = self.binding.values()
        kept = {name: real(value) for name, value in given.items() if name not in self._elsewhere}
        own = {name: own_part(given[own.of], own, self.rank) for name, own in self._own.items() if own.of in given}
        return {**kept, **own, **_added(self.job.trainer["step"])}

    @property
    def shared(self) -> dict[str, object]:
        """What stands for one device: of variables that trainers train alone, what they had after their last meeting."""
        return {**self.values, **{name: value for outer in self.outers for name, value in outer.shared.items()}}

    def take(self, sender: Address, message: Message) -> None:
        """What a server sent."""
        client = self.outers[message.job - 1].client if message.job else self.client
        client.take(sender, message)

    @torch.no_grad()
    def step(self, prepared: Prepared, part: Part, following: tuple | None = None) -> Generator[Blocked, None, object]:
        """This trainer's part of one step; gives `Blocked` while it waits; returns what the user's step returns.

        A part without examples runs the `idle` program and returns the reduced values with the others.
        following  the next step's part, if it is known
        """
        prepared = prepared.at(self.trained)
        self._adopt(prepared)
        self.begin_alone()
        is_first = LAST in prepared.job.trainer and not self.client.has_begun_later
        calls, phase = self.calls, self.calls.phase(part.examples, is_first)
        calls.begin(part.examples / self.nominal)
        executor = prepared.executor(phase, self.rank)
        hypers, call = self.binding.hyper_values(), (calls.number(self.step_count), calls.weight)
        self.client.begin(
            *(self.step_count, calls.contributed, hypers, prepared.uses[phase]), after=prepared.after, call=call
        )
        self._look_ahead(prepared, part.batch, following)
        values = {**self.values, **hypers, **prepared.captured.constants, **_inputs(prepared, part.batch)}
        values |= {**calls.numbers, FIRST: int(self.rank == 0), RANK: self.rank, **self._peers}
        results = yield from executor.run(values, self.client)
        if part.examples == 0 and TOTAL in results and results[TOTAL] == 0:
            raise no_examples(self.step_count)
        self._keep(results)
        self.binding.set_modes(prepared.captured.modes)
        if calls.updates:
            yield from self._updated(prepared, results)
        calls.end()
        self.client.transport.flush()
        return _returned(prepared, results)

    def _updated(self, prepared: Prepared, results: Mapping[str, object]) -> Generator[Blocked, None, None]:
        """What follows an update: new values are asked for, and trainers that train alone meet when it is time."""
        self.step_count += 1
        self.trained += 1
        self.client.ask(prepared.pulls, self.step_count)
        yield from self._refresh(prepared)
        for outer in self.outers:
            if outer.has_begun:
                outer.add(self.calls.contributed, results)
            if outer.is_due:
                yield from self._meet(outer)
        yield from self._keep_together()

    def _refresh(self, prepared: Prepared) -> Generator[Blocked, None, None]:
        """Waits until the copies of what servers keep are those that the next step reads."""
        for channel, at in prepared.pulls:
            if channel in self._replicated:
                while self.client.fetch(channel, self.step_count + at) is None:
                    yield Blocked("the end of the step", channel)

    @property
    def looks_ahead(self) -> bool:
        """Whether rows are asked for ahead where the next batch is known."""
        return bool(self._ahead)

    def _look_ahead(self, prepared: Prepared, batch: tuple, following: tuple | None) -> None:
        """Uses what was found out about this batch while the last step ran, and asks for rows of the next."""
        known, self._found = self._found, None
        if following is None or not prepared.index.lookups or not is_alike(batch, following):
            if known is not None and is_same(known[0], batch):
                self.client.know(known[1])
            return
        if known is None or not is_same(known[0], batch):
            known = batch, self._asked(prepared, batch, self.client.call)
        self.client.know(known[1])
        self._found = following, self._asked(prepared, following, self.client.call + 1)

    def _asked(self, prepared: Prepared, batch: tuple, call: int) -> Found:
        """Asks for the rows that a batch looks up, for a call of a step, of the tables of which that is done."""
        found = prepared.index.run(_inputs(prepared, batch))
        for lookup in [each for each in prepared.index.lookups if self.job.tables[each.channel].of in self._ahead]:
            self.client.ask_rows(lookup.channel, found[lookup.unique][0], call)
        return found

    def _keep_together(self) -> Generator[Blocked, None, None]:
        """Waits while another trainer is further behind than the plan allows."""
        if self.job.staleness is not None and self.job.plan.trainers > 1:
            self.client.tick(self.step_count, self.job.staleness)
            while not self.client.is_free(self.step_count):
                yield Blocked("the end of the step", CLOCKS)

    @torch.no_grad()
    def apply_last(self) -> Generator[Blocked, None, None]:
        """Applies what the last step has begun, where gradients are applied one step late."""
        prepared = self._layout
        if prepared is None or not self.client.has_begun_later:
            return
        values = {**self.values, **self.binding.hyper_values(), **prepared.captured.constants}
        values |= {**self.calls.numbers, FIRST: int(self.rank == 0), RANK: self.rank}
        self._keep((yield from prepared.executor(LAST, self.rank).run(values, self.client)))

    def meet_last(self) -> Generator[Blocked, None, None]:
        """Ends the steps taken alone: meets the others over those since the last meeting, where there are any."""
        for outer in self.outers:
            if outer.is_open:
                yield from self._meet(outer)

    def begin_alone(self) -> None:
        """Begins what is alone from the next step on: the values of now are what all have."""
        for outer in self.outers:
            if not outer.has_begun and outer.clock.has_begun(self.trained):
                outer.begin(self.values)

    def _meet(self, outer: Outer) -> Generator[Blocked, None, None]:
        parts = {part.name for parts in self._parts.values() for part in parts}
        for name, value in (yield from outer.meet(self.values, self.trained)).items():
            if name in parts:
                self.values[name].copy_(value)  # type: ignore[attr-defined]
            else:
                self.values[name] = value

    def evaluate(
        self, evaluated: Evaluated, batch: tuple, wanted: bool = True
    ) -> Generator[Blocked, None, list[torch.Tensor]]:
        """What a function gives for this trainer's part of a batch, from the values of the steps done. Where it is not `wanted`,
        as none of the examples is this trainer's, it only takes part."""
        self.client.begin(self.step_count, 1.0, {}, training=False)
        values = {**self.shared, **self.binding.hyper_values()}
        found = yield from evaluated.run(values, batch, self.client, self.rank)
        return found if wanted else evaluated.nothing()

    def _adopt(self, prepared: Prepared) -> None:
        """Lays variables out as the program has them: those that a flat one stands for become views of it."""
        if prepared is self._layout:
            return
        self._layout = prepared
        program = prepared.job.trainer["step"]
        self._parts = flat_parts(program)
        for name, parts in self._parts.items():
            flat = program.variables[name]
            if not flat.shape:
                self.values[name] = equal(parts, self.values)
                continue
            self.values[name] = joined = laid_flat(flat, parts, self.values)
            for part in parts:
                self.values[part.name] = joined[slice(*part.part)].view(part.shape)  # type: ignore[misc]

    def _keep(self, results: Mapping[str, object]) -> None:
        for name, value in results.items():
            if name not in self.values:
                continue
            old = self.values[name]
            if name in self._parts and isinstance(old, torch.Tensor) and old.shape:
                if old is not value:
                    old.copy_(value)  # type: ignore[arg-type]
                continue
            self.values[name] = value
            for part in self._parts.get(name, ()):
                self.values[part.name] = value

    def reload(self, outer_state: Mapping[str, torch.Tensor]) -> None:
        """Takes the user's values anew; counts as a step, so that servers tell old values from new.

        State that passes have added begins anew: the user's objects do not hold it. So do meetings of trainers that train
        alone, but for the outer optimizer's state: as many steps as between two of them go before the next.
        """
        self.values = self._begun()
        self._layout = None
        self.calls.forget()
        for outer in self.outers:
            outer.forget(outer_state)
        self.step_count += 1
        self.client.restart(self.step_count)

    def served(self, without: Collection[str] = ()) -> Generator[Blocked, None, Served]:
        """What servers hold, whole, under the variables' own names, as of the steps done; `without` some that they hold."""
        self.client.flush()
        found = yield from self._collected("now", without)
        everything: Served = {**found, **(yield from self._tables(self._ask_tables(without), "state"))}
        for outer in self.outers:
            everything |= yield from outer.served()
        return everything

    def outer_state(self) -> Generator[Blocked, None, dict[str, torch.Tensor]]:
        """The state of outer optimizers after the last meetings, by variable."""
        found: dict[str, torch.Tensor] = {}
        for outer in self.outers:
            found |= yield from outer.state()
        return {name: value.clone() for name, value in found.items()}

    def finish(self, without: Collection[str] = ()) -> Generator[Blocked, None, Served]:
        """Leaves the job; what servers hold in the end. What is updated as contributions come: when all have left."""
        for outer in self.outers:
            outer.leave()
        found: Served = yield from self._finish_steps(without)
        for outer in self.outers:
            found |= yield from outer.last()
        return found

    def leave(self) -> None:
        """Takes part in no further step or exchange."""
        for outer in self.outers:
            outer.leave()
        self.client.leave(self.step_count)

    def _finish_steps(self, without: Collection[str]) -> Generator[Blocked, None, Served]:
        held = self.job.addressed
        arriving = self.job.arriving & held.keys() - set(without)
        if not arriving:
            found = yield from self._collected("now", without)
            held = yield from self._tables(self._ask_tables(without), "state")
            self.client.leave(self.step_count)
            return {**found, **held}
        turns = self._ask_tables(without, at_end=True)
        fresh = self.client.fresh()
        for name in arriving - self.job.by_id:
            self.client.fetch(name, fresh, "end")
        rest = yield from self._collected("now", without=arriving.union(without))
        self.client.leave(self.step_count)
        rest |= yield from self._collected("end", without=held.keys() - arriving, fresh=fresh)
        return {**rest, **(yield from self._tables(turns, UNTIL_ALL_LEFT))}

    def _ask_tables(self, without: Collection[str], at_end: bool = False) -> dict[str, dict[str, int]]:
        """Asks for all tables of any ids, as far as the user's modules can hold them; not for those of `without`."""
        wanted = [name for name, pieces in self.client.tables.pieces.items() if not pieces.keys() <= set(without)]
        most = {name: self.binding.tables[name].capacity for name in wanted}
        return {n: tables.ask_to_read(self.client, n, self.step_count, m, at_end) for n, m in most.items()}

    def _tables(
        self, turns: Mapping[str, Mapping[str, int]], waits: str
    ) -> Generator[Blocked, None, dict[str, tables.Saved | int]]:
        found = {}
        for name, each in turns.items():
            most = self.binding.tables[name].capacity
            found[name] = yield from tables.read(self.client, each, most, waits)
        return found

    def order(
        self, name: str, act: Act, brings: tables.Brings = tables.nothing, number: int = -1
    ) -> Generator[Blocked, None, list[tables.Given]]:
        """What servers answer to what all trainers have them do with a table of any ids, between two steps."""
        return (yield from tables.order(self.client, name, act, self.step_count, brings, number))

    def rows(self, name: str, first: int, last: int) -> Generator[Blocked, None, torch.Tensor]:
        """Rows [first, last) of a piece of a table that a server keeps, or of its state, as of the steps done."""
        self.client.flush()
        self.client.begin(self.step_count, 1.0, {}, training=False)
        ids = torch.arange(first, last)
        while (found := self.client.rows_of(name, ids)) is None:
            yield Blocked("rows", name)
        return found

    def _collected(
        self, when: When, without: Collection[str] = (), fresh: int | None = None
    ) -> Generator[Blocked, None, dict[str, torch.Tensor]]:
        found: list[tuple[Variable, torch.Tensor]] = []
        by_id = self.job.by_id
        fresh = self.client.fresh() if fresh is None else fresh
        for name, variable in self.job.addressed.items():
            if name in without or name in by_id:
                continue
            version = fresh if name in self.job.arriving else self.step_count
            while (value := self.client.collect(name, version, when)) is None:
                yield Blocked("state" if when == "now" else UNTIL_ALL_LEFT, name)
            found.append((variable, value))
        self.client.release()
        return joined(self.job, found)

    def give(self, values: Mapping[str, object], version: int, records: Records = NO_RECORDS) -> None:
        """Sends servers their slices of `values`, and their parts of tables of any ids, but for what they make themselves:
        `records` are those that they have."""
        for name in self.job.unbounded:
            tables.give(self.client, self.binding, name, version)
        give(self.client, values, version, records)

    def gathered(self, without: Collection[str]) -> Generator[Blocked, None, dict[str, torch.Tensor]]:
        """What trainers keep in parts, whole, under the user's names. All trainers take part, each variable at a time."""
        found: dict[str, torch.Tensor] = {}
        for name, own in self._cut.items():
            if own.of in self.values or own.of in without:
                continue  # every trainer has the parameter whole, or nobody wants it so
            part = self.values.get(name, _none_of(self.job.trainer["step"].variables[name]))
            assert isinstance(part, torch.Tensor), "parts are tensors"
            if own.keeper is None:
                self.client.start_whole(own.of, [part], own.group)
            else:
                self.client.start_given(own.of, [part], own.keeper, own.group)
            while (whole := self.client.finish_whole(own.of, [own.numel])) is None:
                yield Blocked("state", own.of)
            found[own.of] = whole[0].view(own.shape)
        return found

    @torch.no_grad()
    def take_first(self) -> None:
        """Takes trainer 0's values, one collective per dtype, and one for each variable that is kept in parts."""
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for name in self._cut:
            self._take_part(name)
        for name, value in self.values.items():
            if name not in self._cut and isinstance(value, torch.Tensor) and value.numel():
                by_dtype.setdefault(value.dtype, []).append(value)
        for dtype, values in by_dtype.items():
            flat = torch.cat([v.reshape(-1) for v in values])
            self.client.transport.broadcast(flat, f"the initial values of type {dtype}")
            for value, part in zip(values, flat.split([v.numel() for v in values]), strict=True):
                value.copy_(part.view(value.shape))

    def _take_part(self, name: str) -> None:
        """This trainer's part of trainer 0's value; what is deferred is made of the same record everywhere."""
        own = self._cut[name]
        given = self.binding.values().get(own.of)
        if given is not None and not (isinstance(given, Deferred) and self.step_count == 0):
            whole = real(given)
            self.client.transport.broadcast(whole, f"the initial value of {own.of}")
            if own.is_with(self.rank):
                self.values[name] = own_part(whole, own, self.rank)


def _none_of(variable: Variable) -> torch.Tensor:
    """In place of what another trainer keeps: it says how much there is, and takes no memory."""
    return torch.empty(1, dtype=variable.dtype).expand(variable.numel)


def _tables_ahead(job: Job) -> set[str]:
    """The tables of which rows are asked for ahead; of joined ones also what they are rows of."""
    sharings = [s for s in job.plan.sharings if s.rows == "touched"]
    found = {s.variable for s in sharings if isinstance(s.sync, ParameterServer) and s.sync.prefetch}
    return found | {str(part.whole) for name, part in job.below.items() if name in found}


def _added(program: Program) -> dict[str, torch.Tensor]:
    """The state that passes have added to a trainer's program, as it begins."""
    return {
        name: begun(program.variables[name], node.meta["val"].device)
        for name, node in program.placeholders.items()
        if program.variables[name].initial is not None
    }


def count_examples(batch: tuple, examples: Examples) -> float:
    """How many examples a batch counts as: `examples`, or the leading size of its first tensor."""
    if examples is not None:
        count = float(examples(*batch) if callable(examples) else examples)
        if not 0 <= count < math.inf:
            raise BatchError(
                f"examples: found {count:g} for a batch, expected a finite number, at least 0. Let `examples` count "
                "what the loss is a mean over, such as the valid tokens."
            )
        return count
    for tensor in tensors(batch):
        if tensor.dim() > 0:
            return float(tensor.shape[0])
    raise BatchError(
        "the batch has no tensor with a leading axis, so its examples cannot be counted; expected one such as [64, "
        "10]. Give distribute(..., examples=) a number, or a function of the batch."
    )


def check_not_empty(examples: float) -> None:
    """Raises `BatchError` for a global batch without examples: its mean is 0 / 0."""
    if examples == 0:
        raise BatchError(
            "the global batch has no examples; expected at least one, on some trainer. Leave the step out for such a "
            "batch."
        )


def random_stream(trainer: int) -> torch.Tensor:
    """The state of trainer `trainer`'s random generator at the start: trainer 0 goes on with the user's own stream,
    the others start from the user's seed mixed with their number (splitmix64)."""
    if trainer == 0:
        return torch.get_rng_state()
    mixed = (torch.initial_seed() + trainer * 0x9E3779B97F4A7C15) % 2**64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
    return torch.Generator().manual_seed((mixed ^ (mixed >> 31)) % 2**63).get_state()


def _inputs(prepared: Prepared, batch: tuple) -> dict[str, torch.Tensor]:
    names = [v.name for v in prepared.captured.program.of_role(Role.INPUT)]
    return dict(zip(names, tensors(batch), strict=True))


def _returned(prepared: Prepared, results: Mapping[str, object]) -> object:
    leaves = [results.get(name) for name in prepared.captured.outputs]
    return prepared.captured.returned.unflatten(leaves)
