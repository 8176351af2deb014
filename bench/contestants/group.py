"""The process group of the peers: Gloo, meeting at a file."""

from __future__ import annotations

from datetime import timedelta

from torch import distributed as dist

from bench.contestants import Seat


def join(seat: Seat) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{seat.store}",
        rank=seat.rank,
        world_size=seat.processes,
        timeout=timedelta(minutes=15),
    )
