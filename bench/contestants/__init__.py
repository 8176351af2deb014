"""What a contestant is, and what its module must offer.

A module offers `start(workload, seat, **options) -> Running`, which the ranks call: those that the driver asks to
step. Where a contestant has other processes (servers, say), its module offers `serve(workload, seat, **options)` as
well, which each of them calls: it runs until the job or its process ends. Nothing here imports torch: the driver reads
it and stays small, and a peer's environment may have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Kind(Enum):
    OURS = "ours"
    LIMIT = "limit"  # no communication, or nothing but communication
    PEER = "peer"  # trains together with others, by someone else's means
    APART = "apart"  # trains without any peer: comparable in time, not in losses after the first step
    WHOLE = "whole"  # one device on the batches of all trainers together


@dataclass(frozen=True, slots=True)
class Contestant:
    """
    options         what its module's functions get
    processes       how many ranks
    compiles        its first start differs from the second: Inductor has a cache
    minibatches     that one step trains, of all trainers together; None: one per rank
    helpers         the roles of its further processes, such as ("store", "server", "server")
    environment     the peer's environment that it runs in (`make bench-peers`); None: the driver's
    imports         what every process imports before time counts
    loss_reference  whose first losses its own must equal; None: nobody's
    unavailable     why it cannot run at all; None: it may
    wire            options that send over TCP, where it can be counted, what it sends otherwise; None: it does anyway
    counted         what it sends can be counted; False: it goes through memory that processes share, and no other way
    restless        its processes use cores even when nothing is asked of them: they are stopped between its turns
    """

    name: str
    kind: Kind
    module: str
    options: Mapping[str, object] = field(default_factory=dict)
    processes: int = 2
    compiles: bool = False
    minibatches: int | None = None
    helpers: tuple[str, ...] = ()
    environment: str | None = None
    imports: str = "torch"
    loss_reference: str | None = None
    unavailable: str | None = None
    wire: Mapping[str, object] | None = None
    counted: bool = True
    restless: bool = False

    @property
    def minibatches_per_step(self) -> int:
        return self.processes if self.minibatches is None else self.minibatches


@dataclass(frozen=True, slots=True)
class Seat:
    """Where one process of a contestant sits.

    rank       its number among those of its role
    processes  how many ranks the contestant has
    store      a file for rendezvous, new for every start
    role       "rank", or one of the contestant's helpers
    helpers    the roles of the contestant's other processes
    ports      free ports of 127.0.0.1, the same for all processes: one for each of them, and one more
    """

    rank: int
    processes: int
    store: str
    role: str = "rank"
    helpers: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()

    def count(self, role: str) -> int:
        return self.helpers.count(role)


@dataclass(frozen=True, slots=True)
class Running:
    """A started contestant.

    step     runs one whole training step and returns the loss: a number, or a tensor of one
    close    leaves the job, in order
    batches  what `step` gets; None: the workload's batches of this rank, in turn
    block    runs so many steps of these batches, all of them done when it returns; None: one after another
    """

    step: Callable[..., torch.Tensor]
    close: Callable[[], None]
    batches: Iterator[tuple] | None = None
    block: Callable[[int, Iterator[tuple]], None] | None = None


class NotAvailable(Exception):
    """This contestant cannot run here; the message says why. Never replaced by a figure."""
