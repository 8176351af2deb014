"""Small messages to one role travel together: each message costs the same time, however small it is."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from syncwright.runtime.wire import WireError

SMALL_NBYTES = 32 << 10
"""The size up to which a message waits for others."""
BUNDLE_NBYTES = 256 << 10
"""The size from which what waits is sent."""
MARK = b"B"
"""The first byte of a bundle; no message begins with it."""

Frames = Sequence[bytes | memoryview]
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[list[bytes]])


class Bundle:
    """Messages that wait to be sent to one role, in order. Changes with every message."""

    def __init__(self) -> None:
        self._waiting: list[list[bytes]] = []
        self.nbytes = 0

    def add(self, frames: Frames) -> None:
        self._waiting.append([bytes(frame) for frame in frames])
        self.nbytes += sum(map(len, frames))

    def take(self) -> Frames:
        """All that waits as one message; nothing waits then."""
        waiting, self._waiting, self.nbytes = self._waiting, [], 0
        return waiting[0] if len(waiting) == 1 else [MARK + _ENCODER.encode(waiting)] if waiting else []


def is_small(frames: Frames) -> bool:
    return sum(map(len, frames)) <= SMALL_NBYTES


def opened(frames: Frames) -> list[Frames]:
    """The messages that came together; of any other message itself. Raises `WireError` for a bundle that is none."""
    first = memoryview(frames[0])
    if len(frames) != 1 or first[:1] != MARK:
        return [frames]
    try:
        found = _DECODER.decode(first[1:])
    except (msgspec.DecodeError, RecursionError) as error:
        raise WireError(f"a bundle that cannot be read ({first.nbytes} bytes): {error}") from error
    if not found or not all(found):
        raise WireError("a bundle with an empty message; expected frames in each")
    return list(found)
