"""What roles say to each other about named values. Data only: no sockets, no pickle, no code."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, get_args

import msgspec
import torch


class Kind(StrEnum):
    TRAINER = "trainer"
    SERVER = "server"


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """One role of the job: `trainer 0`, `server 2`."""

    kind: Kind
    rank: int

    def __str__(self) -> str:
        return f"{self.kind} {self.rank}"


Act = Literal["set", "read", "export", "restore", "observe", "shrink"]


class Header(msgspec.Struct, frozen=True, tag_field="type"):
    """What a message is about; a tensor may travel behind it."""


class Hello(Header, frozen=True, tag="hello"):
    """Sent once to every server by every role that will talk to it, before anything else.

    digest: of the job that the sender derived; a server answers a digest that differs from its own with `Failure`.
    """

    digest: str


class Push(Header, frozen=True, tag="push"):
    """One trainer's contribution to `channel` at `step`; the tensor is already multiplied by weight / trainers.

    weight: this trainer's examples / the nominal number (1.0 when all batches are equal).
    hypers: the values that the user's scheduler set, of the hyper-parameters that the update of this value reads.
    skip: of rows of a table: they are those that the sender has asked for in this step, in that order, but for the first
    `skip`.
    """

    channel: str
    step: int
    weight: float
    hypers: dict[str, float] = {}
    skip: int = 0


class Pull(Header, frozen=True, tag="pull"):
    """Asks for `channel`. Parked until it is there.

    when  "step": as it is once `version` steps are in it; "now": as it is, once all values have been set `version` times;
          "end": as it is when every trainer has left
    """

    channel: str
    version: int
    when: Literal["step", "now", "end"] = "step"


class PullRows(Header, frozen=True, tag="pull_rows"):
    """Asks for rows of the table `channel`, whose ids are the tensor, distinct; see `Pull` for `version` and `when`.

    turn: comes back with the answer.
    step: at which the sender will push the gradient of these rows; -1: never.
    """

    channel: str
    version: int
    when: Literal["step", "now"]
    turn: int
    step: int


class Rows(Header, frozen=True, tag="rows"):
    """The answer to `PullRows` with the same turn: the rows, in the order of the ids.

    some: these are the rows alone whose bits are set. Empty: all.
    last: nothing follows; else the others do, and with them again what has changed since.
    """

    channel: str
    turn: int
    some: bytes = b""
    last: bool = True


class Order(Header, frozen=True, tag="order"):
    """Has a server do something with its part of the table `channel`, which is of any ids. See `table_server`.

    The tensor is a part of what `packed.pack` made; see `Pull` for `version` and `when`.

    act     "set": hold what is given; "read": give all rows; and, done once all trainers have asked for it, "export": give
            the rows that changed since `number`, or all (-1), and note that; "restore": put what is given on top;
            "observe": shows and clicks of ids; "shrink"
    turn    comes back with the answer
    number  of "read": the most rows that are wanted; of "export": see there
    last    nothing more of this follows
    """

    channel: str
    act: Act
    version: int
    when: Literal["step", "now", "end"]
    turn: int
    number: int = -1
    last: bool = True


class Part(Header, frozen=True, tag="part"):
    """The answer to `Order` with the same turn, or a part of it."""

    channel: str
    turn: int
    last: bool = True


class Taken(Header, frozen=True, tag="taken"):
    """A server has taken a contribution to `channel` of the trainer that this goes to."""

    channel: str


class Tick(Header, frozen=True, tag="tick"):
    """The sender has pushed `clock` steps. Answered with `Go` when no live trainer is more than `staleness` behind."""

    clock: int
    staleness: int


class Go(Header, frozen=True, tag="go"):
    """The answer to `Tick` with the same clock."""

    clock: int


class Value(Header, frozen=True, tag="value"):
    """A whole value after `version` steps: the answer to a pull, a global value on its way, or (version 0) a start."""

    channel: str
    version: int


class Start(Header, frozen=True, tag="start"):
    """Trainer 0's word on what `channel` begins with, of which no value travels: the receiver makes it.

    record: the digest of what was recorded by deferred(); the receiver has the same record, and makes its part from it.
    number: without a record, all elements are this.
    """

    channel: str
    version: int
    record: str = ""
    number: float = 0.0


class Resume(Header, frozen=True, tag="resume"):
    """All values have been set anew: programs go on at `step`. Sent by trainer 0, behind the values."""

    step: int


class Leave(Header, frozen=True, tag="leave"):
    """The sender contributes to no step from `step` on; merges go on with those that are left."""

    step: int


class Failure(Header, frozen=True, tag="failure"):
    """The sender cannot go on; `reason`, for people, names who cannot and why. Whoever hears it ends with it."""

    reason: str


class Offer(Header, frozen=True, tag="offer"):
    """To a role of the same host: memory of the sender's, in which it could hand tensors over. See `parcels`.

    pid, descriptor  the process that has it open, and as what
    inode, nbytes    which memory that must be
    """

    pid: int
    descriptor: int
    inode: int
    nbytes: int


class Accepted(Header, frozen=True, tag="accepted"):
    """The sender can read the memory that the receiver has offered."""


AnyHeader = (
    Hello | Push | Pull | PullRows | Rows | Order | Part | Taken | Tick | Go | Value | Start | Resume | Leave
) | (Failure | Offer | Accepted)
HEADERS = get_args(AnyHeader)


class Place(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a tensor lies in memory that its sender has offered.

    start  of its bytes
    mark   the byte that the receiver makes 0 when it is done with the tensor
    """

    start: int
    mark: int


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """A header and, for `Push`, `PullRows`, `Rows`, `Order`, `Part` and `Value`, one contiguous tensor.

    job: which it is of, as each numbers its rounds by itself: 0 is that of the steps, n the n-th of its exchanges.
    """

    header: AnyHeader
    tensor: torch.Tensor | None = None
    job: int = 0
