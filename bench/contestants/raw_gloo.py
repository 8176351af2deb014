"""A bare round trip over Gloo: one send and one receive between every trainer and every server. No update, no merge."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import distributed as dist

from bench.contestants import Running, Seat
from bench.contestants.group import join
from bench.server_workloads import Transfer


def start(workload: Transfer, seat: Seat) -> Running:
    """Every trainer sends an equal part of the bytes to every server, and gets as many back."""
    servers = seat.count("server")
    join(replace(seat, processes=seat.processes + servers))
    everyone = [seat.processes + server for server in range(servers)]
    out = torch.ones(workload.nbytes // servers, dtype=torch.uint8)
    back = [torch.empty_like(out) for _ in everyone]

    def step(*batch: object) -> float:
        sent = [dist.isend(out, server) for server in everyone]
        received = [dist.irecv(into, server) for into, server in zip(back, everyone, strict=True)]
        for work in [*sent, *received]:
            work.wait()
        return 0.0

    return Running(step, lambda: None)


def serve(workload: Transfer, seat: Seat) -> None:
    servers = seat.count("server")
    join(replace(seat, rank=seat.processes + seat.rank, processes=seat.processes + servers))
    held = torch.empty(workload.nbytes // servers, dtype=torch.uint8)
    while True:
        trainer = dist.recv(held)
        dist.send(held, trainer)
