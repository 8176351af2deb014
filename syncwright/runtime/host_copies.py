"""Values that one trainer of a host gives to the others there, through shared memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from syncwright.runtime.shared_memory import HostGroup

MOST_SIZES = 4
"""Of one name: the memory of the size that was used longest ago goes, on all trainers at the same value."""


class Slot:
    """The memory of one name: for every trainer two buffers, used in turn. Changes with every value.

    written  by buffer, the number behind that of the value that was written there last
    """

    def __init__(self, buffers: Mapping[int, Sequence[torch.Tensor]]):
        self.buffers = buffers
        self.turn = 0
        self.written = [0, 0]


class HostCopies(HostGroup):
    """The trainers of one host. Values are numbered, and all trainers give or take the n-th as their n-th.

    A signal of the one that gives says that the value is there, a signal of another that it has read it. The one that gives
    is the first of those who have a part in that number: where it leaves, the next gives from the next number on.
    Changes with every value.
    """

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self._slots: dict[tuple[str, torch.dtype], OrderedDict[int, Slot]] = {}

    @property
    def is_first(self) -> bool:
        """Whether the next value is this trainer's to give, as far as it knows."""
        return self._giver() == self.rank

    def give(self, tensor: torch.Tensor, note: str) -> None:
        """Writes the next value where the others read it; waits until they have read the one before the last."""
        slot = self._slot(tensor.numel(), tensor.dtype, note)
        wait = self._begin()
        for peer in self._peers.values():
            while self._heard[peer.rank] < slot.written[slot.turn % 2] and peer.rank not in self._left:
                self._listen(peer, note, wait)
        slot.buffers[self.rank][slot.turn % 2].copy_(tensor.reshape(-1))
        slot.written[slot.turn % 2] = self._begun + 1
        self._had(slot, note)

    def take(self, shape: list[int], dtype: torch.dtype, note: str) -> torch.Tensor | None:
        """Waits for the next value; None where it is this trainer's to give, as all before it have left."""
        value = torch.empty(shape, dtype=dtype)
        slot = self._slot(value.numel(), dtype, note)
        wait = self._begin()
        while (giver := self._giver()) != self.rank:
            if self._heard[giver] > self._begun:
                value.view(-1).copy_(slot.buffers[giver][slot.turn % 2])
                self._had(slot, note)
                return value
            self._listen(self._peers[giver], note, wait)
        return None

    def close(self) -> None:
        super().close()
        self._slots.clear()

    def _slot(self, count: int, dtype: torch.dtype, note: str) -> Slot:
        sizes = self._slots.setdefault((note, dtype), OrderedDict())
        if count not in sizes:
            found = self._exchanged(max(2 * count * dtype.itemsize, 1), note)
            halves = {rank: each[: 2 * count * dtype.itemsize].view(dtype) for rank, each in found.items()}
            sizes[count] = Slot({rank: (each[:count], each[count:]) for rank, each in halves.items()})
        sizes.move_to_end(count)
        if len(sizes) > MOST_SIZES:
            sizes.popitem(last=False)
        return sizes[count]

    def _had(self, slot: Slot, note: str) -> None:
        slot.turn += 1
        self._begun += 1
        for peer in self._peers.values():
            self._signal(peer, note)

    def _giver(self) -> int:
        """Who gives the next value: the first of those who have not left, or not before it."""
        there = (r for r in self.members if r == self.rank or r not in self._left or self._heard[r] > self._begun)
        return next(there)
