"""What the row of an id begins with: a function of (seed, id, column) alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from syncwright.errors import TableError
from syncwright.tables.mixing import GAMMA, fractions, mix64
from syncwright.typed import Amount, check_fields


@dataclass(frozen=True, slots=True)
class Uniform:
    """Evenly from `low` to `high`. (Rounded to a narrow dtype, a number may be `high` itself.)"""

    low: float
    high: float

    def __post_init__(self) -> None:
        check_fields(self, TableError)
        if not self.low <= self.high:
            raise TableError(f"Uniform: found low={self.low} above high={self.high}; expected low <= high.")


@dataclass(frozen=True, slots=True)
class Normal:
    """Normally distributed around `mean`, with the standard deviation `std`."""

    mean: float = 0.0
    std: Amount = 1.0

    def __post_init__(self) -> None:
        check_fields(self, TableError)


@dataclass(frozen=True, slots=True)
class Constant:
    """`value` everywhere."""

    value: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, TableError)


Initial = Uniform | Normal | Constant
"""What rows begin with."""

_BLOCK = 2**16


def rows(initial: Initial, seed: int, ids: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The initial rows of `ids` (n), of shape (n, width), on the ids' device.

    Column c of the row of an id is made from number c of splitmix64 seeded with mix64(id ^ mix64(seed + GAMMA)), so it
    depends neither on the order of ids, nor on which come together, nor on the row's width. Numbers are made in float64,
    from all 53 bits (Normal: 52, through the inverse of the distribution function), then rounded to `dtype`.
    """
    match initial:
        case Constant(value):
            return torch.full((len(ids), width), value, dtype=dtype, device=ids.device)
        case Uniform(low, high):
            return _drawn(seed, ids, width, dtype, lambda bits: fractions(bits).mul_(high - low).add_(low))
        case Normal(mean, std):
            return _drawn(seed, ids, width, dtype, lambda bits: _normal(bits).mul_(std).add_(mean))


def stream(seed: int, ids: Tensor) -> Tensor:
    """The seed of each id's own numbers."""
    start = torch.tensor(_signed(seed), dtype=torch.int64, device=ids.device) + GAMMA
    return mix64(ids.to(torch.int64) ^ mix64(start))


def numbers(streams: Tensor, which: Tensor) -> Tensor:
    """The bits of number `which` (from 0) of each stream."""
    return mix64(streams + (which + 1) * GAMMA)


def _signed(seed: int) -> int:
    """The seed's lower 64 bits as int64."""
    return (seed + 2**63) % 2**64 - 2**63


def _drawn(seed: int, ids: Tensor, width: int, dtype: torch.dtype, of: Callable[[Tensor], Tensor]) -> Tensor:
    """In blocks that stay in a processor's cache."""
    streams, columns = stream(seed, ids.flatten())[:, None], torch.arange(width, device=ids.device)
    made = torch.empty(len(streams), width, dtype=dtype, device=ids.device)
    count = max(1, _BLOCK // max(1, width))
    for begin in range(0, len(streams), count):
        made[begin : begin + count] = of(numbers(streams[begin : begin + count], columns))
    return made


def _normal(bits: Tensor) -> Tensor:
    """Between 0 and 1, both excluded, and symmetric: so no number is infinite."""
    return torch.special.ndtri((fractions(bits) * 2**52).floor_().add_(0.5).mul_(2.0**-52))
