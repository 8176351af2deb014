"""Guard: who does not know a server's secret is turned away before ZeroMQ reads a message of it."""

from __future__ import annotations

import hmac
import threading
from collections.abc import Sequence

import zmq

from syncwright.runtime.messages import Address
from syncwright.runtime.traffic import Seldom

REQUESTS = "inproc://zeromq.zap.01"
"""Where ZeroMQ asks who may connect (its specification 27, ZAP); one guard per context."""

DOMAIN = b"syncwright"


class Guard(threading.Thread):
    """Changes: answers ZeroMQ, in a thread of its own, about everyone who connects to a server's socket.

    A message of many frames is kept by ZeroMQ until its last one has come, and what has come until it is read, so a
    visitor could fill the memory whatever is done with its messages. One that is turned away sends none.

    refused  how many were turned away
    """

    def __init__(self, me: Address, context: zmq.Context, token: str) -> None:
        super().__init__(name=f"guard of {me}", daemon=True)
        self.refused = 0
        self._me, self._token = me, token.encode()
        self._seldom = Seldom()
        self._socket = context.socket(zmq.REP)
        self._socket.bind(REQUESTS)

    def protect(self, router: zmq.Socket) -> None:
        """Has this guard asked about all who connect to `router`, which is not bound yet."""
        router.setsockopt(zmq.PLAIN_SERVER, 1)
        router.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)

    def run(self) -> None:
        """Answers until the context ends."""
        try:
            while True:
                request = self._socket.recv_multipart()
                version, number = request[:2]
                status = b"200" if self._knows(request) else b"400"
                self._socket.send_multipart([version, number, status, b"", b"", b""])
        except zmq.ContextTerminated:
            self._socket.close(0)

    def _knows(self, request: Sequence[bytes]) -> bool:
        """A request: version, number, domain, address, identity, mechanism, and what that brings: a name, a secret."""
        if len(request) == 8 and request[5] == b"PLAIN" and hmac.compare_digest(request[7], self._token):
            return True
        self.refused += 1
        self._seldom.warn("", f"{self._me} turns a visitor away that does not know the job's secret")
        return False


def present(dealer: zmq.Socket, me: Address, token: str) -> None:
    """Has `dealer` say who it is, and the secret, when it connects. Within a process nobody asks."""
    dealer.setsockopt(zmq.PLAIN_USERNAME, str(me).encode())
    dealer.setsockopt(zmq.PLAIN_PASSWORD, token.encode())
