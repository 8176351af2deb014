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


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What every role runs.

    trainer   programs by phase: `step`, and `idle` for a trainer whose part of a batch is empty
    servers   one part per server of the plan
    channels  what trainers push, by name
    owners    which server keeps or computes each value that trainers pull, by name
    local     outputs that stay on each trainer: tensors along the batch axis
    digest    of variables, update programs and the sequence of communications; never of a batch's shape
    """

    plan: Plan
    trainer: Mapping[str, Program]
    servers: tuple[ServerPart, ...]
    channels: Mapping[str, Channel]
    owners: Mapping[str, int]
    local: tuple[str, ...]
    digest: str

    @property
    def held(self) -> dict[str, Variable]:
        """Every variable, or piece of one, that lives on a server."""
        return {v.name: v for part in self.servers for v in part.holds}

    @property
    def fixed(self) -> set[str]:
        """What lives on a server and no update writes: frozen parameters, state that is made once."""
        written = {name for part in self.servers for program in part.programs for name in program.writes}
        return self.held.keys() - written
