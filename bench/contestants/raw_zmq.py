"""A bare round trip over ZeroMQ: frames of 4 MB from DEALER to ROUTER and back, not copied. No update, no merge."""

from __future__ import annotations

import numpy as np
import zmq

from bench.contestants import Running, Seat
from bench.server_workloads import Transfer

FRAME_NBYTES = 4 * 2**20


def url(seat: Seat, server: int, transport: str) -> str:
    if transport == "ipc":
        return f"ipc://{seat.store}-{server}"
    return f"tcp://127.0.0.1:{seat.ports[seat.processes + server]}"


def start(workload: Transfer, seat: Seat, transport: str) -> Running:
    """Every trainer sends an equal part of the bytes to every server, and gets as many back."""
    context = zmq.Context()
    servers = seat.count("server")
    dealers = [context.socket(zmq.DEALER) for _ in range(servers)]
    for server, dealer in enumerate(dealers):
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(url(seat, server, transport))
    part = memoryview(np.ones(workload.nbytes // servers, np.uint8))
    frames = [part[at : at + FRAME_NBYTES] for at in range(0, len(part), FRAME_NBYTES)]

    def step(*batch: object) -> float:
        for dealer in dealers:
            dealer.send_multipart(frames, copy=False)
        received = sum(len(frame.buffer) for dealer in dealers for frame in dealer.recv_multipart(copy=False))
        if received != servers * len(part):
            raise RuntimeError(f"{received} bytes came back of {servers * len(part)}")
        return 0.0

    return Running(step, context.destroy)


def serve(workload: Transfer, seat: Seat, transport: str) -> None:
    router = zmq.Context().socket(zmq.ROUTER)
    router.bind(url(seat, seat.rank, transport))
    while True:
        router.send_multipart(router.recv_multipart(copy=False), copy=False)
