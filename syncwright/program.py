"""Program: one fx graph whose interface, named variables with roles, lives inside it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch


class Role(Enum):
    """What a variable is to the training step, recorded at capture and never guessed from a name."""

    INPUT = "input"
    PARAM = "param"
    BUFFER = "buffer"
    STATE = "state"
    GRAD = "grad"
    HYPER = "hyper"
    OUTPUT = "output"
    GLOBAL = "global"


@dataclass(frozen=True, slots=True)
class Variable:
    """A named value that a program reads or writes.

    name     the user's own fully qualified name ("fc.weight"); state and gradients extend it ("fc.weight.exp_avg")
    shape    sizes, whole tensor; () for scalars and for host numbers
    of       the parameter that a GRAD or STATE belongs to
    sparse   the gradient touches few rows (every read is an embedding lookup)
    aliases  further names of the same tensor (tied weights are one variable)
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    dtype: torch.dtype
    of: str | None = None
    sparse: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize
