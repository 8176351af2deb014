"""Heartbeats: every role says each second where it is, so that an error can name who is late and at what."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
from torch.distributed import DistNetworkError, DistStoreError, Store

from syncwright.errors import PeerLost
from syncwright.runtime.deadlines import Wait
from syncwright.runtime.messages import Address, Kind
from syncwright.runtime.rendezvous import LOST, STAY, Rendezvous, cannot_go_on, failure, names, tell_failure

ROLES = "roles"
"""The key, above the generations, where the roles of the latest one say how many they are."""


class Beat(msgspec.Struct, frozen=True):
    """One role, now.

    number   counts its beats
    seconds  its host's clock
    busy     what it does that others wait for ("compiling the step"), and for how long it has; "" for nothing
    rested   seconds since it was last busy; None if it never was
    """

    pid: int
    host: str
    step: int
    node: str
    number: int
    seconds: float
    ended: bool
    busy: str = ""
    busy_seconds: float = 0.0
    rested: float | None = None


class Roles(msgspec.Struct, frozen=True):
    """What there is to watch: the job that runs now, the n-th of its script, and how many trainers it has."""

    generation: int
    trainers: int


class Heartbeat:
    """Changes: a thread writes this role's beat to the store and reads who failed; it waits for nobody.

    failed       what a role says about its own failure, or the launcher about one that ended badly; None so far
    store_lost   why the store can no longer be reached; None as long as it can

    longest      how many seconds at a stretch others may capture or compile while this role waits for them
    """

    def __init__(
        self, me: Address, rendezvous: Rendezvous, every: float = 1.0, silent: float = 5.0, longest: float = 1800.0
    ) -> None:
        self.me = me
        self.failed: str | None = None
        self.store_lost: str | None = None
        self.lost_trainers: frozenset[int] = frozenset()
        self._store, self._job = rendezvous.clients()
        self._host = rendezvous.place.host
        self._roles = Roles(rendezvous.generation, rendezvous.place.trainers)
        self._every, self._silent, self._longest = every, silent, longest
        self._at = (0, "start")
        self._busy: tuple[str, float] | None = None
        self._rested: float | None = None
        self._number = 0
        self._seen: dict[Address, tuple[int, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat of {me}", daemon=True)
        atexit.register(self.close)  # a thread inside the store must not outlive the interpreter
        self._thread.start()

    def progress(self, step: int, node: str) -> None:
        """Notes where this role is; costs one attribute write."""
        self._at = (step, node)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """While open, beats say that this role does `what`: those who wait for it wait on."""
        before, self._busy = self._busy, (what, time.monotonic())
        try:
            yield
        finally:
            self._busy, self._rested = before, time.monotonic()

    def wait(self, peers: Sequence[Address], seconds: float) -> Wait:
        """A wait for `peers` that begins now."""
        return Wait(seconds, lambda: self._allowed(peers, seconds), lambda: self._doing(peers))

    @property
    def step(self) -> int:
        """The step that this role is at."""
        return self._at[0]

    def fail(self, reason: str) -> None:
        """Tells all roles of this generation that this one cannot go on. The first who says so is heard."""
        tell_failure([self._store, self._job], reason)

    def broken(self, why: str, peers: Sequence[Address], expected: str = STAY) -> PeerLost:
        """What to raise when `why` shows that some of `peers` are gone. A failure that was told, by a role or by the
        launcher, is the cause, whoever noticed it first and by what: it is told in the same words everywhere."""
        lost = self.lost(peers)
        return self.told() or PeerLost(f"{why}: {lost}. {expected}")

    def told(self) -> PeerLost | None:
        """What to raise when a failure has been told; None if none has."""
        return None if self.failed is None else cannot_go_on(self.me, self.failed)

    def silent(self, peers: Sequence[Address]) -> list[Address]:
        """Those of `peers` that beat no more: ended, gone, stopped or cut off. Takes two beats to tell."""
        before = {peer: self._read(peer) for peer in peers}
        self._stop.wait(3 * self._every)
        return [peer for peer, beat in before.items() if self._read(peer) == beat]

    def ended(self, peer: Address) -> bool:
        """Whether `peer` closed its transport in good order."""
        beat = self._read(peer)
        return beat is not None and beat.ended

    def late(self, peers: Sequence[Address]) -> str:
        """Who among `peers` is silent, gone or behind, and where it was.

        [server 0, server 1] -> "server 1 (pid 7 on a) has been silent for 8 s, last at step 3, `pull w`".
        Clocks of other hosts are not trusted: a beat of theirs that seems old is read twice.
        """
        if self.store_lost:
            return f"who is late cannot be told: the job's store is gone ({self.store_lost})"
        beats = {peer: self._read(peer) for peer in peers}
        suspects = [p for p, beat in beats.items() if beat and beat.host != self._host and self._old(beat)]
        if suspects:
            time.sleep(2 * self._every)
        alive = {peer for peer in suspects if self._read(peer) != beats[peer]}
        said = [self._about(peer, beat, peer in alive) for peer, beat in beats.items()]
        if any(said):
            return "; ".join(sentence for sentence in said if sentence)
        return "all are alive: " + "; ".join(f"{peer} is at {_place(beat)}" for peer, beat in beats.items() if beat)

    def lost(self, peers: Sequence[Address]) -> str:
        """Who among `peers` is gone, after a connection broke: its own or the launcher's word, or who beats no more.

        Waits for up to ten beats: a process that has just died looks alive before.
        """
        before = {peer: self._read(peer) for peer in peers}
        deadline = time.monotonic() + 10 * self._every
        while self.store_lost is None and time.monotonic() < deadline:
            self._hear()
            if self.failed is not None:
                return self.failed
            if any(beat is None or beat.ended for beat in map(self._read, peers)):
                return self.late(peers)
            self._stop.wait(0.05 * self._every)
        if self.store_lost is not None:
            return "the job's store is gone too"
        gone = [(peer, beat) for peer, beat in before.items() if beat and self._read(peer) == beat]
        said = [f"{_who(peer, beat)} is gone, last at {_place(beat)}" for peer, beat in gone]
        return "; ".join(said) or f"{names(peers)} cannot be reached, but still beats"

    def close(self) -> None:
        """Writes the last beat, which says that this role ended in good order. Safe to call twice."""
        if self._stop.is_set():
            return
        self._stop.set()
        atexit.unregister(self.close)
        self._thread.join(timeout=10 * self._every)
        self._beat(ended=True)

    def _run(self) -> None:
        while self._beat(ended=False) and not self._stop.wait(self._every):
            continue

    def _beat(self, ended: bool) -> bool:
        (step, node), busy, rested, now = self._at, self._busy, self._rested, time.monotonic()
        self._number += 1
        beat = Beat(
            *(os.getpid(), self._host, step, node, self._number, time.time(), ended),
            busy=busy[0] if busy else "",
            busy_seconds=now - busy[1] if busy else 0.0,
            rested=None if rested is None else now - rested,
        )
        try:
            if self._number == 1:
                self._job.set(ROLES, msgspec.json.encode(self._roles).decode())
            self._store.set(f"beat/{self.me}", msgspec.json.encode(beat).decode())
        except (DistNetworkError, DistStoreError) as error:
            self.store_lost = str(error).splitlines()[0]
        self._hear()
        return self.store_lost is None

    def _hear(self) -> None:
        try:
            self.failed = self.failed or failure([self._store, self._job])
            if self.me.kind is Kind.SERVER and self._job.check([LOST]):
                self.lost_trainers = frozenset(map(int, self._job.get(LOST).split()))
        except (DistNetworkError, DistStoreError) as error:
            self.store_lost = str(error).splitlines()[0]

    def _read(self, peer: Address) -> Beat | None:
        try:
            return beat_of(self._store, peer)
        except (DistNetworkError, DistStoreError) as error:
            self.store_lost = str(error).splitlines()[0]
            return None

    def _old(self, beat: Beat) -> bool:
        return not beat.ended and time.time() - beat.seconds > self._silent

    def _allowed(self, peers: Sequence[Address], seconds: float) -> float:
        """How much longer a wait of `seconds` that is over may go on.

        While one of `peers` captures or compiles, to the next beat but one; then for `seconds` from the end of that.
        """
        beats = [beat for peer in peers if (beat := self._read(peer)) and self._is_fresh(peer, beat)]
        if any(beat.busy and beat.busy_seconds <= self._longest for beat in beats):
            return 2 * self._every
        return max((seconds - beat.rested for beat in beats if not beat.busy and beat.rested is not None), default=0.0)

    def _is_fresh(self, peer: Address, beat: Beat) -> bool:
        """Whether `peer` still beats, by our own clock: the same beat counts for `silent` seconds."""
        number, since = self._seen.get(peer, (-1, 0.0))
        if number != beat.number:
            self._seen[peer] = (beat.number, time.monotonic())
            return not beat.ended
        return not beat.ended and time.monotonic() - since <= self._silent

    def _doing(self, peers: Sequence[Address]) -> str:
        said = [f"; {_who(p, beat)} {self._busy_with(beat)}" for p in peers if (beat := self._read(p)) and beat.busy]
        return "".join(said)

    def _busy_with(self, beat: Beat) -> str:
        """`has been compiling the step for 40 s (more than Deadlines.compile, 30 s)`."""
        limit = f" (more than Deadlines.compile, {self._longest:g} s)" if beat.busy_seconds > self._longest else ""
        return f"has been {beat.busy} for {beat.busy_seconds:.0f} s{limit}"

    def _about(self, peer: Address, beat: Beat | None, alive: bool) -> str:
        if beat is None:
            return f"{peer} has never been heard of"
        who = _who(peer, beat)
        if beat.ended:
            return f"{who} has ended, at {_place(beat)}"
        if self._old(beat) and not alive:
            return f"{who} has been silent for {time.time() - beat.seconds:.0f} s, last at {_place(beat)}"
        if beat.busy:
            return f"{who} {self._busy_with(beat)}, at {_place(beat)}"
        if beat.step < self._at[0]:
            return f"{who} is behind, at {_place(beat)}; {self.me} is at step {self._at[0]}"
        return ""


def beat_of(store: Store, peer: Address) -> Beat | None:
    """The last beat of a role; None before its first."""
    key = f"beat/{peer}"
    return msgspec.json.decode(store.get(key), type=Beat) if store.check([key]) else None


def _who(peer: Address, beat: Beat) -> str:
    return f"{peer} (pid {beat.pid} on {beat.host})"


def _place(beat: Beat) -> str:
    return f"step {beat.step}, `{beat.node}`"
