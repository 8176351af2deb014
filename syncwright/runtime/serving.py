"""A server's loop: takes messages from its transport, hands them to the state machine, sends what comes out."""

from __future__ import annotations

import threading
import time

from syncwright.errors import DeadlineExceeded, SyncwrightError
from syncwright.runtime.messages import Address, Failure, Kind, Message
from syncwright.runtime.server import Server
from syncwright.runtime.transport import Transport


def serve(server: Server, transport: Transport, seconds: float) -> None:
    """Serves until every trainer has left. Tells them before it ends with an error.

    seconds  how long a merge may wait for its last contribution; while nothing is pending a server waits for ever
    """
    trainers = [Address(Kind.TRAINER, k) for k in range(server.job.plan.trainers)]
    last = time.monotonic()
    try:
        while not server.done:
            got = transport.receive(1.0)
            if got is None:
                _check_late(server, transport, trainers, last, seconds)
                continue
            last = time.monotonic()
            for to, message in server.handle(*got):
                transport.send(to, message)
            transport.progress(server.step, "serving")
    except SyncwrightError as error:
        _tell(transport, trainers, str(error))
        raise


def _check_late(server: Server, transport: Transport, trainers: list[Address], last: float, seconds: float) -> None:
    if server.pending and time.monotonic() - last > seconds:
        raise DeadlineExceeded(
            f"server {server.rank} has waited {seconds:.0f} s for {server.waits_for()}. {transport.late(trainers)}"
        )


def _tell(transport: Transport, trainers: list[Address], reason: str) -> None:
    """Best effort: whoever is gone cannot be told, and the others learn it from the heartbeat."""
    for trainer in trainers:
        try:
            transport.send(trainer, Message(Failure(reason)))
        except SyncwrightError:
            continue


class ServerThread(threading.Thread):
    """A server that lives in a trainer's process. Ends by itself when all trainers have left."""

    def __init__(self, server: Server, transport: Transport, seconds: float):
        super().__init__(name=f"syncwright server {server.rank}", daemon=True)
        self.error: SyncwrightError | None = None
        self._server, self._transport, self._seconds = server, transport, seconds

    def run(self) -> None:
        try:
            serve(self._server, self._transport, self._seconds)
        except SyncwrightError as error:
            self.error = error
        finally:
            self._transport.close()
