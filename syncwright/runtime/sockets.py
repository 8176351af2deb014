"""SocketTransport: messages between processes by ZeroMQ, collectives by torch.distributed."""

from __future__ import annotations

import math
import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
import zmq

from syncwright.errors import JobError, PeerLost
from syncwright.runtime.bundles import BUNDLE_NBYTES, Bundle, Frames, is_small
from syncwright.runtime.collectives import Collectives
from syncwright.runtime.deadlines import Deadlines, Wait
from syncwright.runtime.endpoint import Binding
from syncwright.runtime.guard import Guard, present
from syncwright.runtime.heartbeat import Heartbeat
from syncwright.runtime.intake import Intake
from syncwright.runtime.limits import Limits
from syncwright.runtime.messages import Accepted, Address, Kind, Leave, Message, Offer
from syncwright.runtime.metrics import Metrics
from syncwright.runtime.parcels import Parcels, is_available
from syncwright.runtime.rendezvous import STAY, Endpoint, Rendezvous, look_up, publish
from syncwright.runtime.traffic import MALFORMED, Traffic
from syncwright.runtime.transport import Gathered, HostWork, Scattered, Work
from syncwright.runtime.wire import CHUNK_NBYTES, WireError, encode

SLICE_SECONDS = 0.5
"""How long a receive sleeps before it looks whether somebody is lost."""

VISITOR_MESSAGES = 4096
"""How many messages of one visitor a server keeps that it has not read; the others wait where they were sent."""


