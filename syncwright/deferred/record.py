"""What was done to a tensor that was not made: data from which its elements can be made, any range of them at any time.

A record is of elements laid out flat, in order. Records are values: writing to a tensor gives it another record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

CHUNK = 2**20
"""Elements that are drawn at a time. A multiple of `ALIGNED`."""
ALIGNED = 64
"""Pointwise kernels and `normal_` work on groups of 16 to 64 elements, and otherwise on what is left behind the last."""
LEAST = 16
"""`normal_` draws fewer elements than this in another way."""


@dataclass(frozen=True, slots=True, eq=False)
class Filled:
    """All elements are one number; memory that nothing was written to counts as zeros."""

    number: float | int | bool | complex
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """Random numbers: `draw(x, *args)` on all elements at once, which equals draws on chunks one after another.

    states  of the generator before each chunk (see `chunks`)
    """

    draw: Callable
    args: tuple
    dtype: torch.dtype
    numel: int
    states: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Applied:
    """`func(*args, **kwargs)`, element by element; where `args` have records, these are of as many elements."""

    func: Any
    args: tuple
    kwargs: dict[str, object]
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """`base` with elements from `start` on written over by `part`."""

    base: Record
    start: int
    part: Record

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def numel(self) -> int:
        return self.base.numel


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """Elements of `base` from `start` on."""

    base: Record
    start: int
    numel: int

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """A tensor's elements, copied when they were given."""

    values: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def numel(self) -> int:
        return self.values.numel()


@dataclass(frozen=True, slots=True, eq=False)
class Away:
    """Elements that are somewhere else; `why` says where, and how to get them."""

    why: str
    dtype: torch.dtype
    numel: int


Record = Filled | Drawn | Applied | Written | Taken | Given | Away


def chunks(numel: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of what is drawn at a time: `CHUNK` elements, the last one with what would be less than `LEAST`."""
    start = 0
    while start < numel:
        stop = start + CHUNK if start + CHUNK + LEAST <= numel else numel
        yield start, stop
        start = stop


def drawn(draw: Callable, args: tuple, generator: torch.Generator | None, dtype: torch.dtype, numel: int) -> Drawn:
    """Records a draw, and moves the generator to where it leaves it; takes memory for one chunk."""
    source = generator if generator is not None else torch.default_generator
    states, scratch = [], torch.empty(min(numel, CHUNK + LEAST), dtype=dtype)
    for start, stop in chunks(numel):
        states.append(source.get_state())
        draw(scratch[: stop - start], *args, generator=source)
    return Drawn(draw, args, dtype, numel, tuple(states))


def written(base: Record, start: int, part: Record) -> Record:
    """`base` with a range of elements written over."""
    if part.numel == base.numel:
        return part
    return Written(base, start, part)


def taken(base: Record, start: int, numel: int) -> Record:
    """A range of elements."""
    return base if numel == base.numel else Taken(base, start, numel)


def digest(record: Record) -> str | None:
    """Equal for records that give the same elements by the same operations, in any process; None where a record has
    elements of its own or is of elements that are somewhere else, which no other process can make."""
    seen: dict[int, str | None] = {}
    return _digest(record, seen)


def _digest(record: Record, seen: dict[int, str | None]) -> str | None:
    if id(record) not in seen:
        parts = _parts(record, seen)
        joined = (
            None if parts is None else "\n".join(map(str, (type(record).__name__, record.numel, record.dtype, *parts)))
        )
        seen[id(record)] = None if joined is None else hashlib.sha256(joined.encode()).hexdigest()
    return seen[id(record)]


def _parts(record: Record, seen: dict[int, str | None]) -> list[object] | None:
    """What a record is made of, as text that is the same in every process."""
    match record:
        case Filled():
            return [repr(record.number)]
        case Drawn():
            first = record.states[0].numpy().tobytes() if record.states else b""
            return [record.draw, repr(record.args), hashlib.sha256(first).hexdigest()]
        case Written():
            parts: list[object] = [_digest(record.base, seen), record.start, _digest(record.part, seen)]
        case Taken():
            parts = [_digest(record.base, seen), record.start]
        case Applied():
            leaves, structure = pytree.tree_flatten((record.args, dict(sorted(record.kwargs.items()))))
            parts = [record.func, structure, *(_leaf(leaf, seen) for leaf in leaves)]
        case Given() if record.numel <= CHUNK:
            parts = [hashlib.sha256(record.values.view(torch.uint8).numpy().tobytes()).hexdigest()]
        case _:
            return None
    return None if None in parts else parts


def _leaf(leaf: object, seen: dict[int, str | None]) -> str | None:
    if isinstance(leaf, Record):
        return _digest(leaf, seen)
    return repr((leaf.dtype, leaf.item())) if isinstance(leaf, torch.Tensor) else repr(leaf)
