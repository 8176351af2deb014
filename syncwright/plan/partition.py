"""Partition: how many pieces a variable is cut into along axis 0, and how large each is.

    cut(Blocks(), (10, 4096), servers=4) == (3, 3, 3, 1)
    cut(Even(3), (10,), servers=2) == (4, 3, 3)
    cut(Uneven(4), (10,), servers=2) == (1, 2, 3, 4)
    cut(Hashed(1024), (10,), servers=3) == (342, 341, 341)

Every cut keeps the same rules: the sizes add up to the axis, no piece is empty, whole rows stay together, and
a variable without an axis (0-d, size 1 by convention) or without elements is one piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from syncwright.errors import PlanError
from syncwright.typed import Count, check_fields


@dataclass(frozen=True, slots=True)
class Whole:
    """One piece."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """At most one piece per server, each of about `min_elements` or more (Paddle's DistributeTranspiler)."""

    min_elements: Count = 8192

    def __post_init__(self) -> None:
        check_fields(self, PlanError)


@dataclass(frozen=True, slots=True)
class Even:
    """`k` pieces whose sizes differ by at most one row, the larger ones first (as `torch.tensor_split`)."""

    k: Count

    def __post_init__(self) -> None:
        check_fields(self, PlanError)


@dataclass(frozen=True, slots=True)
class Uneven:
    """`k` pieces, piece i of weight i+1, each bound at the row nearest to its exact place."""

    k: Count

    def __post_init__(self) -> None:
        check_fields(self, PlanError)


@dataclass(frozen=True, slots=True)
class Hashed:
    """Of tables of which rows travel: a row lives in virtual shard `mix64(id) % shards`, shards are spread over servers.

    Sizes are numbers of shards: each server keeps as many in a row, to within one. Where an id lives does not depend on
    the number of servers.
    """

    shards: Count = 1024

    def __post_init__(self) -> None:
        check_fields(self, PlanError)
        if self.shards > 2**31:
            raise PlanError(f"Hashed.shards: found {self.shards}, expected at most 2**31.")


Partition = Whole | Blocks | Even | Uneven | Hashed


def cut(partition: Partition, shape: tuple[int, ...], servers: int) -> tuple[int, ...]:
    """The sizes along axis 0 of the pieces that a variable of this shape is cut into; of `Hashed`, in shards."""
    if isinstance(partition, Hashed):
        return _even(partition.shards, min(servers, partition.shards))
    rows = axis_length(shape)
    elements = rows
    for size in shape[1:]:
        elements *= size
    if elements == 0:
        return (rows,)
    match partition:
        case Whole():
            return (rows,)
        case Blocks(min_elements):
            return _blocks(rows, elements, min(servers, max(1, elements // min_elements)))
        case Even(k):
            return _even(rows, min(k, rows))
        case Uneven(k):
            return _uneven(rows, min(k, rows))


def length(partition: Partition, shape: tuple[int, ...]) -> int:
    """What the sizes of the pieces add up to."""
    return partition.shards if isinstance(partition, Hashed) else axis_length(shape)


def axis_length(shape: tuple[int, ...]) -> int:
    """The length of axis 0; 1 for a 0-d variable, which is one piece."""
    return shape[0] if shape else 1


def _blocks(rows: int, elements: int, pieces: int) -> tuple[int, ...]:
    row = elements // rows
    size = _ceil(_ceil(elements, pieces), row)
    full, rest = divmod(rows, size)
    return (size,) * full + ((rest,) if rest else ())


def _even(rows: int, pieces: int) -> tuple[int, ...]:
    size, larger = divmod(rows, pieces)
    return (size + 1,) * larger + (size,) * (pieces - larger)


def _uneven(rows: int, pieces: int) -> tuple[int, ...]:
    """The bound after piece i stands at rows * (1 + ... + i) / (1 + ... + pieces), rounded half up.

    At least one row after the bound before it; later pieces are heavier, so enough rows always remain.
    """
    total = pieces * (pieces + 1) // 2
    bounds = [0]
    for weight in range(1, pieces + 1):
        ahead = weight * (weight + 1) // 2
        nearest = (2 * rows * ahead + total) // (2 * total)
        bounds.append(max(nearest, bounds[-1] + 1))
    return tuple(stop - start for start, stop in pairwise(bounds))


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
