"""Compression: what gradients are made of before trainers reduce them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, takewhile
from typing import Literal

from syncwright.errors import PlanError
from syncwright.typed import Count, Factor, Index, Ratio, check_fields

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
class TopK:
    """Of a gradient the elements of the largest magnitude travel, with their places; the others are kept on each trainer and
    added to the next gradient (Deep Gradient Compression, Lin et al., ICLR 2018).

    ratio         of a gradient's elements, above 0, at most 1; one at least is sent
    momentum      in place of the optimizer's own: every trainer accumulates u = momentum * u + gradient, sends of the sum of
                  all u, and begins both anew where it has sent (momentum correction and factor masking); at least 0, below 1
    warmup_steps  steps in which more is sent, each stretch of them a quarter of the one before: 25%, 6.25%, ... above `ratio`

    Raises PlanError for a warm-up towards 25% or more.
    """

    ratio: Ratio
    momentum: Factor = 0.0
    warmup_steps: Index = 0

    def __post_init__(self) -> None:
        check_fields(self, PlanError)
        if self.warmup_steps and self.ratio >= _QUARTER:
            raise PlanError(
                f"TopK: found warmup_steps: {self.warmup_steps} with ratio: {self.ratio:g}, but a warm-up begins at "
                f"{_QUARTER:g}. Leave warmup_steps out, or send less."
            )

    @property
    def stretches(self) -> dict[int, float]:
        """By its first step the ratio of each stretch of steps.

        TopK(0.01, warmup_steps=90)  ->  {0: 0.25, 30: 0.0625, 60: 0.015625, 90: 0.01}
        """
        ratios = list(takewhile(lambda ratio: ratio > self.ratio, (_QUARTER**power for power in count(1))))
        warming = {self.warmup_steps * at // len(ratios): ratio for at, ratio in enumerate(ratios)}
        return {**(warming if self.warmup_steps else {}), self.warmup_steps: self.ratio}


_QUARTER = 0.25


@dataclass(frozen=True, slots=True)
class Int8:
    """Gradients travel as whole numbers of 8 bits. Of each block, `scale` is the largest magnitude / 127; an element travels as
    round(element / scale), with the scales of all blocks (block-wise, Dettmers et al., ICLR 2022; linear, symmetric). Every
    trainer adds up what all have sent.

    block  elements that share a scale, laid out flat; at least 1
    """

    block: Count = 2048

    def __post_init__(self) -> None:
        check_fields(self, PlanError)


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """What a compression leaves out is kept on each trainer and added to the next gradient (Seide et al., Interspeech 2014;
    Karimireddy et al., ICML 2019).

    of  the compression; TopK, which keeps what it does not send, means the same alone
    """

    of: Cast | TopK | Int8

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


Compression = Cast | ErrorFeedback | PowerSGD | TopK | Int8


def gathered_as(by: Compression | None) -> TopK | Int8 | None:
    """What makes of a gradient what cannot be added up on its way, so that all trainers gather it; None: it can be."""
    inner = by.of if isinstance(by, ErrorFeedback) else by
    return inner if isinstance(inner, TopK | Int8) else None
