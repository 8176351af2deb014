"""Values that one trainer of a host gives to the others there, through shared memory."""

from __future__ import annotations

import torch

from syncwright.runtime.shared_memory import HostGroup, Slot


class HostCopies(HostGroup):
    """The trainers of one host. Values are numbered, and all trainers give or take the n-th as their n-th.

    A signal of the one that gives says that the value is there, a signal of another that it has read it. The one that gives
    is the first of those who have a part in that number: where it leaves, the next gives from the next number on.
    Changes with every value.
    """

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

    def _had(self, slot: Slot, note: str) -> None:
        slot.turn += 1
        self._begun += 1
        for peer in self._peers.values():
            self._signal(peer, note)

    def _giver(self) -> int:
        """Who gives the next value: the first of those who have not left, or not before it."""
        there = (r for r in self.members if r == self.rank or r not in self._left or self._heard[r] > self._begun)
        return next(there)
