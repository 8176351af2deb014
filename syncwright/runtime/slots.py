"""The values that a server has, by name and number, with who reads them and who waits for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from syncwright.program import Program, Role
from syncwright.runtime.merging import Counting
from syncwright.runtime.messages import Address, Order, Pull, PullRows
from syncwright.shapes import is_host


@dataclass(slots=True, eq=False)
class Running:
    """A program and which of its runs is next. Changes with every run.

    clock  what numbers its runs: "" the steps, or the channel whose contributions do
    reads  by the name of each value that it reads, where the values are
    """

    program: Program
    clock: str
    host: frozenset[str]
    reads: dict[str, Slot] = field(default_factory=dict)
    step: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """Rows that a trainer has asked for: `ids` within the piece that is kept here.

    missing  which of them it does not have as they will be; None: all
    """

    header: PullRows
    ids: torch.Tensor
    missing: torch.Tensor | None = None


@dataclass(slots=True, eq=False)
class Slot:
    """The values of one name, by number. Changes as they come and go.

    held     the server keeps it between runs: it stays until there is a newer one
    readers  programs that read it
    kept     of values that trainers pull, so many of the newest stay, whoever has read them
    parked   pulls that wait for a value
    """

    held: bool
    readers: list[Running] = field(default_factory=list)
    kept: int = 0
    values: dict[int, object] = field(default_factory=dict)
    parked: list[tuple[Address, Pull | Asked | Order]] = field(default_factory=list)

    @property
    def newest(self) -> int | None:
        return max(self.values, default=None)

    def forget(self) -> None:
        """What nobody asks for any more."""
        if not self.values:
            return
        bound = min((r.step for r in self.readers), default=max(self.values) + 1)
        if self.kept:
            bound = min(bound, max(self.values) - self.kept + 1)
        for number in [n for n in self.values if n < bound]:
            del self.values[number]


def running_of(program: Program, counted: Mapping[str, Counting]) -> Running:
    host = frozenset(name for name, node in program.placeholders.items() if is_host(node.meta["val"]))
    clock = next((name for name in program.reads if name in counted and counted[name].channel.take), "")
    return Running(program, clock, host)


def key_of(running: Running, name: str) -> tuple[str, str]:
    """Where a program finds a value. Hyper-parameters travel with contributions, and are numbered as these are."""
    return name, running.clock if running.program.variables[name].role is Role.HYPER else ""


def is_pulled(running: Running, name: str) -> bool:
    """Whether a program reads under this name what the trainer of a contribution has pulled (see `passes.compensate`)."""
    variable = running.program.variables[name]
    return variable.role is Role.GLOBAL and variable.of is not None


def as_tensor(value: object) -> torch.Tensor:
    """A value as it travels: in host memory."""
    return value.cpu() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
