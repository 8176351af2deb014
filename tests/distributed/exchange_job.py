"""A job of the sockets' tests: servers send back what they get; trainers send, sum and print what they found.

Arguments: `exchange`, or `lose` (the server kills its own process after the first message).
"""

from __future__ import annotations

import os
import signal
import sys

import torch

from syncwright.runtime.membership import membership
from syncwright.runtime.messages import Address, Kind, Leave, Message, Push, Value
from syncwright.runtime.rendezvous import Rendezvous
from syncwright.runtime.sockets import Deadlines, SocketTransport


def serve(transport: SocketTransport, trainers: int, lose: bool) -> None:
    while trainers:
        got = transport.receive(20)
        assert got is not None, transport.late([Address(Kind.TRAINER, 0)])
        peer, message = got
        match message.header:
            case Push(channel=channel, step=step):
                transport.send(peer, Message(Value(channel, step + 1), message.tensor))
            case Leave():
                trainers -= 1
        if lose:
            os.kill(os.getpid(), signal.SIGKILL)


def train(transport: SocketTransport) -> None:
    rank = transport.me.rank
    server = Address(Kind.SERVER, 0)
    for step in range(3):
        transport.progress(step, "push w")
        sent = torch.arange(2_000_000, dtype=torch.float32) + step
        transport.send(server, Message(Push("w", step, 1.0), sent))
        got = transport.receive(20)
        assert got is not None, transport.late([server])
        assert got[1].header == Value("w", step + 1)
        assert got[1].tensor is not None
        assert torch.equal(got[1].tensor, sent)
    total = torch.full((3,), float(rank + 1))
    assert transport.all_reduce(total, "total").done()
    first = torch.tensor([rank + 5])
    transport.broadcast(first, "first")
    print("sum", total.tolist(), "first", first.item())
    transport.send(server, Message(Leave(3)))
    transport.flush()


def main() -> None:
    place = membership(os.environ)
    deadlines = Deadlines(join=30, wait=20, linger=1)
    transport = SocketTransport(place.me, Rendezvous(place, 0), place.servers, deadlines=deadlines)
    try:
        if place.me.kind is Kind.SERVER:
            serve(transport, place.trainers, lose=sys.argv[1] == "lose")
        else:
            train(transport)
    finally:
        transport.close()


if __name__ == "__main__":
    main()
