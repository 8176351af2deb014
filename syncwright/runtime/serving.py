"""A server's loop: takes messages from its transport, hands them to the state machine, sends what comes out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable

from syncwright.errors import DeadlineExceeded, JobError, PeerLost, SyncwrightError
from syncwright.runtime.deadlines import Wait
from syncwright.runtime.joint_server import JointServer
from syncwright.runtime.messages import Address, Failure, Kind, Message
from syncwright.runtime.transport import Transport

log = logging.getLogger("syncwright")
QUIET_SECONDS = 5.0
"""After so long without a message, a server looks whether the trainers are still there."""


def serve(server: JointServer, transport: Transport, seconds: float, stop: threading.Event | None = None) -> None:
    """Serves until every trainer has left, or `stop` is set. Tells everyone before it ends with an error.

    seconds  how long a merge may wait for its last contribution, and trainers may show no sign of life; while they
             live and nothing is pending a server waits for ever
    """
    trainers = [Address(Kind.TRAINER, k) for k in range(server.job.plan.trainers)]
    last, wait = time.monotonic(), transport.wait(trainers, seconds)
    try:
        while not server.done and not (stop is not None and stop.is_set()):
            got = transport.receive(1.0)
            _go_on(server, transport, transport.lost())
            if got is None:
                _check_late(server, transport, time.monotonic() - last, wait)
                continue
            last, wait = time.monotonic(), transport.wait(trainers, seconds)
            for to, message in server.handle(*got):
                transport.send(to, message)
            transport.progress(server.step, "serve")
    except Exception as error:
        told = _told(server, error)
        transport.fail(str(told))
        if not isinstance(told, PeerLost):
            _tell(transport, trainers, str(told))
        raise told from (None if told is error else error)


def _go_on(server: JointServer, transport: Transport, lost: Iterable[int]) -> None:
    """Goes on without trainers that are lost."""
    for trainer in sorted(set(lost) - server.lost):
        log.warning("server %d goes on without trainer %d, which is lost", server.rank, trainer)
        for to, message in server.lose(trainer):
            transport.send(to, message)


def _check_late(server: JointServer, transport: Transport, quiet: float, wait: Wait) -> None:
    live = [Address(Kind.TRAINER, k) for k in server.live]
    if server.pending and wait.is_over():
        raise DeadlineExceeded(
            f"server {server.rank} has waited {wait.seconds:g} s for {server.waits_for()}: {transport.late(live)}. Expected "
            "every trainer to push in time. See the output of who is late; if it is only slow, give a longer "
            "Deadlines.wait."
        )
    if quiet > QUIET_SECONDS and (ended := [peer for peer in live if transport.ended(peer)]):
        raise PeerLost(
            f"server {server.rank} waits for {ended[0]}, which has ended without leaving the job: "
            f"{transport.late(ended)}. Expected trainer.close(), or a `with` block, at the end of the script. Add it."
        )
    if quiet > max(wait.seconds, QUIET_SECONDS) and (silent := transport.silent(live)):
        raise DeadlineExceeded(
            f"server {server.rank} has heard nothing for {quiet:.0f} s: {transport.late(silent)}. Expected every "
            "trainer to stay until the job ends. See its output."
        )


def _told(server: JointServer, error: Exception) -> SyncwrightError:
    if isinstance(error, SyncwrightError):
        return error
    return JobError(
        f"server {server.rank} at step {server.step}: found {type(error).__name__}: {error}. Expected its update to "
        "run as on one device. Run the step once without Syncwright to see whether it does."
    )


def _tell(transport: Transport, trainers: list[Address], reason: str) -> None:
    """Best effort: whoever is gone cannot be told, and the others learn it from the store."""
    for trainer in trainers:
        try:
            transport.send(trainer, Message(Failure(reason)))
        except SyncwrightError:
            continue


class ServerThread(threading.Thread):
    """A server that lives in a trainer's process. Ends by itself when all trainers have left, or when it is told to."""

    def __init__(self, server: JointServer, transport: Transport, seconds: float):
        super().__init__(name=f"syncwright server {server.rank}", daemon=True)
        self.error: SyncwrightError | None = None
        self.stop = threading.Event()
        self._server, self._transport, self._seconds = server, transport, seconds

    def run(self) -> None:
        try:
            serve(self._server, self._transport, self._seconds, self.stop)
        except SyncwrightError as error:
            self.error = error
        finally:
            self._transport.close()
