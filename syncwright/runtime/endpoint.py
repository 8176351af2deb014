"""Where a server listens: in the process, in a private folder, or on this host's address."""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import zmq

from syncwright.errors import ClusterError
from syncwright.runtime.membership import Membership
from syncwright.runtime.messages import Address
from syncwright.runtime.rendezvous import Rendezvous

LONGEST_PATH = 100
"""Unix sockets have names of at most 104 to 108 bytes."""


@dataclass(frozen=True, slots=True)
class Binding:
    """A bound socket, its url, and the private folder that holds it (None where the launcher made one)."""

    socket: zmq.Socket
    url: str
    folder: tempfile.TemporaryDirectory | None = None

    @classmethod
    def bound(cls, router: zmq.Socket, me: Address, rendezvous: Rendezvous, embedded: bool) -> Binding:
        """Binds `router`: inproc if `embedded`, ipc if all roles are on one host, else tcp on a free port.

        Never on all interfaces: only on the one by which this host reaches the job's store.
        """
        place = rendezvous.place
        if embedded:
            return cls._on(router, f"inproc://syncwright/{id(rendezvous)}/{me}")
        if not place.one_host:
            own = own_address(place)
            router.setsockopt(zmq.IPV6, ":" in own)
            return cls._on(router, f"tcp://[{own}]:*" if ":" in own else f"tcp://{own}:*")
        folder = tempfile.TemporaryDirectory(prefix="syncwright-") if place.sockets is None else None
        path = Path(folder.name if folder else str(place.sockets)) / f"{me.kind}-{me.rank}-{rendezvous.generation}"
        if len(os.fsencode(path)) <= LONGEST_PATH:
            return cls._on(router, f"ipc://{path}", folder)
        if folder:
            folder.cleanup()
        return cls._on(router, "tcp://127.0.0.1:*")

    @classmethod
    def _on(cls, router: zmq.Socket, url: str, folder: tempfile.TemporaryDirectory | None = None) -> Binding:
        try:
            router.bind(url)
        except zmq.ZMQError as error:
            raise ClusterError(f"a server could not listen at {url}: {error}") from error
        return cls(router, router.getsockopt_string(zmq.LAST_ENDPOINT), folder)

    def close(self) -> None:
        """Removes the folder."""
        if self.folder is not None:
            self.folder.cleanup()


def own_address(place: Membership) -> str:
    """The address of this host on the network that leads to the store."""
    if place.address is not None:
        return str(socket.getaddrinfo(place.address, None)[0][4][0])
    at = place.store
    family, kind, protocol, _, there = socket.getaddrinfo(at.host, at.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(there)  # sends nothing: it only chooses a route
        found = str(probe.getsockname()[0])
    if _is_loopback(found):  # the store is on this host
        found = str(socket.getaddrinfo(place.host, None)[0][4][0])
    if _is_loopback(found):
        raise ClusterError(
            f"other hosts cannot reach {place.me}: the store {at} and this host's name {place.host!r} lead "
            f"to {found}; set SYNCWRIGHT_HOST to this host's address on the job's network"
        )
    return found


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")
