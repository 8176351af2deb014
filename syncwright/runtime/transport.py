"""Transport: the only thing that knows the network. Everything above it is the same in loopback and in processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from syncwright.runtime.deadlines import Wait
from syncwright.runtime.messages import Address, Message


class Work(Protocol):
    """A collective under way."""

    def done(self) -> bool:
        """Whether the result stands in the tensor that was given.

        A transport between processes waits here and then says True, or raises `PeerLost` or `DeadlineExceeded`.
        """
        ...


class Gathered(Work, Protocol):
    """Bytes of every trainer, under way to all."""

    @property
    def parts(self) -> Sequence[torch.Tensor]:
        """Once it is done, until `release`: each trainer's bytes, in order."""
        ...

    def release(self) -> None:
        """Nothing reads the parts any more. To be called on all trainers at the same place among what they begin and end."""
        ...


class Scattered(Work, Protocol):
    """Sums over all trainers under way, of which each gets its own parts."""

    @property
    def own(self) -> torch.Tensor:
        """Once it is done: this trainer's parts, one behind another."""
        ...


class HostWork(Protocol):
    """A sum over the trainers of one host under way."""

    def done(self) -> bool:
        """Like `Work.done`; the result stands with the first trainer, the others keep what they gave."""
        ...

    @property
    def is_first(self) -> bool:
        """Once it is done: whether no trainer of this host that took part has a lower number."""
        ...


class Outlet(Protocol):
    """What a trainer's running program needs of a transport."""

    me: Address

    def send(self, to: Address, message: Message) -> None:
        """Queues `message` and returns. The tensor must not be changed afterwards (a transport may not copy it)."""
        ...

    def flush(self) -> None:
        """Sends what waits for further messages, to travel with them."""
        ...

    def meet(self, groups: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """Makes further groups of trainers, by their names, each of several that are apart. In what follows, a `group` is that of
        these that this trainer is in, who count from 0 there; "" is all trainers. All of them must come to it with the same."""
        ...

    def all_reduce(self, tensor: torch.Tensor, note: str, group: str = "") -> Work:
        """Starts the sum of `tensor` over the trainers of a group, in place. `note` names the wait in errors. Trainers only."""
        ...

    def reduce_scatter(self, tensors: Sequence[torch.Tensor], note: str, group: str = "") -> Scattered:
        """Starts the sums of `tensors`, of one dtype, over a group's trainers: of each, laid out flat and cut evenly with zeros
        behind its end, a trainer gets its own part. They may change once this returns. Trainers only."""
        ...

    def reduce_to(self, tensors: Sequence[torch.Tensor], keeper: int, note: str, group: str = "") -> Scattered:
        """Starts the sums of `tensors`, of one dtype, over a group's trainers, for one of them: its own are the sums, flat, one
        behind another; the others have none. They may change once this returns. Trainers only."""
        ...

    def give(
        self, nbytes: int, pieces: Sequence[tuple[int, torch.Tensor]], keeper: int, note: str, group: str = ""
    ) -> Gathered:
        """Starts to give all of a group so many bytes of one of them, laid out as `gather` does: the one part. What the others'
        pieces hold means nothing. Trainers only."""
        ...

    def sum_on_host(self, tensor: torch.Tensor, note: str) -> HostWork:
        """Starts the sum of `tensor` over the trainers of this host that have not left, in place on the first of them."""
        ...

    def is_first_on_host(self) -> bool:
        """Whether it is this trainer that gives the next value to the others of its host. It may become so when one leaves."""
        ...

    def give_on_host(self, tensor: torch.Tensor, note: str) -> None:
        """Gives the next value to the other trainers of this host."""
        ...

    def take_on_host(self, shape: list[int], dtype: torch.dtype, note: str) -> torch.Tensor | None:
        """The next value that the first trainer of this host gives. None while it is not there, or where it comes no more, as
        this trainer has become the first. A transport between processes waits here for one or the other."""
        ...

    def leave_host(self) -> None:
        """Takes part in nothing more that trainers of this host do together: the others go on without this one."""
        ...

    def all_gather(self, whole: torch.Tensor, part: torch.Tensor, note: str, group: str = "") -> Work:
        """Starts the gathering of the `part` of every trainer of a group, all of one shape, into `whole`. Trainers only."""
        ...

    def gather(self, nbytes: int, pieces: Sequence[tuple[int, torch.Tensor]], note: str, group: str = "") -> Gathered:
        """Starts to give all of a group so many bytes of each: contiguous tensors, each with the place of its first byte, from a
        multiple of its dtype's size on. What lies between them means nothing. Trainers only."""
        ...

    def broadcast(self, tensor: torch.Tensor, note: str) -> None:
        """Trainer 0's `tensor` becomes everybody's, in place. Trainers only."""
        ...

    def progress(self, step: int, node: str) -> None:
        """Notes how far this role is, for the errors of those who wait for it."""
        ...


class Transport(Outlet, Protocol):
    """How one role reaches the others.

    Used from one thread, the role's own. Order is kept between two roles; nothing is promised between three.
    """

    def receive(self, seconds: float) -> tuple[Address, Message] | None:
        """The next message from anyone, or None when none came within `seconds`."""
        ...

    def wait(self, peers: list[Address], seconds: float) -> Wait:
        """A wait for `peers` that begins now, and goes on while one of them says that it captures or compiles."""
        ...

    def late(self, peers: list[Address]) -> str:
        """Who among `peers` is silent or behind, as a sentence for an error."""
        ...

    def fail(self, reason: str) -> None:
        """Tells all roles, also those that wait in a collective, that this one cannot go on."""
        ...

    def ended(self, peer: Address) -> bool:
        """Whether `peer` has closed its transport in good order."""
        ...

    def silent(self, peers: list[Address]) -> list[Address]:
        """Those of `peers` that show no sign of life. Takes some seconds."""
        ...

    def lost(self) -> frozenset[int]:
        """Trainers that are lost, of a job that goes on without them."""
        ...

    def close(self) -> None:
        """Frees sockets and threads. Safe to call twice."""
        ...
