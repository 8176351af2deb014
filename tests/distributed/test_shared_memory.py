"""Sums through shared memory: right for any sizes, with bounded memory. Threads are enough."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore

from syncwright.errors import JobError
from syncwright.runtime.deadlines import Wait
from syncwright.runtime.host_copies import HostCopies
from syncwright.runtime.shared_memory import HostGroup

SIZES = [1, 2, 3, 4, 5, 6, 7, 1, 2, 7, 7, 3]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create")


def group_of(rank: int, members: range, store: HashStore) -> HostGroup:
    return HostGroup(rank, members, store, lambda: Wait(20.0), lambda: None, lambda doing, error, late: JobError(doing))


def test_sums_of_many_sizes_share_memory() -> None:
    """Of one name and of many; what is under way at once has memory of its own."""
    store = HashStore()

    def sums(rank: int) -> tuple[list[list[float]], int]:
        group = group_of(rank, range(3), store)
        found = []
        for turn, size in enumerate(SIZES):
            tensors = [torch.full((size * 1000 + part,), float(rank + turn + part)) for part in range(3)]
            works = [group.all_reduce(tensor, f"{turn % 2}.{part}") for part, tensor in enumerate(tensors)]
            if rank == 1:
                time.sleep(0.002)
            assert all(work.done() for work in works)
            found.append([tensor.unique().tolist() for tensor in tensors])
        group.close()
        return found, group._blocks.nbytes

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(sums, range(3)))
    expected = [[[3.0 * (turn + part + 1)] for part in range(3)] for turn, _ in enumerate(SIZES)]
    assert [found for found, _ in results] == [expected] * 3
    nbytes = {nbytes for _, nbytes in results}
    assert len(nbytes) == 1
    assert nbytes.pop() <= 6 * 4 * 7002 * 9 / 8 + 6 * 4 * 2002 * 9 / 8


@pytest.mark.parametrize("difference", [1, 300], ids=["in one block", "in blocks of their own"])
def test_what_trainers_give_has_one_size(difference: int) -> None:
    store = HashStore()

    def one(rank: int) -> None:
        group = group_of(rank, range(2), store)
        with pytest.raises(JobError, match=r"trainer \d gives \d+ bytes as w, expected \d+\. Expected all trainers"):
            group.all_reduce(torch.ones(3 + difference * rank), "w").done()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(2)))


STEPS = {4: 2, 5: 5, 6: 3, 7: 0}
"""How many sums each trainer of a host takes part in."""


def test_who_has_left_is_not_waited_for_and_the_next_is_first() -> None:
    """The first trainer leaves after two sums; one that leaves before the first has handed over no memory."""
    store = HashStore()

    def sums(rank: int) -> list[tuple[float, bool]]:
        group, found = group_of(rank, range(4, 8), store), []
        for _ in range(STEPS[rank]):
            tensor = torch.full((3,), 2.0**rank)
            work = group.reduce(tensor, "w")
            assert work.done()
            found.append((tensor[0].item(), work.is_first))
        group.leave()
        group.close()
        return found

    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(STEPS, pool.map(sums, STEPS), strict=True))
    assert found == {
        4: [(112.0, True)] * 2,
        5: [(32.0, False)] * 2 + [(96.0, True)] + [(32.0, True)] * 2,
        6: [(64.0, False)] * 3,
        7: [],
    }


def test_values_are_given_by_the_first_who_is_there() -> None:
    """Of 40 numbers the first trainer gives 7 and leaves, the second the next 13; slow and fast ones take the same values."""
    store, ends, sizes = HashStore(), {4: 7, 5: 20, 6: 40}, (3, 5)

    def values(rank: int) -> list[list[float]]:
        given = (rank, range(4, 7), store, lambda: Wait(20.0), lambda: None, lambda doing, error, late: JobError(doing))
        group, found = HostCopies(*given), []
        for number in range(ends[rank]):
            size = sizes[number % 2]
            value = None if group.is_first else group.take([size], torch.float32, f"of {size}")
            if value is None:
                value = torch.full((size,), 100.0 * rank + number)
                group.give(value, f"of {size}")
            if rank == 5:
                time.sleep(0.002)
            found.append(value.tolist())
        group.leave()
        group.close()
        return found

    with ThreadPoolExecutor(3) as pool:
        found = dict(zip(ends, pool.map(values, ends), strict=True))
    givers = [4] * 7 + [5] * 13 + [6] * 20
    expected = [[100.0 * giver + number] * sizes[number % 2] for number, giver in enumerate(givers)]
    assert found == {rank: expected[:end] for rank, end in ends.items()}


def test_who_is_gone_without_a_word_is_missed() -> None:
    store = HashStore()

    def one(rank: int) -> None:
        group = group_of(rank, range(2), store)
        if rank == 0:
            group.close()
        else:
            with pytest.raises(JobError, match=r"trainer 1 waits for .* of w"):
                group.reduce(torch.ones(3), "w").done()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(2)))
