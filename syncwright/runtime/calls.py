"""The calls of a step since the last update, where several make one. Changes with every call."""

from __future__ import annotations

from syncwright.job import BETWEEN, FIRST, IDLE, IDLE_BETWEEN, IDLE_FIRST, STEP
from syncwright.passes.insert import CALL, INVERSE, WEIGHT
from syncwright.plan import Plan


class Calls:
    """Of one trainer.

    done    how many there were since the last update
    weight  the examples of this call / the nominal number; `total` with those since the last update
    """

    def __init__(self, plan: Plan):
        self._of, self._weighed = plan.accumulate, plan.trainers > 1 or plan.accumulate > 1
        self._alone = plan.trainers == 1
        self.done, self.weight, self.total = 0, 1.0, 0.0

    def begin(self, weight: float) -> None:
        """A call on so many examples / the nominal number."""
        self.weight = weight if self._weighed else 1.0
        self.total = self.weight + (self.total if self.done else 0.0)

    @property
    def updates(self) -> bool:
        """Whether the call that runs makes the update."""
        return self.done + 1 == self._of

    def phase(self, examples: float, is_first: bool) -> str:
        """The program of a call on so many examples; `is_first`: where it would apply gradients of a step before."""
        if not self.updates:
            return BETWEEN if examples > 0 else IDLE_BETWEEN
        if is_first:
            return FIRST if examples > 0 else IDLE_FIRST
        return STEP if examples > 0 else IDLE

    @property
    def contributed(self) -> float:
        """The weight of what a trainer contributes to an update; of one alone nothing is weighed."""
        return 1.0 if self._alone else self.total

    @property
    def numbers(self) -> dict[str, float]:
        """What programs read of it."""
        if self._of == 1:
            return {WEIGHT: self.weight}
        return {WEIGHT: self.total, CALL: self.weight, INVERSE: 1 / self.total if self.total else 0.0}

    def number(self, step: int) -> int:
        """The number of this call, of all calls, where `step` is that of the update that it is for."""
        return step * self._of + self.done

    def end(self) -> None:
        """The call is done."""
        self.done = (self.done + 1) % self._of

    def forget(self) -> None:
        """What was added up is gone."""
        self.done = 0
