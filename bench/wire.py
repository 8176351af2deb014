"""Lines of JSON over a socket between the driver and one child. A side that waits sleeps in the kernel."""

from __future__ import annotations

import json
import socket


class Channel:
    """One end. Changes: holds the bytes of a line that has not arrived whole."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._held = b""

    def send(self, message: dict) -> None:
        self.end.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict | None:
        """The next message, waiting for it; None when the other side is gone."""
        while b"\n" not in self._held:
            try:
                more = self.end.recv(65536)
            except ConnectionResetError:
                return None
            if not more:
                return None
            self._held += more
        line, self._held = self._held.split(b"\n", 1)
        return json.loads(line)
