"""What the rows of a step cost by themselves, in one process: gathered and written back, of a table and its state.

The limit of who keeps tables in memory: random rows of a large table are not in a cache, and not in the processor's map of
pages.
"""

from __future__ import annotations

import torch

from bench.contestants import Running, Seat
from bench.table_workloads import WIDTH, OneTable

TRAINERS = 2
STATES = {"sgd": (), "adagrad": (WIDTH,), "rowwise-adagrad": (1,), "lazy-adam": (WIDTH, WIDTH)}
"""The widths of an optimizer's state for a row."""


def start(workload: OneTable, seat: Seat, rows: int) -> Running:
    """`rows`: of the table; a step is of the ids of all trainers."""
    tables = [torch.zeros(rows, width) for width in (WIDTH, *STATES[workload.optimizer_name])]
    given = [OneTable(workload.optimizer_name, rows).batches(rank) for rank in range(TRAINERS)]
    steps = [torch.cat([ids.flatten() for _, ids, _ in parts]).unique() for parts in zip(*given, strict=True)]

    def step(ids: torch.Tensor) -> torch.Tensor:
        """The trainers' pull, then the update."""
        pulled = tables[0].index_select(0, ids)
        for table in tables:
            table.index_copy_(0, ids, table.index_select(0, ids))
        return pulled[0, 0]

    def forever():
        while True:
            yield from ((ids,) for ids in steps)

    return Running(step, tables.clear, forever())
