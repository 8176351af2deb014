"""Intake: what comes at a role's sockets becomes messages of this job, or is dropped."""

from __future__ import annotations

from functools import partial

import zmq

from syncwright.runtime.bundles import Frames, opened
from syncwright.runtime.limits import Limits
from syncwright.runtime.messages import Address, Message
from syncwright.runtime.parcels import Parcels
from syncwright.runtime.traffic import MALFORMED, OVERSIZED, REFUSED, STRANGER, Traffic
from syncwright.runtime.wire import WireError, decode

MOST_FRAMES = 1 << 16
"""Of a message, where the job's own limits are not known."""


class Intake:
    """Changes: counts what it takes and what it drops, in `traffic`.

    limit     what this role may be sent, and by whom; None accepts anything that is well formed
    visitors  who comes to a socket that is bound, by how they call themselves there
    peers     who is at the other end of a socket that is connected
    parcels   what they hand over in memory
    """

    def __init__(self, limit: Limits | None, traffic: Traffic, parcels: Parcels) -> None:
        self.visitors: dict[bytes, Address] = {}
        self.peers: dict[zmq.Socket, Address] = {}
        self._limit, self._traffic, self._parcels = limit, traffic, parcels
        self._most_frames = MOST_FRAMES if limit is None else limit.frames

    def take(self, socket: zmq.Socket) -> list[tuple[Address, Message]]:
        """The messages that have come together to `socket`, with their sender, but for those that were dropped."""
        peer = self.peers.get(socket)
        if peer is None:
            visitor = socket.recv()
            peer = self.visitors.get(visitor)
            if peer is None:
                _frames(socket, 0)
                self._traffic.drops.drop(None, STRANGER, f"it calls itself {visitor[:16]!r}")
                return []
        frames, found = _frames(socket, self._most_frames)
        if found > len(frames):
            why = f"it has {found} frames; expected at most {self._most_frames}"
            self._traffic.drops.drop(peer, OVERSIZED, why)
            return []
        try:
            together = opened(frames)
        except WireError as error:
            self._traffic.drops.drop(peer, MALFORMED, str(error))
            return []
        return [read for each in together if (read := self._read(peer, each)) is not None]

    def _read(self, peer: Address, frames: Frames) -> tuple[Address, Message] | None:
        reason = MALFORMED
        try:
            read = decode if self._limit is None else self._limit.read
            message = read(frames, given=True, find=partial(self._parcels.find, peer))
            if self._limit is not None:
                reason = REFUSED
                self._limit.check(peer, message.header, message.job)
        except WireError as error:
            self._traffic.drops.drop(peer, reason, str(error))
            return None
        beside = message.tensor.nbytes if message.tensor is not None and len(frames) == 1 else 0
        self._traffic.received(peer, message.header, frames, beside)
        return peer, message


def _frames(socket: zmq.Socket, most: int) -> tuple[list[memoryview], int]:
    """The first `most` frames of the message that waits, and how many it has; the others are not kept."""
    kept, found, more = [], 0, True
    while more:
        frame = socket.recv(copy=False)
        more, found = frame.more, found + 1
        if found <= most:
            kept.append(frame.buffer)
    return kept, found
