"""Bytes that every trainer gives to all: laid out by who sends them, read where they came."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from syncwright.runtime.shared_memory import HostGroup
from syncwright.runtime.transport import Work

Pieces = Sequence[tuple[int, torch.Tensor]]
"""Tensors, contiguous, each with the place of its first byte."""
ALIGNMENT = 64


def rounded(nbytes: int) -> int:
    """So many bytes that what lies behind them is aligned for any dtype."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def lay_out(own: torch.Tensor, pieces: Pieces) -> None:
    """Writes each piece at its place among the bytes of `own`."""
    for place, piece in pieces:
        flat = piece.reshape(-1).view(torch.uint8)
        own[place : place + flat.numel()].copy_(flat)


class CopiedGathered:
    """By a collective that copies (see `transport.Gathered`).

    gather  starts the gathering of a part of every trainer, all of one size, into a tensor of all
    """

    def __init__(
        self, trainers: int, nbytes: int, pieces: Pieces, gather: Callable[[torch.Tensor, torch.Tensor], Work]
    ):
        own = pieces[0][1].new_zeros(rounded(nbytes), dtype=torch.uint8)
        lay_out(own, pieces)
        whole = own.new_empty([trainers, own.numel()])
        self.parts: Sequence[torch.Tensor] = list(whole)
        self._work = gather(whole.view(-1), own)

    def done(self) -> bool:
        return self._work.done()

    def release(self) -> None:
        self.parts = ()


class HostGathered:
    """In the memory that trainers of one host share: nobody but its sender copies a byte."""

    def __init__(self, group: HostGroup, nbytes: int, pieces: Pieces, note: str):
        self._group = group
        self._turn = group.begin_with(rounded(nbytes), torch.uint8, note, lambda own: lay_out(own, pieces))
        self.parts: Sequence[torch.Tensor] = ()

    def done(self) -> bool:
        """Waits until every trainer has laid out its part, then True."""
        self.parts = [part for _, part in self._group.parts(self._turn)]
        return True

    def release(self) -> None:
        self.parts = ()
        self._group.end(self._turn)
