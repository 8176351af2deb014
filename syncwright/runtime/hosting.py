"""The servers that live in a trainer's process, or are a process of their own."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import zmq

from syncwright.job import Job
from syncwright.runtime.heartbeat import Heartbeat
from syncwright.runtime.interpreter import Compiler, Interpreter
from syncwright.runtime.joint_server import JointServer
from syncwright.runtime.limits import limits_of
from syncwright.runtime.meeting import Meeting
from syncwright.runtime.messages import Address, Kind
from syncwright.runtime.records import NO_RECORDS, Records
from syncwright.runtime.rendezvous import cannot_go_on
from syncwright.runtime.serving import ServerThread, serve
from syncwright.runtime.sockets import SocketTransport
from syncwright.runtime.ticking import Ticking


class Hosted:
    """Changes: starts and ends the servers of this process.

    context  by which a trainer that is the whole job reaches its servers; None where there are other processes
    """

    def __init__(self, meeting: Meeting) -> None:
        self.context: zmq.Context | None = None
        self._meeting = meeting
        self._threads: list[ServerThread] = []

    def start(
        self, job: Job, ticking: Ticking | None = None, records: Records = NO_RECORDS, compiles: bool = False
    ) -> None:
        """Starts the servers that live here, with what they tick and with records of what they make. A server's process serves
        until the job ends, and ends."""
        place = self._meeting.place
        self.context = zmq.Context() if place.alone else None
        for address in place.hosted(len(job.servers)):
            with self._meeting.busy("compiling the updates") if compiles else nullcontext():
                compute = Compiler() if compiles else Interpreter()
                server = JointServer(job, address.rank, compute, ticking, records)
            if place.me.kind is Kind.SERVER:
                self._serve(server, address)
            else:
                self._threads.append(self._thread(server, address))
                self._threads[-1].start()
        if place.me.kind is Kind.SERVER:
            sys.exit(0)

    def check(self) -> None:
        """Raises what has ended a server of this process."""
        for thread in self._threads:
            if thread.error is not None:
                raise cannot_go_on(self._meeting.place.me, str(thread.error)) from thread.error

    def end(self, failed: bool) -> None:
        """Returns when the servers have ended: when the last trainer has left, or now, where this one fails."""
        for thread in self._threads:
            if failed:
                thread.stop.set()
            while thread.is_alive():
                thread.join(1.0)

    def _serve(self, server: JointServer, address: Address) -> None:
        transport = self._transport(server.job, address, self._meeting.heartbeat)
        try:
            serve(server, transport, self._meeting.deadlines.wait)
        finally:
            transport.close()

    def _thread(self, server: JointServer, address: Address) -> ServerThread:
        transport = self._transport(server.job, address, None)
        return ServerThread(server, transport, self._meeting.deadlines.wait)

    def _transport(self, job: Job, address: Address, heartbeat: Heartbeat | None) -> SocketTransport:
        return SocketTransport(
            address,
            self._meeting.rendezvous,
            len(job.servers),
            limit=limits_of(job, address),
            context=self.context,
            deadlines=self._meeting.deadlines,
            heartbeat=heartbeat,
            survives=job.survives_losses,
        )
