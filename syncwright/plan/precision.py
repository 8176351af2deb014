"""Precision: by what a step's loss is scaled, so that small gradients in half precision do not become zero."""

from __future__ import annotations

from dataclasses import dataclass

from syncwright.errors import PlanError
from syncwright.typed import Count, Size, check_fields


@dataclass(frozen=True, slots=True)
class Dynamic:
    """A scale that follows the gradients, as `torch.amp.GradScaler`, whose names and defaults these are: a step with a gradient
    that is not finite is skipped and the scale falls; after a stretch of steps without one it grows.

    init_scale       of the first step, above 0
    growth_factor    above 1
    backoff_factor   above 0, below 1
    growth_interval  so many steps in a row without a skipped one
    """

    init_scale: Size = 65536.0
    growth_factor: Size = 2.0
    backoff_factor: Size = 0.5
    growth_interval: Count = 2000

    def __post_init__(self) -> None:
        check_fields(self, PlanError)
        if self.growth_factor <= 1 or self.backoff_factor >= 1:
            raise PlanError(
                f"Dynamic: found growth_factor: {self.growth_factor:g} and backoff_factor: {self.backoff_factor:g}, expected a "
                "growth above 1 and a backoff below 1. Correct them, or leave them out."
            )
