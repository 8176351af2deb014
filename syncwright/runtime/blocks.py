"""Blocks of memory that trainers of one host share, lent to one collective after another.

All trainers make the same choices without a word: they begin and end collectives in the same order, and nothing else counts here.
A block is free once every trainer is known to have read it. Collectives are numbered as they begin; who has ended one next
begins the number behind the last that it has begun, and whoever has waited for that number has heard so of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

HEADER_NBYTES = 64
"""In front of each trainer's buffer: how many bytes it has written there."""
WASTE = 4
"""A block is not lent where a block so many times smaller would do."""
SMALL_NBYTES = 1 << 16
FORGOTTEN = 2048
"""After so many collectives, memory that none of them used goes."""


@dataclass(slots=True, eq=False)
class Block:
    """For every trainer a buffer. Changes as it is lent.

    buffers  by trainer: bytes behind a header
    free     the collective that trainers begin when they have read it; None while it is lent
    used     the collective that used it last
    """

    nbytes: int
    buffers: Mapping[int, torch.Tensor]
    free: int | None = None
    used: int = 0
    _sizes: dict[int, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self._sizes = {rank: each[:8].numpy().view(np.int64) for rank, each in self.buffers.items()}

    def write(self, rank: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
        """Where a trainer writes its part, of so many bytes."""
        self._sizes[rank][0] = nbytes
        return self.part(rank, nbytes, dtype)

    def written(self, rank: int) -> int:
        """How many bytes a trainer has written."""
        return int(self._sizes[rank][0])

    def part(self, rank: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
        """What a trainer has written."""
        return self.buffers[rank][HEADER_NBYTES : HEADER_NBYTES + nbytes].view(dtype)


class Blocks:
    """Changes with every collective that begins and ends.

    make  makes buffers of so many bytes together with the other trainers; given what errors call the collective
    """

    def __init__(self, make: Callable[[int, str], Mapping[int, torch.Tensor]]):
        self._make = make
        self._blocks: list[Block] = []
        self._heard = 0

    @property
    def nbytes(self) -> int:
        """Of one trainer's buffers."""
        return sum(block.nbytes for block in self._blocks)

    def heard(self, number: int) -> None:
        """Every other trainer has begun the collective of this number."""
        self._heard = max(self._heard, number)

    def lend(self, nbytes: int, number: int, note: str) -> Block:
        """The smallest free block for a collective that begins, or a new one."""
        fitting = [
            b for b in self._blocks if self._is_free(b) and nbytes <= b.nbytes <= max(WASTE * nbytes, SMALL_NBYTES)
        ]
        block = min(fitting, key=lambda b: b.nbytes, default=None)
        if block is None:
            self._blocks = [b for b in self._blocks if not self._is_free(b) or b.used > number - FORGOTTEN]
            size = _rounded(nbytes)
            block = Block(size, self._make(HEADER_NBYTES + size, note))
            self._blocks.append(block)
        block.free, block.used = None, number
        return block

    def give_back(self, block: Block, begun: int) -> None:
        """This trainer has read a block, having begun so many collectives."""
        block.free = begun + 1

    def clear(self) -> None:
        self._blocks = []

    def _is_free(self, block: Block) -> bool:
        return block.free is not None and block.free <= self._heard


def _rounded(nbytes: int) -> int:
    """To powers of two for little, else in steps of at most an eighth: sizes that vary from step to step share blocks."""
    step = max(64, 1 << max(0, nbytes.bit_length() - 4))
    return max(-(-nbytes // step) * step, 1024)
