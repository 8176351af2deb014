"""Job: for every role its programs by phase, and every value that crosses between roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from syncwright import ops
from syncwright.plan import Collective, LocalSteps, ParameterServer, Plan, served_by
from syncwright.plan.groups import Members
from syncwright.plan.plan import Travelling
from syncwright.program import Program, Role, Variable
from syncwright.schema import argument
from syncwright.selection import Selection

STEP, IDLE = "step", "idle"
"""Programs of a trainer: of a step, and of one whose part of the batch is empty."""
BETWEEN, IDLE_BETWEEN = "between", "idle between"
"""Likewise of a call that only adds up gradients, where several make one update."""
FIRST, IDLE_FIRST = "first", "idle first"
"""Likewise of a step before which none was, where gradients are applied one step late."""
LAST = "last"
"""What follows the last step there."""
COMPILED = frozenset({STEP, BETWEEN})
"""What runs often."""

Merge = Literal["mean", "sum", "first", "mean_by_touch"]


@dataclass(frozen=True, slots=True)
class Channel:
    """A value that trainers push to one server.

    variable  what is pushed; the channel's name is the variable's
    server    who merges the contributions
    merge     how: example-weighted mean, sum, or (for values that are equal everywhere) the first trainer's
    hypers    hyper-parameters that its update reads, whose present values travel with each push
    ticks     the server makes these numbers itself, by a copy of the user's scheduler: they do not travel
    take      0: one contribution of every live trainer, by steps; or so many contributions, as they come
    up_to     so many contributions of one trainer travel as one, while an earlier one is under way
    wire      dtype in which it travels, where that is not the variable's
    rows      of a table whose rows travel: those that its update writes, "touched" or "all"
    on_host   trainers of one host have added theirs up: one of them contributes for all
    calls     so many contributions of each trainer, one of each call, make one update
    """

    variable: Variable
    server: int
    merge: Merge
    hypers: tuple[str, ...] = ()
    take: int = 0
    up_to: int = 1
    wire: torch.dtype | None = None
    rows: Travelling = ""
    ticks: bool = False
    on_host: bool = False
    calls: int = 1

    @property
    def travelling(self) -> tuple[str, ...]:
        """The hyper-parameters that travel with each push."""
        return () if self.ticks else self.hypers

    @property
    def sent(self) -> Variable:
        """What travels."""
        return self.variable if self.wire is None else replace(self.variable, dtype=self.wire)


@dataclass(frozen=True, slots=True)
class Table:
    """What trainers push or pull rows of.

    of      the table
    pieces  the channel of each piece, with the rows that it has
    """

    of: str
    pieces: tuple[tuple[str, Selection], ...]


@dataclass(frozen=True, slots=True, eq=False)
class ServerPart:
    """What one server does.

    holds     variables (or pieces) that live here between steps
    programs  each runs once per step, as soon as everything it reads is there for that step
    exports   values computed here that other servers read, with those servers
    """

    rank: int
    holds: tuple[Variable, ...]
    programs: tuple[Program, ...]
    exports: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Clock:
    """When trainers that train alone meet: after every `every`-th step that they have taken alone, from step `start` on."""

    every: int
    start: int = 0

    def has_begun(self, step: int) -> bool:
        """Whether step `step`, counted from 0, is taken alone."""
        return step >= self.start

    def is_due(self, alone: int) -> bool:
        """Whether to meet, after so many steps since the last time."""
        return alone >= self.every


@dataclass(frozen=True, slots=True)
class Interface:
    """What goes into the program of an exchange and what comes out, beside what servers keep.

    latest   by input of the program, the variable whose latest value on this trainer it is
    base     by input, the variable whose value after this trainer's last exchange it is; a program also reads that under the
             variable's own name
    goes_on  by what the program writes, the variable whose latest value it becomes
    keeps    by what the program writes, the variable whose value after this exchange it is
    ids      the input that says which rows of the one table the others are of; None: they are whole
    """

    latest: Mapping[str, str]
    base: Mapping[str, str]
    goes_on: Mapping[str, str]
    keeps: Mapping[str, str]
    ids: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """What trainers that train alone do when they meet.

    clock      when they do
    interface  which values its program reads and writes
    hypers     numbers that it reads; they never change
    job        its program `step` reads the values that were there after the last exchange and the latest ones; it writes
               those with which trainers go on
    """

    clock: Clock
    interface: Interface
    hypers: Mapping[str, float]
    job: Job

    @property
    def is_served(self) -> bool:
        """Whether servers keep what was there after the last exchange."""
        return bool(self.job.servers)

    @property
    def waits(self) -> bool:
        """Whether all trainers come to an exchange together, and have the same values after it."""
        return not self.job.arriving


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """The job of the steps before `until`: variables that trainers do not train alone yet."""

    until: int
    job: Job


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What every role runs.

    trainer   programs by phase: `step`, and `idle` for a trainer whose part of a batch is empty; of calls that only accumulate
              `between` and `idle between`; where gradients are applied one step late, of the first step `first` and `idle first`,
              and `last`, which applies those of the last
    servers   one part per server of the plan
    channels  what trainers push, by name
    owners    which server keeps or computes each value that trainers pull, by name
    tables    what trainers push or pull rows of, by the name that their programs give it
    casts     values that trainers pull in another dtype, by name: the variable that is kept, and the dtype
    local     outputs that stay on each trainer: tensors along the batch axis
    digest    of variables, update programs and the sequence of communications; never of a batch's shape
    joined    by the name of a variable that servers keep for several, its parts
    spans     what holds in the first steps instead, in order
    exchanges what trainers do together beside their steps, in the order in which they do it where several are due
    """

    plan: Plan
    trainer: Mapping[str, Program]
    servers: tuple[ServerPart, ...]
    channels: Mapping[str, Channel]
    owners: Mapping[str, int]
    local: tuple[str, ...]
    digest: str
    casts: Mapping[str, tuple[str, torch.dtype]] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    joined: Mapping[str, tuple[Variable, ...]] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()
    exchanges: tuple[Exchange, ...] = ()

    @property
    def pushed_between(self) -> set[str]:
        """What trainers push in every call of a step, also in those that only accumulate: channels."""
        program = self.trainer.get(BETWEEN)
        nodes = [] if program is None else program.graph.nodes
        pushed = {str(node.args[1]) for node in nodes if node.target in (ops.push, ops.push_rows)}
        of_rows = {piece for name in pushed & self.tables.keys() for piece, _ in self.tables[name].pieces}
        return of_rows | pushed - self.tables.keys()

    @property
    def served(self) -> set[str]:
        """The user's variables that servers keep, under their own names."""
        kept = {v.whole or v.name for v in self.held.values()}
        return {name for name in kept if name not in self.joined} | {
            v.name for parts in self.joined.values() for v in parts
        }

    def at(self, step: int) -> Job:
        """The job of step `step`, counted from 0."""
        return next((span.job for span in self.spans if step < span.until), self)

    @property
    def below(self) -> dict[str, Variable]:
        """The tables, and state per row, that servers keep as rows of others: each with its place there."""
        return {
            p.name: p for parts in self.joined.values() for p in parts if p.selection and p.selection.along == "rows"
        }

    @property
    def addressed(self) -> dict[str, Variable]:
        """What lives on a server, by the names by which trainers give and ask for it outside of steps: of tables that are joined
        each, as if it were kept alone."""
        below = self.below
        wholes = {part.whole for part in below.values()}
        alone = {name: variable for name, variable in self.held.items() if name not in wholes}
        return alone | {name: replace(part, selection=None) for name, part in below.items()}

    @property
    def held(self) -> dict[str, Variable]:
        """Every variable, or piece of one, that lives on a server."""
        return {v.name: v for part in self.servers for v in part.holds}

    @property
    def unbounded(self) -> tuple[str, ...]:
        """The tables of any ids that servers keep."""
        return tuple(dict.fromkeys(v.whole or v.name for v in self.held.values() if v.unbounded is not None))

    @property
    def by_id(self) -> set[str]:
        """What lives on servers, row by row, in tables of any ids: these and their state per row, or pieces of them."""
        tables = {name for name, variable in self.held.items() if variable.unbounded is not None}
        return tables | {name for name, v in self.held.items() if v.role is Role.STATE and v.shape and v.of in tables}

    @property
    def by_rows(self) -> set[str]:
        """What lives on a server and is pulled by the numbers of its rows: tables, or pieces of them, and state per row. Of
        joined tables also each by its own name."""
        tables = {piece for table in self.tables.values() for piece, _ in table.pieces}
        tables |= {self.casts[name][0] for name in tables if name in self.casts}
        held = self.held
        own = {name: held[name] for name in tables if name in held and held[name].unbounded is None}
        found = own.keys() | {
            v.name
            for v in held.values()
            if v.of in own and v.shape[:1] == own[v.of].shape[:1] and v.part == own[v.of].part
        }
        return found | {name for name, part in self.below.items() if part.whole in found}

    @property
    def arriving(self) -> set[str]:
        """What lives on a server and is updated as contributions come: trainers ask for it as it is now. Of joined tables
        also each by its own name."""
        taken = {name for name, channel in self.channels.items() if channel.take}
        programs = [p for part in self.servers for p in part.programs if taken.intersection(p.reads)]
        found = {name for program in programs for name in program.writes} & self.held.keys()
        return found | {name for name, part in self.below.items() if part.whole in found}

    @property
    def staged(self) -> set[str]:
        """What trainers pull as it was one step before."""
        pulls = self.trainer["step"].graph.find_nodes(op="call_function", target=ops.pull)
        found = {str(node.args[1]) for node in pulls if node.args[4:5] == ("before",)}
        return found | {self.casts[name][0] for name in found if name in self.casts}

    @property
    def syncs(self) -> dict[str, ParameterServer]:
        """How each variable, or piece of one, is shared that lives on a server."""
        held = self.held
        shared = {s.variable: by for s in self.plan.sharings if (by := served_by(s.sync)) is not None}
        return {name: shared[self._parameter(name, held)] for name in held}

    def _parameter(self, name: str, held: Mapping[str, Variable]) -> str:
        """The user's parameter with which something goes that lives on a server; of several that are joined, the first."""
        if name in self.joined:
            part = self.joined[name][0]
            return part.name if part.role is Role.PARAM else str(part.of)
        variable = held.get(name)
        if variable is None:
            return name
        return variable.whole or name if variable.role is Role.PARAM else self._parameter(str(variable.of), held)

    @property
    def replicated(self) -> set[str]:
        """What lives on a server and of which every trainer keeps a copy, by the names under which it is pulled."""
        found = {name for name, sync in self.syncs.items() if sync.replicated}
        return found | {name for name, (of, _) in self.casts.items() if of in found}

    @property
    def survives_losses(self) -> bool:
        """Whether the others can go on without a trainer that is lost: where servers alone join them."""
        plans = [self.plan, *(span.job.plan for span in self.spans)]
        syncs = [s.sync for plan in plans for s in plan.sharings]
        replicated = [s for s in syncs if isinstance(s, Collective | LocalSteps) and served_by(s) is None]
        return any(served_by(sync) is not None for sync in syncs) and not replicated and not self.joins_hosts

    @property
    def copied(self) -> set[str]:
        """What one trainer of each host pulls for all, by the names under which it is pulled."""
        programs = [each.trainer["step"] for each in (*(span.job for span in self.spans), self)]
        pulls = [node for p in programs for node in p.graph.find_nodes(op="call_function", target=ops.pull)]
        return {str(node.args[1]) for node in pulls if argument(node, "on_host")}

    @property
    def joins_hosts(self) -> bool:
        """Whether trainers of one host do something together."""
        return any(channel.on_host for channel in self.channels.values()) or bool(self.copied)

    @property
    def groups(self) -> dict[str, Members]:
        """The groups that trainers make when they start."""
        groups = self.plan.groups
        return {name: groups.members(name) for name in groups.needed(s.sync for s in self.plan.sharings)}

    @property
    def staleness(self) -> int | None:
        """How many steps a trainer may be ahead of another when its step returns; None: any number."""
        syncs = [s.sync for s in self.plan.sharings if isinstance(s.sync, ParameterServer)]
        return min((s.staleness for s in syncs if s.staleness is not None), default=None)

    @property
    def fixed(self) -> set[str]:
        """What lives on a server and no update writes: frozen parameters, state that is made once."""
        written = {name for part in self.servers for program in part.programs for name in program.writes}
        return self.held.keys() - written
