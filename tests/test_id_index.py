"""The map from ids to slots: what a dict and a list of free slots do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from syncwright.errors import TableError, TableFull
from syncwright.tables import IdIndex, mix64, shard_of
from syncwright.tables.index import FREE, GRAVES
from syncwright.tables.mixing import GAMMA

LEAST, MOST = -(2**63), 2**63 - 1
FEW = st.sampled_from([LEAST, LEAST + 1, -16, -2, -1, 0, 1, 2, 3, 16, 32, 48, MOST])
IDS = st.lists(FEW | st.integers(LEAST, MOST), max_size=40)
CALLS = st.lists(st.tuples(st.sampled_from(["find", "insert", "remove"]), IDS), max_size=12)


class Model:
    """What the index is to do, one id at a time."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}
        self.free: list[int] = []
        self.end = 0

    def find(self, ids: list[int]) -> list[int]:
        return [self.slots.get(i, -1) for i in ids]

    def insert(self, ids: list[int]) -> list[int]:
        for i in ids:
            if i not in self.slots:
                self.slots[i] = self.free.pop() if self.free else self.end
                self.end = max(self.end, self.slots[i] + 1)
        return self.find(ids)

    def remove(self, ids: list[int]) -> list[int]:
        freed = [self.slots.pop(i) for i in dict.fromkeys(ids) if i in self.slots]
        self.free += freed
        return freed


def tensor(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def check(index: IdIndex, calls: list[tuple[str, list[int]]]) -> None:
    model = Model()
    for call, ids in calls:
        assert getattr(index, call)(tensor(ids)).tolist() == getattr(model, call)(ids)
        assert len(index) == len(model.slots)
        assert dict(zip(index.ids().tolist(), index.slots().tolist(), strict=True)) == model.slots
        assert index.slots().tolist() == sorted(model.slots.values())


@settings(deadline=None)
@given(CALLS)
def test_an_index_is_a_dict(calls):
    check(IdIndex(), calls)


@settings(deadline=None)
@given(CALLS)
def test_an_index_over_somebody_elses_memory_is_a_dict(calls):
    """Of a fixed size; opened again for every call."""
    held, model = IdIndex.fixed(500), Model()
    for call, ids in calls:
        assert getattr(IdIndex(held), call)(tensor(ids)).tolist() == getattr(model, call)(ids)
    assert IdIndex(held).find(tensor(list(model.slots))).tolist() == list(model.slots.values())


@settings(deadline=None)
@given(IDS, IDS)
def test_what_is_new(known, asked):
    index = IdIndex()
    index.insert(tensor(known))
    assert index.new(tensor(asked)).tolist() == [i for i in dict.fromkeys(asked) if i not in known]
    assert len(index) == len(set(known))


def test_an_index_grows_and_stays_small():
    index, ids = IdIndex(), mix64(torch.arange(200_000))
    for some in ids.split(7_000):
        index.insert(some)
    assert torch.equal(index.find(ids), torch.arange(200_000))
    assert index.nbytes / len(index) < 24


def test_ids_that_come_and_go_leave_no_graves_behind():
    """Three times as many ids as buckets pass through; the memory stays where it is."""
    held = IdIndex.fixed(64)
    index = IdIndex(held)
    index.insert(torch.arange(60))
    for turn in range(100):
        index.remove(torch.arange(4) + 4 * turn)
        assert index.insert(torch.arange(4) + 60 + 4 * turn).max() < 64
        assert (len(index) + held["sizes"][GRAVES]) * 3 <= len(held["buckets"]) * 2
    assert index.find(torch.arange(400, 460)).min() >= 0
    assert index.find(torch.arange(400)).max() == -1
    assert held["sizes"][FREE] == 0


def test_a_full_index_says_so_and_keeps_what_it_has():
    index = IdIndex(IdIndex.fixed(3))
    index.insert(tensor([5, 6]))
    with pytest.raises(TableFull, match=r"^the table holds 2 ids, and 2 more do not fit: its capacity is 3\."):
        index.insert(tensor([5, 7, 8]))
    assert index.find(tensor([5, 6, 7, 8])).tolist() == [0, 1, -1, -1]
    assert index.insert(tensor([8, 8, 5])).tolist() == [2, 2, 0]


def test_shapes_and_narrow_ids():
    index = IdIndex()
    slots = index.insert(torch.tensor([[3, -7], [3, 0]], dtype=torch.int32))
    assert slots.tolist() == [[0, 1], [0, 2]]
    assert index.find(tensor([-7])).tolist() == [1]
    assert index.insert(torch.empty(0, 4, dtype=torch.int64)).shape == (0, 4)
    with pytest.raises(TableError, match=r"^ids are torch\.float32; expected torch\.int64"):
        index.find(torch.ones(2))


def test_mixed_bits():
    """splitmix64's first number from seed 0 is 0xE220A8397B1DCDAF; its second adds GAMMA once more."""
    known = {0: 0, 1: 0x5692161D100B05E5, GAMMA: 0xE220A8397B1DCDAF, 2 * GAMMA + 2**64: 0x6E789E6AA1B965F4}
    assert [i % 2**64 for i in mix64(tensor(list(known))).tolist()] == list(known.values())
    assert torch.equal(mix64(torch.tensor([-3], dtype=torch.int32)), mix64(tensor([-3])))


@given(st.lists(st.integers(LEAST, MOST), min_size=1), st.integers(1, 2**31))
def test_shards_are_the_unsigned_remainder(ids, shards):
    mixed = mix64(tensor(ids)).tolist()
    assert shard_of(tensor(ids), shards).tolist() == [m % 2**64 % shards for m in mixed]
