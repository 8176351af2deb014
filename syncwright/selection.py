"""Selection: a part of a variable, and the role that owns it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Along = Literal["all", "rows", "elements"]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which part of the variable `of`, and the server that owns it; None: trainers keep it.

    all       the whole variable: one owner, or (0-d state, such as a step count) every owner of a piece
    rows      [start, stop) of axis 0
    elements  [start, stop) of the whole laid out flat
    """

    of: str
    along: Along = "all"
    start: int = 0
    stop: int = 0
    server: int | None = None

    @property
    def bounds(self) -> tuple[int, int] | None:
        """[start, stop) of rows or elements; None for all of the variable."""
        return None if self.along == "all" else (self.start, self.stop)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of the part of a variable of shape `whole`: rows [2, 5) of (9, 4) are (3, 4)."""
        match self.along:
            case "all":
                return whole
            case "rows":
                return (self.stop - self.start, *whole[1:])
            case "elements":
                return (self.stop - self.start,)
