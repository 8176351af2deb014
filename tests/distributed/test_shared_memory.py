"""Sums through shared memory: right for any sizes, with bounded memory. Threads are enough."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore

from syncwright.errors import JobError
from syncwright.runtime.deadlines import Wait
from syncwright.runtime.shared_memory import MOST_SIZES, HostGroup

SIZES = [1, 2, 3, 4, 5, 6, 7, 1, 2, 7, 7, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="memfd_create")
def test_memory_of_sizes_that_are_used_no_more_goes() -> None:
    store = HashStore()

    def sums(rank: int) -> tuple[list[list[float]], int]:
        group = HostGroup(rank, 2, store, lambda: Wait(20.0), lambda: None, lambda doing, error, late: JobError(doing))
        found = []
        for size in SIZES:
            tensor = torch.full((size,), float(rank + size))
            assert group.all_reduce(tensor, "w").done()
            found.append(tensor.tolist())
        ((_, slots),) = group._slots.items()
        group.close()
        return found, len(slots)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(sums, range(2)))
    expected = [[2.0 * size + 1] * size for size in SIZES]
    assert results == [(expected, MOST_SIZES)] * 2
