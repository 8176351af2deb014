"""Meeting: what a trainer or server says to the others by the job's store: its digest, its heartbeat, its failure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.distributed import Store

from syncwright.errors import DeadlineExceeded, Disagreement
from syncwright.job import Job
from syncwright.runtime.deadlines import Deadlines
from syncwright.runtime.heartbeat import Heartbeat
from syncwright.runtime.messages import Address, Kind
from syncwright.runtime.rendezvous import (
    LOST,
    SURVIVES,
    Rendezvous,
    cannot_go_on,
    failure,
    reaching_the_store,
    tell_failure,
)

FIRST = Address(Kind.TRAINER, 0)


class Meeting:
    """Changes: connects at the first word, and beats from the first capture on."""

    def __init__(self, rendezvous: Rendezvous, deadlines: Deadlines) -> None:
        self.rendezvous, self.deadlines = rendezvous, deadlines
        self.place = rendezvous.place
        self._stores: tuple[Store, Store] | None = None
        self._heartbeat: Heartbeat | None = None
        self._shared_states = 0

    @property
    def heartbeat(self) -> Heartbeat:
        """This role's own; it begins to beat here."""
        if self._heartbeat is None:
            self._heartbeat = Heartbeat(self.place.me, self.rendezvous, longest=self.deadlines.compile)
        return self._heartbeat

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """While open, those who wait for this role are told that it does `what`, and wait on."""
        with self.heartbeat.busy(what):
            yield

    def agree(self, job: Job) -> None:
        """All roles compare what they derived with what trainer 0 derived."""
        theirs = self.published("digest", job.digest)
        if theirs != job.digest:
            raise Disagreement(
                f"{self.place.me} derived another job than trainer 0 (digest {job.digest[:12]}, expected "
                f"{theirs[:12]}). Expected all roles to build the same model, optimizer, step and plan. Start all of "
                "them from the same script with the same arguments, and take care that nothing in it depends on the "
                "rank."
            )

    def survive(self) -> None:
        """Says to the launcher that the job goes on when a trainer is lost."""
        self._connected()[1].set(SURVIVES, "1")

    def published(self, key: str, mine: str) -> str:
        """Trainer 0's word on `key`, the same for all."""
        stores = self._connected()
        if self.place.me == FIRST:
            stores[0].set(key, mine)
            return mine
        wait = self.heartbeat.wait([FIRST], max(self.deadlines.join, self.deadlines.wait))
        with reaching_the_store(self.place.me):
            while not stores[0].check([key]):
                if (why := failure(stores)) is not None:
                    raise cannot_go_on(self.place.me, why)
                if wait.is_over():
                    raise DeadlineExceeded(
                        f"{self.place.me} has waited {wait.seconds:g} s for trainer 0's {key}{wait.doing()}. Expected "
                        "trainer 0 to come to its first step. See its output."
                    )
                time.sleep(0.01)
            return stores[0].get(key).decode()

    def say(self, key: str, value: str) -> None:
        """Says something to the other trainers; returns when they can hear it."""
        store = self._connected()[0]
        with reaching_the_store(self.place.me):
            store.set(key, value)
            store.get(key)  # an answer comes when what was set before is there

    def heard(self, key: str) -> str | None:
        """What a trainer has said; None: nothing yet."""
        store = self._connected()[0]
        with reaching_the_store(self.place.me):
            return store.get(key).decode() if store.check([key]) else None

    def hear(self, key: str, trainer: int, enough: Callable[[str], bool]) -> str:
        """Waits for another trainer to say something that is enough; "0" where it takes no further step."""
        stores, peer = self._connected(), Address(Kind.TRAINER, trainer)
        wait = self.heartbeat.wait([peer], max(self.deadlines.join, self.deadlines.wait))
        while (said := self.heard(key)) is None or not enough(said):
            with reaching_the_store(self.place.me):
                if self.is_gone(trainer):
                    return "0"
                if (why := failure(stores)) is not None:
                    raise cannot_go_on(self.place.me, why)
            if wait.is_over():
                raise DeadlineExceeded(
                    f"{self.place.me} has waited {wait.seconds:g} s for {peer} to say how many batches it has{wait.doing()}. "
                    "Expected every trainer to call own() as often. See its output."
                )
            time.sleep(0.002)
        return said

    def leave(self) -> None:
        """Says that this trainer takes no further step."""
        self.say(f"left/{self.place.me.rank}", "1")

    def is_gone(self, trainer: int) -> bool:
        """Whether a trainer takes no further step: it has left, or is lost, and the job goes on without it."""
        own, shared = self._connected()
        with reaching_the_store(self.place.me):
            lost = shared.get(LOST).decode().split() if shared.check([LOST]) else []
            return str(trainer) in lost or own.check([f"left/{trainer}"])

    def share_state(self, state: torch.Tensor) -> torch.Tensor:
        """Trainer 0's random state, for everyone."""
        self._shared_states += 1
        text = self.published(f"sampler/{self._shared_states}", state.numpy().tobytes().hex())
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    def tell(self, reason: str) -> None:
        """Best effort: why this role cannot go on, to all who wait for it somewhere."""
        if self._stores is not None or self._heartbeat is not None:
            tell_failure(self._connected(), reason)

    def close(self) -> None:
        """Ends the heartbeat in good order. Safe to call twice; a later word begins a new one."""
        if self._heartbeat is not None:
            self._heartbeat.close()
            self._heartbeat = None

    def _connected(self) -> tuple[Store, Store]:
        if self._stores is None:
            self._stores = self.rendezvous.clients()
        return self._stores
