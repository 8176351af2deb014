"""Both sizes of bench/tables.py in one process: the processor time of whole jobs, trainers and server together.

On a machine that others use too, wall time says more of them than of a job; processor time much less. Here nothing crosses a
socket, so the rows' share of a step is larger than with processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

import syncwright
from bench.contestants.ours import step
from bench.lists.tables import PLAN
from bench.table_workloads import WORKLOADS, OneTable
from syncwright import Rules
from syncwright.runtime.loopback import Loopback

TRAINERS = 2
STEPS = 24
"""In a block; one more goes before it."""


def cpu_seconds(optimizer: str, sizes: Mapping[str, int], repeats: int) -> dict[str, list[float]]:
    """Seconds of a step by size, every repeat; sizes take turns on fresh batches, the same in number for each."""
    torch.set_num_threads(1)
    jobs = {name: _job(replace(WORKLOADS[optimizer], rows=rows)) for name, rows in sizes.items()}
    found: dict[str, list[float]] = {name: [] for name in sizes}
    for _ in range(repeats):
        for name, (job, batches) in jobs.items():
            job.step(next(batches))
            began = time.process_time()
            for _ in range(STEPS):
                job.step(next(batches))
            found[name].append((time.process_time() - began) / STEPS)
    return found


def _job(workload: OneTable) -> tuple[Loopback, Iterator[list[tuple]]]:
    model = workload.model()
    optimizer = workload.optimizer(model)
    job = syncwright.loopback(step, model, optimizer, plan=Rules.from_yaml(PLAN), trainers=TRAINERS, servers=1)
    batches = _forever([workload.batches(rank) for rank in range(TRAINERS)])
    job.step(next(batches))
    return job, batches


def _forever(given: list[list[tuple]]) -> Iterator[list[tuple]]:
    while True:
        yield from map(list, zip(*given, strict=True))
