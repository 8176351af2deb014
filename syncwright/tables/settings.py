"""What a table does with ids and rows, as data and as text."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

from syncwright.errors import TableError
from syncwright.tables.admission import (
    Admission,
    Always,
    CountFilter,
    Eviction,
    Forever,
    Probability,
    ScoreDecay,
    ShowClick,
    TimeToLive,
)
from syncwright.tables.initial import Constant, Initial, Normal, Uniform
from syncwright.typed import Count, check_fields, tag

_KINDS = (Uniform, Normal, Constant, Always, CountFilter, Probability, ShowClick, Forever, TimeToLive, ScoreDecay)

_NORMAL, _ALWAYS, _FOREVER = Normal(), Always(), Forever()


@dataclass(frozen=True, slots=True)
class Settings:
    """What a table does with ids and rows.

    width       numbers in a row
    seed        of initial rows and of `Probability`
    initial     what rows begin with
    admission   which ids get a row
    eviction    which rows go again
    padding_id  an id that has no row: it reads zeros
    """

    width: Count
    seed: int = 0
    initial: Initial = _NORMAL
    admission: Admission = _ALWAYS
    eviction: Eviction = _FOREVER
    padding_id: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, TableError)

    def to_text(self) -> str:
        """One line, for the argument of an operation in a graph."""
        choices = [[tag(type(c)), *astuple(c)] for c in (self.initial, self.admission, self.eviction)]
        return json.dumps([self.width, self.seed, *choices, self.padding_id])

    @property
    def waits(self) -> bool:
        """Whether an id may be seen and get no row yet."""
        return not isinstance(self.admission, Always)


@cache
def from_text(text: str) -> Settings:
    """The inverse of `Settings.to_text`."""
    kinds: dict[str, Any] = {tag(kind): kind for kind in _KINDS}
    width, seed, *choices, padding_id = json.loads(text)
    initial, admission, eviction = (kinds[name](*values) for name, *values in choices)
    return Settings(width, seed, initial, admission, eviction, padding_id)
