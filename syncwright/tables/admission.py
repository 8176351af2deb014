"""Which ids get a row, and which rows go again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from syncwright.errors import TableError
from syncwright.tables.initial import numbers, stream
from syncwright.tables.mixing import fractions
from syncwright.typed import Amount, Count, check_fields


@dataclass(frozen=True, slots=True)
class Always:
    """An id gets its row when it is first seen."""


@dataclass(frozen=True, slots=True)
class CountFilter:
    """An id gets its row in the `n`-th step that sees it; until then it reads zeros and is not trained."""

    n: Count

    def __post_init__(self) -> None:
        check_fields(self, TableError)


@dataclass(frozen=True, slots=True)
class Probability:
    """Each step that sees an id admits it with probability `p`; until then it reads zeros and is not trained.

    No generator is asked: sighting k (from 1) of an id admits it if number k of the id's own stream, splitmix64 seeded
    with mix64(id ^ mix64(~seed + GAMMA)), as a fraction from 0 to 1, is below `p`. So it depends on the seed, the id and
    how often it was seen. (~seed, as the numbers that `seed` gives are the row's.)
    """

    p: Amount

    def __post_init__(self) -> None:
        check_fields(self, TableError)
        if not 0 < self.p <= 1:
            raise TableError(f"Probability.p: found {self.p}; expected a number above 0 and at most 1.")


@dataclass(frozen=True, slots=True)
class ShowClick:
    """An id gets its row in the first step that sees it with a score (see `score`) of at least `threshold`.

    Shows and clicks are told by `observe`; those of an id without a row are kept beside the table.
    """

    threshold: float
    show_weight: float = 0.1
    click_weight: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, TableError)


@dataclass(frozen=True, slots=True)
class Forever:
    """Rows stay."""


@dataclass(frozen=True, slots=True)
class TimeToLive:
    """`shrink` removes what no step has seen for more than `steps` steps."""

    steps: Count

    def __post_init__(self) -> None:
        check_fields(self, TableError)


@dataclass(frozen=True, slots=True)
class ScoreDecay:
    """`shrink` multiplies shows and clicks by `decay`, then removes what has a score (see `score`) below `threshold`.

    10 shows and 2 clicks, decayed by 0.98, are 9.8 and 1.96, and score (9.8 - 1.96) * 0.1 + 1.96 * 1 = 2.744.
    """

    threshold: float
    decay: Amount = 0.98
    show_weight: float = 0.1
    click_weight: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, TableError)


Admission = Always | CountFilter | Probability | ShowClick
"""Which ids get a row."""
Eviction = Forever | TimeToLive | ScoreDecay
"""Which rows go again."""


def score(shows: Tensor, clicks: Tensor, show_weight: float, click_weight: float) -> Tensor:
    """(shows - clicks) * show_weight + clicks * click_weight: a show that was clicked counts as a click alone."""
    return (shows - clicks) * show_weight + clicks * click_weight


def admitted(admission: Admission, seed: int, ids: Tensor, held: Mapping[str, Tensor]) -> Tensor:
    """Which ids get a row now. `held` of each: `counts` (steps that have seen it, with this one), `shows`, `clicks`."""
    match admission:
        case Always():
            return torch.ones(ids.shape, dtype=torch.bool)
        case CountFilter(n):
            return held["counts"] >= n
        case Probability(p):
            return fractions(numbers(stream(~seed, ids), held["counts"] - 1)) < p
        case ShowClick(threshold, show_weight, click_weight):
            return score(held["shows"], held["clicks"], show_weight, click_weight) >= threshold


def unwanted(eviction: Eviction, now: int, held: Mapping[str, Tensor]) -> Tensor:
    """Which rows go. `held` of each: `seen` (the last step that saw it), and after the decay `shows`, `clicks`."""
    match eviction:
        case ScoreDecay(threshold, _, show_weight, click_weight) if "shows" in held:
            return score(held["shows"], held["clicks"], show_weight, click_weight) < threshold
        case TimeToLive(steps):
            return now - held["seen"] > steps
        case _:
            return torch.zeros(held["seen"].shape, dtype=torch.bool)
