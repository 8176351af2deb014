"""Job: for every role its programs by phase, and every value that crosses between roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from syncwright.plan import Plan
from syncwright.program import Program, Variable

Merge = Literal["mean", "sum", "first"]


@dataclass(frozen=True, slots=True)
class Channel:
    """A value that trainers push to one server.

    variable  what is pushed; the channel's name is the variable's
    server    who merges the contributions
    merge     how: example-weighted mean, sum, or (for values that are equal everywhere) the first trainer's
    hypers    hyper-parameters whose present values travel with each push
    """

    variable: Variable
    server: int
    merge: Merge
    hypers: tuple[str, ...] = ()


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


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """What trainers that train alone do when they meet.

    clock   when they do
    latest  by input of its program, the variable whose latest value it is
    hypers  numbers that its program reads; they never change
    job     its program `step` reads the values that all had after the last exchange, under the variables' own names, and
            the latest ones; it writes those with which all go on
    """

    clock: Clock
    latest: Mapping[str, str]
    hypers: Mapping[str, float]
    job: Job


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """The job of the steps before `until`: variables that trainers do not train alone yet."""

    until: int
    job: Job


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What every role runs.

    trainer   programs by phase: `step`, and `idle` for a trainer whose part of a batch is empty
    servers   one part per server of the plan
    channels  what trainers push, by name
    owners    which server keeps or computes each value that trainers pull, by name
    local     outputs that stay on each trainer: tensors along the batch axis
    digest    of variables, update programs and the sequence of communications; never of a batch's shape
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
    spans: tuple[Span, ...] = ()
    exchanges: tuple[Exchange, ...] = ()

    def at(self, step: int) -> Job:
        """The job of step `step`, counted from 0."""
        return next((span.job for span in self.spans if step < span.until), self)

    @property
    def held(self) -> dict[str, Variable]:
        """Every variable, or piece of one, that lives on a server."""
        return {v.name: v for part in self.servers for v in part.holds}

    @property
    def fixed(self) -> set[str]:
        """What lives on a server and no update writes: frozen parameters, state that is made once."""
        written = {name for part in self.servers for program in part.programs for name in program.writes}
        return self.held.keys() - written
