"""Traffic: what one role has sent, taken in, waited for and dropped. Numbers only; who asks for them pays for the rest."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from syncwright.runtime.messages import HEADERS, Address, Header, Kind, Leave, Push

STRANGER = "stranger"
"""Whoever is not of this job, whatever it calls itself: what strangers say is no name to count under."""

MALFORMED, OVERSIZED, REFUSED = "malformed", "oversized", "refused"
"""Why a message is dropped: no message of this job; of more frames than any; one that its sender may not send."""

TOLD_CHARACTERS = 200

SERVER = Kind.SERVER
"""An enum's member is looked up slowly, and this is asked for every message."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Count:
    """Changes: messages of one kind, and the bytes of their frames and of what was handed over beside them."""

    messages: int = 0
    nbytes: int = 0


def _by_kind() -> dict[type, Count]:
    return {header: Count() for header in HEADERS}


@dataclass(slots=True)
class Flow:
    """Changes: what there was between this role and one other.

    step    of the last push that came from it; None before the first and once it has left
    waited  seconds that this role waited for it
    """

    sent: dict[type, Count] = field(default_factory=_by_kind)
    received: dict[type, Count] = field(default_factory=_by_kind)
    step: int | None = None
    waited: float = 0.0


class Traffic:
    """Changes with every message of `me`. Written by the role's own thread, read by any; a count is an addition."""

    def __init__(self, me: Address, everyone: Sequence[Address]) -> None:
        self.me = me
        self.flows = {peer: Flow() for peer in everyone}
        self.drops = Drops(me)
        self.step = 0
        self.step_waited = 0.0
        self.is_waiting = False
        self.awaited: Address | None = None
        self._trainers = [flow for peer, flow in self.flows.items() if peer.kind is Kind.TRAINER]
        self._servers = [flow for peer, flow in self.flows.items() if peer.kind is Kind.SERVER]
        self._anyone = Flow()
        self._waited_before = 0.0

    @property
    def waited(self) -> float:
        """Seconds that this role has waited for messages, whoever's."""
        return self._anyone.waited + sum(flow.waited for flow in self.flows.values())

    @property
    def waited_for_anyone(self) -> float:
        """Seconds of those in which it waited for nobody in particular."""
        return self._anyone.waited

    def sent(self, to: Address, header: Header, frames: Sequence[bytes | memoryview], beside: int = 0) -> None:
        """beside: bytes that were handed over in memory, not in frames."""
        count = self._flow(to).sent[type(header)]
        count.messages += 1
        count.nbytes += beside
        for frame in frames:
            count.nbytes += len(frame)

    def received(self, peer: Address, header: Header, frames: Sequence[bytes | memoryview], beside: int = 0) -> None:
        """beside: as of `sent`."""
        flow = self._flow(peer)
        count = flow.received[type(header)]
        count.messages += 1
        count.nbytes += beside
        for frame in frames:
            count.nbytes += len(frame)
        if type(header) is Push:
            flow.step = header.step
        elif type(header) is Leave:
            flow.step = None

    def wait_for(self, peer: Address | None) -> None:
        """What is waited from now on is waited for `peer`; None: for anyone."""
        self.awaited = peer

    def add_wait(self, seconds: float) -> None:
        flow = self._anyone if self.awaited is None else self._flow(self.awaited)
        flow.waited += seconds

    def progress(self, step: int) -> None:
        """Notes the step that runs; with a new one, how long the one before has waited."""
        if step != self.step:
            self.step, waited = step, self.waited
            self.step_waited, self._waited_before = waited - self._waited_before, waited

    def lags(self) -> dict[Address, int]:
        """How many steps each trainer is behind the foremost, by the last push that came from it: {trainer 1: 2}."""
        steps = {peer: flow.step for peer, flow in list(self.flows.items()) if flow.step is not None}
        foremost = max(steps.values(), default=0)
        return {peer: foremost - step for peer, step in steps.items()}

    def _flow(self, peer: Address) -> Flow:
        return (self._servers if peer.kind is SERVER else self._trainers)[peer.rank]


class Drops:
    """Changes: the messages that were dropped, by sender and reason, and what is to be said of them.

    Every one is counted. The log tells the first of a sender and reason at once, and then one in `seconds`.
    """

    def __init__(self, me: Address, seconds: float = 10.0) -> None:
        self.me = me
        self.counts: dict[tuple[str, str], int] = {}
        self._last: dict[Address, str] = {}
        self._seldom = Seldom(seconds)

    def drop(self, sender: Address | None, reason: str, why: str) -> None:
        """Counts a message of `sender` (None: a stranger), and tells why it is dropped unless that was told just now."""
        who = STRANGER if sender is None else str(sender)
        self.counts[who, reason] = self.counts.get((who, reason), 0) + 1
        if sender is not None:
            self._last[sender] = why
        self._seldom.warn((who, reason), f"{self.me} drops a message of {'a ' * (sender is None)}{who}: {why}")

    def told(self) -> str:
        """`it dropped 2 messages of trainer 1, the last: Push of 'w' without ...`: for the errors of those who wait."""
        said = []
        for sender, why in list(self._last.items()):
            count = sum(n for (who, _), n in list(self.counts.items()) if who == str(sender))
            said.append(f"{count} message{'s' * (count > 1)} of {sender}, the last: {why[:TOLD_CHARACTERS]}")
        return f"it dropped {' and '.join(said)}" if said else ""


class Seldom:
    """Changes: warnings of which some are left out: of one key, one in `seconds`, which says how many were not told."""

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._told: dict[object, tuple[float, int]] = {}

    def warn(self, key: object, text: str) -> None:
        now = time.monotonic()
        at, untold = self._told.get(key, (now - self._seconds, 0))
        if now - at < self._seconds:
            self._told[key] = at, untold + 1
            return
        self._told[key] = now, 0
        log.warning("%s%s", text, f" ({untold} more of these were not told)" if untold else "")
