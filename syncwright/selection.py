"""Selection: a part of a variable, and the role that owns it. Own: the part of it that each trainer keeps."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from syncwright.tables.mixing import count_in

Along = Literal["all", "rows", "elements", "shards", "ids"]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which part of the variable `of`, and the server that owns it; None: trainers keep it.

    all       the whole variable: one owner, or (0-d state, such as a step count) every owner of a piece
    rows      [start, stop) of axis 0
    elements  [start, stop) of the whole laid out flat
    shards    the rows of axis 0 whose virtual shard (see `tables.mixing.shard_of`), of `shards`, is in [start, stop)
    ids       of a table of which nobody has counted the rows, those of ids whose virtual shard is
    """

    of: str
    along: Along = "all"
    start: int = 0
    stop: int = 0
    server: int | None = None
    shards: int = 0

    @property
    def bounds(self) -> tuple[int, int] | None:
        """[start, stop) of rows, elements or shards; None for all of the variable."""
        return None if self.along == "all" else (self.start, self.stop)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of the part of a variable of shape `whole`: rows [2, 5) of (9, 4) are (3, 4).

        Of rows that nobody has counted the length means nothing.
        """
        match self.along:
            case "all" | "ids":
                return whole
            case "rows":
                return (self.stop - self.start, *whole[1:])
            case "elements":
                return (self.stop - self.start,)
            case "shards":
                return (count_in(whole[0], self.shards, self.start, self.stop), *whole[1:])


@dataclass(frozen=True, slots=True)
class Own:
    """Of the variable `of`, laid out flat and cut into parts of one size, each trainer's own; zeros stand behind its end.

    (3, 3) among 2 trainers: elements [0, 5) and [5, 9), and a zero.

    keeper  the trainer whose own is all of it, and the others have none; None: every trainer has a part
    group   whose trainers have all of it among them (see `plan.groups`): these count from 0 in each, so that trainers of one
            place in their groups have the same part
    """

    of: str
    shape: tuple[int, ...]
    trainers: int
    keeper: int | None = None
    group: str = ""

    @property
    def numel(self) -> int:
        """Of the whole."""
        return prod(self.shape)

    @property
    def count(self) -> int:
        """Elements of a part, with the zeros."""
        return self.numel if self.keeper is not None else -(-self.numel // self.trainers)

    @property
    def is_padded(self) -> bool:
        """Whether some trainer's part has zeros behind the variable's end."""
        return self.keeper is None and self.count * self.trainers > self.numel

    def is_with(self, trainer: int) -> bool:
        """Whether a trainer has a part."""
        return self.keeper in (None, self.place(trainer))

    def place(self, trainer: int) -> int:
        """A trainer's number among those that have all of it."""
        return trainer % self.trainers if self.group else trainer

    def bounds(self, trainer: int) -> tuple[int, int]:
        """Which elements a trainer's part has; none where the variable has fewer than trainers before it keep."""
        if self.keeper is not None:
            return (0, self.numel) if self.is_with(trainer) else (0, 0)
        start = min(self.place(trainer) * self.count, self.numel)
        return start, min(start + self.count, self.numel)
