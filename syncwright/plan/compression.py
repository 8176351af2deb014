"""Compression: what gradients are made of before trainers reduce them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from syncwright.errors import PlanError
from syncwright.typed import Count, Index, check_fields

Narrow = Literal["float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Cast:
    """Gradients travel, and are added up, in another type. They are scaled to their share of the mean before: 40000 and 40000 do
    not overflow on the way to their mean.

    dtype  "float16" or "bfloat16"
    """

    dtype: Narrow

    def __post_init__(self) -> None:
        check_fields(self, PlanError)


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """What a compression leaves out is kept on each trainer and added to the next gradient (Seide et al., Interspeech 2014;
    Karimireddy et al., ICML 2019).

    of  the compression
    """

    of: Cast

    def __post_init__(self) -> None:
        check_fields(self, PlanError)


@dataclass(frozen=True, slots=True)
class PowerSGD:
    """Of a matrix two thin factors travel, which every step turns once and starts from those of the step before; what they leave
    out is kept on each trainer and added to the next gradient (Vogels et al., NeurIPS 2019).

    rank        columns of a factor
    start_step  the first step of which factors travel; until then gradients travel as they are
    """

    rank: Count
    start_step: Index = 0

    def __post_init__(self) -> None:
        check_fields(self, PlanError)


Compression = Cast | ErrorFeedback | PowerSGD