class SocketTransport:
    """Changes: holds sockets, a heartbeat and the trainers' process group. Used from the role's own thread.

    A server binds a ROUTER; every trainer connects a DEALER to each server, a server connects one to another
    server when it first sends to it. What a server sends to a trainer goes back through its ROUTER. Order is
    kept between two roles. Queues of what is sent are unbounded: what may be under way is bounded by the protocol
    above (a step's pushes), and a bound here would block one role on the slowness of another.

    A connection that breaks is not mended, since messages may be lost with it: `receive` and collectives then
    raise `PeerLost`. Servers that live in the trainers' processes make a transport of their own in their own
    thread, and must have it before the trainer makes its: a trainer looks for all servers when it starts.

    What is no message of this job is counted, told seldom and dropped, whoever sent it: whoever waits for what it should
    have been names it when its deadline is over (`late`).

    me          the role that this transport serves
    servers     how many servers the plan names
    limit       what this role may be sent, and by whom; None accepts anything that is well formed
    context     given: servers in one process with the only trainer are reached through it (inproc)
    heartbeat   of the role, where it beats already; the transport ends it
    survives    the job goes on when a trainer is lost
    """

    def __init__(
        self,
        me: Address,
        rendezvous: Rendezvous,
        servers: int,
        *,
        limit: Limits | None = None,
        context: zmq.Context | None = None,
        deadlines: Deadlines | None = None,
        heartbeat: Heartbeat | None = None,
        survives: bool = False,
    ) -> None:
        self.me = me
        self._place = rendezvous.place
        self._everyone = rendezvous.place.everyone(servers)
        self.traffic = Traffic(me, self._everyone)
        self._parcels = Parcels(me)
        self._intake = Intake(limit, self.traffic, self._parcels)
        self._servers = [peer for peer in self._everyone if peer.kind is Kind.SERVER]
        self._deadlines = deadlines or Deadlines()
        self._own_context = context is None
        self._context = context or zmq.Context()
        self._poller = zmq.Poller()
        self._ready: deque[zmq.Socket] = deque()
        self._dealers: dict[Address, zmq.Socket] = {}
        self._monitors: dict[Address, zmq.Socket] = {}
        self._sockets: list[zmq.Socket] = []
        self._ended: set[Address] = set()
        self._left: set[Address] = set()
        self._binding: Binding | None = None
        self._guard: Guard | None = None
        self._metrics: Metrics | None = None
        self._token = ""
        self._closed = False
        self._bundles: dict[Address, Bundle] = {}
        self._inbox: deque[tuple[Address, Message]] = deque()
        self._survives, self._unreachable = survives, frozenset[int]()
        self._store = rendezvous.client()
        self._heartbeat = heartbeat or Heartbeat(me, rendezvous, longest=self._deadlines.compile)
        self._collectives = Collectives(me, rendezvous, self._deadlines, self._heartbeat, self.watch)
        try:
            self._start(rendezvous, embedded=rendezvous.place.alone and context is not None)
            if rendezvous.place.metrics:
                self._metrics = Metrics(self.traffic, self._guard, rendezvous.place, self._store)
        except BaseException:
            self.close()
            raise

    def send(self, to: Address, message: Message) -> None:
        """Queues `message` and returns; its tensor must not change any more. `PeerLost` if `to` is gone.

        A small one waits for others, until this role waits for an answer, or `flush`.
        """
        if to.kind is Kind.TRAINER and self._binding is None:
            raise JobError(f"{self.me} sent a message to {to}; trainers send to servers only")
        if type(message.header) is Leave:
            self._left.add(to)
        place = self._parcels.place(to, message)
        frames = encode(message, place)
        self.traffic.sent(to, message.header, frames, 0 if place is None else message.tensor.nbytes)  # type: ignore[union-attr]
        bundle = self._bundles.setdefault(to, Bundle())
        if place is None and is_small(frames):
            bundle.add(frames)
            if bundle.nbytes >= BUNDLE_NBYTES:
                self._send(to, bundle.take())
            return
        self._send(to, bundle.take())
        self._send(to, frames)

    def flush(self) -> None:
        """Sends what waits for others."""
        for to, bundle in self._bundles.items():
            if bundle.nbytes:
                self._send(to, bundle.take())

    def _send(self, to: Address, frames: Frames) -> None:
        if not frames:
            return
        if to.kind is Kind.SERVER:
            self._dealer(to).send_multipart(frames, copy=False)
            return
        assert self._binding is not None, "looked at before"
        try:
            self._binding.socket.send_multipart([identity(to, self._token), *frames], copy=False)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            if self._survives:
                self._unreachable |= {to.rank}
                return
            why = "which never connected, or whose connection is gone"
            raise self._heartbeat.broken(f"{self.me} cannot send to {to}, {why}", [to]) from error

    def receive(self, seconds: float) -> tuple[Address, Message] | None:
        """The next message from anyone, None when none came within `seconds`; `PeerLost` if one is gone."""
        if self._inbox:
            return self._inbox.popleft()
        self.flush()
        deadline = time.monotonic() + seconds
        while True:
            left = max(0.0, deadline - time.monotonic())
            if not self._ready:
                self._pause(min(left, SLICE_SECONDS))
            came = bool(self._ready)
            while self._ready:
                self._inbox.extend(each for each in self._intake.take(self._ready.popleft()) if self._is_for_us(*each))
                if self._inbox:
                    return self._inbox.popleft()
            if came and left > 0.0:
                continue  # it was about memory: behind it may be the last words of who is lost
            self.watch()
            if left == 0.0:
                return None

    def _is_for_us(self, peer: Address, message: Message) -> bool:
        """Whether a message is not one about memory, which are answered here."""
        if not isinstance(message.header, Offer | Accepted):
            return True
        if self._binding is None or is_available(self._binding.url):
            try:
                for answer in self._parcels.take(peer, message.header):
                    self.send(peer, answer)
            except WireError as error:
                self.traffic.drops.drop(peer, MALFORMED, str(error))
            self.flush()
        return False

    def meet(self, groups: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """See `Outlet.meet`."""
        self.flush()
        self._collectives.meet(groups)

    def all_reduce(self, tensor: torch.Tensor, note: str, group: str = "") -> Work:
        """See `Outlet.all_reduce`."""
        self.flush()
        return self._collectives.all_reduce(tensor, note, group)

    def reduce_scatter(self, tensors: Sequence[torch.Tensor], note: str, group: str = "") -> Scattered:
        """See `Outlet.reduce_scatter`."""
        self.flush()
        return self._collectives.reduce_scatter(tensors, note, group)

    def reduce_to(self, tensors: Sequence[torch.Tensor], keeper: int, note: str, group: str = "") -> Scattered:
        """See `Outlet.reduce_to`."""
        self.flush()
        return self._collectives.reduce_to(tensors, keeper, note, group)

    def give(
        self, nbytes: int, pieces: Sequence[tuple[int, torch.Tensor]], keeper: int, note: str, group: str = ""
    ) -> Gathered:
        """See `Outlet.give`."""
        self.flush()
        return self._collectives.give(nbytes, pieces, keeper, note, group)

    def sum_on_host(self, tensor: torch.Tensor, note: str) -> HostWork:
        """Starts the sum of `tensor` over the trainers of this host that have not left, in place on the first of them."""
        self.flush()
        return self._collectives.sum_on_host(tensor, note)

    def is_first_on_host(self) -> bool:
        """Whether this trainer gives the next value to the others of its host."""
        return self._collectives.is_first_on_host()

    def give_on_host(self, tensor: torch.Tensor, note: str) -> None:
        """Gives the next value to the other trainers of this host."""
        self.flush()
        self._collectives.give_on_host(tensor, note)

    def take_on_host(self, shape: list[int], dtype: torch.dtype, note: str) -> torch.Tensor | None:
        """Waits for the next value of the first trainer of this host; None where that is this one, as those before have left."""
        self.flush()
        return self._collectives.take_on_host(shape, dtype, note)

    def leave_host(self) -> None:
        """Takes part in nothing more that trainers of this host do together."""
        self._collectives.leave_host()

    def all_gather(self, whole: torch.Tensor, part: torch.Tensor, note: str, group: str = "") -> Work:
        """Starts the gathering of every trainer's `part` into `whole`."""
        self.flush()
        return self._collectives.all_gather(whole, part, note, group)

    def gather(self, nbytes: int, pieces: Sequence[tuple[int, torch.Tensor]], note: str, group: str = "") -> Gathered:
        """See `Outlet.gather`."""
        self.flush()
        return self._collectives.gather(nbytes, pieces, note, group)

    def broadcast(self, tensor: torch.Tensor, note: str) -> None:
        """Trainer 0's `tensor` becomes everybody's, in place."""
        self.flush()
        self._collectives.broadcast(tensor, note)

    def join(self) -> None:
        """Joins the trainers' process group now and not at the first collective; all trainers must."""
        self._collectives.join()

    def progress(self, step: int, node: str) -> None:
        """Notes how far this role is."""
        self.traffic.progress(step)
        self._heartbeat.progress(step, node)

    def wait(self, peers: list[Address], seconds: float) -> Wait:
        """A wait for `peers` that begins now, and goes on while one of them says that it captures or compiles.

        A trainer names the one first that has what it waits for.
        """
        self.traffic.wait_for(peers[0] if peers and self.me.kind is Kind.TRAINER else None)
        return self._heartbeat.wait(peers, seconds)

    def late(self, peers: list[Address]) -> str:
        """Who among `peers` is silent or behind, or has dropped messages, as a sentence for an error."""
        told = self.traffic.drops.told()
        return self._heartbeat.late(peers) + (f"; {self.me}: {told}" if told else "")

    def fail(self, reason: str) -> None:
        """Tells all roles, also those that wait in a collective, that this one cannot go on."""
        self._heartbeat.fail(reason)

    def ended(self, peer: Address) -> bool:
        """Whether `peer` has closed its transport in good order."""
        return self._heartbeat.ended(peer)

    def silent(self, peers: list[Address]) -> list[Address]:
        """Those of `peers` that show no sign of life. Takes some seconds."""
        return self._heartbeat.silent(peers)

    def lost(self) -> frozenset[int]:
        """Trainers that are lost, of a job that goes on without them: the launcher's word, or messages do not reach them."""
        lost = self._heartbeat.lost_trainers | self._unreachable
        if lost:
            self._parcels.forget(Address(Kind.TRAINER, trainer) for trainer in lost)
        return lost

    def watch(self) -> None:
        """Raises `PeerLost` if a role is known to be gone. Looks at what has arrived, waits for nothing."""
        if (told := self._heartbeat.told()) is not None:
            raise told
        if self._heartbeat.store_lost is not None:
            at = self._place.store
            raise PeerLost(f"{self.me} cannot go on: the job's store at {at} is gone with who hosts it. {STAY}")
        for server in [peer for peer, monitor in self._monitors.items() if monitor.poll(0)]:
            served = self.me.kind is Kind.TRAINER and server not in self._left
            if served or not self._heartbeat.ended(server):
                raise self._heartbeat.broken(f"{self.me} lost its connection to {server}", [server])
            # A server may end before another server does; a trainer is served until it leaves, and may wait for another.
            self._poller.unregister(self._monitors.pop(server))
            self._ended.add(server)

    def close(self) -> None:
        """Sends what is queued, for at most `deadlines.linger` seconds, and frees everything."""
        if self._closed:
            return
        self._closed = True
        with suppress(PeerLost):  # whoever is gone needs nothing more
            self.flush()
        if self._metrics is not None:
            self._metrics.close()
        self._parcels.close()
        self._heartbeat.close()  # first: a connection that then breaks is no surprise to anyone
        self._collectives.close()
        linger = round(1000 * self._deadlines.linger)
        for dealer in self._dealers.values():
            dealer.disable_monitor()
        for socket in self._sockets:
            socket.close(linger)
        if self._binding is not None:
            self._binding.close()
        if self._own_context:
            self._context.term()

    def _start(self, rendezvous: Rendezvous, embedded: bool) -> None:
        if self.me.kind is Kind.TRAINER:
            publish(self._store, self.me, Endpoint())
            self._connect(self._servers)
            return
        router = self._socket(zmq.ROUTER)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.RCVHWM, VISITOR_MESSAGES)
        self._token = secrets.token_hex(16)
        self._intake.visitors |= {identity(peer, self._token): peer for peer in self._everyone}
        if not embedded:
            self._guard = Guard(self.me, self._context, self._token)
            self._guard.protect(router)
            self._guard.start()
        self._binding = Binding.bound(router, self.me, rendezvous, embedded)
        self._poller.register(router, zmq.POLLIN)
        publish(self._store, self.me, Endpoint(self._binding.url, self._token))

    def _connect(self, servers: Sequence[Address]) -> None:
        wait = self._heartbeat.wait(servers, self._deadlines.join)
        found = look_up(self._store, self.me, servers, self._everyone, wait, self.watch)
        for server, endpoint in found.items():
            dealer = self._socket(zmq.DEALER)
            dealer.setsockopt(zmq.IDENTITY, identity(self.me, endpoint.token))
            present(dealer, self.me, endpoint.token)
            monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            dealer.setsockopt(zmq.IPV6, endpoint.url.startswith("tcp://["))
            dealer.connect(endpoint.url)
            self._sockets.append(monitor)
            self._dealers[server], self._monitors[server] = dealer, monitor
            self._intake.peers[dealer] = server
            self._poller.register(dealer, zmq.POLLIN)
            self._poller.register(monitor, zmq.POLLIN)
            if is_available(endpoint.url):
                for message in self._parcels.offer(server):
                    self.send(server, message)

    def _dealer(self, server: Address) -> zmq.Socket:
        if server in self._ended:
            raise PeerLost(f"{self.me} cannot send to {server}: {self.late([server])}. {STAY}")
        if server not in self._dealers:
            self._connect([server])
        return self._dealers[server]

    def _socket(self, kind: zmq.SocketType) -> zmq.Socket:
        socket = self._context.socket(kind)
        self._sockets.append(socket)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, CHUNK_NBYTES)
        return socket

    def _poll(self, seconds: float) -> None:
        monitors = set(self._monitors.values())
        ready = self._poller.poll(math.ceil(1000 * seconds))
        if ready and all(socket in monitors for socket, _ in ready):
            ready = self._poller.poll(0)  # the last words of who is lost came before the loss
        self._ready.extend(socket for socket, _ in ready if socket not in monitors)

    def _pause(self, seconds: float) -> None:
        """Waits for messages, and notes for how long."""
        begun, self.traffic.is_waiting = time.monotonic(), True
        self._poll(seconds)
        self.traffic.is_waiting = False
        self.traffic.add_wait(time.monotonic() - begun)


def identity(me: Address, token: str) -> bytes:
    """How `me` calls itself to the server that published `token`: b"trainer 0 5f2a..."."""
    return f"{me} {token}".encode()
